"""The whole model as one compiled function: `step` runs tokens through all layers and the head.

A layer is ten stages. The five named after matrices and attention are shared by all threads, chunk
by chunk (see threads.py); the pointwise ones in between take one token a chunk. Between two stages
lie only the buffers of `Work`, made once: nothing is allocated while tokens are made.
"""

from typing import NamedTuple

import numpy as np

from bitnet_edu.kernels.attention import (
    SPAN,
    TOKENS,
    attend,
    holds_infinity,
    join,
    rotate_and_store,
)
from bitnet_edu.kernels.bits import cached_jit, ceil_div, jit
from bitnet_edu.kernels.head import head_rows
from bitnet_edu.kernels.pointwise import add_sums, norm_and_quantize, squared_relu
from bitnet_edu.kernels.screen import screened_rows
from bitnet_edu.kernels.simd import fetch, ternary_rows
from bitnet_edu.kernels.threads import chunk_count, finish, finished, now, take, wait_for

STAGE_NAMES = (
    "input norm",
    "q, k and v",
    "rotation",
    "attention",
    "attention's SubLN",
    "output projection",
    "middle norm",
    "gate and up",
    "feed-forward's SubLN",
    "down projection",
)
STAGES = len(STAGE_NAMES)
INPUT, QKV, ROTATION, ATTENTION, HEADS, OUTPUT, MIDDLE, GATE_UP, SQUARED_RELU, DOWN = range(STAGES)
PART_NAMES = ("ternary products", "attention", "pointwise", "head")  # of a profile
PRODUCTS, ATTENDING, POINTWISE, HEAD = range(len(PART_NAMES))
FETCH = 32768  # bytes of weights that a waiting thread asks for: what its caches have room for


