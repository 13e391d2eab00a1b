"""How the next token is chosen from the scores of all words."""

import numbers
import threading
from dataclasses import dataclass

import numpy as np

from bitnet_edu.errors import BitNetError, InputError, require_whole
from bitnet_edu.kernels.border import checked
from bitnet_edu.kernels.matmul import count_nonfinite
from bitnet_edu.kernels.sampling import Words, choose, keep_likely, put, room_for

MOST = 2**62  # more words than there are
ALL = 2.0  # a share that is never reached


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 (default) always takes the best. top_k: among the K best only. top_p: among the
    fewest whose probabilities reach this share, above 0 to 1. seed: 0 to 2**64 - 1; the same seed
    gives the same tokens, None always others. Raises InputError.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if not (_is_number(self.temperature) and 0 <= self.temperature < np.inf):
            raise InputError(f"temperature must be a number from 0 up, not {self.temperature!r}")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be a number above 0, up to 1, not {self.top_p!r}")
        if self.top_k is not None:
            require_whole(self.top_k, 1, None, "top_k")
        if self.seed is not None:
            require_whole(self.seed, 0, 2**64 - 1, "seed")

    @property
    def numbers(self) -> tuple[float, int, float]:
        """(temperature, top_k, top_p) for compiled code: None is what leaves out no word."""
        top_k = MOST if self.top_k is None else min(int(self.top_k), MOST)
        top_p = ALL if self.top_p is None or self.top_p == 1 else float(self.top_p)
        return float(self.temperature), top_k, top_p


GREEDY = Sampling()


def sample(scores: np.ndarray, key: int, sampling: Sampling = GREEDY) -> int:
    """Pick the next token from float32[vocab] scores.

    temperature 0: the best score, the lowest id among equals. Otherwise softmax(scores /
    temperature) over the top_k best and, of these, the fewest whose probabilities reach top_p
    (nucleus sampling, arXiv 1904.09751); of equal scores, the lower ids count as better. `key`, 0
    to 2**64 - 1, is the randomness: the same key, the same token. BitNetError if the scores hold
    NaN or Inf, InputError for what are no scores or no key.
    """
    _require_finite(scores)
    require_whole(key, 0, 2**64 - 1, "key")
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(choose(_words(scores), len(scores), np.uint64(key), *sampling.numbers))


def probabilities(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """float64[vocab]: how often `sample` picks each word at a temperature above 0."""
    _require_finite(scores)
    words, shares = _words(scores), np.zeros(len(scores))
    kept = keep_likely(words, len(scores), *sampling.numbers)
    weights = words.weights[:kept].astype(np.float64)
    shares[words.ids[:kept]] = weights / weights.sum()
    return shares


_of_thread = threading.local()


def _words(scores: np.ndarray) -> Words:
    """All words, in arrays that this thread uses again and again."""
    room = getattr(_of_thread, "room", None)
    if room is None or len(room.ids) != len(scores):
        room = _of_thread.room = room_for(len(scores))
    put(room, scores)
    return room


def _require_finite(scores: np.ndarray) -> None:
    if count_nonfinite(checked(scores, np.float32, (None,), "scores")):
        raise BitNetError(
            "the model produced NaN or Inf instead of scores: the weights are damaged or were read "
            "in the wrong format; `bitnet-edu verify` finds the layer"
        )
