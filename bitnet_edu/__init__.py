"""BitNet from Scratch: ternary language models, explained and run in pure Python.

    model = bitnet_edu.load("tiny")
    print("".join(model.stream([{"role": "user", "content": "Hello!"}])))

Submodules load on first use, so that `import bitnet_edu` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

from bitnet_edu.errors import (
    BitNetError,
    CheckpointError,
    ContextLengthError,
    DownloadError,
    InputError,
)

if TYPE_CHECKING:
    from bitnet_edu.generate import BitNetLM

__version__ = "0.1.0"
__all__ = [
    "BitNetError",
    "ChatSession",
    "CheckpointError",
    "ContextLengthError",
    "DownloadError",
    "InputError",
    "load",
]


def load(
    source: str = "tiny", *, ternarize: bool = False, i2s_block: int | None = None
) -> "BitNetLM":
    """Load a model: "tiny", a checkpoint folder, a .gguf file, or a hub id such as "org/name".

    A hub model is downloaded once, at a pinned revision. ternarize=True accepts dense weights and
    rounds them to ternary. i2s_block=64 reads a GGUF file that bitnet.cpp quantized on an Arm
    machine, which the file doesn't tell. Raises CheckpointError or DownloadError.
    """
    from bitnet_edu.sources import load_source

    return load_source(source, ternarize=ternarize, i2s_block=i2s_block)


def __getattr__(name: str):
    if name == "ChatSession":
        from bitnet_edu.chat import ChatSession

        return ChatSession
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"bitnet_edu.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"bitnet_edu.{name}":
            raise
        raise AttributeError(f"module 'bitnet_edu' has no attribute {name!r}") from None