class Shape(NamedTuple):
    """The numbers of a `BitNetConfig` that compiled code needs."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    eps: np.float32
    score_scale: np.float32  # head_dim ** -0.5


class Table(NamedTuple):
    """The weights: matrices as addresses, for they may be memory-mapped; the rest as arrays."""

    packing: tuple  # one of simd.PACKINGS
    matrices: np.ndarray  # int64[layers, 7] addresses of packed bytes
    scales: np.ndarray  # float32[layers, 7]
    rows: np.ndarray  # int64[7] byte rows
    columns: np.ndarray  # int64[7]
    outputs: np.ndarray  # int64[7] output rows
    offsets: np.ndarray  # int64[7] where a matrix's sums begin among those of its stage
    input_norm: np.ndarray  # float32[layers + 1, hidden]; the last row is the model's last norm
    middle_norm: np.ndarray  # float32[layers, hidden]
    attn_sub_norm: np.ndarray  # float32[layers, hidden]
    ffn_sub_norm: np.ndarray  # float32[layers, ffn]
    head: int  # address of [vocab, hidden], in the dtype that head_bytes tells
    head_bytes: int  # 4: float32, 2: bfloat16, 1: int8 times head_scales
    head_scales: np.ndarray  # float32[vocab] or [0]
    ahead: int  # bytes of weights that memory is asked for ahead of their use, or 0
    head_ahead: int  # the same for the head


class Work(NamedTuple):
    """The buffers between stages, for up to T tokens at a time."""

    x: np.ndarray  # float32[T, hidden], the residual stream
    inner: np.ndarray  # float32[T, max(hidden, ffn)], what attention or squared ReLU made, or a
    normed: np.ndarray  # row for each thread (see `pointwise`); the same of normed
    q: np.ndarray  # int8[T, max(hidden, ffn)], quantized activations
    q_scale: np.ndarray  # float32[T]
    q_sum: np.ndarray  # int32[T]
    sums: np.ndarray  # int32[T, most outputs of a stage]
    queries: np.ndarray  # float32[T, heads, padded head_dim]
    mixed: np.ndarray  # float32[slots, heads, padded head_dim], what a span of positions gave
    largest: np.ndarray  # float32[slots, heads], its largest score
    total: np.ndarray  # float32[slots, heads], its sum of exp(score - largest)
    scores: np.ndarray  # float32[threads, TOKENS, heads / kv_heads, STRETCH]
    codes: np.ndarray  # uint8[threads, scratch_size], unpacked weights
    fault: np.ndarray  # int64[1]: 0, or 1 + the first stage whose input held NaN or Inf
    ticks: np.ndarray  # int64[threads, >= 4] nanoseconds of each part, or [0, 0]: nobody asks


class Cache(NamedTuple):
    """Keys and values, float32 or uint16 that holds float16, and the rotations of each position."""

    keys: np.ndarray  # [layers, kv_heads, padded max_len, padded head_dim]
    values: np.ndarray
    cos: np.ndarray  # float32[max_len, head_dim / 2]
    sin: np.ndarray


@cached_jit
def step(
    shape, table, cache, work, logits, start, tokens, begin, end, kernel, threads, thread, counters
):
    """Run work.x[:tokens], at positions start.., through the stages from `begin` to before `end`.

    Stage STAGES * layers is the last norm, which leaves the tokens in work.normed; the one after
    it makes logits, float32[n, vocab], of the last n tokens. A stage run alone leaves what it makes
    for all tokens; else only what later stages need is kept. Called by several threads at once with
    the same arguments but for `thread`. What is computed for a token does not depend on how many
    there are, nor on the threads: a logit is the same to the bit however a text is cut into calls.
    """
    spans = ceil_div(start + tokens, SPAN)
    done, timed = 0, len(work.ticks) > 0
    chunk = take(counters)
    for stage in range(begin, end):
        layer, kind = stage // STAGES, stage % STAGES
        first, last = stage_matrices(kind) if layer < shape.layers else (0, 0)
        rows, part = shape.vocab, POINTWISE
        if last:
            part = PRODUCTS
            rows = table.rows[first:last].sum()
            count = chunk_count(rows * table.columns[first], threads)
        elif kind == ATTENTION:
            part = ATTENDING
            count = ceil_div(tokens, TOKENS) * shape.kv_heads * spans
        elif stage > STAGES * shape.layers:
            part = HEAD
            count = chunk_count(rows * shape.hidden * table.head_bytes, threads)
        else:
            count = tokens
        while chunk < done + count:
            index = chunk - done
            row, end_row = index * rows // count, (index + 1) * rows // count
            if last and tokens == 1 and not finished(counters, done):
                fetch_rows(layer, first, row, table)
            wait_for(counters, done)
            began = now() if timed else 0
            if last:
                scratch = work.codes[thread]
                multiply(layer, first, last, row, end_row, table, work, tokens, kernel, scratch)
            elif kind == ATTENTION:
                attention_chunk(shape, cache, work, layer, index, start, tokens, spans, thread)
            elif stage > STAGES * shape.layers:
                x = work.normed[tokens - len(logits) : tokens, : shape.hidden]
                if table.head_bytes == 1:
                    screened_rows(
                        kernel, table.head, table.head_scales, x, row, end_row, logits,
                        table.head_ahead, work.codes[thread],
                    )  # fmt: skip
                else:
                    args = x, row, end_row, logits, table.head_ahead
                    head_rows(table.head, table.head_bytes, *args)
            else:
                row = index if end - begin == 1 else thread
                pointwise(stage, index, row, shape, table, cache, work, start, spans)
            if timed:
                work.ticks[thread, part] += now() - began
            finish(counters)
            chunk = take(counters)
        done += count
    wait_for(counters, done)


@jit
def stage_matrices(kind):
    """Which of a layer's seven matrices a stage multiplies with: [first, last)."""
    if kind == QKV:
        return 0, 3
    if kind == OUTPUT:
        return 3, 4
    if kind == GATE_UP:
        return 4, 6
    if kind == DOWN:
        return 6, 7
    return 0, 0


@jit
def multiply(layer, first, last, row, end_row, table, work, tokens, kernel, scratch):
    """Byte rows row..end_row of a stage's matrices, counted through, for all tokens."""
    for m in range(first, last):
        rows, out = table.rows[m], work.sums[:, table.offsets[m] :]
        begin, end = max(row, 0), min(end_row, rows)
        if begin < end:
            ternary_rows(
                kernel, table.packing, table.matrices[layer, m], rows, table.columns[m],
                table.outputs[m], begin, end, work.q, work.q_sum, tokens, out, table.ahead, scratch,
            )  # fmt: skip
        row, end_row = row - rows, end_row - rows


