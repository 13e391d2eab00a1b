"""Attention over the KV cache, a few tokens and one KV head at a time.

The cache is float32, or float16 in uint16 clothes (Numba has no float16). Its heads are padded with
zeros to a multiple of `PAD` numbers, and its positions to a multiple of `TILE`, so that the two
tiles below, written in LLVM's vectors like that of simd.py, need no remainders.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import (
    FLOATS,
    as_float,
    at,
    fused_jit,
    is_full_half,
    jit,
    load_floats,
    multiply_add,
    narrow,
    pointer,
    sum_jit,
)
from bitnet_edu.kernels.simd import AHEAD, INT64, broadcast, prefetch_line, store

SPAN = 1024  # positions in a chunk when one token is decoded
TOKENS = 8  # of a prompt that share the keys and values they look at
STRETCH = 128  # positions looked at in one go: no more scores of a token than this exist at a time
BLOCK = 32  # positions whose keys, then values, stay in the first-level cache for all TOKENS
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
def attend(queries, keys, values, seen, scale, scores, mixed, largest, total):
    """mixed[t, h] = sum of exp(score - largest[t, h]) * value, total[t, h] = sum of exp.

    The sums go over the positions that token t sees: seen + t, of SPAN at most. queries, mixed:
    float32[tokens, group, size], keys, values: [>= all positions, size], largest, total:
    float32[tokens, group]; scores: scratch, float32[>= tokens, group, STRETCH]. A running maximum
    and sum keep it to one pass (online softmax: Milakov and Gimelshein, arXiv 1805.02867).

    What is computed for a token, and in which order, does not depend on those beside it: they only
    share the keys and values that are in the first-level cache.
    """
    tokens, group, size = queries.shape
    mixed[:] = 0
    largest[:] = -np.inf
    total[:] = 0
    # addresses: a slice of an array would count its owners, as slow as a few dot products
    q, k, v, s, m = at(queries), at(keys), at(values), at(scores), at(mixed)
    k_row, v_row, like = keys.strides[0], values.strides[0], keys[0, 0]
    for first in range(0, min(seen + tokens - 1, SPAN), STRETCH):
        for i in range(first, first + STRETCH, BLOCK):
            for t in range(tokens):
                count, out = min(seen + t - i, BLOCK), s + t * scores.strides[0] + 4 * (i - first)
                query = q + t * queries.strides[0]
                score(query, k + i * k_row, k_row, count, group, size, scale, out, like)
        for t in range(max(0, first + 1 - seen), tokens):
            row, sums = s + t * scores.strides[0], m + t * mixed.strides[0]
            most, all_ = at(largest) + t * largest.strides[0], at(total) + t * total.strides[0]
            weigh(row, seen + t - first, group, size, most, all_, sums)
        for i in range(first, first + STRETCH, BLOCK):
            for t in range(tokens):
                count, row = min(seen + t - i, BLOCK), s + t * scores.strides[0] + 4 * (i - first)
                mix(row, v + i * v_row, v_row, count, group, size, m + t * mixed.strides[0], like)


@jit
def score(queries, keys, key_row, count, group, size, scale, scores, like):
    """scores[h, i] = scale * dot(queries[h], keys[i]) for i < count, rounded up to a full tile.

    Arrays are addresses here and below, of float32[group, STRETCH] and float32[group, size], but
    for keys and values, whose numbers are of the type of `like` and whose rows are key_row apart.
    """
    q_row, s_row = 4 * size, 4 * STRETCH
    for i in range(0, count, TILE):
        k, place = keys + i * key_row, scores + 4 * i
        for head in range(0, group - TILE + 1, TILE):
            q, out = queries + head * q_row, place + head * s_row
            _scores_of_four(q, q_row, k, key_row, size, scale, out, s_row, like)
        for head in range(group // TILE * TILE, group):
            q, out = queries + head * q_row, place + head * s_row
            _scores_of_one(q, q_row, k, key_row, size, scale, out, s_row, like)


@jit
def weigh(scores, count, group, size, largest, total, mixed):
    """Make weights of the first `count` scores; shrink what was mixed if there is a larger score.

    largest, total: float32[group], at addresses too. Three loops, so that heads overlap.
    """
    largest, total = _floats(largest, group), _floats(total, group)
    for head in range(group):
        row, before = _floats(scores + 4 * head * STRETCH, STRETCH), largest[head]
        row[count:] = -np.inf
        largest[head] = max(before, _largest(at(row)))
        if largest[head] != before:
            shrink = math.exp(before - largest[head])
            total[head] *= shrink
            sums = _floats(mixed + 4 * head * size, size)
            for i in range(size):
                sums[i] *= shrink
    for head in range(group):
        exponentials(_floats(scores + 4 * head * STRETCH, STRETCH), largest[head])
    for head in range(group):
        row = _floats(scores + 4 * head * STRETCH, STRETCH)
        row[count:] = 0
        total[head] += add_up(row)


@jit
def mix(weights, values, value_row, count, group, size, mixed, like):
    """mixed[h] += sum of weights[h, i] * values[i] over i < count."""
    w_row, m_row, number = 4 * STRETCH, 4 * size, value_row // size
    for part in range(0, size, PAD):
        v, place = values + part * number, mixed + 4 * part
        for head in range(0, group - TILE + 1, TILE):
            w, out = weights + head * w_row, place + head * m_row
            _mix_four(w, w_row, v, value_row, count, out, m_row, like)
        for head in range(group // TILE * TILE, group):
            w, out = weights + head * w_row, place + head * m_row
            _mix_one(w, w_row, v, value_row, count, out, m_row, like)


@jit
def _floats(place, count):
    return carray(pointer(place, np.float32), count)


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
        result = _sum_each(builder, [builder.load(sum_) for row in sums for sum_ in row])
        result = builder.fmul(result, broadcast(builder, scale, 16))
        for head in range(heads):
            four = builder.shuffle_vector(result, result, _mask(range(4 * head, 4 * head + 4)))
            store(builder, four, _row(builder, out, out_row, head))
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
                weight = broadcast(builder, weight, 16)
                for j, sum_ in enumerate(sums[head]):
                    builder.store(multiply_add(builder, weight, v[j], builder.load(sum_)), sum_)
        for head in range(heads):
            for sum_, place in zip(sums[head], places[head], strict=True):
                store(builder, builder.load(sum_), place)
        return context.get_dummy_value()

    def typer(typingctx, weights, weight_row, values, value_row, count, out, out_row, like):
        return types.void(*[types.int64] * 7, like), codegen

    return intrinsic(typer)


_scores_of_four, _scores_of_one = _score_tile(TILE), _score_tile(1)
_mix_four, _mix_one = _mix_tile(TILE), _mix_tile(1)


def _sum_each(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Lane i of the result is the sum of vector i, of 4 or 16 vectors of 16 lanes.

    Half of the lanes of one vector and half of the other's, plus the other halves: four times.
    """
    for bit in (1, 2, 4, 8):
        own = _mask(i if i & bit == 0 else 16 + i for i in range(16))
        other = _mask(i ^ bit if i & bit == 0 else 16 + (i ^ bit) for i in range(16))
        pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, own), builder.shuffle_vector(a, b, other))
            for a, b in pairs
        ]
    return vectors[0]


def _mask(lanes: Iterable[int]) -> ir.Constant:
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def _row(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, index: int) -> ir.Value:
    return builder.add(address, builder.mul(stride, INT64(index)))


@fused_jit
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


@intrinsic
def _largest(typingctx, numbers):
    """The largest of STRETCH float32 numbers at an address.

    Anything if there is NaN among them, which `exponentials` then passes on.
    """

    def codegen(context, builder, signature, args):
        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        places = [builder.add(args[0], INT64(4 * i)) for i in range(0, STRETCH, 16)]
        largest = functools.reduce(larger, [load_floats(builder, place) for place in places])
        for bit in (8, 4, 2, 1):
            other = builder.shuffle_vector(largest, largest, _mask(i ^ bit for i in range(16)))
            largest = larger(largest, other)
        return builder.extract_element(largest, ir.IntType(32)(0))

    return types.float32(types.int64), codegen


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
