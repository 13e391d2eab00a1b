"""Where models come from: the embedded one, a folder, a GGUF file, the hub; any format, read."""

from pathlib import Path

from bitnet_edu.errors import CheckpointError, DownloadError
from bitnet_edu.files.config import fault
from bitnet_edu.files.gguf import read_gguf
from bitnet_edu.files.hf import read_folder
from bitnet_edu.files.hub import download, is_hub_id
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.weights import BitNetConfig, Weights

TINY = Path(__file__).parents[1] / "models" / "tiny"


def find_model(source: str) -> Path:
    """The folder or .gguf file of a model: the embedded one, a path, or a hub id (downloaded once).

    Raises CheckpointError if there is none, DownloadError if the hub has none.
    """
    path = TINY if source == "tiny" else Path(source)
    if not path.exists() and is_hub_id(source):
        try:
            path = download(source)
        except DownloadError as error:
            raise DownloadError(f"{error} (and no folder is named {source})") from error
    if path.is_dir() and not (path / "config.json").exists():
        files = list(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    if path.is_dir() or path.suffix == ".gguf":
        return path
    raise CheckpointError(
        f"no model at {source!r}: give 'tiny', a folder with config.json, a .gguf file or the "
        "name of a model on the hub, such as microsoft/bitnet-b1.58-2B-4T"
    )


def read_model(
    path: Path, *, ternarize: bool = False, i2s_block: int | None = None
) -> tuple[BitNetConfig, Weights, Tokenizer | None]:
    """Read what `find_model` found."""
    if path.is_dir():
        config, weights = read_folder(path, ternarize)
        tokenizer = Tokenizer.from_folder(path) if (path / "tokenizer.json").exists() else None
    else:
        config, weights, tokenizer = read_gguf(path, i2s_block)
    if tokenizer and (tokens := tokenizer.backend.get_vocab_size()) > config.vocab_size:
        file = path / "tokenizer.json" if path.is_dir() else path
        raise fault(file, "the tokenizer's vocabulary", f"at most {config.vocab_size}", str(tokens))
    if tokenizer and (end := tokenizer.token_id("<|eot_id|>")) is not None:
        # a chat turn ends with this token even where config.json names only the end of a text
        config = config._replace(eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, end))))
    return config, weights, tokenizer
