"""The engine: the same maths as reference.py in one compiled step, with a KV cache.

`kernels.step` does the work on the weights where they lie, memory-mapped or not; this module
prepares its tables and buffers, checks what comes in, and feeds it prompts tile by tile.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import ml_dtypes
import numpy as np

from bitnet_edu.container import memory_limit
from bitnet_edu.errors import BitNetError, ContextLengthError, InputError, require_whole
from bitnet_edu.kernels.attention import PAD, SPAN, STRETCH, TILE, TOKENS
from bitnet_edu.kernels.bits import has_float16
from bitnet_edu.kernels.border import address, aligned_zeros, checked, release
from bitnet_edu.kernels.matmul import base3_of
from bitnet_edu.kernels.screen import MOST_HIDDEN, Screen
from bitnet_edu.kernels.simd import (
    MAX_COLUMNS,
    PACKINGS,
    kernel_name,
    kernel_type,
    scratch_size,
)
from bitnet_edu.kernels.step import (
    INPUT,
    MIDDLE,
    PART_NAMES,
    ROTATION,
    STAGE_NAMES,
    STAGES,
    Cache,
    Shape,
    Table,
    Work,
    stage_matrices,
    step,
)
from bitnet_edu.kernels.threads import (
    MOST_THREADS,
    checked_threads,
    default_threads,
    run,
    run_long,
)
from bitnet_edu.kernels.tuning import ENOUGH, Tuning, tuning_for
from bitnet_edu.layers import Observer, rope_frequencies
from bitnet_edu.sampling import Sampling, sample
from bitnet_edu.weights import BitNetConfig, TernaryMatrix, Weights

BATCH = 256  # prompt tokens that go through the layers together
SPREAD = 32  # tokens whose embeddings are in memory together
SLOTS = 4 * BATCH  # of attention: a token in each span of positions that it looks back at
LONG = 2**31  # bytes of weights times tokens from which on Ctrl-C can't wait for the end
WORTH_A_THREAD = 2**21  # bytes of weights times tokens: for less, waking another is not worth it
HEADS = ("exact", "screened", "auto")
IN_VAIN, PAUSE = 4, 32  # so many steps without a decision in half the bytes: so many without them
HEAD_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
NOT_TIMED = np.zeros((0, 0), np.int64)
INNER = {"o_proj": "attention", "down_proj": "feed_forward"}  # what the two SubLNs normalize


@dataclass(frozen=True)
class Settings:
    """How an engine works; what it computes does not depend on it, but for a float16 cache.

    threads: 1 to 256 (default: the physical cores). kernel: a name in `kernels.simd.KERNELS`
    (default: the fastest that this CPU runs). packing: of the ternary weights while they are worked
    with, "2bit", "base3", or "auto": what is faster here (see `kernels/tuning.py`). cache_dtype: of
    a new KV cache, float32 or float16. head: "exact", or "screened": tokens are chosen with half
    the head's bytes where these decide, which costs a copy of one byte for each number of the head
    (see `kernels/screen.py`), or "auto": screened where the head is large. Raises InputError.
    """

    threads: int = field(default_factory=default_threads)
    kernel: str = field(default_factory=kernel_name)
    packing: str = "auto"
    cache_dtype: type = np.float32
    head: str = "auto"

    def __post_init__(self):
        checked_threads(self.threads)
        kernel_type(self.kernel)
        if self.packing not in ("auto", *PACKINGS):
            raise InputError(f"packing must be auto, 2bit or base3, not {self.packing!r}")
        _checked_cache_dtype(self.cache_dtype)
        if self.head not in HEADS:
            raise InputError(f"the head is exact, screened or auto, not {self.head!r}")


class KVCache:
    """Keys and values of the tokens seen so far, [layers, kv_heads, max_len, head_dim] each.

    dtype: float32 (default), or float16: half the memory and, in long contexts, half the time of
    attention, for an error of 5e-4 of each number. ContextLengthError for more tokens than the
    model's context, InputError for more than memory holds.
    """

    def __init__(self, config: BitNetConfig, max_len: int, dtype: type = np.float32):
        max_len = require_whole(max_len, -(2**63), 2**63, "max_len")
        if not 1 <= max_len <= config.max_position_embeddings:
            raise ContextLengthError(
                f"a cache of {max_len} tokens was asked for, but this model's context is 1 to "
                f"{config.max_position_embeddings} tokens: ask for a max_len in that range"
            )
        self.config = config
        self.dtype = _checked_cache_dtype(dtype)
        self.length = 0
        rows, numbers = _round_up(max_len, TILE), _round_up(config.head_dim, PAD)
        shape = config.num_hidden_layers, config.num_key_value_heads, rows, numbers
        size = 2 * int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        size += 4 * rows * config.head_dim  # the rotations
        stored = np.uint16 if dtype == np.float16 else np.float32  # compiled code has no float16
        try:
            if size > memory_limit():
                raise MemoryError
            positions = np.arange(max_len, dtype=np.float32)[:, None]
            angles = positions * rope_frequencies(config.head_dim, config.rope_theta)
            keys, values = aligned_zeros(shape, stored), aligned_zeros(shape, stored)
            self._arrays = Cache(keys, values, np.cos(angles), np.sin(angles))
        except MemoryError:
            raise InputError(
                f"a KV cache of {max_len} tokens takes {size / 1e9:.1f} GB, more than there is "
                "memory: ask for a smaller max_len"
            ) from None

    @property
    def max_len(self) -> int:
        return len(self._arrays.cos)

    @property
    def keys(self) -> np.ndarray:
        return self._numbers(self._arrays.keys)

    @property
    def values(self) -> np.ndarray:
        return self._numbers(self._arrays.values)

    def _numbers(self, padded: np.ndarray) -> np.ndarray:
        return padded.view(self.dtype)[:, :, : self.max_len, : self.config.head_dim]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.length = require_whole(length, 0, self.length, "the number of tokens to keep")


class BitNet:
    """A model that maps token ids to logits. Text comes in `bitnet_edu.generate`.

    `settings`, and with them `threads` and `kernel`, may be changed at any time: a call that has
    begun keeps those it found. Calls from several Python threads are safe: they take turns. Of the
    tokens chosen with a screened head, `screened` in all, `whole_heads` needed the exact one too.
    InputError if config and weights don't fit each other, or are more than the kernels can do.
    """

    def __init__(self, config: BitNetConfig, weights: Weights):
        _require_fit(config, weights)
        self.config = config
        self.weights = weights
        self._settings = Settings()
        self._lock = threading.Lock()
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
        head = weights.lm_head
        narrow = head.dtype == ml_dtypes.bfloat16
        # kept, for the table holds nothing but addresses
        self._head = head if narrow else head.astype(np.float32, copy=False)
        self._stored = weights.layers[0].q_proj.packing
        self._tables: dict[str, Table] = {}
        self._base3: list[np.ndarray] = []  # kept, as the head is
        self._tunings: dict[tuple[str, int], Tuning] = {}
        self._bytes = sum(m.packed.nbytes for layer in weights.layers for m in layer[:7])
        self._work: Work | None = None
        self._screen: Screen | None = None  # there is one while settings.head is "screened"
        self.screened = self.whole_heads = 0
        self._in_vain = self._pause = 0  # steps
        _engines.add(self)

    @property
    def settings(self) -> Settings:
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        if not isinstance(settings, Settings):
            raise InputError(f"settings must be made by model.Settings, not {settings!r}")
        if settings.packing == "2bit" and self._stored == "base3":
            raise InputError(
                "this model lies in base 3: `bitnet-edu convert` makes a model in 2 bits of it"
            )
        with self._lock:
            screen = self._screen if settings.head != "exact" else None
            if settings.head == "screened" and screen is None:
                screen = Screen(self._head, settings.threads)
            self._settings, self._screen = settings, screen

    @property
    def threads(self) -> int:
        return self._settings.threads

    @threads.setter
    def threads(self, threads: int) -> None:
        self.settings = replace(self._settings, threads=threads)

    @property
    def kernel(self) -> str:
        return self._settings.kernel

    @kernel.setter
    def kernel(self, kernel: str) -> None:
        self.settings = replace(self._settings, kernel=kernel)

    def new_cache(self, max_len: int | None = None, dtype: type | None = None) -> KVCache:
        """An empty KV cache for up to `max_len` tokens (default: the model's whole context)."""
        max_len = self.config.max_position_embeddings if max_len is None else max_len
        return KVCache(self.config, max_len, self._settings.cache_dtype if dtype is None else dtype)

    def logits(self, ids: np.ndarray, observe: Observer | None = None) -> np.ndarray:
        """Scores after every prefix of the sequence: int[T] -> float32[T, vocab].

        Row t is what `forward` returns once it has been given the first t + 1 tokens, in whatever
        portions, to the bit. `observe` as for `forward`.
        """
        ids = self._checked(ids)
        cache = self.new_cache(len(ids))
        scores = np.empty((len(ids), self.config.vocab_size), np.float32)
        self._body(ids, cache, scores, observe)
        return scores

    def forward(
        self, ids: np.ndarray, cache: KVCache, observe: Observer | None = None
    ) -> np.ndarray:
        """Append int[T] tokens to the cache; return the scores of the next token, float32[vocab].

        `observe(name, array)`, where given, is shown what lies between the stages, under the names
        of `BitNetReference.logits`, tile by tile; the arrays are overwritten afterwards.

        With the cache as it was: InputError for ids that are none, ContextLengthError if the tokens
        don't fit in the cache, BitNetError if NaN or Inf turn up.
        """
        ids = self._checked(ids)
        scores = np.empty((1, self.config.vocab_size), np.float32)
        self._body(ids, cache, scores, observe)
        return scores[0]

    def prefill(self, ids: np.ndarray, cache: KVCache) -> None:
        """Append int[T] tokens to the cache, without any scores: the head is not read."""
        no_scores = np.empty((0, self.config.vocab_size), np.float32)
        self._body(self._checked(ids), cache, no_scores, None)

    def next_tokens(
        self, ids: np.ndarray, cache: KVCache, sampling: Sampling, keys: np.ndarray
    ) -> list[int]:
        """Append int[T] tokens to the cache; choose what follows each of the last n of them.

        keys: uint64[n], n <= T, the random number of each choice. Errors as for `forward`.
        """
        ids = self._checked(ids)
        if len(checked(keys, np.uint64, (None,), "keys")) > len(ids):
            raise InputError(f"{len(keys)} choices can't be made after {len(ids)} tokens")
        scores, screen = (
            np.empty((len(keys), self.config.vocab_size), np.float32),
            self._screening(),
        )
        if screen is None:
            self._body(ids, cache, scores, None)
            return [sample(row, int(key), sampling) for row, key in zip(scores, keys, strict=True)]
        x = np.empty((len(keys), self.config.hidden_size), np.float32)
        self._body(ids, cache, scores, None, (screen, x))
        with self._lock:
            return self._choose(screen, scores, x, keys, sampling)

    def _screening(self) -> Screen | None:
        """What to choose the next tokens with. By itself, where the head is large: there half of
        its bytes save more than they cost. Not for a while after they decided nothing.
        """
        with self._lock:
            if self._settings.head != "auto":
                return self._screen
            if self._pause > 0 or not self._screens(self._settings):
                self._pause -= 1
                return None
            self._screen = self._screen or Screen(self._head, self._settings.threads)
            return self._screen

    def _screens(self, settings: Settings) -> bool:
        """Whether tokens are chosen without reading the whole head, as a rule."""
        large = self._head.nbytes >= ENOUGH and self.config.hidden_size <= MOST_HIDDEN
        return settings.head == "screened" or (settings.head == "auto" and large)

    def _choose(
        self,
        screen: Screen,
        scores: np.ndarray,
        x: np.ndarray,
        keys: np.ndarray,
        sampling: Sampling,
    ) -> list[int]:
        """From screened scores, float32[n, vocab], and hidden vectors, float32[n, hidden]."""
        threads, vocab = self._settings.threads, self.config.vocab_size
        tokens = [
            screen.choose(row, vector, int(key), sampling.numbers, threads)
            for row, vector, key in zip(scores, x, keys, strict=True)
        ]
        left = [place for place, token in enumerate(tokens) if token is None]
        if left:
            exact = np.empty((len(left), vocab), np.float32)
            screen.read(np.arange(vocab, dtype=np.int32), x[left], exact, threads)
            for place, row in zip(left, exact, strict=True):
                tokens[place] = sample(row, int(keys[place]), sampling)
        self.screened += len(tokens)
        self.whole_heads += len(left)
        self._in_vain = self._in_vain + 1 if len(left) == len(tokens) else 0
        if self._in_vain >= IN_VAIN:
            self._pause = PAUSE
        return tokens

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        try:
            ids = np.asarray(ids)
        except ValueError:  # lists of different lengths
            ids = np.array(None)
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
        scores: np.ndarray,
        observe: Observer | None,
        screened: tuple[Screen, np.ndarray] | None = None,
        ticks: np.ndarray = NOT_TIMED,
    ) -> None:
        """All layers, tile by tile; the cache grows by T, the last n tokens fill `scores`.

        screened: what makes the scores, and room for what they are made of, float32[n, hidden].
        """
        with self._lock:
            settings = self._settings
            self._require_room(cache, len(ids))
            table = self._table_for(settings)
            if screened:
                table = self._screened_table(table, screened[0])
            before = len(ids) - len(scores)
            for first, last in _tiles(cache.length, len(ids)):
                part = slice(max(0, first - before), max(0, last - before))
                start = cache.length + first
                tile, rows = ids[first:last], scores[part]
                work = self._run(tile, cache, start, rows, table, settings, observe, ticks)
                if screened:
                    last_ones = slice(last - first - len(rows), last - first)
                    screened[1][part] = work.normed[last_ones, : self._shape.hidden]
            cache.length += len(ids)

    def _require_room(self, cache: KVCache, tokens: int) -> None:
        if not isinstance(cache, KVCache) or cache.config != self.config:
            raise InputError("this KV cache was made for another model: make one with new_cache")
        require_whole(cache.length, 0, cache.max_len, "the length of a KV cache")
        if cache.length + tokens > cache.max_len:
            raise ContextLengthError(
                f"{tokens} tokens do not fit after {cache.length} in a context of "
                f"{cache.max_len}: shorten the prompt or start a new conversation"
            )

    def _run(
        self,
        ids: np.ndarray,
        cache: KVCache,
        start: int,
        scores: np.ndarray,
        table: Table,
        settings: Settings,
        observe: Observer | None,
        ticks: np.ndarray,
    ) -> Work:
        """One tile of tokens through all stages; the last ones fill `scores`, float32[n, vocab]."""
        work, tokens = self._work_for(settings.threads), len(ids)
        self._embed(ids, work.x, settings)
        work.fault[0] = 0
        timed = work._replace(ticks=ticks)
        args = self._shape, table, cache._arrays, timed, scores, start, tokens
        kernel = kernel_type(settings.kernel)
        size = tokens * self._bytes
        threads = min(settings.threads, 1 + size // WORTH_A_THREAD)
        work_off = run_long if size > LONG else run
        stages = STAGES * self._shape.layers + 1 + (len(scores) > 0)
        self._work = None  # not used again if an exception ends the work on it
        for begin, end in pairwise(range(stages + 1) if observe else (0, stages)):
            work_off(step, (*args, begin, end, kernel, threads), threads)
            if observe:
                self._show(begin, cache, work, start, tokens, observe)
        self._work = work
        if work.fault[0]:
            raise BitNetError(self._explain(*divmod(int(work.fault[0]) - 1, STAGES)))
        return work

    def _embed(self, ids: np.ndarray, x: np.ndarray, settings: Settings) -> None:
        """x[t] = embedding[ids[t]]; of a head that is seldom read, no more stays in memory."""
        spare = len(ids) > TOKENS and self._screens(settings)
        for first in range(0, len(ids), SPREAD):
            part = slice(first, min(first + SPREAD, len(ids)))
            x[part] = self.weights.embedding[ids[part]]
            if spare:
                release(self.weights.embedding)  # each row brings a megabyte around it along

    def _work_for(self, threads: int) -> Work:
        if self._work is None or len(self._work.scores) < threads:
            self._work = self._make_work(threads)
        return self._work

    def _explain(self, layer: int, stage: int) -> str:
        if stage == ROTATION:
            return (
                f"keys or values of layer {layer} are beyond 65,504, the largest float16: take a "
                "float32 KV cache for this model"
            )
        last = layer == self._shape.layers
        where = "last norm" if last else f"layer {layer}, {STAGE_NAMES[stage]}"
        return (
            f"NaN or Inf among the activations ({where}): the weights are damaged or were read "
            "in the wrong format; `bitnet-edu verify` compares them with transformers"
        )

    @property
    def arrays_of_a_token(self) -> list[np.ndarray]:
        """All weights that a decode step reads: packed matrices, and the head or its int8 copy."""
        with self._lock:
            packed = self._arrays(self._packing(self._settings))
        screen = self._screen
        return [*packed, screen.copy.codes if screen else self._head]

    def profile(self, ids: np.ndarray, cache: KVCache) -> dict[str, float]:
        """Append int[T] tokens to the cache; the seconds that this took, part by part.

        Each of the `PART_NAMES` is the time that threads worked on it, averaged over them. What is
        left of the whole is "waiting": for each other, for a helper to begin, and for Python.
        A core that another program takes in the middle of a chunk counts as work. Errors as for
        `forward`.
        """
        ids = self._checked(ids)
        scores = np.empty((1, self.config.vocab_size), np.float32)
        ticks = aligned_zeros((MOST_THREADS, 8), np.int64)  # a cache line for each thread
        threads, start = self.threads, time.perf_counter()
        self._body(ids, cache, scores, None, ticks=ticks)
        whole = time.perf_counter() - start
        seconds = ticks.sum(axis=0) / 1e9 / threads
        parts = {name: float(s) for name, s in zip(PART_NAMES, seconds, strict=False)}
        return parts | {"waiting": whole - sum(parts.values())}

    def _show(
        self, stage: int, cache: KVCache, work: Work, start: int, tokens: int, observe: Observer
    ) -> None:
        """What a stage has just made, under the reference's names."""
        layer, kind = divmod(stage, STAGES)
        hidden, table = self._shape.hidden, next(iter(self._tables.values()))
        prefix = f"layers.{layer}."
        if kind == INPUT and layer <= self._shape.layers:
            name = f"layers.{layer - 1}.after_feed_forward" if layer else "embedding"
            observe(name, work.x[:tokens])
        if kind == MIDDLE:
            observe(f"{prefix}after_attention", work.x[:tokens])
        if layer == self._shape.layers:
            if kind == INPUT:
                observe("norm", work.normed[:tokens, :hidden])
            return
        if kind == ROTATION:
            observe(f"{prefix}queries", work.queries[:tokens, :, : self.config.head_dim])
            for name, numbers in (("keys", cache.keys), ("values", cache.values)):
                made = numbers[layer, :, start : start + tokens].swapaxes(0, 1)
                observe(f"{prefix}{name}", made.astype(np.float32))
        # a norm makes the input of the next product, a product the sums of its matrices
        names, first = list(self.config.matrix_shapes), stage_matrices(kind)
        for m in range(*first):
            place, rows = table.offsets[m], table.outputs[m]
            observe(f"{prefix}{names[m]}.sums", work.sums[:tokens, place : place + rows])
        for m in range(*stage_matrices(kind + 1)) if first == (0, 0) else ():
            columns = table.columns[m]
            if names[m] in INNER:
                observe(f"{prefix}{INNER[names[m]]}", work.inner[:tokens, :columns])
            observe(f"{prefix}{names[m]}.input", work.normed[:tokens, :columns])
            observe(f"{prefix}{names[m]}.int8", work.q[:tokens, :columns])

    @property
    def mode(self) -> dict[str, str | int]:
        """How tokens are made now: what the settings say, and what was chosen by itself."""
        tuning = self.tuning()
        with self._lock:
            table = self._table_for(self._settings)
            return {
                "packing": self._packing(self._settings),
                "head": "screened" if self._screen else "exact",
                "ahead": table.ahead,
                "head_ahead": tuning.head_ahead,
                "threads": self.threads,
                "kernel": self.kernel,
            }

    def tuning(self) -> Tuning:
        """What was chosen for this machine, these threads and this kernel, measured if need be."""
        with self._lock:
            return self._tuning(self._settings)

    def _tuning(self, settings: Settings) -> Tuning:
        key = settings.kernel, settings.threads
        if key not in self._tunings:
            self._tunings[key] = tuning_for(self._matrices, self._head, *key)
        return self._tunings[key]

    @property
    def _matrices(self) -> list[TernaryMatrix]:
        return [matrix for layer in self.weights.layers for matrix in layer[:7]]

    def _table_for(self, settings: Settings) -> Table:
        """The weights in the packing of the settings, made when they are needed first."""
        tuning, packing = self._tuning(settings), self._packing(settings)
        if packing not in self._tables:
            self._tables[packing] = self._make_table(packing)
        ahead = tuning.ahead if packing == "2bit" else tuning.base3_ahead
        return self._tables[packing]._replace(ahead=ahead, head_ahead=tuning.head_ahead)

    def _packing(self, settings: Settings) -> str:
        if self._stored == "base3":
            return self._stored
        return self._tuning(settings).packing if settings.packing == "auto" else settings.packing

    def _arrays(self, packing: str) -> list[np.ndarray]:
        """The packed matrices; base-3 copies are made once."""
        arrays = [matrix.packed for matrix in self._matrices]
        if packing == self._stored:
            return arrays
        for array in arrays[len(self._base3) :]:
            self._base3.append(base3_of(array, self.threads))
            release(array)  # one copy in memory is enough
        return self._base3

    def _make_table(self, packing: str) -> Table:
        layers = self.weights.layers
        out, columns = np.array(list(self.config.matrix_shapes.values())).T
        q, k, _, _, gate, _, _ = out
        arrays = self._arrays(packing)
        places = [address(array, np.uint8, array.shape, "packed weights") for array in arrays]
        return Table(
            PACKINGS[packing],
            np.array(places, np.int64).reshape(-1, 7),
            np.array([[matrix.scale for matrix in layer[:7]] for layer in layers], np.float32),
            np.array([len(array) for array in arrays[:7]]),
            columns.copy(),
            out.copy(),
            np.array([0, q, q + k, 0, 0, gate, 0]),
            np.array([layer.input_layernorm for layer in layers] + [self.weights.norm], np.float32),
            np.array([layer.post_attention_layernorm for layer in layers], np.float32),
            np.array([layer.attn_sub_norm for layer in layers], np.float32),
            np.array([layer.ffn_sub_norm for layer in layers], np.float32),
            address(self._head, HEAD_DTYPES, self._head.shape, "the head"),
            self._head.itemsize,
            np.empty(0, np.float32),
            0,
            0,
        )

    def _screened_table(self, table: Table, screen: Screen) -> Table:
        codes = screen.copy.codes
        place = address(codes, np.int8, codes.shape, "the screen")
        return table._replace(head=place, head_bytes=1, head_scales=screen.copy.scales)

    def _make_work(self, threads: int) -> Work:
        c = self.config
        wide = max(c.hidden_size, c.intermediate_size)
        heads = c.num_attention_heads
        kv = c.num_key_value_heads * c.head_dim
        numbers = _round_up(c.head_dim, PAD)
        spans = -(-c.max_position_embeddings // SPAN)
        slots = min(max(SLOTS, spans), BATCH * spans)
        return Work(
            x=aligned_zeros((BATCH, c.hidden_size), np.float32),
            inner=aligned_zeros((BATCH, wide), np.float32),
            normed=aligned_zeros((BATCH, wide), np.float32),
            q=aligned_zeros((BATCH, wide), np.int8),
            q_scale=aligned_zeros((BATCH,), np.float32),
            q_sum=aligned_zeros((BATCH,), np.int32),
            sums=aligned_zeros(
                (BATCH, max(c.hidden_size + 2 * kv, 2 * c.intermediate_size)), np.int32
            ),
            queries=aligned_zeros((BATCH, heads, numbers), np.float32),
            mixed=aligned_zeros((slots, heads, numbers), np.float32),
            largest=aligned_zeros((slots, heads), np.float32),
            total=aligned_zeros((slots, heads), np.float32),
            scores=aligned_zeros(
                (threads, TOKENS, heads // c.num_key_value_heads, STRETCH), np.float32
            ),
            codes=aligned_zeros((threads, scratch_size(wide, BATCH)), np.uint8),
            fault=aligned_zeros((1,), np.int64),
            ticks=NOT_TIMED,
        )


_engines: weakref.WeakSet[BitNet] = weakref.WeakSet()


def _renew_after_fork() -> None:
    """A child process has no threads: a lock that one of them held would never be opened."""
    for engine in _engines:
        engine._lock, engine._work = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def _tiles(start: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Cut tokens at positions start.. into tiles, (first, last), that the buffers can hold."""
    first = 0
    while first < tokens:
        spans = -(-(start + first + BATCH) // SPAN)
        last = min(tokens, first + max(1, min(BATCH, SLOTS // spans)))
        yield first, last
        first = last


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _checked_cache_dtype(dtype: type) -> np.dtype:
    if dtype not in (np.float32, np.float16):
        raise InputError(f"a KV cache is float32 or float16, not {dtype!r}")
    if dtype == np.float16 and not has_float16():
        raise InputError("this CPU cannot convert float16: take a float32 KV cache")
    return np.dtype(dtype)


def _require_fit(config: BitNetConfig, weights: Weights) -> None:
    """Whether these arrays make a model of this shape that compiled code can run."""
    if max(config.hidden_size, config.intermediate_size) > MAX_COLUMNS:
        raise InputError(f"the kernels are exact up to {MAX_COLUMNS} columns, this model has more")
    hidden, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if hidden % (2 * heads) or heads % kv_heads:
        raise InputError(
            f"{hidden} numbers can't be shared out to {heads} heads, an even number to each, or "
            f"these not to {kv_heads} KV heads"
        )
    if len(weights.layers) != config.num_hidden_layers:
        raise InputError(f"{len(weights.layers)} layers for {config.num_hidden_layers} in config")
    for index, layer in enumerate(weights.layers):
        for name, (out, columns) in config.matrix_shapes.items():
            packed, scale, base3_rows = getattr(layer, name)
            rows = out // 4 if base3_rows is None else -(-out // 5)
            checked(packed, np.uint8, (rows, columns), f"layer {index}: {name}")
            same = base3_rows == (None if weights.layers[0].q_proj.base3_rows is None else out)
            if out % 4 or not same or not np.isfinite(scale):
                raise InputError(f"layer {index}: {name} has {out} rows and the scale {scale}")
        for name in layer._fields[7:]:
            size = config.intermediate_size if name == "ffn_sub_norm" else hidden
            _require_norm(getattr(layer, name), size, f"layer {index}: {name}")
    _require_norm(weights.norm, hidden, "the last norm")
    for name in ("embedding", "lm_head"):
        checked(getattr(weights, name), HEAD_DTYPES, (config.vocab_size, hidden), name)


def _require_norm(weight: np.ndarray, size: int, what: str) -> None:
    if not np.isfinite(checked(weight, np.float32, (size,), what)).all():
        raise InputError(f"{what} holds NaN or Inf")
