"""The heart of the claim: engine, reference and transformers agree on every form of a checkpoint,
and where they don't, `verify` says so."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Recipe, make, matrix, save, write

from bitnet_edu import InputError, load, reference
from bitnet_edu.packing import pack_hf, unpack_hf
from bitnet_edu.proof import replay, transformers
from bitnet_edu.proof import report as report_module
from bitnet_edu.quantize import absmax_int8
from bitnet_edu.weights import TernaryMatrix

TOKENS = 12


def random_prompt(seed: int = 0, tokens: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(0, 299, tokens).tolist()


def report_on(folder: Path, seed: int = 0, **options) -> report_module.Report:
    model = load(str(folder), **options)
    theirs = transformers.load_transformers(folder, **options)
    return compare(model, theirs, TOKENS, seed)


def compare(model, theirs, tokens: int = 4, seed: int = 0) -> report_module.Report:
    return report_module.compare(
        model, theirs, *report_module.converse(model, [random_prompt(seed)], tokens)
    )


def assert_proved(report: report_module.Report) -> None:
    assert report.ok, verify_text(report)
    for part in (report.engine, report.transformers):
        assert part.unexplained == part.sums_differ == 0
        assert not part.weights_differ
        assert len(part.rows) >= 7
        # far inside the bound: what remains is the last bits of float32
        assert max(row.max_difference / row.range for row in part.rows) < 2e-6
        if not part.flip_count:
            assert part.max_logit_difference <= 2e-6 * report.logit_range
    assert report.greedy_equal or report.rounding_flips


def verify_text(report: report_module.Report) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(report_module.render(report, layers=True))
    return capture.get()


@pytest.mark.parametrize("recipe", matrix(), ids=str)
def test_every_form_of_checkpoint_equals_transformers(tmp_path, recipe):
    assert_proved(report_on(write(tmp_path, recipe)))


@pytest.mark.parametrize("head", ["exact", "screened"])
@pytest.mark.parametrize("packing", ["2bit", "base3"])
def test_every_mode_of_the_engine_equals_transformers(tmp_path, packing, head):
    folder = write(tmp_path, Recipe())
    model = load(str(folder))
    model.settings = replace(model.settings, packing=packing, head=head)
    assert_proved(compare(model, transformers.load_transformers(folder), TOKENS))


@pytest.mark.parametrize("seed", range(3))
def test_deeper_models_and_other_tokens(tmp_path, seed):
    folder = write(tmp_path, Recipe(layers=6, head_dim=20, ffn=204), seed)
    assert_proved(report_on(folder, seed))


def test_dense_weights_ternarized_on_demand(tmp_path):
    config, tensors = make(Recipe("dense", dtype="float32"))
    assert_proved(report_on(save(tmp_path, config, tensors), ternarize=True))


@pytest.mark.parametrize("stored", ["same", "different", "head only"])
def test_tied_weights_with_a_stored_head(tmp_path, stored):
    config, tensors = make(Recipe(tied=True))
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding[::-1].copy() if stored == "different" else embedding
    if stored == "head only":
        del tensors["model.embed_tokens.weight"]
    assert_proved(report_on(save(tmp_path, config, tensors)))


@pytest.mark.parametrize("scheme", ["packed", "unpacked", "divide", "online"])
def test_files_of_mixed_dtypes(tmp_path, scheme):
    config, tensors = make(Recipe(scheme))
    for name in tensors:
        if "norm" in name or "scale" in name:
            tensors[name] = tensors[name].astype(np.float32) * np.float32(1.001)
    assert_proved(report_on(save(tmp_path, config, tensors)))


def test_flips_are_found_located_and_explained(tmp_path):
    """Over enough tokens and layers some activation sits on a rounding boundary."""
    folder = write(tmp_path, Recipe("online", layers=8, head_dim=20, ffn=300))
    report = report_on(folder)
    flips = report.engine.flips + report.transformers.flips
    assert report.rounding_flips == len(flips) > 0
    for flip in flips:
        assert flip.explained
        assert abs(abs(flip.unrounded) % 1 - 0.5) < replay.STEP_BOUND
        assert 0 <= flip.layer < 8
        assert 0 <= flip.token < 60 + TOKENS
        text = f"layer {flip.layer}, input of {flip.matrix}, token {flip.token}"
        assert text in verify_text(report)


def test_the_embedded_model_over_200_tokens():
    report = report_module.verify("tiny", tokens=200)
    assert_proved(report)
    assert report.tokens == 200
    assert report.greedy_equal


# What must be rejected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), Recipe(dtype="float32", tied=False))


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.load_transformers(folder)


def change(model, layer: int | None = None, **changes):
    """The model with some weights replaced: {name: function of the old one}."""
    weights = model.weights
    old = weights if layer is None else weights.layers[layer]
    new = old._replace(**{name: f(getattr(old, name)) for name, f in changes.items()})
    if layer is not None:
        layers = list(weights.layers)
        layers[layer] = new
        new = weights._replace(layers=tuple(layers))
    return type(model)(model.config, new, model.tokenizer)


def scaled(factor: float):
    return lambda matrix: TernaryMatrix(matrix.packed, np.float32(matrix.scale * factor))


def inverted(matrix: TernaryMatrix) -> TernaryMatrix:
    return TernaryMatrix(matrix.packed, np.float32(1) / matrix.scale)


def swapped_blocks(matrix: TernaryMatrix) -> TernaryMatrix:
    blocks = np.split(unpack_hf(matrix.packed), 4)
    return TernaryMatrix(pack_hf(np.concatenate(blocks[::-1])), matrix.scale)


def one_code(matrix: TernaryMatrix) -> TernaryMatrix:
    codes = unpack_hf(matrix.packed)
    codes[5, 7] = (codes[5, 7] + 2) % 3 - 1
    return TernaryMatrix(pack_hf(codes), matrix.scale)


def one_number(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[..., 3] *= np.float32(1.01)
    return array


SABOTAGE = {
    "scale divided for multiplied": (0, {"o_proj": inverted}),
    "scale off by a thousandth": (1, {"down_proj": scaled(1.001)}),
    "a scale that SubLN hides": (0, {"v_proj": scaled(2)}),
    "row blocks swapped": (0, {"q_proj": swapped_blocks}),
    "one code of one matrix": (1, {"up_proj": one_code}),
    "attention's SubLN left out": (0, {"attn_sub_norm": np.ones_like}),
    "feed-forward's SubLN left out": (1, {"ffn_sub_norm": np.ones_like}),
    "one number of a norm": (1, {"input_layernorm": one_number}),
    "one number of the embedding": (None, {"embedding": one_number}),
    "one number of the head": (None, {"lm_head": one_number}),
    "one number of the last norm": (None, {"norm": one_number}),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_model_that_differs_is_rejected(folder, theirs, case):
    layer, changes = SABOTAGE[case]
    report = compare(change(load(str(folder)), layer, **changes), theirs)
    assert not report.ok
    assert report.engine.ok  # it does what its weights say
    assert not report.transformers.ok
    assert "NOT equal" in verify_text(report)


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 20000.0}, {"rms_norm_eps": 1e-2}, {"num_attention_heads": 3}],
    ids=str,
)
def test_another_shape_is_rejected(folder, theirs, changes):
    model = load(str(folder))
    config = model.config._replace(**changes)
    if "num_attention_heads" in changes:
        config = config._replace(num_key_value_heads=1)
    model = type(model)(config, model.weights, None)
    assert not compare(model, theirs).ok


def test_a_reference_that_rounds_per_tensor_is_rejected(folder, theirs, monkeypatch):
    def per_tensor(x):
        q, scale = absmax_int8(x.reshape(-1))
        return q.reshape(x.shape), np.broadcast_to(scale, (*x.shape[:-1], 1))

    monkeypatch.setattr(reference, "absmax_int8", per_tensor)
    report = compare(load(str(folder)), theirs)
    assert report.engine.unexplained
    assert report.transformers.unexplained
    assert not report.ok


def test_an_engine_that_differs_from_the_reference_is_rejected(folder, theirs):
    model = load(str(folder))
    model.forward([1], model.new_cache(1))  # the tables are made when they are needed
    model.engine._tables["2bit"].scales[1, 3] *= np.float32(1.001)
    report = compare(model, theirs)
    assert not report.engine.ok
    assert report.transformers.ok
    assert not report.ok


def test_integer_sums_that_differ_are_rejected(folder):
    model = load(str(folder))
    ids = np.array(random_prompt())
    logits, trace = report_module.trace_engine(model, ids)
    oracle = reference.BitNetReference(model.config, model.weights)
    plain = oracle.logits(ids)
    assert replay.replay(oracle, ids, "engine", logits, trace, plain).ok
    trace["layers.1.k_proj.sums"][3, 5] += 1
    found = replay.replay(oracle, ids, "engine", logits, trace, plain)
    assert found.sums_differ == 1
    assert not found.ok


def test_a_code_that_differs_for_real_is_no_flip():
    flip = replay.Flip("engine", 0, "o_proj", 0, 0, unrounded=3.5001, reference=4, other=3)
    assert flip.explained
    assert not flip._replace(unrounded=3.51).explained
    assert not flip._replace(other=2).explained
    assert not flip._replace(unrounded=float("nan")).explained


def test_a_difference_in_greedy_tokens_needs_an_equally_good_token(folder, theirs, monkeypatch):
    model = load(str(folder))
    worst = int(model.logits(np.array(random_prompt()))[-1].argmin())
    choices = transformers.greedy_choices
    monkeypatch.setattr(report_module, "greedy_choices", lambda *a: [worst, *choices(*a)[1:]])
    report = compare(model, theirs)
    assert not report.greedy_equal
    assert not report.greedy_explained
    assert not report.ok


# The pieces that chapters use


def test_transformers_is_loaded_in_float32_with_eager_attention(tmp_path, theirs):
    for scheme in ("packed", "divide", "online"):
        model = transformers.load_transformers(write(tmp_path / scheme, Recipe(scheme)))
        kept = {t.dtype for t in (*model.parameters(), *model.buffers())}
        assert kept <= {torch.float32, torch.uint8}
        assert model.config._attn_implementation == "eager"
        assert not model.training
    assert type(theirs).__name__ == "BitNetForCausalLM"


def test_greedy_choices_are_those_of_transformers_generate(theirs):
    prompt = random_prompt(tokens=10)
    whole = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0
    )[0].tolist()
    assert transformers.greedy_choices(theirs, whole, range(10, 30)) == whole[10:]
    other = (whole[12] + 1) % 299
    assert transformers.greedy_choices(theirs, [*whole[:12], other, *whole[13:]], [12]) == [
        whole[12]
    ]


def test_a_conversation_is_made_of_the_prompts_and_greedy_answers(folder):
    model = load(str(folder))
    first = model.generate(random_prompt(), max_new_tokens=60, stop=())
    model.config = model.config._replace(eos_token_ids=(first[2],))
    end = first.index(first[2]) + 1
    ids, made = report_module.converse(model, [random_prompt(), [7, 8]], end + 3)
    assert ids[: 60 + end + 2] == [*random_prompt(), *first[:end], 7, 8]
    assert made == [*range(60, 60 + end), *range(60 + end + 2, 60 + end + 5)]
    logits = model.logits(np.array(ids))
    assert [int(logits[place - 1].argmax()) for place in made] == [ids[place] for place in made]


def test_loading_is_quiet_and_needs_no_compiler(tmp_path):
    write(tmp_path)
    code = (
        "import sys; from bitnet_edu.proof import report as report_module; "
        "report = report_module.verify(sys.argv[1], tokens=5); print(report.ok)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {"PATH": "", "CXX": "no-compiler", "NUMBA_CACHE_DIR": "", "HOME": str(tmp_path)}
    del environment["NUMBA_CACHE_DIR"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_the_prompts_are_questions_in_the_chat_template(folder):
    model = load(str(folder))
    ids = [token for prompt in report_module.prompts_of(model) for token in prompt]
    text = model.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|begin_of_text|>User: Hello!<|eot_id|>Assistant: User: What")
    assert text.count("<|begin_of_text|>") == 1
    model.tokenizer = None
    [ids] = report_module.prompts_of(model)
    assert len(ids) == 16
    assert max(ids) < model.config.vocab_size


def test_more_tokens_than_the_context_holds_are_refused(folder):
    with pytest.raises(InputError, match="context of 512"):
        report_module.converse(load(str(folder)), [random_prompt()], 512)
    with pytest.raises(InputError, match="at least 1"):
        report_module.converse(load(str(folder)), [random_prompt()], 0)


def test_a_gguf_file_is_refused_with_what_to_do(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="convert"):
        transformers.model_folder(file)