@jit
def fetch_rows(layer, m, row, table):
    """Ask for the first weights of a chunk while others still make what they multiply."""
    while row >= table.rows[m]:
        row -= table.rows[m]
        m += 1
    fetch(table.matrices[layer, m] + row * table.columns[m], FETCH)


@jit
def attention_chunk(shape, cache, work, layer, chunk, start, tokens, spans, thread):
    """A few tokens, the query heads of one KV head, and one span of positions."""
    group, tiles = shape.heads // shape.kv_heads, ceil_div(tokens, TOKENS)
    # tiles last: what one has read is still in the second-level cache for the next
    kv_head, rest = chunk // (spans * tiles), chunk % (spans * tiles)
    span, token = rest // tiles, rest % tiles * TOKENS
    end, first = min(tokens, token + TOKENS), span * SPAN
    heads = slice(kv_head * group, (kv_head + 1) * group)
    slots = slice(token * spans + span, end * spans, spans)
    if start + end <= first:  # a later token looks back at this span, these can't yet
        return
    attend(
        work.queries[token:end, heads],
        cache.keys[layer, kv_head, first:],
        cache.values[layer, kv_head, first:],
        start + token + 1 - first,
        shape.score_scale,
        work.scores[thread],
        work.mixed[slots, heads],
        work.largest[slots, heads],
        work.total[slots, heads],
    )


@jit
def pointwise(stage, token, row, shape, table, cache, work, start, spans):
    """What happens to one token between two matrices, or between a matrix and attention.

    row: of the buffers `inner` and `normed`, which a thread uses for all of its tokens, so that
    they stay in its caches, unless somebody wants to see them.
    """
    layer, kind = stage // STAGES, stage % STAGES
    if layer == shape.layers:  # the head needs all
        row = token
    x, x_scale = work.x[token], work.q_scale[token]
    if kind == ROTATION:
        rotate_and_store(
            work.sums[token],
            x_scale,
            table.scales[layer],
            cache.cos[start + token],
            cache.sin[start + token],
            work.queries[token],
            cache.keys[layer, :, start + token],
            cache.values[layer, :, start + token],
        )
        for head in range(shape.kv_heads):
            keys = cache.keys[layer, head, start + token]
            values = cache.values[layer, head, start + token]
            if holds_infinity(keys) or holds_infinity(values):
                note_fault(work, stage)
        return
    size = shape.ffn if kind == SQUARED_RELU else shape.hidden
    sums, inner, normed = work.sums[token], work.inner[row, :size], work.normed[row, :size]
    if kind == INPUT:
        inner, weight = x, table.input_norm[layer]
        if layer > 0:
            add_sums(x, sums, x_scale * table.scales[layer - 1, 6])
    elif kind == MIDDLE:
        inner, weight = x, table.middle_norm[layer]
        add_sums(x, sums, x_scale * table.scales[layer, 3])
    elif kind == HEADS:
        weight = table.attn_sub_norm[layer]
        slots = slice(token * spans, token * spans + ceil_div(start + token + 1, SPAN))
        join(work.mixed[slots], work.largest[slots], work.total[slots], inner)
    else:
        weight = table.ffn_sub_norm[layer]
        gate_scale, up_scale = x_scale * table.scales[layer, 4], x_scale * table.scales[layer, 5]
        squared_relu(sums[:size], gate_scale, sums[size:], up_scale, inner)
    q = work.q[token, :size]
    scale, q_sum, finite = norm_and_quantize(inner, weight, shape.eps, normed, q)
    work.q_scale[token], work.q_sum[token] = scale, q_sum
    if not finite:
        note_fault(work, stage)


@jit
def note_fault(work, stage):
    """Something is NaN or Inf: the first stage where that is seen is what will be reported."""
    work.fault[0] = stage + 1 if work.fault[0] == 0 else min(stage + 1, work.fault[0])
