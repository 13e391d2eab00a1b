"""Where models come from: the embedded one, a folder, a GGUF file, the hub."""

from pathlib import Path

from bitnet_edu.checkpoint import read_folder
from bitnet_edu.errors import CheckpointError
from bitnet_edu.generate import BitNetLM
from bitnet_edu.tokenizer import Tokenizer

TINY = Path(__file__).parent / "models" / "tiny"


def find_folder(source: str) -> Path:
    """The folder of a model: the embedded one's, or the given one; CheckpointError if none."""
    folder = TINY if source == "tiny" else Path(source)
    if not folder.is_dir():
        raise CheckpointError(f"no model at {source!r}: give 'tiny' or a folder with config.json")
    return folder


def load_source(source: str, *, ternarize: bool = False) -> BitNetLM:
    """`bitnet_edu.load`, without the lazy import."""
    folder = find_folder(str(source))
    config, weights = read_folder(folder, ternarize)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    if tokenizer and (end := tokenizer.token_id("<|eot_id|>")) is not None:
        # a chat turn ends with this token even where config.json names only the end of a text
        config = config._replace(eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, end))))
    return BitNetLM(config, weights, tokenizer)
