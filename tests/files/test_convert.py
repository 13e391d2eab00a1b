"""Each format from each, exact in codes and scales, loaded by transformers, all or nothing."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Recipe, make, save, write
from gguf_files import write_real
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import torch, transformers
from safetensors import safe_open

from bitnet_edu import BitNetError, CheckpointError, InputError, cli, load
from bitnet_edu.files import convert as module
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.convert import FORMATS, convert
from bitnet_edu.files.hf import (
    file_tensors,
    master_weights,
    safetensors_header,
    stored_tensors,
    write_folder,
)
from bitnet_edu.files.source import TINY, find_model, read_model
from bitnet_edu.info import describe
from bitnet_edu.model import Settings
from bitnet_edu.proof.report import verify
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.weights import BITNET_2B4T, TernaryMatrix, Weights, random_weights

CHAT = [{"role": "user", "content": "What is a ternary weight?"}]
WIDE = {"head_dim": 64, "ffn": 256}  # I2_S wants whole blocks of 128
SOURCES = {
    "packed": Recipe("packed", "bfloat16", shards=3, **WIDE),
    "divide": Recipe("divide", "float16", **WIDE),
    "unpacked": Recipe("unpacked", "float32", shards=3, **WIDE),
    "online": Recipe("online", "bfloat16", shards=3, **WIDE),
}


@pytest.fixture(scope="module", params=["tiny", "gguf", *SOURCES])
def source(request, tmp_path_factory) -> str:
    """A model in one of the forms that others write."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gguf":
        return str(write_real(folder / "real.gguf"))
    return str(write(folder, SOURCES[request.param])) if request.param in SOURCES else "tiny"


def read(source: str | Path):
    return read_model(find_model(str(source)))


def path_for(folder: Path, name: str, form: str) -> Path:
    return folder / (f"{name}.gguf" if form == "gguf-i2s" else name)


def assert_equal(weights: Weights, expected: Weights, float16: bool) -> None:
    """Codes, scales, norms, tying, and the embedding's values (once `float16` in a GGUF file)."""
    for layer, other in zip(weights.layers, expected.layers, strict=True):
        for ours, theirs in zip(layer, other, strict=True):
            if isinstance(ours, TernaryMatrix):
                np.testing.assert_array_equal(ours.in_two_bits(), theirs.in_two_bits())
                assert ours.scale == theirs.scale
            else:
                np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(weights.norm, expected.norm)
    embedding = expected.embedding.astype(np.float16) if float16 else expected.embedding
    np.testing.assert_array_equal(weights.embedding.astype(np.float32), embedding)
    assert weights.tied == expected.tied


@pytest.mark.parametrize("first", FORMATS)
def test_each_format_from_each_is_exact(tmp_path, source, first):
    """From any source to `first`, and from there to all of them."""
    config, weights, tokenizer = read(source)
    middle = path_for(tmp_path, "first", first)
    if first == "hf-bf16" and "online" in source:
        with pytest.raises(InputError, match="a bf16 master already"):
            convert(source, middle, first)
        return
    assert convert(source, middle, first).format == first
    for form in FORMATS:
        if form == first == "hf-bf16":
            continue
        final = path_for(tmp_path, form, form)
        convert(str(middle), final, form)
        found, new, new_tokenizer = read(final)
        assert found == config
        assert_equal(new, weights, "gguf-i2s" in (first, form))
        assert new_tokenizer.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
        assert new_tokenizer.encode("naïve <|eot_id|>") == tokenizer.encode("naïve <|eot_id|>")
    assert {path.name for path in tmp_path.iterdir()} >= {middle.name}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", ["hf-packed", "hf-bf16"])
def test_transformers_runs_what_convert_writes_as_our_engine_does(tmp_path, source, form):
    folder = tmp_path / "model"
    if form == "hf-bf16" and "online" in source:  # which is that form: start from another
        convert(source, tmp_path / "packed")
        source = str(tmp_path / "packed")
    convert(source, folder, form)
    pytest.importorskip("transformers")
    report = verify(str(folder), tokens=4)
    assert report.ok, report
    ours = load(str(folder)).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )


def test_transformers_runs_the_file_in_its_stored_dtype(tmp_path, source):
    """Without our help: it fails where the floats of a file have different dtypes."""
    convert(source, tmp_path / "model", "hf-packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(2**-10, 4, width=32),
    st.floats(0.05, 0.95),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200)
def test_master_weights_ternarize_to_exactly_what_they_stand_for(
    quarter_rows, columns, scale, share, as_bf16, seed
):
    rng = np.random.default_rng(seed)
    shape = 4 * quarter_rows, 4 * columns
    codes = (rng.integers(0, 2, shape) * 2 - 1) * (rng.random(shape) < share)
    codes[0, :2] = 0, 1  # neither all zero nor without a zero
    scale = np.float32(ml_dtypes.bfloat16(scale)) if as_bf16 else np.float32(scale)
    weights = master_weights(codes.astype(np.int8), scale)
    assert weights.dtype == ml_dtypes.bfloat16
    found, found_scale = absmean_ternary(weights)
    np.testing.assert_array_equal(found, codes)
    assert found_scale == scale


