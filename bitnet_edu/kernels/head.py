"""The LM head: exact logits of the whole vocabulary, or of the few words that can still win.

`Screen` keeps each row w of the head, one for each word, as int8 too: w = s c + e. For the hidden
vector x, reading only c, half the bytes, gives w . x up to |e . x| <= |e| |x| (Cauchy-Schwarz),
and the length |e| of a row's error is known beforehand:

    s c . x - |e| |x|  <=  w . x  <=  s c . x + |e| |x|.

A word whose upper end lies below the k-th largest lower end is not among the k best. Only the rows
of the others are read and multiplied exactly. What is left out keeps s c . x, which lies below the
k-th best: so the k largest logits are those of the exact head, bit for bit and in order.

Rounding counts too: a float32 sum of n products, added up in any order, is off by at most
n u / (1 - n u) times |w| |x| with u = 2**-24 (Higham, Accuracy and Stability, 3.1). It happens in
the screen and in the exact logit; a few more roundings are covered by n + 8 in place of n.
"""

import numpy as np
from numba import carray

from bitnet_edu.kernels.bits import as_float, cached_jit, jit, pointer, sum_jit


@jit
def head_rows(head, number_bytes, scales, x, first, last, logits):
    """logits[r] = row r of the head . x for first <= r < last.

    head: the address of [vocab, hidden] float32 (number_bytes 4), bfloat16 (2) or int8 (1), whose
    rows are multiplied with float32 `scales`.
    """
    hidden = len(x)
    for r in range(first, last):
        row = head + r * hidden * number_bytes
        if number_bytes == 2:
            logits[r] = dot_bfloat16(x, carray(pointer(row, np.uint16), hidden))
        elif number_bytes == 1:
            logits[r] = scales[r] * dot(x, carray(pointer(row, np.int8), hidden))
        else:
            logits[r] = dot(x, carray(pointer(row, np.float32), hidden))


@sum_jit
def dot(x, row):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * np.float32(row[i])
    return total


@sum_jit
def dot_bfloat16(x, row):
    """bfloat16 is the upper half of a float32."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * as_float(np.int64(row[i]) << 16)
    return total


class Screen:
    """The int8 copy of a head, bfloat16 or float32[vocab, hidden], and how far it may be off."""

    def __init__(self, head: np.ndarray):
        vocab, hidden = head.shape
        self.head = head
        self.codes = np.empty((vocab, hidden), np.int8)
        self.scales = np.empty(vocab, np.float32)
        self.slack = np.empty(vocab, np.float32)  # |logit - screened logit| <= slack * |x|
        for first in range(0, vocab, 4096):
            part = slice(first, first + 4096)
            rows = head[part].astype(np.float32)
            largest = np.abs(rows).max(axis=1, keepdims=True)
            scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
            codes = np.rint(rows / scale)
            kept = np.float64(scale) * codes
            u = (hidden + 8) * 2.0**-24
            slack = norms(rows - kept) + u / (1 - u) * (norms(rows) + norms(kept))
            self.codes[part], self.scales[part] = codes, scale[:, 0]
            self.slack[part] = np.nextafter(np.float32(slack), np.float32(np.inf))

    def settle(self, logits: np.ndarray, x: np.ndarray, k: int) -> int:
        """Make the k best of float32[vocab] screened logits exact, in place; returns rows read."""
        reach = self.slack * np.nextafter(np.float32(norms(x)), np.float32(np.inf))
        lower = logits - reach
        threshold = lower.max() if k == 1 else np.partition(lower, -k)[-k]
        rows = np.flatnonzero(logits + reach >= threshold)
        bytes_ = self.head.itemsize
        exact_rows(self.head.ctypes.data, bytes_, self.scales, x, rows, logits)
        return len(rows)


def norms(x: np.ndarray) -> np.ndarray:
    """Euclidean length of each row, in float64."""
    x = x.astype(np.float64)
    return np.sqrt((x * x).sum(axis=-1))


@cached_jit
def exact_rows(head, number_bytes, scales, x, rows, logits):
    for r in rows:
        head_rows(head, number_bytes, scales, x, r, r + 1, logits)
