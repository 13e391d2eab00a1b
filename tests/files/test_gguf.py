"""GGUF: files of the real form are read exactly, ours are read by others, hostile ones refused."""

import contextlib
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFValueType
from gguf_files import (
    SHAPE,
    SPECIAL,
    WRONG_TEMPLATE,
    llama_tokenizer,
    random_tensors,
    real_keys,
    write_real,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_edu import CheckpointError, load
from bitnet_edu.files.gguf import (
    BLOCK_KEY,
    HF_TOKENIZER_KEY,
    I2_S,
    TENSORS,
    Header,
    _converted,
    read_gguf,
    read_header,
    repack_i2s,
    write_gguf,
)
from bitnet_edu.packing import pack_hf, pack_i2s, unpack_hf, unpack_i2s
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE
from bitnet_edu.weights import TernaryMatrix, random_weights

CHAT = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return write_real(tmp_path_factory.mktemp("real") / "ggml-model-i2_s.gguf")


@pytest.fixture(scope="module")
def tokenizers(real):
    return read_gguf(real)[2], llama_tokenizer()


def same_as_written(weights, tensors):
    assert np.array_equal(weights.embedding, tensors["token_embd.weight"])
    assert np.array_equal(weights.norm, tensors["output_norm.weight"])
    for index, layer in enumerate(weights.layers):
        for field, name in TENSORS.items():
            written = tensors[f"blk.{index}.{name}.weight"]
            found = getattr(layer, field)
            if isinstance(found, TernaryMatrix):
                if not np.array_equal(unpack_hf(found.packed), written[0]):
                    return False
                assert found.scale == written[1]
            else:
                assert np.array_equal(found, written)
    return True


def test_a_file_of_the_real_form_is_read_exactly(real):
    header = read_header(real)
    kinds = [info.type for info in header.tensors.values()]
    layers = SHAPE.num_hidden_layers
    assert [kinds.count(kind) for kind in (36, 0, 1)] == [7 * layers, 4 * layers + 1, 1]
    assert len(header.metadata) == 24
    config, weights, _ = read_gguf(real)
    assert config == SHAPE._replace(eos_token_ids=SHAPE.eos_token_ids[:1])
    assert same_as_written(weights, random_tensors())
    assert load(str(real)).config == SHAPE  # the end of a turn ends an answer too


def test_the_embedding_becomes_bfloat16_only_if_that_is_exact(tmp_path, real):
    assert read_gguf(real)[1].embedding.dtype == ml_dtypes.bfloat16
    tensors = random_tensors()
    tensors["token_embd.weight"][-1, -1] = np.float16(1 + 2**-10)
    _, weights, _ = read_gguf(write_real(tmp_path / "a.gguf", tensors))
    assert weights.embedding.dtype == np.float16
    assert same_as_written(weights, tensors)


def test_every_float16_is_bfloat16_or_stays():
    """Subnormals included; NaN and infinities were refused before."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    exact = values.astype(np.float32)
    fits = exact.view(np.uint32) & 0xFFFF == 0
    some = values[fits][:, None]
    narrow = _converted(some.__getitem__, some.shape, ml_dtypes.bfloat16)[:, 0]
    np.testing.assert_array_equal(
        narrow.astype(np.float32).view(np.uint32), exact[fits].view(np.uint32)
    )
    for value in values[~fits][::97]:
        one = np.array([[value]])
        assert _converted(one.__getitem__, one.shape, ml_dtypes.bfloat16) is None


def test_both_block_layouts_are_read_and_only_one_of_them_is_right(tmp_path):
    tensors = random_tensors()
    path = write_real(tmp_path / "arm.gguf", tensors, block=64)
    assert same_as_written(read_gguf(path, 64)[1], tensors)
    # legal bytes in both layouts, so a wrong choice can't be noticed: it only gives nonsense
    assert not same_as_written(read_gguf(path)[1], tensors)
    with pytest.raises(CheckpointError, match=r"128 \(x86\) or 64 \(Arm\)"):
        read_gguf(path, 32)


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([64, 128]), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_repacking_is_unpacking_and_packing(quarter_rows, blocks, block, seed):
    shape = 4 * quarter_rows, block * blocks
    codes = np.random.default_rng(seed).integers(-1, 2, shape, np.int8)
    i2s = pack_i2s(codes, block)
    assert np.array_equal(repack_i2s(i2s, shape, block), pack_hf(unpack_i2s(i2s, shape, block)))


@given(st.text(max_size=60))
@example("It's 12345 naïve  words\n\n  they'll say.<|eot_id|> <|begin_of_text|>\t x")
@example("a BitNet, two BitNets")
@settings(max_examples=200)
def test_the_embedded_tokenizer_is_llama_3s(tokenizers, text):
    ours, original = tokenizers
    assert ours.encode(text) == original.encode(text).ids
    assert ours.decode(ours.encode(text)) == original.decode(original.encode(text).ids)


def test_the_chat_template_is_the_models_and_not_the_files(real):
    assert read_header(real).metadata["tokenizer.chat_template"] == WRONG_TEMPLATE
    tokenizer = read_gguf(real)[2]
    assert tokenizer.chat_template == BITNET_CHAT_TEMPLATE
    assert tokenizer.chat_text(CHAT) == f"{SPECIAL[0]}User: What is it?{SPECIAL[2]}Assistant: "


def test_a_right_chat_template_is_kept(tmp_path):
    keys = real_keys()
    keys["tokenizer.chat_template"] = (GGUFValueType.STRING, "{{ messages[0]['content'] }}")
    path = write_real(tmp_path / "a.gguf", keys=keys)
    assert read_gguf(path)[2].chat_text(CHAT) == "What is it?"


class Reader(gguf.GGUFReader):
    """The gguf package's reader, stopped before it looks up a tensor type that it gave up."""

    def _build_tensors(self, start_offs, fields):
        self.infos = {}
        for field in fields:
            name, dims, kind, offset = (field.parts[i] for i in (1, 3, 4, 5))
            shape = tuple(int(n) for n in reversed(dims))
            self.infos[bytes(name).decode()] = int(kind[0]), shape, start_offs + int(offset[0])


def assert_same_header(ours: Header, path: Path):
    theirs = Reader(path)
    contents = {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()}
    assert plain == contents
    assert {name: info[:3] for name, info in ours.tensors.items()} == theirs.infos


def test_the_gguf_package_reads_the_same_header(real):
    assert_same_header(read_header(real), real)
    with pytest.raises(ValueError, match=r"36\)? is not a valid GGML"):
        gguf.GGUFReader(real)  # when this fails, the package reads I2_S again: use it


@pytest.mark.parametrize("block", [128, 64])
def test_what_we_write_is_read_back_and_others_read_it(tmp_path, real, block):
    config, weights, tokenizer = read_gguf(real)
    path = tmp_path / "ours.gguf"
    write_gguf(path, config, weights, tokenizer, block)
    assert_same_header(read_header(path), path)
    again = read_gguf(path)  # the layout is recorded
    assert again[0] == config
    assert same_as_written(again[1], random_tensors())
    assert again[2].backend.to_str() == tokenizer.backend.to_str()
    assert again[2].chat_text(CHAT) == tokenizer.chat_text(CHAT)


def test_what_we_write_is_the_real_file_but_for_our_keys_and_the_order_of_layers(tmp_path, real):
    config, weights, tokenizer = read_gguf(real)
    write_gguf(tmp_path / "ours.gguf", config, weights, tokenizer)
    theirs, ours = read_header(real), read_header(tmp_path / "ours.gguf")
    assert ours.metadata.keys() - theirs.metadata.keys() == {
        BLOCK_KEY,
        HF_TOKENIZER_KEY,
        "tokenizer.ggml.pre",
    }
    assert ours.metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert theirs.metadata.keys() - ours.metadata.keys() == {"tokenizer.ggml.padding_token_id"}
    different = {
        k for k, v in theirs.metadata.items() if not np.array_equal(ours.metadata.get(k, v), v)
    }
    assert different == {
        "general.name",
        "tokenizer.ggml.scores",
        "tokenizer.chat_template",
    }
    for name, info in theirs.tensors.items():
        assert ours.tensors[name][:2] == info[:2]
        end = info.nbytes - 28 * (info.type == I2_S)  # after the scale the real file holds rubbish
        with real.open("rb") as a, (tmp_path / "ours.gguf").open("rb") as b:
            a.seek(info.offset)
            b.seek(ours.tensors[name].offset)
            assert a.read(end) == b.read(end)


def test_a_file_without_tokenizer_loads_without_one(tmp_path):
    config, weights, _ = read_gguf(write_real(tmp_path / "a.gguf"))
    write_gguf(tmp_path / "b.gguf", config, weights)
    assert load(str(tmp_path / "b.gguf")).tokenizer is None


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    weights = random_weights(SHAPE)
    untied = weights._replace(lm_head=weights.embedding + weights.embedding.dtype.type(1))
    with pytest.raises(CheckpointError, match="ties the head"):
        write_gguf(tmp_path / "a.gguf", SHAPE, untied)
    large = weights.embedding.astype(np.float32)
    large[3, 5] = 1e6
    with pytest.raises(CheckpointError, match="token_embd holds values that float16 can't"):
        write_gguf(tmp_path / "b.gguf", SHAPE, weights._replace(embedding=large, lm_head=large))
    narrow = SHAPE._replace(hidden_size=192)
    with pytest.raises(CheckpointError, match="192 inputs"):
        write_gguf(tmp_path / "c.gguf", narrow, random_weights(narrow))


def changed(name, value):
    tensors = random_tensors()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return {"tensors": tensors}


def keyed(name, *value):
    keys = real_keys()
    if value:
        keys[name] = value
    else:
        del keys[name]
    return {"keys": keys}


UP = "blk.10.ffn_up.weight"
CODES = np.zeros((256, 128), np.int8)
ONE = np.float32(1)
WRONG = {
    "architecture": (
        {"architecture": "bitnet"},
        "general.architecture must be 'bitnet-b1.58' or 'bitnet-25'",
    ),
    "no layers": (keyed("bitnet-b1.58.block_count"), "block_count must be there"),
    "too many layers": (keyed("bitnet-b1.58.block_count", GGUFValueType.UINT32, 12), "blk.11"),
    "heads": (keyed("bitnet-b1.58.attention.head_count", GGUFValueType.UINT32, 3), "128"),
    "rope": (keyed("bitnet-b1.58.rope.dimension_count", GGUFValueType.UINT32, 64), "head_dim"),
    "size as text": (keyed("bitnet-b1.58.vocab_size", GGUFValueType.STRING, "many"), "vocab_size"),
    "tensor missing": (changed(UP, None), f"{UP} must be I2_S .256, 128., found no such"),
    "tensor too many": (changed("output.weight", np.zeros((4, 4), np.float32)), "output.weight"),
    "transposed": (changed(UP, (CODES.T, ONE)), r"found I2_S \[128, 256\]"),
    "floats for codes": (changed(UP, np.zeros((256, 128), np.float16)), "found F16"),
    "codes for floats": (
        changed("token_embd.weight", (CODES, ONE)),
        "BF16 or F16 or F32 or Q8_0 or Q6_K",
    ),
    "code 3": (changed(UP, (CODES + np.int8(2), ONE)), "bit pair 11 in 8192 byte"),
    "scale 0": (changed(UP, (CODES, np.float32(0))), "must be positive, found 0"),
    "scale NaN": (changed(UP, (CODES, np.float32("nan"))), "must be positive, found nan"),
    "norm Inf": (changed("output_norm.weight", np.full(128, np.inf, np.float32)), "NaN or Inf"),
    "other tokenizer": (keyed("tokenizer.ggml.model", GGUFValueType.STRING, "llama"), "Llama 3"),
    "other cut": (keyed("tokenizer.ggml.pre", GGUFValueType.STRING, "qwen2"), "'qwen2'"),
    "no merges": (keyed("tokenizer.ggml.merges"), "tokenizer is damaged"),
    "merge of nothing": (keyed("tokenizer.ggml.merges", GGUFValueType.ARRAY, ["x yz"]), "damaged"),
    "bos beyond": (
        keyed("tokenizer.ggml.bos_token_id", GGUFValueType.UINT32, 9999),
        "each below 320, found 9999",
    ),
    "same tokens": (keyed("tokenizer.ggml.tokens", GGUFValueType.ARRAY, ["a"] * 320), "damaged"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_what_is_wrong_is_named(tmp_path, case):
    options, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        read_gguf(write_real(tmp_path / "a.gguf", **options))


def refused_quickly(path: Path, match: str = ""):
    """The file is refused, within a second and a few megabytes."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=match):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        assert time.perf_counter() - begin < 5
    finally:
        tracemalloc.stop()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HUGE = 2**62
START = b"GGUF" + struct.pack("<I", 3)
KEY = text(b"k")
TENSOR = text(b"t") + struct.pack("<IQQ", 2, HUGE, HUGE)
HOSTILE = {
    "magic alone": b"GGUF",
    "another magic": b"PK\3\4" + bytes(100),
    "tensors without end": START + struct.pack("<QQ", HUGE, 0) + bytes(64),
    "keys without end": START + struct.pack("<QQ", 0, HUGE) + bytes(64),
    "minus one tensor": START + struct.pack("<qQ", -1, 0) + bytes(64),
    "key length": START + struct.pack("<QQQ", 0, 1, HUGE) + bytes(64),
    "string length": START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", 8, HUGE),
    "array length": START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 0, HUGE),
    "large array": START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 0, 2**33),
    "array of strings": START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, HUGE),
    "array of arrays": START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1),
    "value type": START + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", 77, 1),
    "not UTF-8": START + struct.pack("<QQ", 0, 1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1),
    "same key twice": START + struct.pack("<QQ", 0, 2) + 2 * (KEY + struct.pack("<IB", 0, 1)),
    "elements": START + struct.pack("<QQ", 1, 0) + TENSOR + struct.pack("<IQ", 36, 0) + bytes(99),
    "offset": START
    + struct.pack("<QQ", 1, 0)
    + text(b"t")
    + struct.pack("<IQIQ", 1, 4, 0, HUGE)
    + bytes(99),
    "dimensions": START + struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<I", 2**31),
    "unknown type": START + struct.pack("<QQ", 1, 0) + TENSOR + struct.pack("<IQ", 2, 0),
    "alignment": START
    + struct.pack("<QQ", 0, 1)
    + text(b"general.alignment")
    + struct.pack("<II", 4, 0),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_hostile_headers_are_refused_quickly(tmp_path, case):
    path = tmp_path / "a.gguf"
    path.write_bytes(HOSTILE[case])
    refused_quickly(path, "is not a whole GGUF file")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.gguf is missing"):
        read_gguf(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def real_bytes(real) -> bytes:
    return real.read_bytes()


@given(share=st.floats(1e-3, 1, exclude_max=True))
@settings(max_examples=60)
def test_a_truncated_file_is_refused(tmp_path_factory, real_bytes, share):
    path = tmp_path_factory.mktemp("cut") / "a.gguf"
    path.write_bytes(real_bytes[: int(share * len(real_bytes))])
    refused_quickly(path, "is not a whole GGUF file")


@given(place=st.integers(0, 20_000), value=st.integers(0, 255))
@settings(max_examples=150)
def test_any_changed_byte_of_the_header_is_read_or_refused(
    tmp_path_factory, real_bytes, place, value
):
    data = bytearray(real_bytes)
    data[place] = value
    path = tmp_path_factory.mktemp("flip") / "a.gguf"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_gguf(path)
