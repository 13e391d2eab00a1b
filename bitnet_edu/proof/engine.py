"""Listening to the engine: one trace of the whole text, and every other way through it, to the bit.

The engine's logits do not depend on how a text is cut into calls. So a single trace is enough to
hold against the reference, provided that prefill, decode, the KV cache, `truncate` and any number
of threads show the very same arrays. That is checked here, as is attention over many positions,
which a conversation does not reach.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from bitnet_edu.generate import BitNetLM
from bitnet_edu.kernels.attention import SPAN
from bitnet_edu.layers import attention, rope
from bitnet_edu.model import KVCache
from bitnet_edu.proof.replay import Row, Trace, row
from bitnet_edu.quantize import absmax_int8

LONG = 2 * SPAN + 40  # positions: attention adds up three spans
DECODED = 3  # of them, one by one


class Path(NamedTuple):
    """A way through the engine, and what differs on it from the whole text's trace."""

    name: str
    positions: int
    differ: list[str]


def trace_engine(model: BitNetLM, ids: np.ndarray) -> tuple[np.ndarray, Trace]:
    """The engine's logits, float32[T, vocab], and what lies between its stages."""
    parts: dict[str, list[np.ndarray]] = {}

    def see(name: str, array: np.ndarray) -> None:
        if not name.endswith(".input"):
            parts.setdefault(name, []).append(array.copy())

    logits = model.logits(ids, see)
    return logits, {name: np.concatenate(tiles) for name, tiles in parts.items()}


def other_paths(
    model: BitNetLM, ids: np.ndarray, made: Iterable[int], logits: np.ndarray, trace: Trace
) -> list[Path]:
    """The ways that generating, forgetting and a change of threads take through the same text.

    made: the places of the tokens that were generated, so that those before were prefilled.
    """
    settings = model.settings
    cuts = [place for place in made if 0 < place < len(ids)]
    paths = [_walk("as generated", model, ids, cuts, model.new_cache(len(ids)), logits, None)]
    cache = model.new_cache(len(ids))
    paths.append(_walk("as generated, observed", model, ids, cuts, cache, logits, trace))
    try:
        for kept, threads in ((len(ids) // 3, 1), (len(ids) // 2, 2), (0, 3)):
            if len(ids) - kept < 2:
                continue
            model.settings = replace(settings, threads=threads)
            name = f"after truncate({kept}), {threads} thread{'s' * (threads > 1)}"
            cache.truncate(kept)
            if cache.length != kept:
                paths.append(Path(name, 0, [f"the cache still holds {cache.length} tokens"]))
                break
            another = np.concatenate([ids[:kept], ids[kept:][::-1]])
            expected = model.forward(another, model.new_cache(len(ids)))
            model.forward(another[kept:-1], cache)
            if not np.array_equal(model.forward(another[-1:], cache), expected):
                paths.append(Path(name, len(ids) - kept, ["logits after another text"]))
            cache.truncate(kept)
            cuts = np.cumsum([1, 2, 5, 3, 1, 17, 1]) + kept
            cuts = [cut for cut in cuts if cut < len(ids)]
            paths.append(_walk(name, model, ids, cuts, cache, logits, trace))
    finally:
        model.settings = settings
    return paths


def _walk(
    name: str,
    model: BitNetLM,
    ids: np.ndarray,
    cuts: list[int],
    cache: KVCache,
    logits: np.ndarray,
    trace: Trace | None,
) -> Path:
    """Feed what the cache lacks of `ids`, cut at these places; compare with logits and trace."""
    begin, differ = cache.length, []
    for first, last in zip([begin, *cuts], [*cuts, len(ids)], strict=True):
        seen = dict.fromkeys(trace or (), first)
        see = partial(_compare, trace, seen, differ)
        scores = model.forward(ids[first:last], cache, *([see] if trace else []))
        if not np.array_equal(scores, logits[last - 1]):
            differ.append(f"logits, token {last - 1}")
        differ += [f"{name}, not shown" for name, place in seen.items() if place != last]
    return Path(name, len(ids) - begin, differ)


def _compare(
    trace: Trace, seen: dict[str, int], differ: list[str], name: str, array: np.ndarray
) -> None:
    """An observer: the next rows of an array, against those of the trace."""
    if name in seen:
        place, seen[name] = seen[name], seen[name] + len(array)
        if not np.array_equal(array, trace[name][place : seen[name]]):
            differ.append(f"{name}, token {place}")


def long_attention(model: BitNetLM, seed: int = 0) -> list[Row]:
    """Rotation and attention of every layer over many positions, against `layers`.

    Nothing to look at, and so no rows, in a model whose context is a single span of positions.
    """
    length = min(LONG, model.config.max_position_embeddings)
    if length <= SPAN:
        return []
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, length)
    watch = _AttentionWatch(model)
    cache = model.new_cache(length)
    for portion in np.split(ids, range(length - DECODED, length)):
        watch.start = cache.length
        model.forward(portion, cache, watch)
    return watch.rows()


class _AttentionWatch:
    """An observer that computes what it is shown next from what it was shown before."""

    def __init__(self, model: BitNetLM):
        self.config, self.layers = model.config, model.weights.layers
        self.start = 0
        self.place: dict[str, int] = {}  # where the next tile of an array begins
        self.last: dict[str, np.ndarray] = {}
        self.past: dict[str, list[np.ndarray]] = {}
        self.worst: dict[str, Row] = {}

    def __call__(self, name: str, array: np.ndarray) -> None:
        if not name.startswith("layers."):
            return
        _, layer, *rest = name.split(".")
        part, tokens, config = ".".join(rest), len(array), self.config
        place = self.place.get(name, 0)
        self.place[name] = place + tokens
        self.last[part] = array.copy()
        if part in ("queries", "keys", "values"):
            matrix = f"{part[0]}_proj"
            scale = absmax_int8(self.last["q_proj.input"])[1]
            scale = scale * np.float32(getattr(self.layers[int(layer)], matrix).scale)
            made = self.last[f"{matrix}.sums"].astype(np.float32) * scale
            made = made.reshape(tokens, -1, config.head_dim)
            if part != "values":
                made = rope(made, np.arange(place, place + tokens), config.rope_theta)
            self._note(name, made, array)
            self.past.setdefault(name, []).append(self.last[part])
        elif part == "attention":
            past = [np.concatenate(self.past[f"layers.{layer}.{p}"]) for p in ("keys", "values")]
            found = attention(self.last["queries"], *past).reshape(tokens, -1)
            self._note(name, found, array)

    def _note(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        found, before = row(f"long text, {name}", ours, theirs), self.worst.get(name)
        if before is None or not found.share <= before.share:
            self.worst[name] = found

    def rows(self) -> list[Row]:
        return list(self.worst.values())
