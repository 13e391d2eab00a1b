"""Sentences about measured times, made from the times: no text then contradicts its own run."""

from collections.abc import Sequence

import numpy as np
import psutil

ALIKE = 1.1  # a ratio of medians that is no difference worth a sentence
BUSY = 10  # percent of the machine that others may use before a page warns


def compared(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The verb between two things whose times are given, in any unit: "A", compared(a, b), "B".

    "is 2.1 times as fast as" or "takes 2.1 times as long as", by the medians; "takes about as long
    as" where they are within a tenth, or the middle halves of the two samples overlap.
    """
    (low, middle, high), (their_low, their_middle, their_high) = (
        np.quantile(times, (0.25, 0.5, 0.75)) for times in (ours, theirs)
    )
    ratio = their_middle / middle
    overlap = low <= their_high and their_low <= high
    if overlap or 1 / ALIKE < ratio < ALIKE:
        return "takes about as long as"
    factor = max(ratio, 1 / ratio)
    times = f"{factor:.1f} times" if factor < 10 else f"{factor:,.0f} times"
    return f"is {times} as fast as" if ratio > 1 else f"takes {times} as long as"


def bystanders(seconds: float = 0.5) -> str:
    """A sentence on how busy others keep this machine, watched for so long."""
    busy = psutil.cpu_percent(seconds)
    share = f"Other programs use {busy:.0f}% of this machine"
    if busy < BUSY:
        return f"{share}: little stands in the way of a measurement."
    return (
        f"{share}: trust no single time on this page, and its ratios only as far as their spread."
    )
