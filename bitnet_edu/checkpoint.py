"""Hugging Face folders: config.json and safetensors, in every form that transformers reads.

| `quantization_config` | linear weights in the file | scale in the file |
| --- | --- | --- |
| autobitlinear, offline | uint8 packed (or ternary floats) | multiplies |
| bitlinear | uint8 packed | divides |
| autobitlinear, online | float master weights, ternarized on load | none |

What cannot be right raises `CheckpointError`, which names file, tensor, expected and found.
"""

import json
import math
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

FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
DTYPES = FLOATS | {"U8": np.uint8}
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
    raw = read_json(folder / "config.json")
    config = parse_config(
        raw, folder / "config.json", read_json(folder / "generation_config.json", {})
    )
    scheme = parse_scheme(raw, folder / "config.json", ternarize)
    tied = bool(raw.get("tie_word_embeddings", False))
    tensors = Tensors(folder)
    layers = tuple(_read_layer(tensors, config, i, scheme) for i in range(config.num_hidden_layers))
    vocabulary = config.vocab_size, config.hidden_size
    embedding = tensors.take("model.embed_tokens.weight", vocabulary, FLOATS)
    norm = _read_norm(tensors, "model.norm", config.hidden_size)
    head = embedding
    if not tied or "lm_head.weight" in tensors:
        head = tensors.take("lm_head.weight", vocabulary, FLOATS)
        if tied and head.tobytes() != embedding.tobytes():
            raise CheckpointError(
                f"{folder}: config.json ties lm_head.weight to the embedding, but the two differ: "
                "set tie_word_embeddings to false or remove lm_head.weight"
            )
    tensors.refuse_leftovers()
    return config, Weights(embedding, layers, norm, head)


def read_json(path: Path, default: dict | None = None) -> dict[str, Any]:
    """Parse a JSON object; `default`, where given, stands in for a missing file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise CheckpointError(f"{path} is missing: a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def parse_config(raw: Mapping[str, Any], path: Path, generation: Mapping[str, Any]) -> BitNetConfig:
    """config.json -> BitNetConfig; refuses each architecture that is not implemented here."""

    def refuse(key: str, expected: str) -> None:
        raise CheckpointError(f"{path}: {key} must be {expected}, found {raw.get(key)!r}")

    def size(key: str, default: int | None = None) -> int:
        value = raw.get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            refuse(key, "a positive whole number")
        return value

    if raw.get("model_type") != "bitnet":
        refuse("model_type", "'bitnet'")
    if raw.get("hidden_act", "relu2") != "relu2":
        refuse("hidden_act", "'relu2' (squared ReLU)")
    if raw.get("attention_bias", False):
        refuse("attention_bias", "false")
    heads = size("num_attention_heads")
    kv_heads = heads if raw.get("num_key_value_heads") is None else size("num_key_value_heads")
    hidden = size("hidden_size")
    if hidden % heads or hidden // heads % 2:
        refuse("hidden_size", f"an even multiple of num_attention_heads ({heads})")
    if raw.get("head_dim") not in (None, hidden // heads):
        refuse("head_dim", f"hidden_size / num_attention_heads ({hidden // heads})")
    if heads % kv_heads:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    eps = raw.get("rms_norm_eps", 1e-5)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        refuse("rms_norm_eps", "a small number from 0 to 1")
    config = BitNetConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=size("max_position_embeddings", 2048),
        rope_theta=_rope_theta(raw, path),
        rms_norm_eps=float(eps),
        bos_token_id=raw.get("bos_token_id", 128000),
        eos_token_ids=_token_ids(
            generation.get("eos_token_id", raw.get("eos_token_id", 128001)), path
        ),
    )
    for name, (rows, columns) in config.matrix_shapes.items():
        if rows % 4 or columns % 4:
            raise CheckpointError(
                f"{path}: {name} is {rows} x {columns}, and both must be multiples of 4"
            )
    return config


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """The rotary base, at the top level (older files) or under rope_parameters (newer ones)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise CheckpointError(f"{path}: RoPE of type {kind!r} is not implemented, only 'default'")
    theta = rope.get("rope_theta", raw.get("rope_theta", 500000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise CheckpointError(f"{path}: rope_theta must be a number above 1, found {theta!r}")
    return float(theta)


def _token_ids(value: int | list[int] | None, path: Path) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token id or a list of them, found {value!r}"
        )
    return tuple(ids)


def parse_scheme(raw: Mapping[str, Any], path: Path, ternarize: bool = False) -> str:
    """How the weights are stored: packed with a scale to "multiply" or "divide" by, or "master"."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        if ternarize:
            return "master"
        raise CheckpointError(
            f"{path} has no quantization_config, so transformers runs it with dense weights: "
            "load it with ternarize=True if its weights are meant to be ternarized"
        )
    kind = (
        quantization.get("quant_method"),
        quantization.get("linear_class", "bitlinear"),
        quantization.get("quantization_mode", "offline"),
    )
    schemes = {
        ("bitnet", "autobitlinear", "offline"): "multiply",
        ("bitnet", "autobitlinear", "online"): "master",
        ("bitnet", "bitlinear", "offline"): "divide",
    }
    if kind not in schemes:
        raise CheckpointError(f"{path}: quantization {kind} is none of {sorted(schemes)}")
    if quantization.get("use_rms_norm"):
        raise CheckpointError(
            f"{path}: use_rms_norm (a norm inside every BitLinear) is not implemented"
        )
    if set(quantization.get("modules_to_not_convert") or []) - {"lm_head", "model.embed_tokens"}:
        raise CheckpointError(f"{path}: modules_to_not_convert may only name lm_head")
    return schemes[kind]


class Tensors:
    """The tensors of a folder, memory-mapped, each to be taken once with what it must be."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arrays: dict[str, tuple[Path, np.ndarray]] = {}
        for path, names in _shards(folder).items():
            found = map_safetensors(path)
            if names is not None and (missing := names - found.keys()):
                raise CheckpointError(
                    f"{path}: the index promises {min(missing)}, the file lacks it"
                )
            if twice := found.keys() & self.arrays.keys():
                raise CheckpointError(f"{path}: {min(twice)} is in another shard too")
            self.arrays |= {name: (path, array) for name, array in found.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def take(self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, Any]) -> np.ndarray:
        if name not in self.arrays:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        path, array = self.arrays.pop(name)
        if array.shape != shape:
            raise CheckpointError(
                f"{path}: {name} must have shape {list(shape)}, found {list(array.shape)}"
            )
        if array.dtype not in dtypes.values():
            raise CheckpointError(
                f"{path}: {name} must be {' or '.join(dtypes)}, found {array.dtype}"
            )
        return array

    def refuse_leftovers(self) -> None:
        if self.arrays:
            name, (path, _) = min(self.arrays.items())
            raise CheckpointError(
                f"{path}: {len(self.arrays)} tensor(s) that a BitNet does not have, first {name}"
            )


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, each with the tensor names that an index promises."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": None}
    shards: dict[Path, set[str] | None] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must name the file of each tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: {name} must lie in a file of this folder, found {file!r}"
            )
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
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}, expected one of {list(DTYPES)}"
            )
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
    weight = tensors.take(f"{name}.weight", (size,), FLOATS).astype(np.float32)
    if not np.isfinite(weight).all():
        raise CheckpointError(f"{tensors.folder}: {name}.weight holds NaN or Inf")
    return weight


