"""GGUF: files of the real form are read exactly, ours are read by others, hostile ones refused."""

import contextlib
import json
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, TokenType
from gguf_files import (
    BASE,
    SHAPE,
    SPECIAL,
    WRONG_TEMPLATE,
    Quantized,
    llama_tokenizer,
    quantized,
    random_tensors,
    real_keys,
    write_real,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bitnet_edu import CheckpointError, load
from bitnet_edu.files.gguf import (
    BLOCK_KEY,
    HF_TOKENIZER_KEY,
    I2_S,
    TENSORS,
    TYPE_NAMES,
    Header,
    _converted,
    read_gguf,
    read_header,
    repack_i2s,
    write_gguf,
)
from bitnet_edu.packing import pack_hf, pack_i2s, unpack_hf, unpack_i2s
from bitnet_edu.reference import BitNetReference
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


WIDE = SHAPE._replace(
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
)


def wide_keys() -> dict:
    return real_keys(WIDE)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_quantized_tables_are_read_exactly(tmp_path, kind):
    """As bitnet.cpp's tools make them, of the embedding and of a head of its own."""
    tensors = random_tensors(WIDE)
    vocabulary = WIDE.vocab_size, WIDE.hidden_size
    tensors["token_embd.weight"], expected = quantized(kind, *vocabulary)
    tensors["output.weight"], head = quantized(kind, *vocabulary, seed=1)
    path = write_real(tmp_path / "a.gguf", tensors, wide_keys())
    config, weights, _ = read_gguf(path)
    np.testing.assert_array_equal(weights.embedding, expected)
    np.testing.assert_array_equal(weights.lm_head, head)
    assert weights.embedding.dtype == np.float32
    assert not weights.tied
    reference = BitNetReference(config, weights).logits([1, 2, 3])
    np.testing.assert_allclose(load(str(path)).logits([1, 2, 3]), reference, atol=1e-3)


def test_quantized_tables_take_the_least_memory_that_is_exact(tmp_path):
    tensors = random_tensors(WIDE)
    blocks, _ = quantized("Q8_0", WIDE.vocab_size, WIDE.hidden_size)
    for scale, dtype in ((2**-9, ml_dtypes.bfloat16), (1.5 * 2**-9, np.float16)):
        if dtype == np.float16:  # seven bits times three: more than bfloat16's eight
            scale = np.float16(1.625 * 2**-9)
        blocks.data.reshape(-1, 34)[:, :2] = np.array([scale], np.float16).view(np.uint8)
        tensors["token_embd.weight"] = blocks
        embedding = read_gguf(write_real(tmp_path / "a.gguf", tensors, wide_keys()))[1].embedding
        assert embedding.dtype == dtype
        codes = blocks.data.reshape(-1, 34)[:, 2:].view(np.int8).astype(np.float32)
        expected = (codes * np.float32(scale)).reshape(embedding.shape)
        np.testing.assert_array_equal(embedding.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_head_of_its_own_in_floats(tmp_path, dtype):
    tensors = random_tensors()
    head = tensors["token_embd.weight"][::-1].copy()
    tensors["output.weight"] = head.astype(np.float16 if dtype != np.float32 else dtype)
    if dtype == ml_dtypes.bfloat16:
        data = head.astype(dtype).view(np.uint8)
        tensors["output.weight"] = Quantized(GGMLQuantizationType.BF16, data, head.shape)
    weights = read_gguf(write_real(tmp_path / "a.gguf", tensors))[1]
    np.testing.assert_array_equal(weights.lm_head.astype(np.float32), head)
    np.testing.assert_array_equal(weights.embedding, tensors["token_embd.weight"])


@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_that_are_not_finite(tmp_path, name, value):
    tensors = random_tensors(WIDE)
    tensors[name] = tensors["token_embd.weight"].copy()
    tensors[name][3, 5] = value
    with pytest.raises(CheckpointError, match=f"{name} must be finite"):
        read_gguf(write_real(tmp_path / "a.gguf", tensors, wide_keys()))
    tensors[name], _ = quantized("Q6_K", WIDE.vocab_size, WIDE.hidden_size)
    tensors[name].data[0, 208:210] = np.array([value], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match=f"{name} must be finite"):
        read_gguf(write_real(tmp_path / "b.gguf", tensors, wide_keys()))


def test_the_other_architecture_of_bitnet_cpp(tmp_path, real):
    keys = {k.replace("bitnet-b1.58.", "bitnet-25."): v for k, v in real_keys().items()}
    path = write_real(tmp_path / "a.gguf", keys=keys, architecture="bitnet-25")
    assert load(str(path)).config == load(str(real)).config
    for key in ("vocab_size", "rope.dimension_count"):
        del keys[f"bitnet-25.{key}"]
    path = write_real(tmp_path / "b.gguf", keys=keys, architecture="bitnet-25")
    assert load(str(path)).config == load(str(real)).config


@pytest.mark.parametrize("kind", [2, 12, 34, 35, 38, 39, 135, 999])
def test_types_that_are_not_implemented_are_named(tmp_path, kind):
    path = write_real(tmp_path / "a.gguf")
    content = path.read_bytes()
    place = content.index(b"blk.10.ffn_up.weight") + 20 + 4 + 16
    assert content[place : place + 4] == struct.pack("<I", 36)
    path.write_bytes(content[:place] + struct.pack("<I", kind) + content[place + 4 :])
    name = TYPE_NAMES.get(kind, f"type {kind}")
    with pytest.raises(CheckpointError, match=f"blk.10.ffn_up.weight is stored as {name}, which"):
        read_gguf(path)


def test_versions_and_byte_orders_are_named(tmp_path):
    path = tmp_path / "a.gguf"
    for start, message in {
        struct.pack("<IQQ", 1, 0, 0): "version 1, of 2023",
        struct.pack(">IQQ", 3, 0, 0): "is big-endian",
        struct.pack("<IQQ", 4, 0, 0): "version 4 of GGUF: versions 2 and 3",
    }.items():
        path.write_bytes(b"GGUF" + start + bytes(64))
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)


def test_rope_that_is_scaled_is_refused(tmp_path):
    keys = real_keys() | {"bitnet-b1.58.rope.scaling.type": (GGUFValueType.STRING, "yarn")}
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type must be 'none'.*'yarn'"):
        read_gguf(write_real(tmp_path / "a.gguf", keys=keys))


def test_numbers_that_mean_nothing_take_no_memory(tmp_path):
    """40 MB of bytes would be 1.7 GB of Python's whole numbers; nested arrays may be there too."""
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 4)
    for i in range(3):
        content += text(b"k%d" % i) + struct.pack("<IIQ", 9, i % 2, 2**23) + bytes(2**23)
    nested = struct.pack("<IIQ", 9, 9, 2) + 2 * (struct.pack("<IQ", 8, 1) + text(b"x"))
    path = tmp_path / "a.gguf"
    path.write_bytes(content + text(b"nested") + nested + bytes(64))
    tracemalloc.start()
    try:
        assert read_header(path).metadata["nested"] == [["x"], ["x"]]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_texts_that_mean_nothing_have_an_end(tmp_path):
    path = tmp_path / "a.gguf"
    count = 2**21 + 1
    array = struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)
    path.write_bytes(START + struct.pack("<QQ", 0, 1) + KEY + array)
    with pytest.raises(CheckpointError, match="bytes of text"):
        read_header(path)