def test_what_one_should_know_is_said(tmp_path):
    real = str(write_real(tmp_path / "real.gguf"))
    template = (
        "the chat template in real.gguf is not the model's own: the right one is used instead"
    )
    assert convert(real, tmp_path / "a").notes == describe(real)["notes"] == [template]
    assert convert(str(tmp_path / "a"), tmp_path / "a.gguf").notes == []
    assert convert(str(tmp_path / "a.gguf"), tmp_path / "b").notes == []
    (note,) = convert(str(tmp_path / "a"), tmp_path / "c", "hf-bf16").notes
    assert "not the training's" in note
    source = str(write(tmp_path / "model", Recipe("packed", "float32", **WIDE)))
    note, cut = convert(source, tmp_path / "d.gguf").notes
    assert "does not cut text like Llama 3" in cut
    before, after = read(source)[1].embedding, read(tmp_path / "d.gguf")[1].embedding
    assert note.startswith(f"{np.count_nonzero(before != after):,} of {before.size:,} embedding")
    assert f"at most {np.abs(before - after).max():.1e}" in note


def test_codes_times_scale_would_not_do():
    """What one would write first: the codes come back, the scale does not."""
    codes = np.array([[1, 0, -1, 0]] * 4, np.int8)
    found, scale = absmean_ternary(codes * np.float32(0.5))
    np.testing.assert_array_equal(found, codes)
    assert scale == 0.25


