"""What bitnet_edu refuses is a `BitNetError` that says what is wrong and what to do."""

import numbers
import re


class BitNetError(Exception):
    """Base of every error that this package raises on purpose: a message of one printable line."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


def printable(text: object, most: int = 2000) -> str:
    """`text` as one line without what a terminal would obey: names in files may hold escapes.

    Of more than `most` characters the middle is left out.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(BitNetError):
    """A model file that is damaged, incomplete or of another architecture."""


class ContextLengthError(BitNetError):
    """More tokens than the KV cache, or the model's trained context, can hold."""


class DownloadError(BitNetError):
    """A model that could not be fetched: no network, no access, no disk, a bad checksum."""


class InputError(BitNetError, ValueError):
    """An argument that cannot be right: an unknown token id, an empty prompt, a negative count."""


def is_whole(value: object) -> bool:
    """Whether this is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_whole(value: int, least: int, most: int | None, what: str) -> int:
    """`value` if it is a whole number from `least` to `most`; else InputError, naming `what`."""
    if not is_whole(value) or value < least or (most is not None and value > most):
        span = f"from {least} up" if most is None else f"from {least} to {most}"
        raise InputError(f"{what} must be a whole number {span}, not {value!r:.80}")
    return int(value)


def clean_text(text: str, what: str) -> str:
    """`text`, with U+FFFD for lone surrogates, which are no characters and have no UTF-8.

    The one place where text comes in. InputError, which names `what`, for what is no `str`.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} must be text, not {text!r:.80}")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
