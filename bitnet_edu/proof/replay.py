"""The replay: the reference takes over a program's int8 codes, and every difference must vanish.

Engine, reference and transformers multiply the same whole numbers. Around these products they add
float32 numbers in different orders, which moves the last bits (about 1e-7 of an array's range).
Only where such a hair decides how an activation rounds does an int8 code differ, by one step: a
*flip*, after which all that follows differs visibly. So each program is held against the reference
in a replay: the reference takes over the program's int8 codes one matrix after the other. Then
every difference must vanish but for float32's last bits, and every code that was taken over must
be a flip: one step away, its unrounded value in the middle between two steps.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bitnet_edu.quantize import absmax_int8
from bitnet_edu.reference import BitNetReference

BOUND = 1e-5  # of an array's range; what float32's last bits do stays far below
STEP_BOUND = 127 * BOUND  # the same for an activation, in int8 steps
LISTED = 100  # flips kept in a report; all are counted
# the matrices that read the same int8 codes as the one named
READERS = {
    "q_proj": "q_proj, k_proj, v_proj",
    "o_proj": "o_proj",
    "gate_proj": "gate_proj, up_proj",
    "down_proj": "down_proj",
}
Trace = dict[str, np.ndarray]


class Flip(NamedTuple):
    """An activation that a program and the reference round to different int8 codes."""

    program: str
    layer: int
    matrix: str  # whose input it is
    token: int
    channel: int
    unrounded: float  # the reference's value, in int8 steps
    reference: int
    other: int

    @property
    def explained(self) -> bool:
        """One step apart, with the unrounded value in the middle: last bits decided."""
        middle = (self.reference + self.other) / 2
        return abs(self.reference - self.other) == 1 and abs(self.unrounded - middle) <= STEP_BOUND


class Row(NamedTuple):
    """One array of the replay: how far it is from the program's."""

    name: str
    max_difference: float
    range: float

    @property
    def share(self) -> float:
        """The difference as a share of the range; NaN where either is."""
        return self.max_difference / self.range if self.range else self.max_difference

    @property
    def ok(self) -> bool:
        return self.share <= BOUND


@dataclass
class Comparison:
    """One program against the reference, on the same tokens."""

    program: str
    max_logit_difference: float = 0.0  # as the two are
    argmax_agreement: float = 0.0
    weights_differ: list[str] = field(default_factory=list)  # matrices read differently
    flips: list[Flip] = field(default_factory=list)  # the first ones
    flip_count: int = 0
    first_flip: int | None = None  # the token from which on flips may show
    unexplained: int = 0
    sums_differ: int = 0  # integer sums that are not bit-exact in the replay
    missing: list[str] = field(default_factory=list)  # arrays that the program did not show
    rows: list[Row] = field(default_factory=list)  # of the replay, layer by layer; logits last

    @property
    def ok(self) -> bool:
        wrong = self.unexplained or self.sums_differ or self.weights_differ or self.missing
        return not wrong and all(row.ok for row in self.rows)


def replay(
    reference: BitNetReference,
    ids: np.ndarray,
    program: str,
    logits: np.ndarray,
    trace: Trace,
    plain: np.ndarray,
    unseen: tuple[str, ...] = (),
) -> Comparison:
    """Run the reference on the program's int8 codes (`trace`), and note all that differs.

    logits: the program's, plain: the reference's own, both float32[T, vocab]. unseen: endings of
    the names of arrays that this program has no way to show; any other that lacks is a fault.
    """
    found = Comparison(program)
    found.max_logit_difference = float(np.abs(plain - logits).max())
    found.argmax_agreement = agreement(plain, logits)
    last: dict[str, np.ndarray] = {}  # the input of the product at hand, and its codes

    def see(name: str, array: np.ndarray) -> None:
        if name.endswith(".input"):
            last["input"] = array
        if name not in trace or trace[name].shape != array.shape:
            if not name.endswith((".codes", ".input", *unseen)):
                found.missing.append(name)
        elif name.endswith(".int8"):
            if name.split(".")[2] in READERS:
                _note_flips(found, name, array, trace[name], last["input"])
                last["codes"] = trace[name]
            else:  # of the same input as the matrix before
                found.unexplained += int((last["codes"] != trace[name]).sum())
            array[:] = trace[name]
        elif name.endswith(".codes"):
            found.first_flip = 0
            array[:] = trace[name]
        elif name.endswith(".sums"):
            found.sums_differ += int((array != trace[name]).sum())
        else:
            found.rows.append(row(name, array, trace[name]))

    replayed = reference.logits(ids, see)
    found.rows.append(row("logits", replayed, logits))
    return found


def _note_flips(
    found: Comparison, name: str, ours: np.ndarray, theirs: np.ndarray, x: np.ndarray
) -> None:
    _, layer, matrix, _ = name.split(".")
    if np.array_equal(ours, theirs):
        return
    unrounded = x.astype(np.float64) / absmax_int8(x)[1]
    for token, channel in np.argwhere(ours != theirs):
        at = token, channel
        codes = int(ours[at]), int(theirs[at])
        place = int(layer), READERS[matrix], int(token), int(channel)
        flip = Flip(found.program, *place, float(unrounded[at]), *codes)
        found.flip_count += 1
        first = int(token) if found.first_flip is None else min(found.first_flip, int(token))
        found.first_flip = first
        found.unexplained += not flip.explained
        if len(found.flips) < LISTED:
            found.flips.append(flip)


def row(name: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """Compare an array of the replay with the program's."""
    return Row(name, float(np.abs(ours - theirs).max()), float(np.ptp(theirs)))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
