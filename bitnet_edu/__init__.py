"""BitNet from Scratch: ternary language models, explained and run in pure Python.

    model = bitnet_edu.load("tiny")
    print("".join(model.stream([{"role": "user", "content": "Hello!"}])))

Submodules load on first use, so that `import bitnet_edu` costs next to nothing.
"""

import importlib

from bitnet_edu.errors import (
    BitNetError,
    CheckpointError,
    ContextLengthError,
    DownloadError,
    InputError,
)
from bitnet_edu.load import load

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
