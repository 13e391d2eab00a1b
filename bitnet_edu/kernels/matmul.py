"""Packed ternary weights times int8 activations, exact in int32."""

import numpy as np
from numba import njit, prange


@njit(cache=True, parallel=True)
def ternary_matmul(packed: np.ndarray, q: np.ndarray, sums: np.ndarray) -> None:
    """sums[t, o] = sum over i of w[o, i] * q[t, i], for w in Hugging Face's packed layout.

    packed: uint8[out/4, in], q: int8[T, in], sums: int32[T, out], overwritten.
    """
    rows, columns = packed.shape
    for r in prange(rows):
        weights = packed[r]
        for t in range(len(q)):
            tokens = q[t]
            a = b = c = d = total = np.int32(0)
            for i in range(columns):
                byte, x = np.int32(weights[i]), np.int32(tokens[i])
                a += (byte & 3) * x
                b += (byte >> 2 & 3) * x
                c += (byte >> 4 & 3) * x
                d += (byte >> 6) * x
                total += x
            sums[t, r] = a - total
            sums[t, r + rows] = b - total
            sums[t, r + 2 * rows] = c - total
            sums[t, r + 3 * rows] = d - total


@njit(cache=True, parallel=True)
def count_invalid(packed: np.ndarray) -> int:
    """How many bytes of uint8[rows, columns] hold the bit pair 11, which no ternary weight packs to."""
    count = 0
    for r in prange(len(packed)):
        for byte in packed[r]:
            count += (byte & byte >> 1 & 0x55) != 0
    return count
