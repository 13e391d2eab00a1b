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

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import (
    FLOATS,
    as_float,
    at,
    cached_jit,
    jit,
    load_floats,
    multiply_add,
    pointer,
)
from bitnet_edu.kernels.border import address, checked
from bitnet_edu.kernels.matmul import count_nonfinite
from bitnet_edu.kernels.simd import INT8, INT16, INT32, INT64, STEP, prefetch_line, sum_lanes

TOKENS = 4  # that share the loads of a row


@jit
def head_rows(head, number_bytes, scales, x, first, last, logits, ahead):
    """logits[t, r] = row r of the head . x[t] for first <= r < last and all tokens t.

    head: the address of [vocab, hidden] float32 (number_bytes 4), bfloat16 (2) or int8 (1), whose
    rows are multiplied with float32 `scales`; x: float32[T, hidden], logits: float32[T, vocab].
    ahead: bytes that memory is asked for ahead of their use, or 0. A logit's sum is added up in one
    order, however many tokens there are.
    """
    tokens, hidden = x.shape
    x_row, out_row = x.strides[0], logits.strides[0]
    for r in range(first, last):
        row, token = head + r * hidden * number_bytes, 0
        while token < tokens:
            tile = TOKENS if tokens - token >= TOKENS and number_bytes > 1 else 1
            whole, place = hidden // STEP * STEP, at(logits[token, r:])
            args = at(x[token:]), x_row, row, whole, place, out_row, ahead
            if number_bytes == 1:
                _int8_one(*args)
            elif number_bytes == 2:
                if tile > 1:
                    _bfloat16_tile(*args)
                else:
                    _bfloat16_one(*args)
            elif tile > 1:
                _float32_tile(*args)
            else:
                _float32_one(*args)
            for t in range(token, token + tile):
                logits[t, r] += rest_of_row(row, number_bytes, x[t])
                if number_bytes == 1:
                    logits[t, r] *= scales[r]
            token += tile


@jit
def rest_of_row(row, number_bytes, x):
    """The part of row . x behind the last whole step."""
    hidden, total = len(x), np.float32(0)
    whole = hidden // STEP * STEP
    if number_bytes == 2:
        bits = carray(pointer(row, np.uint16), hidden)
        for i in range(whole, hidden):
            total += x[i] * as_float(np.int64(bits[i]) << 16)
    elif number_bytes == 1:
        codes = carray(pointer(row, np.int8), hidden)
        for i in range(whole, hidden):
            total += x[i] * np.float32(codes[i])
    else:
        numbers = carray(pointer(row, np.float32), hidden)
        for i in range(whole, hidden):
            total += x[i] * numbers[i]
    return total


def _dot(number_bytes: int, tokens: int):
    """Make an intrinsic: out[t] = x[t] . row for `tokens` tokens and n numbers, a multiple of STEP.

    (x, x_row, row, n, out, out_row, ahead): addresses, x and out each followed by the bytes from
    token to token. Like the loop that a compiler makes of this sum, but for the prefetch.
    """

    def load(builder, address):
        """16 numbers of the row as float32."""
        if number_bytes == 4:
            return load_floats(builder, address)
        vector = ir.VectorType(INT8 if number_bytes == 1 else INT16, 16)
        numbers = builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)
        wide = ir.VectorType(INT32, 16)
        if number_bytes == 1:
            return builder.sitofp(builder.sext(numbers, wide), FLOATS)
        # bfloat16 is the upper half of a float32
        shifted = builder.shl(builder.zext(numbers, wide), ir.Constant(wide, [16] * 16))
        return builder.bitcast(shifted, FLOATS)

    def codegen(context, builder, signature, args):
        x, x_row, row, n, out, out_row, ahead = args
        zero = ir.Constant(FLOATS, [0.0] * 16)
        sums = [
            [cgutils.alloca_once_value(builder, zero) for _ in range(STEP // 16)]
            for _ in range(tokens)
        ]
        with cgutils.for_range_slice(builder, INT64(0), n, INT64(STEP), INT64) as (i, _):
            place = builder.add(row, builder.mul(i, INT64(number_bytes)))
            if tokens == 1:  # else arithmetic is the limit
                with builder.if_then(builder.icmp_signed("!=", ahead, INT64(0))):
                    far = builder.add(place, ahead)
                    for line in range(0, STEP * number_bytes, 64):
                        prefetch_line(builder, builder.add(far, INT64(line)))
            x_place = builder.add(x, builder.mul(i, INT64(4)))
            for j in range(STEP // 16):
                b = load(builder, builder.add(place, INT64(16 * number_bytes * j)))
                for t in range(tokens):
                    token = builder.add(x_place, builder.mul(x_row, INT64(t)))
                    a = load_floats(builder, builder.add(token, INT64(64 * j)))
                    sum_ = sums[t][j]
                    builder.store(multiply_add(builder, a, b, builder.load(sum_)), sum_)
        totals = []
        for parts in sums:
            a, b, c, d = map(builder.load, parts)
            totals.append(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
        total = sum_lanes(builder, totals)
        for t in range(tokens):
            place = builder.add(out, builder.mul(out_row, INT64(t)))
            value = builder.extract_element(total, INT32(t))
            builder.store(value, builder.inttoptr(place, ir.FloatType().as_pointer()), align=4)
        return context.get_dummy_value()

    def typer(typingctx, x, x_row, row, n, out, out_row, ahead):
        return types.void(*[types.int64] * 7), codegen

    return intrinsic(typer)


_int8_one = _dot(1, 1)
_bfloat16_one, _bfloat16_tile = _dot(2, 1), _dot(2, TOKENS)
_float32_one, _float32_tile = _dot(4, 1), _dot(4, TOKENS)


class Screen:
    """The int8 copy of a head, bfloat16 or float32[vocab, hidden], and how far it may be off."""

    def __init__(self, head: np.ndarray):
        checked(head, (np.float32, ml_dtypes.bfloat16), (None, None), "a head")
        if bad := count_nonfinite(head):
            raise InputError(f"a head with {bad} NaN or Inf can't be screened: it has no best word")
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
        head = address(self.head, self.head.dtype.type, self.head.shape, "a head")
        exact_rows(head, self.head.itemsize, self.scales, x[None], rows, logits[None])
        return len(rows)


def norms(x: np.ndarray) -> np.ndarray:
    """Euclidean length of each row, in float64."""
    x = x.astype(np.float64)
    return np.sqrt((x * x).sum(axis=-1))


@cached_jit
def exact_rows(head, number_bytes, scales, x, rows, logits):
    for r in rows:
        head_rows(head, number_bytes, scales, x, r, r + 1, logits, 0)