def test_a_matrix_without_master_weights_is_named(tmp_path):
    config, tensors = make(SOURCES["packed"])
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.full_like(tensors[name], 0b01010101)  # every code is 0
    save(tmp_path / "model", config, tensors)
    with pytest.raises(CheckpointError, match=f"{name} cannot become bf16 master weights"):
        convert(str(tmp_path / "model"), tmp_path / "master", "hf-bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_untied_head_is_kept_and_refused_by_gguf(tmp_path):
    source = str(write(tmp_path / "model", Recipe(tied=False, **WIDE)))
    convert(source, tmp_path / "packed")
    weights, expected = read(tmp_path / "packed")[1], read(source)[1]
    np.testing.assert_array_equal(weights.lm_head, expected.lm_head)
    assert not weights.tied
    with pytest.raises(CheckpointError, match="ties the head"):
        convert(source, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_packed_files_have_the_names_dtypes_and_shapes_of_microsofts(tmp_path):
    def listing(folder):
        with safe_open(folder / "model.safetensors", "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}

    convert("tiny", tmp_path / "model")
    assert listing(tmp_path / "model") == listing(TINY)


def test_the_2b4t_file_would_have_exactly_the_published_size():
    """1,178,623,988 bytes: every name, dtype, shape and offset counts."""
    shape = BITNET_2B4T
    one = random_weights(shape._replace(num_hidden_layers=1, vocab_size=1))
    embedding = np.broadcast_to(one.embedding, (shape.vocab_size, shape.hidden_size))
    weights = Weights(embedding, one.layers * shape.num_hidden_layers, one.norm, embedding)
    tensors = file_tensors(weights)
    data = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    assert len(tensors) == 542
    assert 8 + len(safetensors_header(tensors)) + data == 1_178_623_988


def test_base_3_is_used_as_it_lies_and_gives_the_same_logits(tmp_path):
    convert("tiny", tmp_path / "tiny3", "base3")
    model, base3 = load("tiny"), load(tmp_path / "tiny3")
    ids = model.tokenizer.encode("What is a ternary weight?")
    np.testing.assert_array_equal(base3.logits(ids), model.logits(ids))
    packed, _, rows = base3.weights.layers[0].gate_proj
    assert rows == model.config.intermediate_size
    assert len(packed) == math.ceil(rows / 5)
    assert not packed.flags.owndata
    sizes = [
        sum(matrix.packed.nbytes for layer in m.weights.layers for matrix in layer[:7])
        for m in (base3, model)
    ]
    assert 0.8 <= sizes[0] / sizes[1] < 0.81
    assert base3.engine.arrays_of_a_token[0] is base3.weights.layers[0].q_proj.packed
    with pytest.raises(InputError, match="lies in base 3"):
        base3.settings = Settings(packing="2bit")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny3")


@pytest.mark.parametrize("place", [0, -1])
def test_a_byte_that_five_digits_never_make_is_refused(tmp_path, place):
    convert("tiny", tmp_path / "tiny3", "base3")
    file = tmp_path / "tiny3" / "model.safetensors"
    content = bytearray(file.read_bytes())
    stored = stored_tensors(file)["model.layers.1.mlp.up_proj.weight"]
    content[stored.offset + (0 if place == 0 else stored.nbytes - 1)] = 243
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight must be bytes up to"
    ):
        load(tmp_path / "tiny3")


@pytest.mark.parametrize("method", ["bitnet", "bitnet_base3"])
def test_a_folder_that_says_the_other_packing_is_refused(tmp_path, method):
    convert("tiny", tmp_path / "m", "base3" if method == "bitnet" else "hf-packed")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight must be U8"):
        load(tmp_path / "m")


def test_both_i2s_layouts_are_written_and_told_apart(tmp_path):
    expected = read("tiny")[1]
    for block in (128, 64):
        convert("tiny", tmp_path / f"{block}.gguf", i2s_block=block)
        assert_equal(read(tmp_path / f"{block}.gguf")[1], expected, True)
    arm = write_real(tmp_path / "arm.gguf", block=64)
    convert(str(arm), tmp_path / "right", i2s_block=64)
    convert(str(write_real(tmp_path / "x86.gguf")), tmp_path / "expected")
    assert_equal(read(tmp_path / "right")[1], read(tmp_path / "expected")[1], False)


def test_random_2b4t_is_a_model_of_that_shape(tmp_path, monkeypatch):
    small = BITNET_2B4T._replace(vocab_size=2100, num_hidden_layers=1, hidden_size=1280)
    small = small._replace(num_attention_heads=10, intermediate_size=256)
    monkeypatch.setattr(module, "BITNET_2B4T", small)
    convert("random-2b4t", tmp_path / "model")
    config, weights, tokenizer = read(tmp_path / "model")
    assert config == small._replace(bos_token_id=2045, eos_token_ids=(2046, 2047))
    tiny = load("tiny").tokenizer
    assert tokenizer.apply_chat_template(CHAT) == tiny.apply_chat_template(CHAT)
    assert tokenizer.decode([*tiny.encode("Hi"), 2099]) == "Hi[PAD2099]"
    assert_equal(weights, random_weights(small), False)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_command(tmp_path, capsys):
    assert cli.main(["convert", "tiny", str(tmp_path / "a.gguf"), "--i2s-block", "64"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.gguf'}: gguf-i2s, ")
    command = ["convert", str(tmp_path / "a.gguf"), str(tmp_path / "b"), "--to", "hf-bf16"]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert (told["format"], told["bytes"]) == ("hf-bf16", size)
    assert len(told["notes"]) == 1
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "exists already" in err
    assert err.count("\n") == 1


REFUSED = {
    "format": (("tiny", "a", "int4"), "not a format: choose one of hf-packed, hf-bf16, gguf-i2s"),
    "folder for gguf": (("tiny", "a", "gguf-i2s"), "a file that ends in .gguf"),
    "gguf for folder": (("tiny", "a.gguf", "hf-bf16"), "a folder, not a .gguf file"),
    "block": (("tiny", "a.gguf", None, 32), "128 .x86. or 64 .Arm. weights, not 32"),
    "exists": (("tiny", "there"), "there exists already"),
    "no source": (("nothing-here", "a"), "no model at 'nothing-here'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_and_nothing_is_written(tmp_path, case):
    (source, name, *options), message = REFUSED[case]
    (tmp_path / "there").mkdir()
    with pytest.raises(BitNetError, match=message):
        convert(source, tmp_path / name, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_no_folder_to_write_into(tmp_path):
    with pytest.raises(BitNetError, match=r"could not be written \(.*No such file"):
        convert("tiny", tmp_path / "no" / "where")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk():
    """No file may pass 300 kB: the next write fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("form", FORMATS)
def test_a_failing_disk_leaves_nothing_behind(tmp_path, full_disk, form):
    with pytest.raises(BitNetError, match=r"could not be written .*: nothing was left behind"):
        convert("tiny", path_for(tmp_path, "model", form), form)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path):
    def interrupted():
        with all_or_nothing(tmp_path / "model", 0) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(BitNetError, match=r"needs about 0\.02 GB and the disk has 0\.00 GB left"):
        convert("tiny", tmp_path / "model")
    assert not list(tmp_path.iterdir())


# not ru_maxrss: through fork and exec a process inherits the peak of its parent
LOAD = """
import re, sys
import bitnet_edu.files.source as sources
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
sources.read_model(sources.TINY)
before = peak()
weights = sources.read_model(Path(sys.argv[1]))[1]
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read as Linux tells it")
def test_master_weights_are_never_all_in_memory(tmp_path):
    shape = BITNET_2B4T._replace(vocab_size=64, num_hidden_layers=12, hidden_size=512)
    shape = shape._replace(num_attention_heads=4, num_key_value_heads=4, intermediate_size=2048)
    shape = shape._replace(bos_token_id=None, eos_token_ids=())
    write_folder(tmp_path / "model", shape, random_weights(shape), scheme="master")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    run = [sys.executable, "-c", LOAD, str(tmp_path / "model")]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    # an eighth of the file are the packed codes; the rest is one matrix at work, in float32
    assert grown < size / 8 + 10 * 512 * 2048 * 4 < size
