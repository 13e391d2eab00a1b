"""One model in four formats, each from each: Hugging Face packed, Hugging Face bf16, GGUF I2_S, and
this package's own base 3, a folder like the first with 1.6 bits a weight.

What is kept exactly: every ternary code, every scale, the norms, the tokenizer. The embedding keeps
its dtype in the Hugging Face formats and becomes float16 in GGUF.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as HFTokenizer

from bitnet_edu.errors import InputError
from bitnet_edu.files.config import parse_scheme, read_json
from bitnet_edu.files.gguf import write_gguf, writing_notes
from bitnet_edu.files.hf import write_folder
from bitnet_edu.files.source import TINY, find_model, read_model
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BITNET_2B4T, BitNetConfig, Weights, random_weights

FORMATS = ("hf-packed", "hf-bf16", "gguf-i2s", "base3")
SCHEMES = {"hf-packed": "multiply", "hf-bf16": "master", "base3": "base3"}


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
    if not isinstance(destination, str | Path) or not str(destination):
        raise InputError(f"a destination is named by text or a path, not by {destination!r}")
    destination = Path(destination)
    to = to or ("gguf-i2s" if destination.suffix == ".gguf" else "hf-packed")
    _check(destination, to, i2s_block)
    if source == "random-2b4t":
        folder, (config, weights, tokenizer) = None, _random_2b4t()
    else:
        path = find_model(source)
        folder = path if path.is_dir() else None
        if folder and to == "hf-bf16" and is_master(folder):
            raise InputError(f"{source} is a bf16 master already: copy the folder")
        config, weights, tokenizer = read_model(path, i2s_block=i2s_block)
    notes = [tokenizer.note] if tokenizer and tokenizer.note else []
    if to == "gguf-i2s":
        write_gguf(destination, config, weights, tokenizer, (folder and i2s_block) or 128)
        notes += writing_notes(weights, tokenizer)
    else:
        scheme = SCHEMES[to]
        write_folder(destination, config, weights, tokenizer, tokenizer_from=folder, scheme=scheme)
    if to == "hf-bf16":
        notes.append(
            "these master weights ternarize to the same model; they are not the training's"
        )
    if to == "base3":
        notes.append(
            "only this package reads base 3; `convert` makes the other formats of it again"
        )
    return Conversion(to, notes)


def _random_2b4t() -> tuple[BitNetConfig, Weights, Tokenizer]:
    """Random weights of the full shape, and tiny's tokenizer filled up with tokens that no text
    has: whatever the model says, it can be shown.
    """
    tiny = Tokenizer.from_folder(TINY)
    whole = json.loads(tiny.backend.to_str())
    vocabulary = tiny.backend.get_vocab(with_added_tokens=True)
    unused = range(len(vocabulary), BITNET_2B4T.vocab_size)
    whole["model"]["vocab"] = vocabulary | {f"[PAD{i}]": i for i in unused}
    backend = HFTokenizer.from_str(json.dumps(whole))
    tokenizer = Tokenizer(backend, tiny.chat_template, tiny.bos_token, tiny.eos_token)
    ends = (tiny.eos_token, "<|eot_id|>")
    config = BITNET_2B4T._replace(
        bos_token_id=tokenizer.token_id(tiny.bos_token),
        eos_token_ids=tuple(tokenizer.token_id(token) for token in ends),
    )
    return config, random_weights(config), tokenizer


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
    if i2s_block is not None and (type(i2s_block) is not int or i2s_block not in (64, 128)):
        raise InputError(f"an I2_S block has 128 (x86) or 64 (Arm) weights, not {i2s_block!r}")
    if os.path.lexists(destination):
        raise InputError(f"{destination} exists already: remove it or choose another name")
