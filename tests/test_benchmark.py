"""What `bench` reports is complete and consistent. No speed is asserted: machines differ."""

import io
import json

import numpy as np
import pytest

from bitnet_edu import benchmark as module
from bitnet_edu.benchmark import benchmark, busy_warning, read_bandwidth, render
from bitnet_edu.errors import BitNetError, ContextLengthError, InputError
from bitnet_edu.generate import BitNetLM
from bitnet_edu.kernels.simd import supported_kernels
from bitnet_edu.weights import BitNetConfig, random_weights

PARTS = {"ternary products", "attention", "pointwise", "head", "waiting"}
SMALL = BitNetConfig(512, 128, 256, 2, 4, 2, 300, 500000.0, 1e-5, None, ())


@pytest.fixture(autouse=True)
def small_shape(monkeypatch):
    """The 2B4T shape takes 1.2 GB; the same code measures a small one."""
    monkeypatch.setitem(module.SHAPES, "2b4t", SMALL)
    monkeypatch.setattr(module.psutil, "cpu_percent", lambda seconds: 50.0)


def test_all_fields_of_the_design_are_there_and_agree():
    result = benchmark(shape="2b4t", threads=2, repeats=2)
    assert json.loads(json.dumps(result)) == result
    assert result["threads"] == 2
    assert result["kernel"] in supported_kernels()
    mode = {"packing": "2bit", "head": "exact", "ahead": 0, "head_ahead": 0, "threads": 2}
    assert result["mode"] == mode | {"kernel": result["kernel"]}
    speeds = ("decode", "sampled_decode", "prefill")
    for name in (f"{speed}_tokens_per_second" for speed in speeds):
        assert 0 < result[name]["min"] <= result[name]["median"] <= result[name]["max"]
    ternary = sum(rows * columns for rows, columns in SMALL.matrix_shapes.values()) * 2 // 4
    assert result["bytes_per_token"] == ternary + 2 * SMALL.vocab_size * SMALL.hidden_size
    bandwidth = result["read_bandwidth_bytes_per_second"]
    assert result["roofline_tokens_per_second"] == pytest.approx(
        bandwidth / result["bytes_per_token"]
    )
    assert result["roofline_share"] > 0
    assert result["peak_rss_bytes"] > 10**7
    assert result["load_seconds"] > 0
    assert [entry["context"] for entry in result["contexts"]] == [64]
    assert set(result["parts_seconds"]) == PARTS
    assert result["int8_peak_multiply_adds_per_second"] > 10**6
    assert list(result["prefill_share_of_int8_peak"]) == ["128"]  # what fits in this context
    assert 0 < result["prefill_share_of_int8_peak"]["128"] < 10
    assert "profile" not in result


def test_share_of_the_peak_counts_every_product_once(monkeypatch):
    """A second for any prompt, a peak of one product a second: the share is their number."""
    monkeypatch.setattr(module, "int8_peak", lambda engine: 1.0)
    monkeypatch.setattr(module, "_prefill", lambda model, tokens: 1.0)
    result = benchmark(shape="2b4t", repeats=1, contexts=[4])
    matrices = sum(rows * columns for rows, columns in SMALL.matrix_shapes.values())
    assert result["prefill_share_of_int8_peak"] == {"128": 128 * 2 * matrices}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_profile_accounts_for_all_of_the_time(threads):
    result = benchmark(shape="2b4t", repeats=1, contexts=[4], threads=threads, profile=True)
    prompt, token = result["profile"]
    assert (prompt["tokens"], prompt["context"]) == (128, 0)
    assert (token["tokens"], token["context"]) == (1, 4)
    for entry in (prompt, token):
        assert set(entry["seconds"]) == PARTS
        assert min(entry["seconds"].values()) > 0
    assert json.loads(json.dumps(result)) == result


def test_screened_head_reads_fewer_bytes():
    exact, screened = (
        benchmark(shape="2b4t", repeats=1, contexts=[4], head=head)
        for head in ("exact", "screened")
    )
    fewer = exact["bytes_per_token"] - screened["bytes_per_token"]
    assert fewer == SMALL.vocab_size * SMALL.hidden_size
    assert screened["mode"]["head"] == "screened"
    assert screened["whole_head_share"] == 0


def test_tokens_are_made_as_a_generation_makes_them(monkeypatch):
    seen = []
    choose = BitNetLM.next_tokens

    def spy(model, ids, cache, sampling, keys):
        seen.append((cache.length, sampling.temperature, sampling.top_p))
        return choose(model, ids, cache, sampling, keys)

    monkeypatch.setattr(BitNetLM, "next_tokens", spy)
    benchmark(shape="2b4t", repeats=1, contexts=[4, 32])
    tokens = module.DECODE_TOKENS
    for context, temperature, top_p, times in (
        (4, 0.0, None, 2),
        (4, 0.6, 0.9, 2),
        (32, 0.0, None, 1),
    ):
        for n in range(tokens):
            assert seen.count((context + n, temperature, top_p)) == times


