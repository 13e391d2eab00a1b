"""The kernel ladder: eight ways to multiply a ternary matrix with one token, to be read in order.

Every rung is called as `rung.function(rung.prepare(codes), q)`: codes int8[out, in] in {-1, 0, 1},
q int8[in]. It returns int32[out], the exact sums over i of codes[o, i] * q[i], on one thread.
They are here to be understood and measured; the engine uses `matmul`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import cached_jit
from bitnet_edu.kernels.border import checked
from bitnet_edu.packing import pack_base3, pack_hf


def compiled(
    dtype: type, shape: str, most: Callable[[np.ndarray], int] | None = None, limit: int = 0
) -> Callable:
    """Compile a rung, behind a check of its arguments: compiled code looks at no length.

    shape: that of the weights, with "in" where the length of q must stand, or "in/4" for a quarter
    of it, rounded up. most(weights) must not exceed limit: the largest index into a table of sums.
    """

    def decorate(function: Callable) -> Callable:
        kernel = cached_jit(function)

        @functools.wraps(function)
        def guarded(weights: np.ndarray, q: np.ndarray) -> np.ndarray:
            checked(q, np.int8, (None,), "q, the activations")
            lengths = {"in": len(q), "in/4": -(-len(q) // 4), "in/5": -(-len(q) // 5), "2": 2}
            sizes = tuple(lengths.get(size) for size in shape.split())
            checked(weights, dtype, sizes, f"weights for {len(q)} activations")
            if most and most(weights) > limit:
                raise InputError(f"{function.__name__} looks sums up: an index is above {limit}")
            return kernel(weights, q)

        guarded.py_func = function
        return guarded

    return decorate


@cached_jit
def largest_nibble(array: np.ndarray) -> int:
    """The largest four-bit number in uint8[rows, columns]."""
    most = np.uint8(0)
    for row in array:
        for byte in row:
            most = max(most, byte & np.uint8(15), byte >> np.uint8(4))
    return most


def numpy_dense(weights: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Multiply as if the weights were any floats: one BLAS dot product for each row.

    weights: float32[out, in], q: int8[in]. Returns int32[out]. float32 holds every integer up to
    2**24 and no partial sum exceeds 128 * in, so this is exact below 131,072 columns.
    """
    return np.vecdot(weights, q.astype(np.float32)).astype(np.int32)


def python_loops(weights: list[list[int]], q: np.ndarray) -> np.ndarray:
    """The definition, spelt out: multiply every weight with its activation and add up.

    weights: out lists of in integers, q: int8[in]. Returns int32[out].
    """
    values = q.tolist()
    sums = []
    for row in weights:
        total = 0
        for w, value in zip(row, values, strict=True):
            total += w * value
        sums.append(total)
    return np.array(sums, np.int32)


