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
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bitnet_edu.errors import CheckpointError
from bitnet_edu.files.config import config_json, fault, parse_config, parse_scheme, read_json
from bitnet_edu.kernels.matmul import count_invalid
from bitnet_edu.packing import pack_hf, unpack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights

INDEX = "model.safetensors.index.json"
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
BF16 = ml_dtypes.bfloat16
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


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


class Tensor(NamedTuple):
    """A tensor to be written: made only when its turn comes, so a file can exceed the memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_folder(
    folder: Path, config: BitNetConfig, weights: Weights, *, master: bool = False
) -> None:
    """Write config.json and model.safetensors: packed like Microsoft's, or as bf16 master weights.

    transformers loads both. Raises CheckpointError for a matrix that has no bf16 master weights.
    """
    folder.mkdir()
    tensors = file_tensors(weights, master=master)
    raw = config_json(config, tied=weights.tied, master=master)
    raw["dtype"] = max(tensors, key=lambda tensor: tensor.dtype.itemsize).dtype.name
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    header = safetensors_header(tensors)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.make())
            assert (data.dtype, data.shape) == (tensor.dtype, tensor.shape)
            file.write(data.reshape(-1).view(np.uint8))


def file_tensors(weights: Weights, *, master: bool = False) -> list[Tensor]:
    """What model.safetensors holds, in its order: wide dtypes first, then by name.

    All floats but the master weights are bfloat16 if that changes none of them (Microsoft's packed
    model is so), else float32: transformers wants one dtype.
    """
    floats = dict(_floats(weights))
    dtype = np.dtype(BF16 if all(map(_is_bf16, floats.values())) else np.float32)
    tensors = list(_matrices(weights, master))
    for name, array in floats.items():
        if not (master and name.endswith("_scale")):
            tensors.append(Tensor(name, dtype, array.shape, partial(array.astype, dtype)))
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def safetensors_header(tensors: list[Tensor]) -> bytes:
    """The JSON that names each tensor's dtype, shape and place; before it come 8 bytes of length.

    The safetensors library writes the same, but wants all tensors in memory at once.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape, _ in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": DTYPE_NAMES[dtype.name], "shape": shape, "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _floats(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Everything but the ternary codes, under its name in the file."""
    yield "model.embed_tokens.weight", weights.embedding
    if not weights.tied:
        yield "lm_head.weight", weights.lm_head
    yield "model.norm.weight", weights.norm
    for index, layer in enumerate(weights.layers):
        for field, name in NORMS.items():
            yield f"model.layers.{index}.{name}.weight", getattr(layer, field)
        for field, name in MATRICES.items():
            scale = np.array([getattr(layer, field).scale], np.float32)
            yield f"model.layers.{index}.{name}.weight_scale", scale


def _is_bf16(array: np.ndarray) -> bool:
    """Whether bfloat16 holds every value exactly."""
    return array.dtype == BF16 or all(
        np.array_equal(part.astype(BF16).astype(np.float32), part.astype(np.float32))
        for part in np.array_split(array, -(-array.size // 2**22))
    )


def _matrices(weights: Weights, master: bool) -> Iterator[Tensor]:
    for index, layer in enumerate(weights.layers):
        for field, name in MATRICES.items():
            matrix, name = getattr(layer, field), f"model.layers.{index}.{name}.weight"
            rows, columns = matrix.packed.shape
            if master:
                make = partial(_master, name, matrix)
                yield Tensor(name, np.dtype(BF16), (4 * rows, columns), make)
            else:
                make = partial(np.asarray, matrix.packed)
                yield Tensor(name, np.dtype(np.uint8), (rows, columns), make)


def _master(name: str, matrix: TernaryMatrix) -> np.ndarray:
    try:
        return master_weights(unpack_hf(matrix.packed), matrix.scale)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot become bf16 master weights: {error}") from None


def master_weights(codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """Weights that absmean rounds to exactly these codes and this scale: bfloat16[out, in].

    They are not the weights of the training, which no packed file holds. And they are not
    codes * scale, whose mean magnitude is too small by the share of zeros: the nonzero weights must
    be larger by that factor. Their sum then has to hit scale * codes.size to float32's precision
    with bfloat16's eight bits: some get the next larger value, and a few of the zeros take the
    remainder, small enough to round to zero still. ValueError where that cannot be done.
    """
    nonzero, zero = np.flatnonzero(codes), np.flatnonzero(codes == 0)
    size = np.zeros(codes.size, BF16)
    rest = float(scale) * codes.size
    if len(nonzero):
        low = _bf16_below(rest / len(nonzero))
        high = np.nextafter(low, BF16(np.inf))
        larger = int((rest - float(low) * len(nonzero)) / (float(high) - float(low)))
        size[nonzero] = low
        size[nonzero[:larger]] = high
        rest -= float(low) * (len(nonzero) - larger) + float(high) * larger
    for place in zero[:1000]:
        size[place] = _bf16_below(min(rest, 0.49 * float(scale)))
        rest -= float(size[place])
    weights = np.copysign(size, codes.reshape(-1).astype(BF16)).reshape(codes.shape)
    found, found_scale = absmean_ternary(weights)
    if found_scale != scale or not np.array_equal(found, codes):
        raise ValueError(
            f"no such weights were found for {codes.size} codes, {len(nonzero)} of them not zero, "
            f"and the mean magnitude {scale}"
        )
    return weights


def _bf16_below(value: float) -> np.ndarray:
    """The largest bfloat16 that is not above a float from 0 up."""
    nearest = BF16(value)
    return nearest if float(nearest) <= value else np.nextafter(nearest, BF16(0))


def write_tokenizer(
    folder: Path, config: BitNetConfig, tokenizer: Tokenizer | None, source: Path | None
) -> None:
    """The source's own tokenizer files; new ones if the source is a GGUF file."""
    if source:
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    elif tokenizer:
        tokenizer.backend.save(str(folder / "tokenizer.json"))
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "chat_template": tokenizer.chat_template,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(about, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
