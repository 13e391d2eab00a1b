"""What bitnet_edu refuses is a `BitNetError` that says what is wrong and what to do."""


class BitNetError(Exception):
    """Base of every error that this package raises on purpose: a message of one printable line."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


def printable(text: str, most: int = 2000) -> str:
    """`text` without what a terminal would obey: names in files may hold line ends and escapes.

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
