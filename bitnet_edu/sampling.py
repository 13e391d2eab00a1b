"""How the next token is chosen from the scores of all words."""

import numbers
from dataclasses import dataclass

import numpy as np

from bitnet_edu.errors import BitNetError, InputError, require_whole
from bitnet_edu.layers import softmax


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


GREEDY = Sampling()


def sample(scores: np.ndarray, key: int, sampling: Sampling = GREEDY) -> int:
    """Pick the next token from float32[vocab] scores.

    temperature 0: the best score, the lowest id among equals. Otherwise softmax(scores /
    temperature) over the top_k best and, of these, the fewest whose probabilities reach top_p
    (nucleus sampling, arXiv 1904.09751), drawn with the random number `key`. BitNetError if the
    scores hold NaN or Inf.
    """
    if not np.isfinite(scores).all():
        raise BitNetError(
            "the model produced NaN or Inf instead of scores: the weights are damaged or were read "
            "in the wrong format; `bitnet-edu verify` finds the layer"
        )
    if sampling.temperature == 0:
        return int(scores.argmax())
    order = np.argsort(-scores)[: sampling.top_k]
    behind = scores[order].astype(np.float64) - scores[order[0]]
    with np.errstate(over="ignore"):  # at 1e-320 all but the best are infinitely far behind
        probabilities = softmax(behind / float(sampling.temperature))
    if sampling.top_p is not None and sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:keep], probabilities[:keep]
    return int(np.random.default_rng(key).choice(order, p=probabilities / probabilities.sum()))
