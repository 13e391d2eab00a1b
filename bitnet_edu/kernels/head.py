"""The LM head: exact logits, a row of the head for each word. (`screen.py` reads fewer bytes.)"""

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import (
    FLOATS,
    as_float,
    at,
    jit,
    load_floats,
    multiply_add,
    pointer,
)
from bitnet_edu.kernels.simd import INT16, INT32, INT64, STEP, prefetch_ahead, sum_lanes

TOKENS = 2  # that share the loads of a row: with more, their x would leave the first-level cache


@jit
def head_rows(head, number_bytes, x, first, last, logits, ahead):
    """logits[t, r] = row r of the head . x[t] for first <= r < last and all tokens t.

    head: the address of [vocab, hidden] float32 (number_bytes 4) or bfloat16 (2); x: float32[T,
    hidden], logits: float32[T, vocab].
    ahead: bytes that memory is asked for ahead of their use, or 0. A logit's sum is added up in one
    order, however many tokens there are.
    """
    tokens, hidden = x.shape
    x_row, out_row = x.strides[0], logits.strides[0]
    for r in range(first, last):
        row, token = head + r * hidden * number_bytes, 0
        while token < tokens:
            tile = TOKENS if tokens - token >= TOKENS else 1
            whole, place = hidden // STEP * STEP, at(logits[token, r:])
            args = at(x[token:]), x_row, row, whole, place, out_row, ahead
            if number_bytes == 2:
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
        vector = ir.VectorType(INT16, 16)
        numbers = builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)
        wide = ir.VectorType(INT32, 16)
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
                prefetch_ahead(builder, place, ahead, STEP * number_bytes)
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


_bfloat16_one, _bfloat16_tile = _dot(2, 1), _dot(2, TOKENS)
_float32_one, _float32_tile = _dot(4, 1), _dot(4, TOKENS)
