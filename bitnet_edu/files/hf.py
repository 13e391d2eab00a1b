"""Hugging Face folders: config.json and safetensors, in every form that transformers reads.

| `quantization_config` | linear weights in the file | scale in the file |
| --- | --- | --- |
| autobitlinear, offline | uint8 packed (or ternary floats) | multiplies |
| bitlinear | uint8 packed | divides |
| autobitlinear, online | float master weights, ternarized on load | none |
| bitnet_base3 (this package's own) | uint8, five rows a byte | multiplies |

What cannot be right raises `CheckpointError`, which names file, tensor, expected and found.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bitnet_edu.errors import CheckpointError, InputError
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import (
    config_json,
    fault,
    parse_config,
    parse_json,
    parse_scheme,
    read_json,
    write_json,
)
from bitnet_edu.files.tensors import (
    DTYPES,
    FLOATS,
    Stored,
    Tensors,
    map_file,
    refuse_nonfinite,
    refuse_wide,
)
from bitnet_edu.kernels.matmul import base3_of, count_invalid
from bitnet_edu.kernels.threads import default_threads
from bitnet_edu.packing import pack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BitNetConfig, LayerWeights, TernaryMatrix, Weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER = 2**24  # bytes: Microsoft's has 70 thousand
IGNORED = "rotary_emb.inv_freq"  # a buffer in old files, which transformers ignores too
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
    refuse_wide(path, config)
    tensors = open_folder(folder)
    layers = tuple(_read_layer(tensors, config, i, scheme) for i in range(config.num_hidden_layers))
    norm = tensors.norm("model.norm.weight", config.hidden_size)
    # like transformers: where the two are tied, one may be left out, and what is stored is used
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    if raw.get("tie_word_embeddings", False):
        tables = [name for name in tables if name in tensors.stored] or tables
    shape = config.vocab_size, config.hidden_size
    embedding, *head = [tensors.floats(name, shape) for name in tables]
    tensors.refuse_leftovers()
    return config, Weights(embedding, layers, norm, head[0] if head else embedding)


def open_folder(folder: Path) -> Tensors:
    """The tensors of a folder's file or files."""
    shards = _shards(folder)
    tensors = Tensors(folder / INDEX if len(shards) > 1 else next(iter(shards)))
    for path, names in shards.items():
        found = stored_tensors(path)
        if missing := names - found.keys():
            raise fault(path, min(missing), "here, by the index", "nothing of that name")
        for name, stored in found.items():
            if not name.endswith(IGNORED):
                tensors.add(name, stored)
    return tensors


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a folder, each with the tensor names that an index promises."""
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and not single.is_symlink() and index.exists():
        return _indexed(index)
    if index.exists():
        _refuse_another(single, index)
    return {single: set()}


def _indexed(index: Path) -> dict[Path, set[str]]:
    shards: dict[Path, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(index, "weight_map", "the file name of each tensor", repr(weight_map))
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise fault(index, f"the file of {name}", "a name in this folder", repr(file))
        shards.setdefault(index.parent / file, set()).add(name)
    return shards


def _refuse_another(single: Path, index: Path) -> None:
    """Of two whole models in one folder nobody can tell which is meant, unless they are equal."""
    try:
        shards = [stored_tensors(path) for path in _indexed(index)]
    except CheckpointError:
        return  # remains of another form of the same model
    sharded = {name: tensor for shard in shards for name, tensor in shard.items()}
    whole = stored_tensors(single)
    if whole.keys() != sharded.keys() or not all(
        map(_same, whole.values(), map(sharded.get, whole))
    ):
        raise CheckpointError(
            f"{single.parent} holds two different models, {single.name} and the files of "
            f"{index.name}: remove one of them"
        )


def _same(a: Stored, b: Stored) -> bool:
    return a[2:4] == b[2:4] and memoryview(a.bytes()) == memoryview(b.bytes())


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder's model."""
    return list(_shards(folder))


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Memory-map a safetensors file: {name: read-only array}. CheckpointError if damaged."""
    stored = stored_tensors(path)
    for name, tensor in stored.items():
        if tensor.kind not in DTYPES:
            raise fault(path, name, " or ".join(DTYPES), tensor.kind)
    return {name: tensor.array() for name, tensor in stored.items()}


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. CheckpointError if it is damaged."""
    memory = map_file(path)
    start = 8 + int.from_bytes(memory[:8], "little")
    if start > MOST_HEADER:
        size = f"{start:,} bytes" if start <= len(memory) else "longer than the file"
        raise fault(path, "the header", f"at most {MOST_HEADER:,} bytes", size)
    try:
        with safe_open(path, framework="numpy"):  # the library checks sizes, offsets and overlaps
            pass
        header = parse_json(memory[8:start])
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        place = start + begin, end - begin
        tensors[name] = Stored(path, memory, entry["dtype"], tuple(entry["shape"]), *place)
    return tensors


