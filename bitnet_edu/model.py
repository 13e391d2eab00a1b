"""The engine: the same maths as reference.py in one compiled step, with a KV cache.

`kernels.step` does the work on the weights where they lie, memory-mapped or not; this module
prepares its tables and buffers, checks what comes in, and feeds it prompts tile by tile.
"""

import math
import threading
import time
from itertools import pairwise

import ml_dtypes
import numpy as np

from bitnet_edu.errors import BitNetError, ContextLengthError, InputError
from bitnet_edu.kernels.attention import PAD, SPAN, STRETCH, TILE
from bitnet_edu.kernels.bits import has_float16
from bitnet_edu.kernels.head import Screen
from bitnet_edu.kernels.simd import MAX_COLUMNS, NO_KERNEL, kernel_index, kernel_name
from bitnet_edu.kernels.step import (
    DOWN,
    GATE_UP,
    INPUT,
    MIDDLE,
    OUTPUT,
    QKV,
    STAGE_NAMES,
    STAGES,
    Cache,
    Shape,
    Table,
    Work,
    step,
)
from bitnet_edu.kernels.threads import default_threads, run
from bitnet_edu.layers import Observer, rope_frequencies
from bitnet_edu.weights import BitNetConfig, Weights

BATCH = 256  # prompt tokens that go through the layers together
WORTH_A_THREAD = 2**21  # bytes of weights times tokens: for less, waking another is not worth it
PRODUCTS = {QKV: (0, 3), OUTPUT: (3, 4), GATE_UP: (4, 6), DOWN: (6, 7)}  # a layer's matrices


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """np.zeros at a multiple of 64 bytes, so that no vector straddles two cache lines."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class KVCache:
    """Keys and values of the tokens seen so far, [layers, kv_heads, max_len, head_dim] each.

    dtype: float32 (default), or float16: half the memory and, in long contexts, half the time of
    attention, for an error of 5e-4 of each number.
    """

    def __init__(self, config: BitNetConfig, max_len: int, dtype: type = np.float32):
        if not 1 <= max_len <= config.max_position_embeddings:
            raise ContextLengthError(
                f"a cache of {max_len} tokens was asked for, but this model's context is 1 to "
                f"{config.max_position_embeddings} tokens: ask for a max_len in that range"
            )
        if dtype not in (np.float32, np.float16):
            raise InputError(f"a KV cache is float32 or float16, not {dtype}")
        if dtype == np.float16 and not has_float16():
            raise InputError("this CPU cannot convert float16: take a float32 KV cache")
        self.config = config
        rows, numbers = _round_up(max_len, TILE), _round_up(config.head_dim, PAD)
        shape = config.num_hidden_layers, config.num_key_value_heads, rows, numbers
        keys, values = _zeros(shape, dtype), _zeros(shape, dtype)
        self.keys = keys[:, :, :max_len, : config.head_dim]
        self.values = values[:, :, :max_len, : config.head_dim]
        self.max_len = max_len
        self.length = 0
        positions = np.arange(max_len, dtype=np.float32)[:, None]
        angles = positions * rope_frequencies(config.head_dim, config.rope_theta)
        bits = np.uint16 if dtype == np.float16 else dtype  # compiled code has no float16
        self._arrays = Cache(keys.view(bits), values.view(bits), np.cos(angles), np.sin(angles))

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        self.length = length


class BitNet:
    """A model that maps token ids to logits. Text comes in `bitnet_edu.generate`.

    `threads` (default: the physical cores) and `kernel` (default: the fastest that this CPU runs)
    may be changed at any time. Calls from several Python threads are safe: they take turns.
    """

    def __init__(self, config: BitNetConfig, weights: Weights):
        self.config = config
        self.weights = weights
        self.threads = default_threads()
        self._lock = threading.Lock()
        self.kernel = kernel_name()
        self._shape = Shape(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vocab_size,
            np.float32(config.rms_norm_eps),
            np.float32(config.head_dim**-0.5),
        )
        if max(config.hidden_size, config.intermediate_size) > MAX_COLUMNS:
            raise InputError(
                f"the kernels are exact up to {MAX_COLUMNS} columns, this model has more"
            )
        head = weights.lm_head
        self._head = (
            head if head.dtype == ml_dtypes.bfloat16 else head.astype(np.float32, copy=False)
        )
        self._head = np.require(self._head, requirements="CA")
        self._packed = [
            [np.require(matrix.packed, np.uint8, "C") for matrix in layer[:7]]
            for layer in weights.layers
        ]  # kept, for the table holds nothing but addresses
        self._table = self._make_table()
        self._bytes = sum(packed.nbytes for row in self._packed for packed in row)
        self._work: Work | None = None
        self._screen: Screen | None = None

    def new_cache(self, max_len: int | None = None, dtype: type = np.float32) -> KVCache:
        """An empty KV cache for up to `max_len` tokens (default: the model's whole context)."""
        return KVCache(self.config, max_len or self.config.max_position_embeddings, dtype)

    def screen_head(self, top_k: int = 1) -> None:
        """From now on `forward` reads half the head, and only its `top_k` best logits are exact.

        They are the best ones beyond doubt (see kernels/head.py), so greedy decoding, and sampling
        from up to `top_k` words, do not change; the other logits are a little off. Costs
        one byte for each number of the head, and a second or two.
        """
        if not 1 <= top_k <= self.config.vocab_size:
            raise InputError(f"top_k must be 1 to {self.config.vocab_size}, not {top_k}")
        screen = self._screen or Screen(self._head)
        with self._lock:
            self._screen, self._exact = screen, top_k
            codes = screen.codes.ctypes.data
            self._table = self._table._replace(head=codes, head_bytes=1, head_scales=screen.scales)

    def logits(self, ids: np.ndarray, observe: Observer | None = None) -> np.ndarray:
        """Scores after every prefix of the sequence: int[T] -> float32[T, vocab].

        `observe(name, array)`, where given, is shown what lies between the stages, under the names
        of `BitNetReference.logits`, tile by tile; the arrays are overwritten afterwards.
        """
        ids = self._checked(ids)
        hidden = np.empty((len(ids), self.config.hidden_size), np.float32)
        self._body(ids, self.new_cache(len(ids)), hidden, observe)
        scores = np.empty((len(ids), self.config.vocab_size), np.float32)
        for first in range(0, len(self._head), 8192):  # float32 copies of some rows at a time
            rows = slice(first, first + 8192)
            scores[:, rows] = hidden @ self._head[rows].astype(np.float32).T
        return scores

    def forward(self, ids: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append int[T] tokens to the cache; return the scores of the next token, float32[vocab].

        With the cache as it was: ContextLengthError if the tokens don't fit in it, BitNetError if
        NaN or Inf turn up.
        """
        return self._body(self._checked(ids), cache)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise InputError("token ids must be a non-empty one-dimensional list of integers")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise InputError(
                f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}"
            )
        return ids

    def _body(
        self,
        ids: np.ndarray,
        cache: KVCache,
        hidden: np.ndarray | None = None,
        observe: Observer | None = None,
    ) -> np.ndarray:
        """All layers, tile by tile; the cache grows by T.

        Returns the last token's logits, or fills `hidden`, float32[T, hidden], after the last norm.
        """
        if cache.config != self.config:
            raise InputError("this KV cache was made for another model: make one with new_cache")
        with self._lock:
            if cache.length + len(ids) > cache.max_len:
                raise ContextLengthError(
                    f"{len(ids)} tokens do not fit after {cache.length} in a context of "
                    f"{cache.max_len}: shorten the prompt or start a new conversation"
                )
            for first in range(0, len(ids), BATCH):
                tile = ids[first : first + BATCH]
                want_logits = hidden is None and first + len(tile) == len(ids)
                work = self._run(tile, cache, cache.length + first, want_logits, observe)
                if hidden is not None:
                    hidden[first : first + len(tile)] = work.normed[: len(tile), : hidden.shape[1]]
            if hidden is None and self._screen:
                x = work.normed[len(tile) - 1, : self._shape.hidden]
                self._screen.settle(work.logits, x, self._exact)
            cache.length += len(ids)
            return hidden if hidden is not None else work.logits.copy()

    def _run(
        self,
        ids: np.ndarray,
        cache: KVCache,
        start: int,
        want_logits: bool,
        observe: Observer | None = None,
    ) -> Work:
        if self._work is None or len(self._work.scores) < self.threads:
            self._work = self._make_work()
        work, tokens = self._work, len(ids)
        work.x[:tokens] = self.weights.embedding[ids]
        work.fault[0] = 0
        args = self._shape, self._table, cache._arrays, work, start, tokens
        kernel = kernel_index(self.kernel)
        threads = min(self.threads, 1 + tokens * self._bytes // WORTH_A_THREAD)
        stages = STAGES * self._shape.layers + 1 + want_logits
        for begin, end in pairwise(range(stages + 1) if observe else (0, stages)):
            run(step, (*args, begin, end, kernel, threads), threads)
            if observe:
                self._show(begin, work, tokens, observe)
        if work.fault[0]:
            layer, stage = divmod(int(work.fault[0]) - 1, STAGES)
            where = (
                f"layer {layer}, {STAGE_NAMES[stage]}" if layer < len(self._packed) else "last norm"
            )
            raise BitNetError(
                f"NaN or Inf among the activations ({where}): the weights are damaged or were read "
                "in the wrong format; `bitnet-edu verify` compares them with transformers"
            )
        return work

    @property
    def arrays_of_a_token(self) -> list[np.ndarray]:
        """All weights that a decode step reads: packed matrices, and the head or its int8 copy."""
        head = self._screen.codes if self._screen else self._head
        return [packed for row in self._packed for packed in row] + [head]

    def time_step(
        self, cache: KVCache, context: int, *, products: bool = True, head: bool = True
    ) -> float:
        """Seconds of one decode step after `context` tokens, without the parts that are False.

        What it computes is lost. For `benchmark`, which looks at what each part costs.
        """
        with self._lock:
            stages = STAGES * self._shape.layers + 1 + head
            kernel = kernel_index(self.kernel) if products else NO_KERNEL
            args = self._shape, self._table, cache._arrays, self._work, context, 1, 0, stages
            start = time.perf_counter()
            run(step, (*args, kernel, self.threads), self.threads)
            return time.perf_counter() - start

    def _show(self, stage: int, work: Work, tokens: int, observe: Observer) -> None:
        """What a stage has just made, under the reference's names."""
        layer, kind = divmod(stage, STAGES)
        hidden, table = self._shape.hidden, self._table
        if kind == INPUT:
            name = f"layers.{layer - 1}.after_feed_forward" if layer else "embedding"
            observe(name, work.x[:tokens])
        if kind == MIDDLE:
            observe(f"layers.{layer}.after_attention", work.x[:tokens])
        if layer == self._shape.layers:
            if kind == INPUT:
                observe("norm", work.normed[:tokens, :hidden])
            return
        # a norm makes the input of the next product, a product the sums of its matrices
        for m in range(*PRODUCTS.get(kind, PRODUCTS.get(kind + 1, (0, 0)))):
            name = f"layers.{layer}.{list(self.config.matrix_shapes)[m]}"
            if kind in PRODUCTS:
                first, rows = table.offsets[m], 4 * table.rows[m]
                observe(f"{name}.sums", work.sums[:tokens, first : first + rows])
            else:
                observe(f"{name}.input", work.normed[:tokens, : table.columns[m]])
                observe(f"{name}.int8", work.q[:tokens, : table.columns[m]])

    def _make_table(self) -> Table:
        layers = self.weights.layers
        out, columns = np.array(list(self.config.matrix_shapes.values())).T
        q, k, _, _, gate, _, _ = out
        return Table(
            np.array([[packed.ctypes.data for packed in row] for row in self._packed], np.int64),
            np.array([[matrix.scale for matrix in layer[:7]] for layer in layers], np.float32),
            out // 4,
            columns.copy(),
            np.array([0, q, q + k, 0, 0, gate, 0]),
            np.array([layer.input_layernorm for layer in layers] + [self.weights.norm], np.float32),
            np.array([layer.post_attention_layernorm for layer in layers], np.float32),
            np.array([layer.attn_sub_norm for layer in layers], np.float32),
            np.array([layer.ffn_sub_norm for layer in layers], np.float32),
            self._head.ctypes.data,
            self._head.itemsize,
            np.empty(0, np.float32),
        )

    def _make_work(self) -> Work:
        c = self.config
        wide = max(c.hidden_size, c.intermediate_size)
        heads = c.num_attention_heads
        kv = c.num_key_value_heads * c.head_dim
        slots, numbers = (
            max(BATCH, -(-c.max_position_embeddings // SPAN)),
            _round_up(c.head_dim, PAD),
        )
        return Work(
            x=_zeros((BATCH, c.hidden_size), np.float32),
            normed=_zeros((BATCH, wide), np.float32),
            q=_zeros((BATCH, wide), np.int8),
            q_scale=_zeros((BATCH,), np.float32),
            q_sum=_zeros((BATCH,), np.int32),
            sums=_zeros((BATCH, max(c.hidden_size + 2 * kv, 2 * c.intermediate_size)), np.int32),
            queries=_zeros((BATCH, heads, numbers), np.float32),
            mixed=_zeros((slots, heads, numbers), np.float32),
            largest=_zeros((slots, heads), np.float32),
            total=_zeros((slots, heads), np.float32),
            scores=_zeros((self.threads, heads // c.num_key_value_heads, STRETCH), np.float32),
            logits=_zeros((c.vocab_size,), np.float32),
            fault=_zeros((1,), np.int64),
        )
