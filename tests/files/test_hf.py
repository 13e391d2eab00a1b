"""Every form of a checkpoint loads to the same model; whatever cannot be right is refused."""

import contextlib
import json
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import HEADS, Recipe, make, matrix, save, shape_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import transformers

from bitnet_edu import CheckpointError, load
from bitnet_edu.files.config import DEFAULTS, parse_config
from bitnet_edu.files.hf import MATRICES, NORMS, read_folder
from bitnet_edu.packing import unpack_hf
from bitnet_edu.quantize import absmean_ternary

Q = "model.layers.1.self_attn.q_proj"
NORM = "model.layers.0.mlp.ffn_sub_norm.weight"


@pytest.mark.parametrize("recipe", matrix(), ids=str)
def test_every_form_is_read_exactly(tmp_path, recipe):
    config, tensors = make(recipe)
    found, weights = read_folder(save(tmp_path, config, tensors, recipe.shards))
    assert found == shape_of(config)
    stored = {name: array.astype(np.float32) for name, array in tensors.items()}
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        for field, name in MATRICES.items():
            matrix, weight = getattr(layer, field), stored[f"{prefix}{name}.weight"]
            if recipe.scheme == "online":
                codes, scale = absmean_ternary(weight)
            else:
                codes = unpack_hf(weight) if recipe.scheme != "unpacked" else weight
                scale = stored[f"{prefix}{name}.weight_scale"][0]
                scale = np.float32(1) / scale if recipe.scheme == "divide" else scale
            np.testing.assert_array_equal(unpack_hf(matrix.packed), codes)
            assert matrix.scale == scale
        for field, name in NORMS.items():
            np.testing.assert_array_equal(getattr(layer, field), stored[f"{prefix}{name}.weight"])
    np.testing.assert_array_equal(weights.norm, stored["model.norm.weight"])
    np.testing.assert_array_equal(weights.embedding, tensors["model.embed_tokens.weight"])
    head = "model.embed_tokens.weight" if recipe.tied else "lm_head.weight"
    np.testing.assert_array_equal(weights.lm_head, tensors[head])
    assert (weights.lm_head is weights.embedding) == recipe.tied


def test_packed_weights_and_embedding_are_the_mapped_file_itself(tmp_path):
    _, weights = read_folder(write(tmp_path))
    for array in (weights.embedding, weights.layers[0].q_proj.packed):
        assert not array.flags.writeable
        while isinstance(array, np.ndarray):
            array = array.base
        assert isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


def test_dense_weights_are_refused_unless_ternarization_is_asked_for(tmp_path):
    config, tensors = make(Recipe("dense"))
    save(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match="ternarize=True"):
        read_folder(tmp_path)
    _, weights = read_folder(tmp_path, ternarize=True)
    codes, scale = absmean_ternary(tensors[f"{Q}.weight"])
    np.testing.assert_array_equal(unpack_hf(weights.layers[1].q_proj.packed), codes)
    assert weights.layers[1].q_proj.scale == scale
    assert load(str(tmp_path), ternarize=True).logits(np.array([1, 2])).shape == (2, 299)


# What transformers does with a key that is absent, null or elsewhere, decides what is right.


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"num_key_value_heads": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
        {"rope_parameters": {"type": "default"}, "rope_theta": 8e4},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 9e4}},
        {"rope_scaling": None, "rope_theta": 6e4},
        {
            "rope_scaling": {"rope_type": "default", "rope_theta": 9e4},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        },
        {"eos_token_id": [3, 4]},
        {"bos_token_id": None},
        {"max_position_embeddings": 99},
        {"rms_norm_eps": 1e-6},
    ],
    ids=str,
)
def test_config_keys_mean_what_transformers_takes_them_for(tmp_path, edit):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bitnet", **edit}))
    ours, theirs = (
        parse_config({"model_type": "bitnet", **edit}, path, {}),
        transformers.AutoConfig.from_pretrained(tmp_path),
    )
    for key in ours._fields:
        if key == "rope_theta":
            assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        elif key == "eos_token_ids":
            ends = theirs.eos_token_id
            assert list(ours.eos_token_ids) == (ends if isinstance(ends, list) else [ends])
        else:
            assert getattr(ours, key) == getattr(theirs, key)


