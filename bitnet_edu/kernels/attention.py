"""Attention over the KV cache, one token and one KV head at a time.

The cache is float32, or float16 in uint16 clothes (Numba has no float16). Its heads are padded with
zeros to a multiple of `PAD` numbers, and its positions to a multiple of `TILE`, so that the two
tiles below, written in LLVM's vectors like that of simd.py, need no remainders.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import (
    FLOATS,
    as_float,
    at,
    is_full_half,
    jit,
    load_floats,
    max_jit,
    multiply_add,
    narrow,
    sum_jit,
)
from bitnet_edu.kernels.simd import AHEAD, INT64, prefetch_line, sum_lanes

SPAN = 1024  # positions in a chunk when one token is decoded
STRETCH = 256  # positions looked at in one go: no more scores than this exist at a time
BLOCK = 16  # positions whose values stay in the first-level cache while they are used
TILE = 4  # positions, and query heads, that share loads
PAD = 64  # numbers of a head's answer that are kept in registers


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
def holds_infinity(halves):
    """Whether one of these numbers of the cache, if they are float16, is Inf or NaN."""
    found = False
    for i in range(len(halves)):
        found |= is_full_half(halves[i])
    return found


@jit
def attend(queries, keys, values, positions, scale, scores, mixed, largest, total):
    """mixed[h] = sum of exp(score - largest[h]) * value over all positions, total[h] = sum of exp.

    queries, mixed: float32[group, size], keys, values: [>= positions, size], largest, total:
    float32[group]; scores: scratch, float32[group, STRETCH]. A running maximum and sum keep it to
    one pass (online softmax: Milakov and Gimelshein, arXiv 1805.02867).
    """
    group, size = queries.shape
    mixed[:] = 0
    largest[:] = -np.inf
    total[:] = 0
    for first in range(0, positions, STRETCH):
        count = min(STRETCH, positions - first)
        score(queries, keys[first:], count, scale, scores)
        for head in range(group):
            row, before = scores[head, :count], largest[head]
            largest[head] = max(before, maximum(row))
            shrink = math.exp(before - largest[head])
            exponentials(row, largest[head])
            total[head] = total[head] * shrink + add_up(row)
            for i in range(size):
                mixed[head, i] *= shrink
        mix(scores, values[first:], count, mixed)


@jit
def score(queries, keys, count, scale, scores):
    """scores[h, i] = scale * dot(queries[h], keys[i]) for i < count, rounded up to a full tile."""
    group, size = queries.shape
    q_row, k_row, s_row = queries.strides[0], keys.strides[0], scores.strides[0]
    q, k, s, like = at(queries), at(keys), at(scores), keys[0, 0]
    for i in range(0, count, TILE):
        for head in range(0, group - TILE + 1, TILE):
            place = s + head * s_row + 4 * i
            _scores_of_four(
                q + head * q_row, q_row, k + i * k_row, k_row, size, scale, place, s_row, like
            )
        for head in range(group // TILE * TILE, group):
            place = s + head * s_row + 4 * i
            _scores_of_one(
                q + head * q_row, q_row, k + i * k_row, k_row, size, scale, place, s_row, like
            )


@jit
def mix(scores, values, count, mixed):
    """mixed[h] += sum of scores[h, i] * values[i] over i < count."""
    group, size = mixed.shape
    s_row, v_row, m_row = scores.strides[0], values.strides[0], mixed.strides[0]
    s, m, like = at(scores), at(mixed), values[0, 0]
    for i in range(0, count, BLOCK):
        rows = min(BLOCK, count - i)
        for part in range(0, size, PAD):
            v = at(values[i, part:])
            for head in range(0, group - TILE + 1, TILE):
                w, place = s + head * s_row + 4 * i, m + head * m_row + 4 * part
                _mix_four(w, s_row, v, v_row, rows, place, m_row, like)
            for head in range(group // TILE * TILE, group):
                w, place = s + head * s_row + 4 * i, m + head * m_row + 4 * part
                _mix_one(w, s_row, v, v_row, rows, place, m_row, like)


def _score_tile(heads: int):
    """Make an intrinsic: out[h, i] = scale * dot(queries[h], keys[i]) for `heads` heads, TILE keys.

    Arrays are addresses, each followed by the bytes from row to row; `like` is a number of the
    keys' type.
    """

    def codegen(context, builder, signature, args):
        queries, query_row, keys, key_row, size, scale, out, out_row, _ = args
        half = signature.args[-1] == types.uint16
        zero = ir.Constant(FLOATS, [0.0] * 16)
        sums = [
            [cgutils.alloca_once_value(builder, zero) for _ in range(TILE)] for _ in range(heads)
        ]
        with cgutils.for_range_slice(builder, INT64(0), size, INT64(16), INT64) as (i, _):
            column = builder.add(keys, builder.mul(i, INT64(2 if half else 4)))
            places = [_row(builder, column, key_row, j) for j in range(TILE)]
            k = [load_floats(builder, place, half) for place in places]
            for place in places:
                prefetch_line(builder, builder.add(place, INT64(AHEAD)))
            column = builder.add(queries, builder.mul(i, INT64(4)))
            for head in range(heads):
                q = load_floats(builder, _row(builder, column, query_row, head))
                for j, sum_ in enumerate(sums[head]):
                    builder.store(multiply_add(builder, q, k[j], builder.load(sum_)), sum_)
        for head in range(heads):
            result = sum_lanes(builder, [builder.load(sum_) for sum_ in sums[head]])
            result = builder.fmul(result, _broadcast(builder, scale, TILE))
            _store(builder, result, _row(builder, out, out_row, head))
        return context.get_dummy_value()

    def typer(typingctx, queries, query_row, keys, key_row, size, scale, out, out_row, like):
        numbers = [types.int64] * 5 + [types.float32] + [types.int64] * 2
        return types.void(*numbers, like), codegen

    return intrinsic(typer)


def _mix_tile(heads: int):
    """Make an intrinsic: out[h] += weights[h, i] * values[i] for `heads` heads, PAD numbers each.

    i < count; arguments as above.
    """

    def codegen(context, builder, signature, args):
        weights, weight_row, values, value_row, count, out, out_row, _ = args
        half = signature.args[-1] == types.uint16
        places = [
            [builder.add(_row(builder, out, out_row, h), INT64(64 * j)) for j in range(PAD // 16)]
            for h in range(heads)
        ]
        sums = [
            [cgutils.alloca_once_value(builder, load_floats(builder, p)) for p in r] for r in places
        ]
        with cgutils.for_range(builder, count, intp=INT64) as loop:
            row = builder.add(values, builder.mul(loop.index, value_row))
            v = [
                load_floats(builder, builder.add(row, INT64(j * (32 if half else 64))), half)
                for j in range(PAD // 16)
            ]
            for line in range(0, PAD * (2 if half else 4), 64):
                prefetch_line(builder, builder.add(row, INT64(AHEAD + line)))
            column = builder.add(weights, builder.mul(loop.index, INT64(4)))
            for head in range(heads):
                address = _row(builder, column, weight_row, head)
                weight = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))
                weight = _broadcast(builder, weight, 16)
                for j, sum_ in enumerate(sums[head]):
                    builder.store(multiply_add(builder, weight, v[j], builder.load(sum_)), sum_)
        for head in range(heads):
            for sum_, place in zip(sums[head], places[head], strict=True):
                _store(builder, builder.load(sum_), place)
        return context.get_dummy_value()

    def typer(typingctx, weights, weight_row, values, value_row, count, out, out_row, like):
        return types.void(*[types.int64] * 7, like), codegen

    return intrinsic(typer)


_scores_of_four, _scores_of_one = _score_tile(TILE), _score_tile(1)
_mix_four, _mix_one = _mix_tile(TILE), _mix_tile(1)


def _row(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, index: int) -> ir.Value:
    return builder.add(address, builder.mul(stride, INT64(index)))


def _store(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def _broadcast(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    vector = ir.Constant(ir.VectorType(ir.FloatType(), lanes), ir.Undefined)
    vector = builder.insert_element(vector, number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(vector, vector, zeros)


@jit
def exponentials(x, largest):
    """x = exp(x - largest) to about 1e-7, in vectors.

    Range reduction and polynomial are those of expf in the Cephes library (S. Moshier).
    """
    for i in range(len(x)):
        y = x[i] - largest
        y = np.float32(-87) if y < np.float32(-87) else y  # so written, NaN stays NaN
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


@max_jit
def maximum(x):
    """The largest; anything if there is NaN among them, which `exponentials` then passes on."""
    largest = x[0]
    for i in range(len(x)):
        largest = max(largest, x[i])
    return largest


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
