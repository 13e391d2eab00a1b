"""The kernels as NumPy functions: what chapters, tests and `checkpoint` call."""

import ml_dtypes
import numpy as np
from numba import carray

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import cached_jit, pointer
from bitnet_edu.kernels.border import address, checked
from bitnet_edu.kernels.simd import MAX_COLUMNS, kernel_index, kernel_name, ternary_rows
from bitnet_edu.kernels.threads import (
    checked_threads,
    chunk_count,
    default_threads,
    finish,
    run,
    take,
    wait_for,
)

EXPONENTS = {  # the bits that are all ones in NaN and Inf, and in no other number
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}


def ternary_matmul(
    packed: np.ndarray,
    q: np.ndarray,
    sums: np.ndarray | None = None,
    *,
    threads: int | None = None,
    kernel: str | None = None,
) -> np.ndarray:
    """sums[t, o] = sum over i of w[o, i] * q[t, i], exactly, for w in Hugging Face's packed layout.

    packed: uint8[out/4, in] of any alignment, q: int8[T, in], in < 2**17. Returns int32[T, out]
    (`sums`, where given, overwritten). kernel: a name in `simd.KERNELS` (default: `kernel_name()`).
    InputError for arrays that don't fit, or are not in one piece.
    """
    weights = address(packed, np.uint8, (None, None), "packed weights")
    rows, columns = packed.shape
    checked(q, np.int8, (None, columns), "activations")
    if columns > MAX_COLUMNS:
        raise InputError(f"{columns} columns: the kernels are exact up to {MAX_COLUMNS}")
    sums = np.empty((len(q), 4 * rows), np.int32) if sums is None else sums
    checked(sums, np.int32, (len(q), 4 * rows), "sums", writable=True)
    if any(np.may_share_memory(sums, array) for array in (packed, q)):
        raise InputError("sums must not lie in the memory of the weights or activations")
    index = kernel_index(kernel or kernel_name())
    threads = default_threads() if threads is None else checked_threads(threads)
    q_sums = q.sum(axis=1, dtype=np.int32)
    run(_matmul, (index, weights, rows, columns, q, q_sums, sums, threads), threads)
    return sums


@cached_jit
def _matmul(kernel, weights, rows, columns, q, q_sums, sums, threads, thread, counters):
    chunks = chunk_count(rows * columns, threads)
    chunk = take(counters)
    while chunk < chunks:
        first, last = chunk * rows // chunks, (chunk + 1) * rows // chunks
        ternary_rows(kernel, weights, rows, columns, first, last, q, q_sums, len(q), sums)
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


def count_invalid(packed: np.ndarray) -> int:
    """How many bytes of uint8[rows, columns] hold the bit pair 11, which no ternary weight is."""
    return _count_invalid(address(packed, np.uint8, (None, None), "packed weights"), packed.size)


@cached_jit
def _count_invalid(place, size):
    packed, count = carray(pointer(place, np.uint8), size), 0
    for i in range(size):
        byte = packed[i]
        count += (byte & byte >> 1 & 0x55) != 0
    return count


def count_nonfinite(array: np.ndarray) -> int:
    """How many numbers of a float32, float16 or bfloat16 array, in one piece, are NaN or Inf."""
    checked(array, tuple(EXPONENTS), (None,) * array.ndim, "an array of floats")
    unsigned, exponent = EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(unsigned)
    if _largest_masked(bits, unsigned(exponent)) < exponent:  # nearly always, and at memory's speed
        return 0
    return int(np.count_nonzero((bits & unsigned(exponent)) == exponent))


@cached_jit
def _largest_masked(numbers, mask):
    narrow = numbers.dtype.type  # else Numba makes everything 64 bits wide
    largest = narrow(0)
    for i in range(len(numbers)):
        largest = max(largest, narrow(numbers[i] & mask))
    return largest