def test_bandwidth_reads_every_byte_once(monkeypatch):
    sums = []
    model = BitNetLM(SMALL, random_weights(SMALL), None)

    def spy(function, args, threads):
        run(function, args, threads)
        sums.append(args[-1].sum(dtype=np.int32))

    run = module.run
    monkeypatch.setattr(module, "run", spy)
    assert read_bandwidth(model.engine) > 0
    everything = b"".join(array.tobytes() for array in model.engine.arrays_of_a_token)
    assert set(sums) == {np.frombuffer(everything, np.int32).sum(dtype=np.int32)}


def test_guessing_is_measured_for_each_kind_of_text(monkeypatch):
    found = benchmark("tiny", repeats=1, contexts=[4], threads=1, guess=True)["guessing"]
    assert [entry["kind"] for entry in found] == list(module.KINDS)
    copying, editing, _, story = found
    for entry in found:
        assert entry["speedup"] > 0
        assert entry["tokens"] == entry["steps"] + entry["accepted_tokens"]
    assert copying["steps"] < copying["tokens"] / 4
    assert editing["steps"] < editing["tokens"] / 1.4
    assert copying["acceptance"] == 1
    assert story["guessed_tokens"] <= 4 + story["tokens"] / 32

    def wrong(model, ids, cache, sampling, keys):
        chosen, words = right(model, ids, cache, sampling, keys), model.config.vocab_size
        return [(token + len(keys)) % words for token in chosen]

    right = BitNetLM.next_tokens
    monkeypatch.setattr(BitNetLM, "next_tokens", wrong)
    with pytest.raises(BitNetError, match="other tokens"):
        benchmark("tiny", repeats=1, contexts=[4], threads=1, guess=True)


def test_guessing_needs_room_for_a_prompt_and_an_answer(monkeypatch):
    monkeypatch.setitem(module.SHAPES, "2b4t", SMALL._replace(max_position_embeddings=200))
    with pytest.raises(ContextLengthError, match="200 tokens is too short"):
        benchmark(shape="2b4t", repeats=1, contexts=[4], guess=True)


def test_warns_when_the_machine_is_busy(monkeypatch):
    result = benchmark(shape="2b4t", repeats=1, contexts=[4])
    assert "using 50% of this machine" in busy_warning(result)
    assert busy_warning(result | {"busy_percent": 3.0}) is None


def test_the_table_shows_every_speed():
    from rich.console import Console

    result = benchmark(shape="2b4t", repeats=1, contexts=[4, 32], head="screened", profile=True)
    speed = {"min": 1.0, "median": 2.0, "max": 3.0}
    result["transformers"] = {
        "decode_tokens_per_second": speed,
        "prefill_tokens_per_second": speed,
        "peak_rss_bytes": 5 * 10**9,
        "load_seconds": 19.0,
    }
    result["guessing"] = [
        {"kind": "copying", "speedup": 4.2, "tokens": 90, "steps": 20, "accepted_tokens": 70}
        | {"guessed_tokens": 75, "acceptance": 70 / 75}
    ]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(result))
    text = console.export_text()
    shown = (
        "context 4 ",
        "context 32",
        "context 4, sampled",
        "screened head",
        "0.0% of",
        "prefill",
        "int8",
        "at 128 tokens",
        "1 token after 32",
        "4.20 times as fast, 90 tokens in 20 steps, 70 of 75",
    )
    for words in (*shown, "transformers, decode", "5.00 GB", "GB/s"):
        assert words in text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shape": "9b"}, InputError, "9b"),
        ({"against": "llama"}, InputError, "llama"),
        ({"repeats": 0}, InputError, "repeats must be a whole number from 1"),
        ({"repeats": "3"}, InputError, "whole number"),
        ({"contexts": [1.5]}, InputError, "whole number"),
        ({"head": "half"}, InputError, "exact, screened or auto"),
        ({"threads": 0}, InputError, "threads must be a whole number from 1"),
        ({"contexts": [0]}, InputError, "context must be a whole number from 1"),
        ({"cache_dtype": "int8"}, InputError, "float32 or float16"),
        ({"shape": "2b4t", "contexts": [290]}, ContextLengthError, "at most 284"),
    ],
)
def test_refuses_what_cannot_be_measured(options, error, words):
    with pytest.raises(error, match=words):
        benchmark(**options)


def test_transformers_takes_turns_in_its_own_process():
    result = benchmark("tiny", against="transformers", repeats=1, contexts=[8], threads=1)
    theirs = result["transformers"]
    assert theirs["decode_tokens_per_second"]["median"] > 0
    assert theirs["prefill_tokens_per_second"]["median"] > 0
    assert theirs["peak_rss_bytes"] > 10**8


def test_a_failing_process_says_why():
    with pytest.raises(module.BitNetError, match="nowhere"):
        module._Other("/nowhere/to/be/found", 1)