def _read_layer(tensors: Tensors, config: BitNetConfig, index: int, scheme: str) -> LayerWeights:
    prefix = f"model.layers.{index}."
    matrices = {
        field: _read_matrix(tensors, prefix + MATRICES[field], shape, scheme)
        for field, shape in config.matrix_shapes.items()
    }
    norms = {
        field: tensors.norm(
            f"{prefix}{name}.weight",
            config.intermediate_size if field == "ffn_sub_norm" else config.hidden_size,
        )
        for field, name in NORMS.items()
    }
    return LayerWeights(**matrices, **norms)


def _read_matrix(tensors: Tensors, name: str, shape: tuple[int, int], scheme: str) -> TernaryMatrix:
    """One linear layer's weights [out, in], brought to packed codes and a scale that multiplies."""
    weight = f"{name}.weight"
    if scheme == "master":
        stored = tensors.take(weight, shape, FLOATS)
        master = stored.array()
        refuse_nonfinite(stored.file, weight, master)
        codes, scale = absmean_ternary(master)
        stored.release()
        return TernaryMatrix(pack_hf(codes), scale)
    scale = tensors.take(f"{name}.weight_scale", (1,), FLOATS)
    with np.errstate(all="ignore"):
        number = scale.array().astype(np.float32)[0]
        factor = np.float32(1) / number if scheme == "divide" else number
    if not (0 < number < np.inf and 0 < factor < np.inf):
        raise fault(scale.file, f"{name}.weight_scale", "positive and finite", str(number))
    unpacked = weight in tensors.stored and tensors.stored[weight].kind in FLOATS
    if scheme == "multiply" and unpacked:
        return TernaryMatrix(_pack_floats(tensors, weight, shape), factor)
    rows, columns = shape
    base3 = scheme == "base3"
    stored = tensors.take(weight, (-(-rows // 5) if base3 else rows // 4, columns), ("U8",))
    packed = stored.array()
    if base3:
        if packed.max() > 242:
            raise fault(stored.file, weight, "bytes up to 242, five base-3 digits", "larger ones")
        return TernaryMatrix(packed, factor, rows)
    if invalid := count_invalid(packed):
        found = f"11 in {invalid} byte(s)"
        raise fault(stored.file, weight, "pairs of bits 00, 01 or 10", found)
    return TernaryMatrix(packed, factor)


def _pack_floats(tensors: Tensors, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Pack a matrix stored unpacked, as floats that must be exactly -1, 0 or +1."""
    stored = tensors.take(name, shape, FLOATS)
    refuse_nonfinite(stored.file, name, stored.array())
    values = stored.array().astype(np.float32)
    stored.release()
    try:
        return pack_hf(values)
    except ValueError:
        other = values[(values != 0) & (abs(values) != 1)][0]
        raise fault(stored.file, name, "-1, 0 or +1 in every place", str(other)) from None


class Tensor(NamedTuple):
    """A tensor to be written: made only when its turn comes, so a file can exceed the memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_folder(
    folder: Path,
    config: BitNetConfig,
    weights: Weights,
    tokenizer: Tokenizer | None = None,
    *,
    tokenizer_from: Path | None = None,
    scheme: str = "multiply",
) -> None:
    """Write a new model folder: packed like Microsoft's ("multiply"), as bf16 master weights
    ("master"), or in this package's "base3". transformers loads the first two. The tokenizer is
    `tokenizer`, or the files of the folder `tokenizer_from` as they are. Raises CheckpointError for
    a matrix that has no bf16 master weights, InputError if the folder exists; either the whole of
    it gets there or nothing.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already: remove it or choose another name")
    tensors = file_tensors(weights, scheme)
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors) + 2**24
    with all_or_nothing(folder, size) as new:
        new.mkdir()
        write_model(new, config, tensors, scheme, tied=weights.tied)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, new)
        elif tokenizer:
            write_tokenizer(new, config, tokenizer)


def write_model(
    folder: Path, config: BitNetConfig, tensors: list[Tensor], scheme: str, *, tied: bool
) -> None:
    """config.json and model.safetensors, into a folder that is there."""
    raw = config_json(config, tied=tied, scheme=scheme)
    raw["dtype"] = max(tensors, key=lambda tensor: tensor.dtype.itemsize).dtype.name
    write_json(folder / "config.json", raw)
    write_tensors(folder / SINGLE, tensors)


def write_tensors(path: Path, tensors: list[Tensor], notes: dict[str, str] | None = None) -> None:
    """A safetensors file, tensor by tensor. notes: the texts in its header; transformers wants to
    see the one that stands there by default.
    """
    header = safetensors_header(tensors, notes)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.make())
            assert (data.dtype, data.shape) == (tensor.dtype, tensor.shape)
            file.write(data.reshape(-1).view(np.uint8))


def file_tensors(weights: Weights, scheme: str = "multiply") -> list[Tensor]:
    """What model.safetensors holds, in its order: wide dtypes first, then by name.

    All floats but the master weights are bfloat16 if that changes none of them (Microsoft's packed
    model is so), else float32: transformers wants one dtype.
    """
    floats = dict(_floats(weights))
    dtype = np.dtype(BF16 if all(map(_is_bf16, floats.values())) else np.float32)
    tensors = list(_matrices(weights, scheme))
    for name, array in floats.items():
        if not (scheme == "master" and name.endswith("_scale")):
            tensors.append(Tensor(name, dtype, array.shape, partial(array.astype, dtype)))
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def safetensors_header(tensors: list[Tensor], notes: dict[str, str] | None = None) -> bytes:
    """The JSON that names each tensor's dtype, shape and place; before it come 8 bytes of length.

    The safetensors library writes the same, but wants all tensors in memory at once.
    """
    header, end = {"__metadata__": notes or {"format": "pt"}}, 0
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


def _matrices(weights: Weights, scheme: str) -> Iterator[Tensor]:
    for index, layer in enumerate(weights.layers):
        for field, name in MATRICES.items():
            matrix, name = getattr(layer, field), f"model.layers.{index}.{name}.weight"
            rows, columns = matrix.shape
            if scheme == "master":
                make = partial(master_of, name, matrix)
                yield Tensor(name, np.dtype(BF16), (rows, columns), make)
            elif scheme == "base3":
                make = partial(_in_base3, matrix)
                yield Tensor(name, np.dtype(np.uint8), (-(-rows // 5), columns), make)
            else:
                yield Tensor(name, np.dtype(np.uint8), (rows // 4, columns), matrix.in_two_bits)


def _in_base3(matrix: TernaryMatrix) -> np.ndarray:
    if matrix.base3_rows is None:
        return base3_of(matrix.packed, default_threads())
    return matrix.packed


def master_of(name: str, matrix: TernaryMatrix) -> np.ndarray:
    """`master_weights` of a matrix; CheckpointError, which names it, where there are none."""
    try:
        return master_weights(matrix.codes(), matrix.scale)
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


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def write_tokenizer(folder: Path, config: BitNetConfig, tokenizer: Tokenizer) -> None:
    # not with the library's own save, which tells a full disk by a bare Exception
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", about)
