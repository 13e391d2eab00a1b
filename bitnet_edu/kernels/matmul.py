"""The kernels as NumPy functions: what chapters, tests and `checkpoint` call."""

import ml_dtypes
import numpy as np
from numba import carray

from bitnet_edu.errors import InputError, require_whole
from bitnet_edu.kernels.bits import cached_jit, jit, pointer
from bitnet_edu.kernels.border import address, aligned_zeros, checked
from bitnet_edu.kernels.simd import (
    MAX_COLUMNS,
    PACKINGS,
    kernel_name,
    kernel_type,
    scratch_size,
    ternary_rows,
)
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
    base3_rows: int | None = None,
    threads: int | None = None,
    kernel: str | None = None,
    ahead: int = 0,
) -> np.ndarray:
    """sums[t, o] = sum over i of w[o, i] * q[t, i], exactly, for packed ternary weights.

    packed: uint8[out/4, in] of any alignment, Hugging Face's layout; or, where base3_rows gives
    `out`, uint8[ceil(out/5), in], that of `packing.pack_base3_rows`. q: int8[T, in], in < 2**17.
    Returns int32[T, out] (`sums`, where given, overwritten). kernel: a name in `simd.KERNELS`
    (default: `kernel_name()`). ahead: bytes that memory is asked for ahead of their use, or 0.
    InputError for arrays that don't fit, or are not in one piece.
    """
    weights = address(packed, np.uint8, (None, None), "packed weights")
    rows, columns = packed.shape
    outputs = 4 * rows
    if base3_rows is not None:
        outputs = require_whole(base3_rows, 5 * rows - 4, 5 * rows, "the rows of base-3 weights")
    checked(q, np.int8, (None, columns), "activations")
    if columns > MAX_COLUMNS:
        raise InputError(f"{columns} columns: the kernels are exact up to {MAX_COLUMNS}")
    sums = np.empty((len(q), outputs), np.int32) if sums is None else sums
    checked(sums, np.int32, (len(q), outputs), "sums", writable=True)
    if any(np.may_share_memory(sums, array) for array in (packed, q)):
        raise InputError("sums must not lie in the memory of the weights or activations")
    chosen = kernel_type(kernel or kernel_name())
    threads = default_threads() if threads is None else checked_threads(threads)
    ahead = require_whole(ahead, 0, 2**20, "ahead")
    q_sums = q.sum(axis=1, dtype=np.int32)
    packing = PACKINGS["2bit" if base3_rows is None else "base3"]
    matrix = packing, weights, rows, columns, outputs
    scratch = aligned_zeros((threads, scratch_size(columns, len(q))), np.uint8)
    run(_matmul, (chosen, *matrix, q, q_sums, sums, ahead, scratch, threads), threads)
    return sums


@cached_jit
def _matmul(
    kernel, packing, weights, rows, columns, outputs, q, q_sums, sums, ahead, scratch, threads,
    thread, counters,
):  # fmt: skip
    chunks = chunk_count(rows * columns, threads)
    chunk = take(counters)
    while chunk < chunks:
        first, last = chunk * rows // chunks, (chunk + 1) * rows // chunks
        ternary_rows(
            kernel, packing, weights, rows, columns, outputs, first, last, q, q_sums, len(q), sums,
            ahead, scratch[thread],
        )  # fmt: skip
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


def base3_of(packed: np.ndarray, threads: int) -> np.ndarray:
    """uint8[rows, in] of Hugging Face's layout -> uint8[ceil(4 * rows / 5), in], packed anew.

    The result is that of `packing.pack_base3_rows`. InputError for an array that doesn't fit.
    """
    source = address(packed, np.uint8, (None, None), "packed weights")
    rows, columns = packed.shape
    out = np.empty((-(-4 * rows // 5), columns), np.uint8)
    place = address(out, np.uint8, out.shape, "base-3 weights")
    run(_to_base3, (source, rows, columns, place, len(out), checked_threads(threads)), threads)
    return out


@cached_jit
def _to_base3(source, rows, columns, place, out_rows, threads, thread, counters):
    chunks = chunk_count(out_rows * columns, threads)
    chunk = take(counters)
    packed = carray(pointer(source, np.uint8), (rows, columns))
    out = carray(pointer(place, np.uint8), (out_rows, columns))
    while chunk < chunks:
        for r in range(chunk * out_rows // chunks, (chunk + 1) * out_rows // chunks):
            out[r] = 0
            power = np.uint8(1)
            for k in range(5):
                row = r + k * out_rows
                if row < 4 * rows:
                    _add_digits(packed[row % rows], row // rows * 2, power, out[r])
                else:
                    out[r] += power  # code 0
                power *= np.uint8(3)
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


@jit
def _add_digits(packed, shift, power, out):
    for c in range(len(out)):
        out[c] += np.uint8(packed[c] >> np.uint8(shift) & np.uint8(3)) * power


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
