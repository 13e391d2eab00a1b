"""One model in three formats, each from each: Hugging Face packed, Hugging Face bf16, GGUF I2_S.

What is kept exactly: every ternary code, every scale, the norms, the tokenizer. The embedding keeps
its dtype in the Hugging Face formats and becomes float16 in GGUF.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bitnet_edu.checkpoint import MATRICES, NORMS, parse_scheme, read_json
from bitnet_edu.errors import BitNetError, CheckpointError, InputError
from bitnet_edu.gguf_io import template_note, write_gguf
from bitnet_edu.packing import unpack_hf
from bitnet_edu.quantize import absmean_ternary
from bitnet_edu.sources import find_model, read_model
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BITNET_2B4T, BitNetConfig, TernaryMatrix, Weights, random_weights

FORMATS = ("hf-packed", "hf-bf16", "gguf-i2s")
BF16 = ml_dtypes.bfloat16
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Conversion(NamedTuple):
    """What was written, and what its user should know."""

    format: str
    notes: list[str]


def convert(
    source: str, destination: Path, to: str | None = None, i2s_block: int | None = None
) -> Conversion:
    """Write the model `source` as `destination`, a new folder or .gguf file.

    source: as for `bitnet_edu.load`, or "random-2b4t" for random weights of the full 2B4T shape.
    to: one of FORMATS, by default what the name of `destination` suggests. i2s_block: 128 or 64,
    the I2_S layout of the source if that is a GGUF file, else of the destination. Either the whole
    model gets there or nothing. Raises InputError, CheckpointError, DownloadError, or BitNetError
    where the disk refuses.
    """
    destination = Path(destination)
    to = to or ("gguf-i2s" if destination.suffix == ".gguf" else "hf-packed")
    _check(destination, to, i2s_block)
    if source == "random-2b4t":
        folder, config, weights, tokenizer = None, BITNET_2B4T, random_weights(BITNET_2B4T), None
        notes = []
    else:
        path = find_model(source)
        folder = path if path.is_dir() else None
        if folder and to == "hf-bf16" and is_master(folder):
            raise InputError(f"{source} is a bf16 master already: copy the folder")
        config, weights, tokenizer = read_model(path, i2s_block=i2s_block)
        notes = [note for note in (template_note(path, tokenizer),) if note]
    with _all_or_nothing(destination, _size(weights, to)) as temporary:
        if to == "gguf-i2s":
            write_gguf(temporary, config, weights, tokenizer, (folder and i2s_block) or 128)
            notes += _rounding_note(weights.embedding)
        else:
            write_folder(temporary, config, weights, master=to == "hf-bf16")
            _write_tokenizer(temporary, config, tokenizer, folder)
    if to == "hf-bf16":
        notes.append(
            "these master weights ternarize to the same model; they are not the training's"
        )
    return Conversion(to, notes)


def _rounding_note(embedding: np.ndarray) -> list[str]:
    changed, most = 0, 0.0
    for rows in np.array_split(embedding, -(-embedding.size // 2**22)):
        exact = rows.astype(np.float32)
        difference = np.abs(rows.astype(np.float16).astype(np.float32) - exact)
        changed, most = changed + np.count_nonzero(difference), max(most, float(difference.max()))
    if not changed:
        return []
    values = f"{changed:,} of {embedding.size:,} embedding values"
    return [f"{values} were rounded, by at most {most:.1e}: bitnet.cpp stores them as float16"]


def is_master(folder: Path) -> bool:
    """Whether a checkpoint folder holds float master weights, to be ternarized on load."""
    path = folder / "config.json"
    return parse_scheme(read_json(path), path, ternarize=True) == "master"


def _check(destination: Path, to: str, i2s_block: int | None) -> None:
    if to not in FORMATS:
        raise InputError(f"{to!r} is not a format: choose one of {', '.join(FORMATS)}")
    if (destination.suffix == ".gguf") != (to == "gguf-i2s"):
        form = "a file that ends in .gguf" if to == "gguf-i2s" else "a folder, not a .gguf file"
        raise InputError(f"{destination}: the format {to} is written to {form}")
    if i2s_block not in (None, 64, 128):
        raise InputError(f"an I2_S block has 128 (x86) or 64 (Arm) weights, not {i2s_block}")
    if destination.exists():
        raise InputError(f"{destination} exists already: remove it or choose another name")


def _size(weights: Weights, to: str) -> int:
    """About how many bytes the written model takes."""
    codes = sum(getattr(layer, name).packed.nbytes for layer in weights.layers for name in MATRICES)
    heads = 1 if weights.tied else 2
    return codes * (8 if to == "hf-bf16" else 1) + heads * weights.embedding.nbytes + 2**24


@contextmanager
def _all_or_nothing(destination: Path, size: int) -> Iterator[Path]:
    """A temporary path beside `destination` that takes its name if all goes well, else vanishes."""
    parent = destination.absolute().parent
    try:
        if (free := shutil.disk_usage(parent).free) < size:
            raise BitNetError(
                f"{destination} needs about {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} "
                "GB left: free some or choose another disk"
            )
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=parent) as folder:
            temporary = Path(folder, destination.name)
            yield temporary
            temporary.rename(destination)
    except OSError as error:
        raise BitNetError(
            f"{destination} could not be written ({error}): nothing was left behind"
        ) from error


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


def config_json(config: BitNetConfig, *, tied: bool, master: bool) -> dict[str, Any]:
    """What transformers reads as config.json, without the dtype."""
    ends = list(config.eos_token_ids)
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        **{key: value for key, value in config._asdict().items() if key != "eos_token_ids"},
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "tie_word_embeddings": tied,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online" if master else "offline",
        },
    }


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


def _write_tokenizer(
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
