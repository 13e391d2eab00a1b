"""What bitnet_edu refuses is a `BitNetError` that says what is wrong and what to do."""


class BitNetError(Exception):
    """Base of every error that this package raises on purpose."""


class CheckpointError(BitNetError):
    """A model file that is damaged, incomplete or of another architecture."""


class ContextLengthError(BitNetError):
    """More tokens than the KV cache, or the model's trained context, can hold."""


class DownloadError(BitNetError):
    """A model that could not be fetched: no network, no access, no disk, a bad checksum."""


class InputError(BitNetError, ValueError):
    """An argument that cannot be right: an unknown token id, an empty prompt, a negative count."""
