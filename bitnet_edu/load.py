"""`load`: files, engine and tokenizer put together."""

import logging
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from bitnet_edu.generate import BitNetLM


def load(
    source: "str | Path" = "tiny", *, ternarize: bool = False, i2s_block: int | None = None
) -> "BitNetLM":
    """Load a model: "tiny", a checkpoint folder, a .gguf file, or a hub id such as "org/name".

    A hub model is downloaded once, at a pinned revision. ternarize=True accepts dense weights and
    rounds them to ternary. i2s_block=64 reads a GGUF file that bitnet.cpp quantized on an Arm
    machine, which the file doesn't tell. Raises CheckpointError or DownloadError.
    """
    # imported here, for `import bitnet_edu` imports this module and shall cost next to nothing
    from bitnet_edu.files.source import find_model, read_model
    from bitnet_edu.generate import BitNetLM

    path = find_model(source)
    model = BitNetLM(*read_model(path, ternarize=ternarize, i2s_block=i2s_block))
    if model.tokenizer and model.tokenizer.note:
        _say(model.tokenizer.note)
    return model


@cache
def _say(note: str) -> None:
    """Log a line, once in a process."""
    logging.getLogger("bitnet_edu").warning(note)