def test_defaults_are_transformers_own():
    theirs = transformers.AutoConfig.for_model("bitnet")
    for key, value in DEFAULTS.items():
        if key == "rope_theta":
            assert theirs.rope_parameters[key] == value
        elif key != "model_type":
            assert getattr(theirs, key) == value, key


def test_end_tokens_come_from_generation_config_first(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_folder(tmp_path)[0].eos_token_ids == (1, 2)


def test_an_index_beside_a_single_file(tmp_path):
    """transformers reads the single file; two models that differ are nobody's intention."""
    config, tensors = make(seed=2)
    save(tmp_path, config, tensors, shards=3)
    save(tmp_path, config, tensors)
    np.testing.assert_array_equal(
        read_folder(tmp_path)[1].embedding, tensors["model.embed_tokens.weight"]
    )
    save(tmp_path, config, make(seed=1)[1], shards=3)
    refuse(tmp_path, "two different models", "model.safetensors", "model.safetensors.index.json")
    next(tmp_path.glob("model-*")).unlink()  # no longer a model
    np.testing.assert_array_equal(
        read_folder(tmp_path)[1].embedding, tensors["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("stored", ["same", "different", "head only"])
def test_tied_weights_with_a_stored_head(tmp_path, stored):
    """transformers uses what is stored: see test_verify, where all three equal it."""
    config, tensors = make(Recipe(tied=True))
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding[::-1].copy() if stored == "different" else embedding.copy()
    tensors["lm_head.weight"] = head
    if stored == "head only":
        del tensors["model.embed_tokens.weight"]
    _, weights = read_folder(save(tmp_path, config, tensors))
    np.testing.assert_array_equal(weights.embedding, embedding)
    np.testing.assert_array_equal(weights.lm_head, head)


# Refusals: each names the file, what in it, what was expected and what was found.


def refuse(tmp_path: Path, *words: str, ternarize: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(str(tmp_path), ternarize=ternarize)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "'bitnet'", "'llama'"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"hidden_act": "silu"}, ["hidden_act", "relu2", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias", "false", "True"]),
        ({"hidden_size": 70}, ["hidden_size", "multiple of", "70"]),
        ({"hidden_size": 66}, ["hidden_size", "even", "66"]),
        ({"hidden_size": "72"}, ["hidden_size", "positive whole number", "'72'"]),
        ({"hidden_size": 72.0}, ["hidden_size", "positive whole number", "72.0"]),
        ({"hidden_size": -72}, ["hidden_size", "-72"]),
        ({"hidden_size": 10**30}, ["hidden_size", "10000"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads", "divisor", "4"]),
        ({"head_dim": 16}, ["head_dim", "12", "16"]),
        ({"intermediate_size": 102}, ["gate_proj", "multiples of 4", "102"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "'tiny'"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rope_theta": None}, ["rope_theta", "None"]),
        ({"rope_theta": True}, ["rope_theta", "True"]),
        ({"rope_theta": 10**400}, ["rope_theta", "10000"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            ["RoPE", "'default'", "'yarn'"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["RoPE", "'linear'"]),
        ({"rope_scaling": "linear"}, ["rope", "'linear'"]),
        ({"bos_token_id": "<s>"}, ["bos_token_id", "'<s>'"]),
        ({"eos_token_id": [1, "</s>"]}, ["eos_token_id", "'</s>'"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ({"quantization_config": "bitnet"}, ["quantization_config", "'bitnet'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quant_method", "'bitnet'", "'gptq'"]),
    ],
    ids=str,
)
def test_config_that_cannot_be_right(tmp_path, edit, words):
    config, tensors = make()
    refuse(save(tmp_path, config | edit, tensors), "config.json", *words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("linear_class", "biglinear"),
        ("linear_class", ["bitlinear"]),
        ("quantization_mode", "sometimes"),
        ("use_rms_norm", True),
        ("modules_to_not_convert", []),
        ("modules_to_not_convert", ["lm_head", "model.layers.0"]),
        ("modules_to_not_convert", "lm_head"),
    ],
)
def test_quantization_that_is_not_implemented(tmp_path, key, value):
    config, tensors = make()
    config["quantization_config"][key] = value
    refuse(save(tmp_path, config, tensors), "config.json", key, repr(value))


def edited(**changes: Any):
    """A change of some tensors; None takes one out."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name, change in changes.items():
            if change is None:
                del tensors[name]
            else:
                tensors[name] = change(tensors.get(name))

    return edit


def filled(value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[array.size // 2] = value
        return array

    return change


TENSOR_FAULTS = {
    "a missing matrix": ({f"{Q}.weight": None}, [Q, "U8 [18, 72]", "no such tensor"]),
    "a missing scale": ({f"{Q}.weight_scale": None}, [Q, "weight_scale", "no such tensor"]),
    "a missing norm": ({NORM: None}, [NORM, "[100]", "no such tensor"]),
    "a missing embedding": (
        {"model.embed_tokens.weight": None},
        ["model.embed_tokens.weight", "[299, 72]", "no such tensor"],
    ),
    "a surplus bias": (
        {f"{Q}.bias": lambda _: np.zeros(72, np.float32)},
        [f"{Q}.bias", "absent", "surplus"],
    ),
    "an empty surplus tensor": (
        {"model.empty": lambda _: np.zeros((0, 4), np.float32)},
        ["model.empty", "absent", "surplus"],
    ),
    "a matrix of another shape": (
        {f"{Q}.weight": lambda w: w[:, :68].copy()},
        [f"{Q}.weight", "U8 [18, 72]", "U8 [18, 68]"],
    ),
    "a transposed embedding": (
        {"model.embed_tokens.weight": lambda w: w.T.copy()},
        ["model.embed_tokens.weight", "[299, 72]", "[72, 299]"],
    ),
    "a scale without an axis": (
        {f"{Q}.weight_scale": lambda w: w.reshape(())},
        [f"{Q}.weight_scale", "[1]", "[]"],
    ),
    "a matrix of another dtype": (
        {f"{Q}.weight": lambda w: w.astype(np.int8)},
        [f"{Q}.weight", "U8", "I8"],
    ),
    "a norm of another dtype": (
        {NORM: lambda w: w.astype(np.uint8)},
        [NORM, "BF16 or F16 or F32", "U8"],
    ),
    "a code 3": ({f"{Q}.weight": filled(0b01_11_00_10)}, [f"{Q}.weight", "11 in 1 byte"]),
    "NaN in a norm": ({NORM: filled(np.nan)}, [NORM, "finite", "NaN"]),
    "Inf in the last norm": (
        {"model.norm.weight": filled(np.inf)},
        ["model.norm.weight", "finite", "Inf"],
    ),
    "NaN for a scale": ({f"{Q}.weight_scale": filled(np.nan)}, ["weight_scale", "positive", "nan"]),
    "Inf for a scale": ({f"{Q}.weight_scale": filled(np.inf)}, ["weight_scale", "finite", "inf"]),
    "zero for a scale": ({f"{Q}.weight_scale": filled(0)}, ["weight_scale", "positive", "0.0"]),
    "a negative scale": ({f"{Q}.weight_scale": filled(-1)}, ["weight_scale", "positive", "-1.0"]),
}


@pytest.mark.parametrize("case", TENSOR_FAULTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_that_cannot_be_right(tmp_path, case, shards):
    changes, words = TENSOR_FAULTS[case]
    config, tensors = make()
    edited(**changes)(tensors)
    refuse(save(tmp_path, config, tensors, shards), "safetensors", "found", *words)


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("unpacked", filled(0.5), ["-1, 0 or +1", "0.5"]),
        ("unpacked", filled(np.nan), ["finite", "NaN"]),
        ("online", filled(np.nan), ["finite", "NaN"]),
        ("online", filled(np.inf), ["finite", "Inf"]),
        ("divide", lambda w: w.astype(ml_dtypes.bfloat16), ["U8", "BF16"]),
    ],
)
def test_matrices_of_other_schemes_that_cannot_be_right(tmp_path, scheme, change, words):
    config, tensors = make(Recipe(scheme))
    edited(**{f"{Q}.weight": change})(tensors)
    refuse(save(tmp_path, config, tensors), f"{Q}.weight", *words)


def test_layers_that_config_does_not_know(tmp_path):
    config, tensors = make()
    refuse(save(tmp_path, config | {"num_hidden_layers": 1}, tensors), "model.layers.1", "surplus")
    refuse(save(tmp_path, config | {"num_hidden_layers": 3}, tensors), "model.layers.2", "no such")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(str(tmp_path / "nowhere"))
    refuse(tmp_path, "config.json", "missing")
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuse(tmp_path, "model.safetensors", "missing")


def test_a_shard_is_missing_or_foreign(tmp_path):
    write(tmp_path, Recipe(shards=3))
    shards = sorted(tmp_path.glob("model-*"))
    index = tmp_path / "model.safetensors.index.json"
    content = shards[1].read_bytes()
    shards[1].write_bytes(shards[0].read_bytes())
    refuse(tmp_path, shards[1].name, "index")
    shards[1].unlink()
    refuse(tmp_path, shards[1].name, "missing")
    shards[1].write_bytes(content)
    whole = json.loads(index.read_text())
    for weight_map in ([], {}, {Q: "../model.safetensors"}, {Q: 3}):
        index.write_text(json.dumps(whole | {"weight_map": weight_map}))
        refuse(tmp_path, index.name, "found")


def test_one_tensor_in_two_shards(tmp_path):
    config, tensors = make()
    save(tmp_path, config, tensors, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    save(tmp_path / "whole", config, tensors)
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "all.safetensors")
    index["weight_map"]["model.norm.weight"] = "all.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(tmp_path, "all.safetensors", "in one file alone")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\xff\xfe", "[" * 100_000])
def test_json_that_is_none(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    refuse(tmp_path, name)


def header(size: int | None, content: dict | bytes, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"",
    "shorter than a length": b"\x01\x02",
    "foreign": b"GGUF" + bytes(100),
    "HTML": b"<!DOCTYPE html><html>not found</html>" * 10,
    "header longer than the file": header(10_000, {"a": ENTRY}, bytes(4)),
    "header of 16 EiB": header(2**64 - 1, {"a": ENTRY}, bytes(4)),
    "header that is no JSON": header(None, b"{]" * 8),
    "header that is a list": header(None, b"[1,2,3]"),
    "header nested deeply": header(None, b'{"a":' * 50_000),
    "data cut off": header(None, {"a": ENTRY}, bytes(3)),
    "data left over": header(None, {"a": ENTRY}, bytes(5)),
    "a shape of 2**60": header(None, {"a": ENTRY | {"shape": [2**60]}}, bytes(4)),
    "a shape that overflows": header(None, {"a": ENTRY | {"shape": [2**40, 2**40]}}, bytes(4)),
    "a negative shape": header(None, {"a": ENTRY | {"shape": [-4]}}, bytes(4)),
    "offsets backwards": header(None, {"a": ENTRY | {"data_offsets": [4, 0]}}, bytes(4)),
    "offsets of 2**63": header(None, {"a": ENTRY | {"data_offsets": [0, 2**63]}}, bytes(4)),
    "overlapping": header(None, {"a": ENTRY, "b": ENTRY}, bytes(4)),
    "an unknown dtype": header(None, {"a": ENTRY | {"dtype": "U3"}}, bytes(4)),
    "an entry that is none": header(None, {"a": 5}, bytes(4)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_are_no_safetensors(tmp_path, case):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    refuse(tmp_path, "model.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(tmp_path, share):
    whole = write(tmp_path) / "model.safetensors"
    content = whole.read_bytes()
    whole.write_bytes(content[: int(share * len(content))])
    refuse(tmp_path, "model.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.integers(0, 4000), st.integers(0, 255))
def test_a_changed_byte_in_the_header_is_refused_or_harmless(tmp_path, place, value):
    whole = write(tmp_path) / "model.safetensors"
    content = bytearray(whole.read_bytes())
    content[place] = value
    whole.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):  # and nothing else
        read_folder(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    config, tensors = make()
    write(tmp_path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:290].copy()
    refuse(save(tmp_path, config | {"vocab_size": 290}, tensors), "tokenizer.json", "290", "298")


def test_a_tokenizer_with_an_id_beyond_the_model(tmp_path):
    """Few enough tokens, but one of them far away."""
    write(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["model"]["merges"][-1]
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"][last] = 5000
    path.write_text(json.dumps(tokenizer))
    refuse(tmp_path, "tokenizer.json", "299", "5000")


def test_a_tokenizer_that_is_a_link_to_nothing(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("nothing")
    refuse(tmp_path, "tokenizer.json")


def test_every_kind_of_heads_is_in_the_matrix():
    recipes = list(matrix())
    assert {recipe.heads for recipe in recipes} == set(HEADS)
    assert {recipe.nested_rope for recipe in recipes} == {True, False}
    assert {recipe.shards for recipe in recipes} == {1, 3}