@compiled(np.int8, "out in")
def branching(codes: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Add where the weight is +1, subtract where it is -1, do nothing where it is 0.

    codes: int8[out, in], q: int8[in]. Returns int32[out].
    """
    rows, columns = codes.shape
    sums = np.zeros(rows, np.int32)
    for o in range(rows):
        for i in range(columns):
            if codes[o, i] == 1:
                sums[o] += q[i]
            elif codes[o, i] == -1:
                sums[o] -= q[i]
    return sums


@cached_jit
def times_code(w: int, value: int) -> int:
    """w * value for w in {-1, 0, 1}, without a multiplication and without a branch.

    In two's complement -1 is all ones and 0 is all zeros, and -v is (v ^ -1) + 1.
    """
    keep = -(w & 1)  # all ones unless w is 0
    flip = w >> 7  # all ones only where w is -1
    return ((value & keep) ^ flip) - flip


@compiled(np.int8, "out in")
def branch_free(codes: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The same few operations for every weight, whatever it is: masks choose what is added.

    codes: int8[out, in], q: int8[in]. Returns int32[out].
    """
    rows, columns = codes.shape
    sums = np.zeros(rows, np.int32)
    for o in range(rows):
        for i in range(columns):
            sums[o] += times_code(codes[o, i], q[i])
    return sums


@compiled(np.uint8, "rows in")
def packed_two_bits(packed: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Read a quarter of the bytes and decode on the fly: shift, mask, subtract 1.

    packed: uint8[out/4, in] in Hugging Face's layout (`packing.pack_hf`), q: int8[in].
    Returns int32[out].
    """
    quarter, columns = packed.shape
    sums = np.zeros((4, quarter), np.int32)
    for r in range(quarter):
        for k in range(4):
            for i in range(columns):
                code = np.int8((packed[r, i] >> 2 * k & 3) - 1)
                sums[k, r] += times_code(code, q[i])
    return sums.reshape(-1)


def pack_bit_planes(codes: np.ndarray) -> np.ndarray:
    """int8[out, in] -> uint8[2, out/8, in]: where the weight is +1, and where it is -1.

    Byte row r of a plane holds rows r, r + out/8, ... in bits 0, 1, ...; ValueError unless `out`
    is a multiple of 8.
    """
    rows, columns = codes.shape
    if rows % 8:
        raise ValueError(f"{rows} output rows cannot be packed in eights: not a multiple of 8")
    planes = np.stack([codes == 1, codes == -1]).reshape(2, 8, rows // 8, columns)
    return np.packbits(planes, axis=1, bitorder="little")[:, 0]


@compiled(np.uint8, "2 rows in")
def bit_planes(planes: np.ndarray, q: np.ndarray) -> np.ndarray:
    """One bit says "add", another says "subtract": each bit becomes a mask over the activation.

    planes: uint8[2, out/8, in] (`pack_bit_planes`), q: int8[in]. Returns int32[out].
    """
    _, eighth, columns = planes.shape
    sums = np.zeros((8, eighth), np.int32)
    for r in range(eighth):
        for k in range(8):
            for i in range(columns):
                plus = -(np.int8(planes[0, r, i] >> k) & 1)
                minus = -(np.int8(planes[1, r, i] >> k) & 1)
                sums[k, r] += (q[i] & plus) - (q[i] & minus)
    return sums.reshape(-1)


@cached_jit
def partial_sums(group: np.ndarray, table: np.ndarray) -> None:
    """All sums that g activations can have under ternary weights, each one addition away.

    group: int8[g]. Fills table int16[3**g]: the sum of (d_j - 1) * group[j] stands at the index
    d_0 + 3 * d_1 + 9 * d_2 + ..., with digits d_j in {0, 1, 2}. ValueError for a shorter table.
    """
    if len(table) < 3 ** len(group):
        raise ValueError("the table is too short: g activations have 3**g sums")
    table[0] = 0
    for value in group:
        table[0] -= value
    size = 1
    for value in group:
        for index in range(size, 3 * size):
            table[index] = table[index - size] + value
        size *= 3


def pack_pairs(codes: np.ndarray) -> np.ndarray:
    """int8[out, in] -> uint8[ceil(in/4), out]: two pairs of weights in a byte, four bits a pair.

    The low four bits of byte [b, o] are (w0 + 1) + 3 * (w1 + 1) for columns 4b and 4b + 1, the
    high four the same for the next two; columns past the end count as weight 0.
    """
    rows, columns = codes.shape
    digits = np.ones((rows, -(-columns // 4) * 4), np.uint8)
    digits[:, :columns] = codes + 1
    pairs = digits[:, 0::2] + 3 * digits[:, 1::2]
    return np.ascontiguousarray((pairs[:, 0::2] | pairs[:, 1::2] << 4).T)


@compiled(np.uint8, "in/4 out", largest_nibble, 8)
def lookup_table(pairs: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Two activations have only nine sums: make them once, then look them up for every row.

    pairs: uint8[ceil(in/4), out] (`pack_pairs`), q: int8[in]. Returns int32[out].
    The idea of bitnet.cpp's TL1 kernel (arXiv 2502.11880), without its SIMD shuffles.
    """
    blocks, rows = pairs.shape
    padded = np.zeros(4 * blocks, np.int8)
    for i in range(len(q)):
        padded[i] = q[i]
    low, high = np.empty(9, np.int16), np.empty(9, np.int16)
    sums = np.zeros(rows, np.int32)
    for b in range(blocks):
        partial_sums(padded[4 * b : 4 * b + 2], low)
        partial_sums(padded[4 * b + 2 : 4 * b + 4], high)
        for o in range(rows):
            sums[o] += low[pairs[b, o] & 15] + high[pairs[b, o] >> 4]
    return sums


def pack_base3_columns(codes: np.ndarray) -> np.ndarray:
    """`packing.pack_base3`, transposed: int8[out, in] -> uint8[ceil(in/5), out]."""
    return np.ascontiguousarray(pack_base3(codes).T)


@compiled(np.uint8, "in/5 out", np.max, 242)
def base_three(trits: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Five weights in a byte, and the byte itself is the index of their sum.

    trits: uint8[ceil(in/5), out] (`pack_base3_columns`), 1.6 bits a weight; q: int8[in].
    Returns int32[out].
    """
    groups, rows = trits.shape
    padded = np.zeros(5 * groups, np.int8)
    for i in range(len(q)):
        padded[i] = q[i]
    table = np.empty(243, np.int16)
    sums = np.zeros(rows, np.int32)
    for g in range(groups):
        partial_sums(padded[5 * g : 5 * g + 5], table)
        for o in range(rows):
            sums[o] += table[trits[g, o]]
    return sums


class Count(NamedTuple):
    """What one product of a matrix and a token executes, as the source is written.

    additions: also subtractions and negations. logic: and, exclusive or, shifts, comparisons.
    Loop counters and addresses are not counted. weight_bytes: how much weight memory is read.
    """

    multiplications: int
    additions: int
    logic: int
    lookups: int
    weight_bytes: int


def _count_products(codes: np.ndarray, bytes_per_weight: int) -> Count:
    n = codes.size
    return Count(n, n, 0, 0, bytes_per_weight * n)


def _count_branching(codes: np.ndarray) -> Count:
    n, plus, minus = codes.size, int(np.sum(codes == 1)), int(np.sum(codes == -1))
    return Count(0, plus + minus, 2 * n - plus, 0, n)


def _count_per_weight(codes: np.ndarray, additions: int, logic: int, bits: int) -> Count:
    n = codes.size
    return Count(0, additions * n, logic * n, 0, bits * n // 8)


def _count_lookup_table(codes: np.ndarray) -> Count:
    rows, blocks = len(codes), -(-codes.shape[1] // 4)
    tables = 2 * (2 + 8) * blocks  # a table of nine: two subtractions, eight additions
    return Count(0, 2 * rows * blocks + tables, 2 * rows * blocks, 2 * rows * blocks, rows * blocks)


def _count_base_three(codes: np.ndarray) -> Count:
    rows, groups = len(codes), -(-codes.shape[1] // 5)
    tables = (5 + 242) * groups
    return Count(0, rows * groups + tables, 0, rows * groups, rows * groups)


class Rung(NamedTuple):
    """One way to multiply: function(prepare(codes), q) -> int32[out]; count(codes) -> Count."""

    name: str
    function: Callable[[Any, np.ndarray], np.ndarray]
    prepare: Callable[[np.ndarray], Any]
    count: Callable[[np.ndarray], Count]


RUNGS = (
    Rung("NumPy dense", numpy_dense, np.float32, lambda c: _count_products(c, 4)),
    # a list holds a pointer of 8 bytes for each weight
    Rung("Python loops", python_loops, np.ndarray.tolist, lambda c: _count_products(c, 8)),
    Rung("branching", branching, np.int8, _count_branching),
    Rung("branch-free", branch_free, np.int8, lambda c: _count_per_weight(c, 3, 4, 8)),
    Rung("two bits", packed_two_bits, pack_hf, lambda c: _count_per_weight(c, 4, 6, 2)),
    Rung("bit-planes", bit_planes, pack_bit_planes, lambda c: _count_per_weight(c, 4, 6, 2)),
    Rung("lookup table", lookup_table, pack_pairs, _count_lookup_table),
    Rung("base 3", base_three, pack_base3_columns, _count_base_three),
)
