"""The checks of chapter 14's exercises: each wrong answer is refused, and told what is wrong."""

import numpy as np
import pandas as pd
import pytest
from exercise_checks import verdict_of

from bitnet_edu.training import study

N = np.array([2e4, 1e5, 3e5, 1e6])
FULL, TERNARY = (pd.DataFrame({"mean": 0.8 + a * N**-0.3}, index=N) for a in (8, 9))


def verdict(number: int, answer: str) -> str:
    """What check `number` of the chapter says of an answer, given as source code."""
    names = {"np": np, "study": study, "N": N, "floor": 0.8, "gap_spread": 0.005}
    names |= {"losses": {"full": FULL, "ternary": TERNARY}, "full_loss": FULL["mean"]}
    names |= {"sizes": pd.DataFrame({"linear": N}, index=N)}
    return verdict_of("14_what_size_does", number, answer, names)


SIZES = {
    "None": "Not yet",
    "np.interp(loss, losses, sizes)": "Must x grow",
    "np.interp(loss, losses[::-1], sizes[::-1])": "half-way in loss",
    "np.exp(np.interp(loss, losses[::-1], np.log(sizes)))": "belongs to its own size",
    "np.exp(np.interp(loss, losses[::-1], np.log(sizes)[::-1]))": "Right",
}


@pytest.mark.parametrize("answer", SIZES)
def test_matching_size(answer: str) -> None:
    source = f"def matching_size(loss, sizes, losses):\n    {ARRAYS}\n    return {answer}"
    assert SIZES[answer] in verdict(1, source)


ARRAYS = "sizes, losses = np.asarray(sizes, float), np.asarray(losses)"
PAIRS = {
    "None": "Not yet",
    "(1.96 * spread / half_width) ** 2 + 0.5": "no number of pairs",
    "int(1.96 * spread / half_width) + 1": "the interval is still",
    "int((1.96 * spread / half_width) ** 2) + 1": "fewer pairs would do",
    "int((1.96 * spread / half_width) ** 2)": "still",
    "0": "no number of pairs",
    "max(1, int(np.ceil((1.96 * spread / half_width) ** 2 - 1e-9)))": "Right",
}


@pytest.mark.parametrize("answer", PAIRS)
def test_pairs_needed(answer: str) -> None:
    assert PAIRS[answer] in verdict(
        2, f"def pairs_needed(spread, half_width):\n    return {answer}"
    )


FLOORS = {
    "None": "Not yet",
    "min(losses)": "the floor of this law is",
    "0.0": "the floor of this law is",
}


@pytest.mark.parametrize("answer", FLOORS)
def test_fit_floor(answer: str) -> None:
    assert FLOORS[answer] in verdict(3, f"def fit_floor(sizes, losses):\n    return {answer}")
