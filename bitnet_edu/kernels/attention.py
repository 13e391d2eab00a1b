"""Attention over the KV cache, one token and one KV head at a time.

The cache is float32, or float16 in uint16 clothes (Numba has no float16). Its heads are padded with
zeros to a multiple of `PAD` numbers, and its positions to a multiple of `TILE`, so that the two
inner loops below, written in LLVM's vectors like those of simd.py, need no remainders.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import as_float, jit, narrow, sum_jit
from bitnet_edu.kernels.simd import INT64, sum_lanes

SPAN = 256  # positions looked at in one go: no more scores than this exist at a time
BLOCK = 32  # positions whose values stay in the first-level cache while all heads use them
TILE = 8  # positions that share a load of the query
PAD = 64  # numbers of a head that `add_rows` keeps in registers
FLOATS = ir.VectorType(ir.FloatType(), 16)


@jit
def rotate_and_store(sums, x_scale, scales, cos, sin, queries, keys, values):
    """Scale the int32 sums of q, k and v; rotate q and k (layers.rope); store all three.

    sums: [(heads + 2 * kv_heads) * head_dim], cos, sin: [head_dim / 2], queries: float32[heads,
    padded head_dim], keys, values: this position's place in the cache, [kv_heads, padded head_dim].
    """
    size, heads, kv_heads = 2 * len(cos), len(queries), len(keys)
    for head in range(heads):
        rotate(sums[head * size : (head + 1) * size], x_scale * scales[0], cos, sin, queries[head])
    for head in range(kv_heads):
        first = (heads + head) * size
        rotate(sums[first : first + size], x_scale * scales[1], cos, sin, keys[head])
        first += kv_heads * size
        value_sums, out = sums[first : first + size], values[head]
        for i in range(size):
            out[i] = narrow(np.float32(value_sums[i]) * (x_scale * scales[2]), out[i])


@jit
def rotate(sums, scale, cos, sin, out):
    """Pair i with i + head_dim/2 and turn the pair by its angle."""
    half = len(cos)
    first, second, first_out, second_out = sums[:half], sums[half:], out[:half], out[half:]
    for i in range(half):
        a, b = np.float32(first[i]) * scale, np.float32(second[i]) * scale
        first_out[i] = narrow(a * cos[i] - b * sin[i], first_out[i])
        second_out[i] = narrow(b * cos[i] + a * sin[i], second_out[i])


@jit
def attend(queries, keys, values, positions, scale, scores, mixed, largest, total):
    """mixed[h] = sum of exp(score - largest[h]) * value over all positions, total[h] = sum of exp.

    queries, mixed: float32[group, size], keys, values: [>= positions, size], largest, total:
    float32[group]; scores: scratch, float32[group, SPAN]. A running maximum and sum keep it to one
    pass (online softmax: Milakov and Gimelshein, arXiv 1805.02867).
    """
    group, size = queries.shape
    stride = keys.strides[0]
    mixed[:] = 0
    largest[:] = -np.inf
    total[:] = 0
    for first in range(0, positions, SPAN):
        count = min(SPAN, positions - first)
        for i in range(0, count, TILE):
            for head in range(group):
                row = keys[first + i]
                score_tile(
                    at(queries[head]), at(row), stride, size, scale, at(scores[head, i:]), row[0]
                )
        for head in range(group):
            row, before = scores[head, :count], largest[head]
            for i in range(count):
                largest[head] = max(largest[head], row[i])
            shrink = math.exp(before - largest[head])
            exponentials(row, largest[head])
            total[head] = total[head] * shrink + add_up(row)
            for i in range(size):
                mixed[head, i] *= shrink
        for i in range(0, count, BLOCK):
            rows = min(BLOCK, count - i)
            for head in range(group):
                for part in range(0, size, PAD):
                    row = values[first + i, part:]
                    add_rows(
                        at(scores[head, i:]), at(row), stride, rows, at(mixed[head, part:]), row[0]
                    )


@jit
def at(array):
    """Where an array begins, as an int64."""
    return np.int64(array.ctypes.data)


@intrinsic
def score_tile(typingctx, query, keys, stride, size, scale, out, like):
    """out[i] = scale * dot(query, keys[i]) for TILE rows of keys, `stride` bytes apart.

    query, keys and out are addresses; `like` is a number of the keys' type.
    """

    def codegen(context, builder, signature, args):
        query, keys, stride, size, scale, out, _ = args
        half = signature.args[-1] == types.uint16
        sums = [
            cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * 16)) for _ in range(TILE)
        ]
        with cgutils.for_range_slice(builder, INT64(0), size, INT64(16), INT64) as (i, _):
            q = _load(builder, builder.add(query, builder.mul(i, INT64(4))))
            column = builder.add(keys, builder.mul(i, INT64(2 if half else 4)))
            for row, sum_ in enumerate(sums):
                k = _load(builder, builder.add(column, builder.mul(stride, INT64(row))), half)
                builder.store(_multiply_add(builder, q, k, builder.load(sum_)), sum_)
        scores = sum_lanes(builder, [builder.load(s) for s in sums])
        scores = builder.fmul(scores, _broadcast(builder, scale, TILE))
        builder.store(scores, builder.inttoptr(out, scores.type.as_pointer()), align=4)
        return context.get_dummy_value()

    number = types.int64
    return types.void(number, number, number, number, types.float32, number, like), codegen


@intrinsic
def add_rows(typingctx, weights, rows, stride, count, out, like):
    """out += weights[i] * rows[i] for `count` rows, PAD numbers of each; arguments as above."""

    def codegen(context, builder, signature, args):
        weights, rows, stride, count, out, _ = args
        half = signature.args[-1] == types.uint16
        places = [builder.add(out, INT64(64 * j)) for j in range(PAD // 16)]
        sums = [cgutils.alloca_once_value(builder, _load(builder, place)) for place in places]
        with cgutils.for_range(builder, count, intp=INT64) as loop:
            weight = builder.add(weights, builder.mul(loop.index, INT64(4)))
            weight = builder.load(builder.inttoptr(weight, ir.FloatType().as_pointer()), align=4)
            weight = _broadcast(builder, weight, 16)
            row = builder.add(rows, builder.mul(loop.index, stride))
            for j, sum_ in enumerate(sums):
                v = _load(builder, builder.add(row, INT64(j * (32 if half else 64))), half)
                builder.store(_multiply_add(builder, weight, v, builder.load(sum_)), sum_)
        for sum_, place in zip(sums, places, strict=True):
            builder.store(builder.load(sum_), builder.inttoptr(place, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, like), codegen


def _load(builder: ir.IRBuilder, address: ir.Value, half: bool = False) -> ir.Value:
    """16 numbers as float32."""
    stored = ir.VectorType(ir.HalfType(), 16) if half else FLOATS
    value = builder.load(builder.inttoptr(address, stored.as_pointer()), align=2 if half else 4)
    return builder.fpext(value, FLOATS) if half else value


def _broadcast(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    vector = ir.Constant(ir.VectorType(ir.FloatType(), lanes), ir.Undefined)
    vector = builder.insert_element(vector, number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(vector, vector, zeros)


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, in one instruction where there is one."""
    function = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, function, "llvm.fmuladd.v16f32")
    return builder.call(function, [a, b, c])


