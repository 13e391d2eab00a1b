"""What depends on the machine, measured where the engine runs: a fraction of a second, once.

Asking memory for bytes ahead of their use makes one processor a third faster and the next one a
third slower; base 3 reads fewer bytes for more arithmetic. No constant is right everywhere, so the
products and the head are timed with each choice, by turns, on the model's own weights. Results
never depend on a choice, only the time does.
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import cache_folder, cached_jit, cpu_identity
from bitnet_edu.kernels.border import address
from bitnet_edu.kernels.head import head_rows
from bitnet_edu.kernels.matmul import base3_of, ternary_matmul
from bitnet_edu.kernels.simd import PACKINGS
from bitnet_edu.kernels.threads import chunk_count, finish, run, take, wait_for
from bitnet_edu.weights import TernaryMatrix

AHEADS = (0, 2048, 8192)  # bytes
ENOUGH = 2**26  # bytes of weights from which on memory is the limit, and tuning pays
SAMPLE = 2**27  # bytes of each kind of weights that are read in a measurement
ROUNDS = 5
CLEARLY = 0.97  # of the time without: for less gain nothing is asked for ahead
STEADY = 1.25  # times the shortest time, the middle one, at most
FILE = "tuning.json"


class Tuning(NamedTuple):
    """What was chosen: the packing of ternary weights, bytes to ask for ahead with each, or 0."""

    packing: str = "2bit"
    ahead: int = 0
    base3_ahead: int = 0
    head_ahead: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


def tuning_for(
    matrices: Sequence[TernaryMatrix], head: np.ndarray, kernel: str, threads: int
) -> Tuning:
    """The choices for these weights: BITNET_EDU_TUNING's, those measured before, or measured now.

    matrices: all in one packing; head: bfloat16 or float32[vocab, hidden].
    """
    if os.environ.get("BITNET_EDU_TUNING"):
        return tuning_of_environment()
    packing = matrices[0].packing
    if sum(matrix.packed.nbytes for matrix in matrices) + head.nbytes < ENOUGH:
        return Tuning(packing)
    key = f"{cpu_identity()}, {kernel}, {threads} threads, {packing}"
    if (known := recall(key)) is None:
        known, steady = measure(matrices, head, kernel, threads)
        if steady:
            remember(key, known)
    return known


def tuning_of_environment() -> Tuning:
    """BITNET_EDU_TUNING, such as "packing=base3 head_ahead=8192". InputError for what is none."""
    given = os.environ.get("BITNET_EDU_TUNING", "")
    choices: dict[str, str | int] = {}
    for part in given.split():
        name, _, value = part.partition("=")
        if name == "packing" and value in PACKINGS:
            choices[name] = value
        elif name in Tuning._fields[1:] and value.isascii() and value.isdigit():
            choices[name] = min(int(value), 2**20)
        else:
            raise InputError(
                f"BITNET_EDU_TUNING holds {part!r}: it takes packing=2bit or base3 and numbers of "
                f"bytes, such as {str(Tuning())!r}"
            )
    return Tuning(**choices)


def measure(
    matrices: Sequence[TernaryMatrix], head: np.ndarray, kernel: str, threads: int
) -> tuple[Tuning, bool]:
    """Time the products of one token and the head with each of AHEADS, in both packings.

    What lies in base 3 already stays so. Also returns whether the clock can be believed: on a busy
    machine the same work takes now so long, now so long.
    """
    samples = {matrices[0].packing: _sample(matrices)}
    if "2bit" in samples:
        samples["base3"] = [
            TernaryMatrix(base3_of(packed, threads), scale, 4 * len(packed))
            for packed, scale, _ in samples["2bit"]
        ]
    rows = head[: max(1, SAMPLE // head[0].nbytes)]
    place = address(rows, head.dtype.type, rows.shape, "a head")
    hidden, logits = np.ones((1, head.shape[1]), np.float32), np.empty((1, len(rows)), np.float32)

    def work(kind: str, ahead: int) -> None:
        if kind == "head":
            run(_head, (place, head.itemsize, hidden, logits, ahead, threads), threads)
            return
        for packed, _, base3_rows in samples[kind]:
            q = np.ones((1, packed.shape[1]), np.int8)
            ternary_matmul(
                packed, q, base3_rows=base3_rows, threads=threads, kernel=kernel, ahead=ahead
            )

    rounds = {(kind, ahead): [] for kind in (*samples, "head") for ahead in AHEADS}
    for _ in range(ROUNDS + 1):
        for choice, seconds in rounds.items():
            start = time.perf_counter()
            work(*choice)
            seconds.append(time.perf_counter() - start)
    times = {choice: min(seconds[1:]) for choice, seconds in rounds.items()}  # the first warms up
    middle = {choice: np.median(seconds[1:]) for choice, seconds in rounds.items()}
    steady = all(middle[choice] <= STEADY * times[choice] for choice in times)
    best = {kind: _best(kind, times) for kind in (*samples, "head")}
    packing = next(iter(samples))
    if len(samples) == 2 and (
        times["base3", best["base3"]] < CLEARLY * times["2bit", best["2bit"]]
    ):
        packing = "base3"
    return Tuning(packing, best.get("2bit", 0), best["base3"], best["head"]), steady


def _sample(matrices: Sequence[TernaryMatrix]) -> list[TernaryMatrix]:
    """The first matrices that are some SAMPLE bytes together."""
    size, some = 0, []
    for matrix in matrices:
        if size < SAMPLE:
            some.append(matrix)
            size += matrix.packed.nbytes
    return some


def _best(kind: str, times: dict[tuple[str, int], float]) -> int:
    """The distance with the shortest time; none at all, unless one is clearly better."""
    ahead = min(AHEADS, key=lambda ahead: times[kind, ahead])
    return ahead if times[kind, ahead] < CLEARLY * times[kind, 0] else 0


@cached_jit
def _head(head, number_bytes, x, logits, ahead, threads, thread, counters):
    vocab, hidden = logits.shape[1], x.shape[1]
    chunks = chunk_count(vocab * hidden * number_bytes, threads)
    chunk = take(counters)
    while chunk < chunks:
        first, last = chunk * vocab // chunks, (chunk + 1) * vocab // chunks
        head_rows(head, number_bytes, x, first, last, logits, ahead)
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


# --- Kept from one process to the next ---------------------------------------------------------


def recall(key: str) -> Tuning | None:
    """What was measured here before, under this name."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        choices = Tuning(**_stored()[key])
        if choices.packing in PACKINGS and all(n in AHEADS for n in choices[1:]):
            return choices
    return None


def remember(key: str, tuning: Tuning) -> None:
    """Keep it beside Numba's machine code, where that is possible."""
    with contextlib.suppress(OSError):
        try:
            stored = _stored()
        except ValueError:
            stored = {}
        path = _path()
        new = path.with_name(f"{FILE}.{os.getpid()}")
        new.write_text(json.dumps(stored | {key: tuning._asdict()}, indent=1), encoding="utf-8")
        new.replace(path)


def _stored() -> dict:
    path = _path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except RecursionError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError
    return stored


def _path() -> Path:
    if (folder := cache_folder()) is None:
        raise FileNotFoundError
    return folder / FILE
