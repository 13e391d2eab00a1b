"""The kernels as NumPy functions: what chapters, tests and `checkpoint` call."""

import numpy as np
from numba import carray

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import cached_jit, pointer
from bitnet_edu.kernels.simd import MAX_COLUMNS, kernel_index, kernel_name, ternary_rows
from bitnet_edu.kernels.threads import chunk_count, default_threads, finish, run, take, wait_for


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
    InputError for arrays that don't fit.
    """
    rows, columns = packed.shape
    if q.ndim != 2 or q.shape[1] != columns or not 1 <= columns <= MAX_COLUMNS:
        raise InputError(f"activations {q.shape} do not fit packed weights {packed.shape}")
    sums = np.empty((len(q), 4 * rows), np.int32) if sums is None else sums
    if sums.shape != (len(q), 4 * rows) or sums.dtype != np.int32:
        raise InputError(f"sums must be int32[{len(q)}, {4 * rows}]")
    packed, q = np.require(packed, np.uint8, "C"), np.require(q, np.int8, "CW")
    q_sums = q.sum(axis=1, dtype=np.int32)
    index = kernel_index(kernel or kernel_name())
    threads = threads or default_threads()
    args = index, packed.ctypes.data, rows, columns, q, q_sums, sums, threads
    run(_matmul, args, threads)
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
    packed = np.require(packed, np.uint8, "C")
    return _count_invalid(packed.ctypes.data, packed.size)


@cached_jit
def _count_invalid(address, size):
    packed, count = carray(pointer(address, np.uint8), size), 0
    for i in range(size):
        byte = packed[i]
        count += (byte & byte >> 1 & 0x55) != 0
    return count
