"""Where models come from: the embedded one, a folder, a GGUF file, the hub; any format, read."""

import re
from pathlib import Path

from bitnet_edu.errors import CheckpointError, DownloadError, InputError
from bitnet_edu.files.config import fault, unreadable
from bitnet_edu.files.gguf import read_gguf
from bitnet_edu.files.hf import INDEX, SINGLE, read_folder
from bitnet_edu.files.hub import download, is_hub_id
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BitNetConfig, Weights

TINY = Path(__file__).parents[1] / "models" / "tiny"


def find_model(source: str | Path) -> Path:
    """The folder or .gguf file of a model: the embedded one, a path, or a hub id (downloaded once).

    Raises CheckpointError if there is none, DownloadError if the hub has none, InputError for what
    is neither text nor a path.
    """
    if not isinstance(source, str | Path) or not str(source) or "\0" in str(source):
        raise InputError(f"a model is named by text, such as 'tiny' or a path, not by {source!r}")
    path = TINY if source == "tiny" else Path(source)
    try:
        path = path.expanduser()
        found = path.exists() or path.suffix.lower() == ".gguf"
    except (OSError, RuntimeError) as error:  # a name too long, nobody's home
        raise unreadable(path, error) from None
    if not found and is_hub_id(str(source)):
        try:
            path = download(str(source))
        except DownloadError as error:
            raise DownloadError(f"{error} (and no folder is named {source})") from error
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() == ".gguf":
        return path
    raise CheckpointError(
        f"no model at {str(source)!r}: give 'tiny', a folder with config.json, a .gguf file or the "
        "name of a model on the hub, such as microsoft/bitnet-b1.58-2B-4T"
    )


def _in_folder(folder: Path) -> Path:
    """The folder itself if it holds safetensors, else the one .gguf file in it."""
    try:
        files = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise unreadable(folder, error) from None
    if (folder / "config.json").exists() and any((folder / n).exists() for n in (SINGLE, INDEX)):
        return folder
    ggufs = [file for file in files if file.suffix.lower() == ".gguf"]
    # of a model in parts, the first says what to do
    ggufs = [file for file in ggufs if not re.search(r"-0*([2-9]|1\d+)-of-\d+$", file.stem)]
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{folder} holds {len(ggufs)} models, {names}: name one of them")
    if ggufs:
        return ggufs[0]
    foreign = [file.name for file in files if file.suffix in (".bin", ".pt", ".pth")]
    if foreign:
        raise CheckpointError(
            f"{folder} holds {foreign[0]} and no safetensors: pickled weights can run any code and "
            "are not read; save them anew with transformers"
        )
    return folder


def read_model(
    path: Path, *, ternarize: bool = False, i2s_block: int | None = None
) -> tuple[BitNetConfig, Weights, Tokenizer | None]:
    """Read what `find_model` found."""
    if type(ternarize) is not bool:
        raise InputError(f"ternarize must be True or False, not {ternarize!r}")
    if path.is_dir():
        config, weights = read_folder(path, ternarize)
        file = path / "tokenizer.json"
        tokenizer = Tokenizer.from_folder(path) if file.exists() or file.is_symlink() else None
    else:
        file, (config, weights, tokenizer) = path, read_gguf(path, i2s_block)
    largest = tokenizer.largest_id if tokenizer else 0
    if largest >= config.vocab_size:
        expected = f"below the model's vocabulary of {config.vocab_size}"
        raise fault(file, "the largest token id of the tokenizer", expected, str(largest))
    if tokenizer and (end := tokenizer.token_id("<|eot_id|>")) is not None:
        # a chat turn ends with this token even where config.json names only the end of a text
        config = config._replace(eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, end))))
    return config, weights, tokenizer