@jit
def exponentials(x, largest):
    """x = exp(x - largest) to about 1e-7, in vectors.

    Range reduction and polynomial are those of expf in the Cephes library (S. Moshier).
    """
    for i in range(len(x)):
        y = max(x[i] - largest, np.float32(-87))
        k = np.int32(y * np.float32(1.4426950408889634) - np.float32(0.5))  # towards zero: y <= 0
        r = y - np.float32(k) * np.float32(0.693359375) + np.float32(k) * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1)
        x[i] = p * as_float((k + 127) << 23)


@sum_jit
def add_up(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total


@jit
def join(mixed, largest, total, out):
    """What the spans of positions gave becomes one answer: softmax-weighted values of each head.

    mixed: float32[spans, heads, padded head_dim], largest, total: float32[spans, heads], out:
    float32[heads * head_dim].
    """
    spans, heads, _ = mixed.shape
    size = len(out) // heads
    for head in range(heads):
        joined = out[head * size : (head + 1) * size]
        joined[:] = 0
        most, sum_ = np.float32(-np.inf), np.float32(0)
        for span in range(spans):
            most = max(most, largest[span, head])
        for span in range(spans):
            weight = math.exp(largest[span, head] - most)
            sum_ += weight * total[span, head]
            part = mixed[span, head]
            for i in range(size):
                joined[i] += weight * part[i]
        for i in range(size):
            joined[i] /= sum_