def typed(*kinds: TokenType) -> dict:
    """The real keys, the last tokens of these types."""
    keys = real_keys()
    kind, types = keys["tokenizer.ggml.token_type"]
    keys["tokenizer.ggml.token_type"] = kind, types[: -len(kinds)] + [int(k) for k in kinds]
    return keys


def test_every_type_of_token_keeps_its_meaning(tmp_path):
    """What llama.cpp finds in a text whose special tokens count: all but unused and normal ones."""
    kinds = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED, TokenType.UNUSED)
    tokenizer = read_gguf(write_real(tmp_path / "a.gguf", keys=typed(*kinds)))[2]
    assert tokenizer.backend.get_added_tokens_decoder().keys() == {BASE, BASE + 1, BASE + 2}
    ids = tokenizer.encode("a" + "".join(SPECIAL), add_special_tokens=False)
    assert ids[1:4] == [BASE, BASE + 1, BASE + 2]
    assert BASE + 3 not in ids
    # shown to a reader: no control tokens, but the user's own and unused ones
    assert tokenizer.decode([BASE, BASE + 1, BASE + 2, BASE + 3]) == SPECIAL[2] + SPECIAL[3]


@pytest.mark.parametrize("kinds", [(3, 3, 3, 3), (3, 4, 4, 3), (4, 4, 3, 5), (1, 5, 3, 4)])
def test_types_of_tokens_mean_what_transformers_takes_them_for(tmp_path, kinds):
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    path = write_real(tmp_path / "a.gguf", keys=typed(*map(TokenType, kinds)))
    ours, metadata = read_gguf(path)[2], read_header(path).metadata
    about = {name: metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges")}
    about |= {"token_type": metadata["tokenizer.ggml.token_type"].tolist()}
    about |= {"tokenizer_type": "gpt2", "pre_tokenizer_type": "llama-bpe"}
    other = theirs.set_split_regex(
        theirs.add_gguf_special_tokens(theirs.byte_level_tokenizer(about), about), about
    )
    for text in ("".join(SPECIAL), f"They'll say 12345{SPECIAL[1]} naïve\n\n {SPECIAL[3]}it's"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == other.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == other.decode(
                ids, skip_special_tokens=skip
            )


def test_tokens_of_bytes_are_decoded(tmp_path):
    keys = typed(TokenType.BYTE)
    kind, tokens = keys["tokenizer.ggml.tokens"]
    keys["tokenizer.ggml.tokens"] = kind, [*tokens[:-1], "<0x0A>"]
    tokenizer = read_gguf(write_real(tmp_path / "a.gguf", keys=keys))[2]
    word = tokenizer.encode("a naïve word", add_special_tokens=False)
    assert tokenizer.decode([*word, BASE + 3, *word]) == "a naïve word\na naïve word"


@pytest.mark.parametrize("kinds", [(3, 3, 3, 3), (3, 3, 4, 4), (3, 4, 3, 5), (3, 3, 3, 1)])
def test_types_of_tokens_survive_the_way_to_gguf_and_back(tmp_path, kinds):
    keys = typed(*map(TokenType, kinds))
    config, weights, tokenizer = read_gguf(write_real(tmp_path / "a.gguf", keys=keys))
    write_gguf(tmp_path / "b.gguf", config, weights, tokenizer)
    found = read_header(tmp_path / "b.gguf").metadata["tokenizer.ggml.token_type"].tolist()
    unused_is_normal = [1 if kind == 5 else kind for kind in kinds]
    assert found[-4:] == unused_is_normal


@pytest.mark.parametrize("cut", ["llama-bpe", "llama3", "llama-v3"])
def test_llama_3s_cut_by_all_its_names(tmp_path, cut):
    keys = real_keys() | {"tokenizer.ggml.pre": (GGUFValueType.STRING, cut)}
    assert read_gguf(write_real(tmp_path / "a.gguf", keys=keys))[2].encode("1234567")[0] == BASE


def test_a_tokenizer_without_merges_is_refused(tmp_path, real):
    config, weights, tokenizer = read_gguf(real)
    whole = json.loads(tokenizer.backend.to_str())
    whole["model"]["merges"] = []
    tokenizer.backend = Tokenizer.from_str(json.dumps(whole))
    with pytest.raises(CheckpointError, match="has no merges"):
        write_gguf(tmp_path / "a.gguf", config, weights, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_replaced_template_is_said_once(tmp_path, caplog):
    path = str(write_real(tmp_path / "once.gguf"))
    load(path)
    load(path)
    (record,) = caplog.records
    assert record.message == (
        "the chat template in once.gguf is not the model's own: the right one is used instead"
    )


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
