"""Hugging Face folders: config.json and safetensors, in every form that transformers reads.

| `quantization_config` | linear weights in the file | scale in the file |
| --- | --- | --- |
| autobitlinear, offline | uint8 packed (or ternary floats) | multiplies |
| bitlinear | uint8 packed | divides |
| autobitlinear, online | float master weights, ternarized on load | none |

What cannot be right raises `CheckpointError`, which names file, tensor, expected and found.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bitnet_edu.errors import CheckpointError
from bitnet_edu.kernels.matmul import count_invalid
from bitnet_edu.packing import pack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights

INDEX = "model.safetensors.index.json"
FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
DTYPES = FLOATS | {"U8": np.uint8}
# What transformers takes for a key that config.json leaves out (its configuration_bitnet.py).
DEFAULTS = {
    "model_type": None,
    "vocab_size": 128256,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
MATRICES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}


def read_folder(folder: Path, ternarize: bool = False) -> tuple[BitNetConfig, Weights]:
    """Read a checkpoint folder. Packed weights and the embedding stay memory-mapped, not copied.

    ternarize=True accepts a folder without `quantization_config`, whose weights transformers would
    run dense, and ternarizes them by absmean. Raises CheckpointError.
    """
    path = folder / "config.json"
    raw = read_json(path)
    config = parse_config(raw, path, read_json(folder / "generation_config.json", {}))
    scheme = parse_scheme(raw, path, ternarize)
    tensors = Tensors(folder)
    layers = tuple(_read_layer(tensors, config, i, scheme) for i in range(config.num_hidden_layers))
    norm = _read_norm(tensors, "model.norm", config.hidden_size)
    # like transformers: where the two are tied, one may be left out, and what is stored is used
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    if raw.get("tie_word_embeddings", False):
        tables = [name for name in tables if name in tensors.arrays] or tables
    shape = config.vocab_size, config.hidden_size
    embedding, *head = [tensors.take(name, shape, FLOATS) for name in tables]
    tensors.refuse_leftovers()
    return config, Weights(embedding, layers, norm, head[0] if head else embedding)


def read_json(path: Path, default: dict | None = None) -> dict[str, Any]:
    """Parse a JSON object; `default`, where given, stands in for a missing file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise CheckpointError(f"{path} is missing: a model folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def parse_config(raw: Mapping[str, Any], path: Path, generation: Mapping[str, Any]) -> BitNetConfig:
    """config.json -> BitNetConfig; refuses each architecture that is not implemented here."""
    raw = DEFAULTS | raw

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise fault(path, key, expected, repr(raw.get(key)))

    def size(key: str) -> int:
        require(type(raw[key]) is int and 1 <= raw[key] < 2**31, key, "a positive whole number")
        return raw[key]

    require(raw["model_type"] == "bitnet", "model_type", "'bitnet'")
    require(raw["hidden_act"] == "relu2", "hidden_act", "'relu2' (squared ReLU)")
    require(raw["attention_bias"] is False, "attention_bias", "false")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = heads if raw["num_key_value_heads"] is None else size("num_key_value_heads")
    require(hidden % heads == 0, "hidden_size", f"a multiple of num_attention_heads ({heads})")
    require(hidden // heads % 2 == 0, "hidden_size", f"even in each of {heads} heads, for RoPE")
    require(raw.get("head_dim") in (None, hidden // heads), "head_dim", str(hidden // heads))
    require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of {heads} heads")
    eps = raw["rms_norm_eps"]
    require(type(eps) in (int, float) and 0 <= eps < 1, "rms_norm_eps", "a number from 0 to 1")
    bos = raw["bos_token_id"]
    require(bos is None or type(bos) is int, "bos_token_id", "a token id or null")
    tied = raw["tie_word_embeddings"]
    require(type(tied) is bool, "tie_word_embeddings", "true or false")
    config = BitNetConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=size("max_position_embeddings"),
        rope_theta=_rope_theta(raw, path),
        rms_norm_eps=float(eps),
        bos_token_id=bos,
        eos_token_ids=_token_ids(generation.get("eos_token_id", raw["eos_token_id"]), path),
    )
    for name, (rows, columns) in config.matrix_shapes.items():
        if rows % 4 or columns % 4:
            raise fault(path, f"the shape of {name}", "multiples of 4", f"[{rows}, {columns}]")
    return config


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """The rotary base, under rope_parameters (newer files) or at the top level (older ones)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise fault(path, "rope_parameters", "a JSON object", repr(rope))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise fault(
            path, "the type of RoPE", "'default', as others are not implemented", repr(kind)
        )
    theta = rope.get("rope_theta", raw["rope_theta"])
    if type(theta) not in (int, float) or not 1 < theta < 1e30:
        raise fault(path, "rope_theta", "a number above 1", repr(theta))
    return float(theta)


def _token_ids(value: int | list[int] | None, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise fault(path, "eos_token_id", "a token id or a list of them", repr(value))
    return tuple(ids)


def parse_scheme(raw: Mapping[str, Any], path: Path, ternarize: bool = False) -> str:
    """How the weights are stored: packed with a scale to "multiply" or "divide" by, or "master"."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        if ternarize:
            return "master"
        raise CheckpointError(
            f"{path} has no quantization_config, so transformers runs it with dense weights: "
            "ask for ternarize=True (--ternarize) if they are meant to be ternarized"
        )
    if not isinstance(quantization, dict):
        raise fault(path, "quantization_config", "a JSON object", repr(quantization))

    def choose(key: str, *allowed: Any) -> Any:
        value = quantization.get(key, allowed[0])
        if value not in allowed:
            raise fault(path, f"quantization_config: {key}", f"one of {allowed}", repr(value))
        return value

    if quantization.get("quant_method") != "bitnet":
        found = repr(quantization.get("quant_method"))
        raise fault(path, "quantization_config: quant_method", "'bitnet'", found)
    choose("use_rms_norm", False)
    choose("modules_to_not_convert", None, ["lm_head"])
    mode = choose("quantization_mode", "offline", "online")
    if choose("linear_class", "bitlinear", "autobitlinear") == "bitlinear":
        return "divide"
    return "multiply" if mode == "offline" else "master"


def fault(path: Path, what: str, expected: str, found: str) -> CheckpointError:
    """The one form of complaint: which file, what in it, what it must be and what it is."""
    return CheckpointError(f"{path}: {what} must be {expected}, found {found}")


class Tensors:
    """The tensors of a folder, memory-mapped, each to be taken once with what it must be."""

    def __init__(self, folder: Path):
        self.arrays: dict[str, np.ndarray] = {}
        self.files: dict[str, Path] = {}
        shards = _shards(folder)
        self.source = folder / INDEX if len(shards) > 1 else next(iter(shards))
        for path, names in shards.items():
            found = map_safetensors(path)
            if missing := names - found.keys():
                raise fault(path, min(missing), "here, by the index", "nothing of that name")
            if twice := found.keys() & self.arrays.keys():
                name = min(twice)
                raise fault(path, name, "in one file alone", f"it in {self.files[name].name} too")
            self.arrays |= found
            self.files |= dict.fromkeys(found, path)

    def take(self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, Any]) -> np.ndarray:
        expected = f"{' or '.join(dtypes)} {list(shape)}"
        if name not in self.arrays:
            raise fault(self.source, name, expected, "no such tensor")
        array = self.arrays.pop(name)
        if array.shape != shape or array.dtype not in dtypes.values():
            raise self.fault(name, expected, f"{array.dtype} {list(array.shape)}")
        return array

    def stores_floats(self, name: str) -> bool:
        return name in self.arrays and self.arrays[name].dtype != np.uint8

    def fault(self, name: str, expected: str, found: str) -> CheckpointError:
        return fault(self.files[name], name, expected, found)

    def refuse_leftovers(self) -> None:
        if self.arrays:
            name = min(self.arrays)
            found = f"{len(self.arrays)} surplus tensor(s)"
            raise self.fault(name, "absent, as no BitNet of this config.json has it", found)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a folder, each with the tensor names that an index promises."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists() or not index.exists():
        return {single: set()}
    shards: dict[Path, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(index, "weight_map", "the file name of each tensor", repr(weight_map))
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise fault(index, f"the file of {name}", "a name in this folder", repr(file))
        shards.setdefault(folder / file, set()).add(name)
    return shards


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Memory-map a safetensors file: {name: read-only array}. CheckpointError if damaged."""
    try:
        with safe_open(path, framework="numpy"):  # the library checks sizes, offsets and overlaps
            pass
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the download is incomplete") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from None
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise fault(path, name, " or ".join(DTYPES), entry["dtype"])
        begin, end = entry["data_offsets"]
        # a map for each tensor, so that a master weight's memory goes when the array goes
        data = np.memmap(path, np.uint8, "r", start + begin, (end - begin,))
        arrays[name] = np.asarray(data).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _read_layer(tensors: Tensors, config: BitNetConfig, index: int, scheme: str) -> LayerWeights:
    prefix = f"model.layers.{index}."
    matrices = {
        field: _read_matrix(tensors, prefix + MATRICES[field], shape, scheme)
        for field, shape in config.matrix_shapes.items()
    }
    norms = {
        field: _read_norm(
            tensors,
            prefix + name,
            config.intermediate_size if field == "ffn_sub_norm" else config.hidden_size,
        )
        for field, name in NORMS.items()
    }
    return LayerWeights(**matrices, **norms)


def _read_norm(tensors: Tensors, name: str, size: int) -> np.ndarray:
    name = f"{name}.weight"
    weight = tensors.take(name, (size,), FLOATS).astype(np.float32)
    if not np.isfinite(weight).all():
        raise tensors.fault(name, "finite", "NaN or Inf")
    return weight


def _read_matrix(tensors: Tensors, name: str, shape: tuple[int, int], scheme: str) -> TernaryMatrix:
    """One linear layer's weights [out, in], brought to packed codes and a scale that multiplies."""
    weight = f"{name}.weight"
    if scheme == "master":
        master = tensors.take(weight, shape, FLOATS)
        if not np.isfinite(master).all():
            raise tensors.fault(weight, "finite", "NaN or Inf")
        codes, scale = absmean_ternary(master)
        return TernaryMatrix(pack_hf(codes), scale)
    stored = tensors.take(f"{name}.weight_scale", (1,), FLOATS).astype(np.float32)[0]
    if not 0 < stored < np.inf:
        raise tensors.fault(f"{name}.weight_scale", "positive and finite", str(stored))
    scale = stored if scheme == "multiply" else np.float32(1) / stored
    if scheme == "multiply" and tensors.stores_floats(weight):
        return TernaryMatrix(_pack_floats(tensors, weight, shape), scale)
    rows, columns = shape
    packed = tensors.take(weight, (rows // 4, columns), {"U8": np.uint8})
    if invalid := count_invalid(packed):
        raise tensors.fault(weight, "pairs of bits 00, 01 or 10", f"11 in {invalid} byte(s)")
    return TernaryMatrix(packed, scale)


def _pack_floats(tensors: Tensors, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Pack a matrix stored unpacked, as floats that must be exactly -1, 0 or +1."""
    values = tensors.take(name, shape, FLOATS).astype(np.float32)
    try:
        return pack_hf(values)
    except ValueError:
        other = values[~np.isin(values, (-1, 0, 1))][0]
        raise tensors.fault(name, "-1, 0 or +1 in every place", str(other)) from None
