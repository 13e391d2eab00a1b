"""One model in three formats, each from each: Hugging Face packed, Hugging Face bf16, GGUF I2_S.

What is kept exactly: every ternary code, every scale, the norms, the tokenizer. The embedding keeps
its dtype in the Hugging Face formats and becomes float16 in GGUF.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitnet_edu.errors import InputError
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import parse_scheme, read_json
from bitnet_edu.files.gguf import template_note, write_gguf
from bitnet_edu.files.hf import MATRICES, write_folder, write_tokenizer
from bitnet_edu.files.source import find_model, read_model
from bitnet_edu.weights import BITNET_2B4T, Weights, random_weights

FORMATS = ("hf-packed", "hf-bf16", "gguf-i2s")


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
    with all_or_nothing(destination, _size(weights, to)) as temporary:
        if to == "gguf-i2s":
            write_gguf(temporary, config, weights, tokenizer, (folder and i2s_block) or 128)
            notes += _rounding_note(weights.embedding)
        else:
            write_folder(temporary, config, weights, master=to == "hf-bf16")
            write_tokenizer(temporary, config, tokenizer, folder)
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
