"""Attention over the KV cache, one token and one KV head at a time."""

import math

import numpy as np

from bitnet_edu.kernels.bits import as_float, jit, narrow, sum_jit, widen

SPAN = 256  # positions looked at in one go: no more scores than this exist at a time


@jit
def rotate_and_store(sums, x_scale, scales, cos, sin, queries, keys, values):
    """Scale the int32 sums of q, k and v; rotate q and k (layers.rope); store all three.

    sums: [hidden + 2 * kv_heads * head_dim], queries: float32[heads, head_dim], keys, values: this
    position's place in the cache, [kv_heads, head_dim].
    """
    heads, size = queries.shape
    for head in range(heads):
        rotate(sums[head * size : (head + 1) * size], x_scale * scales[0], cos, sin, queries[head])
    for head in range(len(keys)):
        first = (heads + head) * size
        rotate(sums[first : first + size], x_scale * scales[1], cos, sin, keys[head])
        first += len(keys) * size
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
def attend(queries, keys, values, scores, mixed, largest, total):
    """mixed[h] = sum of exp(score - largest[h]) * value over all positions, total[h] = sum of exp.

    queries, mixed: float32[group, head_dim], keys, values: [positions, head_dim], largest, total:
    float32[group]; scores: scratch, float32[group, SPAN]. A running maximum and sum keep it to one
    pass (online softmax: Milakov and Gimelshein, arXiv 1805.02867).
    """
    group, size = queries.shape
    mixed[:] = 0
    largest[:] = -np.inf
    total[:] = 0
    scale = np.float32(size**-0.5)
    for first in range(0, len(keys), SPAN):
        last = min(first + SPAN, len(keys))
        for i in range(first, last):
            for head in range(group):
                scores[head, i - first] = dot(queries[head], keys[i]) * scale
        for head in range(group):
            row = scores[head, : last - first]
            before = largest[head]
            for score in row:
                largest[head] = max(largest[head], score)
            shrink = math.exp(before - largest[head])
            exponentials(row, largest[head])
            total[head] = total[head] * shrink + add_up(row)
            for i in range(size):
                mixed[head, i] *= shrink
        for i in range(first, last):
            for head in range(group):
                add_scaled(mixed[head], scores[head, i - first], values[i])


@jit
def join(mixed, largest, total, out):
    """What the spans of positions gave becomes one answer: softmax-weighted values of each head.

    mixed: float32[spans, heads, head_dim], largest, total: float32[spans, heads], out:
    float32[heads * head_dim].
    """
    spans, heads, size = mixed.shape
    for head in range(heads):
        joined = out[head * size : (head + 1) * size]
        joined[:] = 0
        most, sum_ = np.float32(-np.inf), np.float32(0)
        for span in range(spans):
            most = max(most, largest[span, head])
        for span in range(spans):
            weight = math.exp(largest[span, head] - most)
            sum_ += weight * total[span, head]
            add_scaled(joined, weight, mixed[span, head])
        for i in range(size):
            joined[i] /= sum_


@sum_jit
def dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * widen(b[i])
    return total


@sum_jit
def add_up(x):
    total = np.float32(0)
    for v in x:
        total += v
    return total


@jit
def add_scaled(out, weight, values):
    for i in range(len(out)):
        out[i] += weight * widen(values[i])


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