def _read_matrix(tensors: Tensors, name: str, shape: tuple[int, int], scheme: str) -> TernaryMatrix:
    """One linear layer's weights [out, in], brought to packed codes and a scale that multiplies."""
    weight = f"{name}.weight"
    if scheme == "master":
        master = tensors.take(weight, shape, FLOATS)
        codes, scale = absmean_ternary(master)
        if not np.isfinite(scale):
            raise CheckpointError(f"{tensors.folder}: {weight} holds NaN or Inf")
        return TernaryMatrix(pack_hf(codes), scale)
    scale = tensors.take(f"{name}.weight_scale", (1,), FLOATS).astype(np.float32)[0]
    if not (np.isfinite(scale) and scale > 0):
        raise CheckpointError(
            f"{tensors.folder}: {name}.weight_scale must be positive, found {scale}"
        )
    if scheme == "divide":
        scale = np.float32(1) / scale
    if scheme == "multiply" and weight in tensors and tensors.arrays[weight][1].dtype != np.uint8:
        return TernaryMatrix(_pack_floats(tensors, weight, shape), scale)
    rows, columns = shape
    packed = tensors.take(weight, (rows // 4, columns), {"U8": np.uint8})
    if invalid := count_invalid(packed):
        raise CheckpointError(
            f"{tensors.folder}: {weight} has {invalid} byte(s) with the bit pair 11"
        )
    return TernaryMatrix(packed, scale)


def _pack_floats(tensors: Tensors, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Pack a matrix stored unpacked, as floats that must be exactly -1, 0 or +1."""
    values = tensors.take(name, shape, FLOATS).astype(np.float32)
    if not np.isin(values, (-1, 0, 1)).all():
        raise CheckpointError(f"{tensors.folder}: {name} must hold only -1, 0 and +1")
    return pack_hf(values.astype(np.int8))
