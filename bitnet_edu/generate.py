"""From logits to text: sampling, streaming, stop conditions."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from bitnet_edu.errors import BitNetError, InputError
from bitnet_edu.layers import softmax
from bitnet_edu.model import BitNet, KVCache
from bitnet_edu.tokenizer import Messages, Tokenizer
from bitnet_edu.weights import BitNetConfig, Weights

Stop = str | int | Sequence[str | int] | None


class BitNetLM(BitNet):
    """A `BitNet` with its tokenizer: what `bitnet_edu.load` returns."""

    def __init__(self, config: BitNetConfig, weights: Weights, tokenizer: Tokenizer | None):
        super().__init__(config, weights)
        self.tokenizer = tokenizer

    def generate(
        self, ids: Sequence[int], max_new_tokens: int = 128, *, stop: Stop = None, **options
    ) -> list[int]:
        """The new token ids, with the one that ended them. Options as in `generate_ids`.

        Strings in `stop` end the text too (see `stream`); the last token may reach beyond them.
        """
        made: list[int] = []
        for _ in self._pieces(ids, max_new_tokens, stop, made, options):
            pass
        return made

    def stream(
        self,
        ids_or_messages: Sequence[int] | Messages,
        max_new_tokens: int = 128,
        *,
        stop: Stop = None,
        made: list[int] | None = None,
        **options,
    ) -> Iterator[str]:
        """Pieces of text as they are made; closing the generator stops the work.

        Takes token ids, or messages [{"role": ..., "content": ...}]. Options as in `generate_ids`,
        but `stop` may hold strings too: the text ends before the first of them. `made`, a list,
        receives the token ids as they come.
        """
        ids = list(ids_or_messages)
        if ids and isinstance(ids[0], dict):
            ids = self.require_tokenizer().apply_chat_template(ids)
        made = [] if made is None else made
        self.require_tokenizer()
        yield from self._pieces(ids, max_new_tokens, stop, made, options)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or an InputError that says why there is none."""
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer.json, so it can't read or write text: "
                "put the file into its folder, or work with token ids"
            )
        return self.tokenizer

    def _pieces(
        self, ids: Sequence[int], count: int, stop: Stop, made: list[int], options: dict
    ) -> Iterator[str]:
        ends, strings = split_stop(stop, self.config.eos_token_ids)
        tokens = generate_ids(self, ids, count, stop=ends, **options)
        recorded = (made.append(token) or token for token in tokens)
        if self.tokenizer is None and not strings:
            yield from ("" for _ in recorded)
        else:
            yield from until(self.require_tokenizer().decode_stream(recorded), strings)


def split_stop(stop: Stop, end_tokens: Sequence[int]) -> tuple[set[int], list[str]]:
    """What ends a text: token ids, and strings.

    None means the model's end tokens. Ids take their place, strings come on top, () is nothing.
    """
    stop = [stop] if isinstance(stop, str | int) else stop
    strings = [s for s in stop or () if isinstance(s, str)]
    ids = {int(s) for s in stop or () if not isinstance(s, str)}
    if stop is None or (strings and not ids):
        ids = set(end_tokens)
    if "" in strings:
        raise InputError("a stop string can't be empty: it would end every text at once")
    return ids, strings


def until(pieces: Iterator[str], strings: Sequence[str]) -> Iterator[str]:
    """Pass pieces on up to the first of `strings`, keeping back what may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for string in strings if (at := held.find(string)) >= 0]
        if found:
            held = held[: min(found)]
            break
        # how much of the end of `held` is the beginning of a stop string
        starts = (n for s in strings for n in range(1, len(s)) if held.endswith(s[:n]))
        safe = len(held) - max(starts, default=0)
        if safe:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def generate_ids(
    model: BitNet,
    ids: Sequence[int],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Collection[int] | None = None,
    cache: KVCache | None = None,
) -> Iterator[int]:
    """Yield new token ids one by one: prefill the prompt, then decode.

    temperature 0 is greedy; top_k and top_p cut the tail before sampling; the same seed gives the
    same tokens. Ends after max_new_tokens, after a token of `stop` (default: the model's end
    tokens), or when the context is full. `cache` may already hold tokens that come before `ids`.
    InputError for bad arguments, ContextLengthError for a prompt that doesn't fit.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    stop = model.config.eos_token_ids if stop is None else stop
    rng = np.random.default_rng(seed)
    if cache is None:
        longest = model.config.max_position_embeddings
        cache = model.new_cache(min(longest, max(len(ids), 1) + max_new_tokens))
    scores = model.forward(ids, cache)
    for count in range(max_new_tokens):
        token = sample(scores, rng, temperature=temperature, top_k=top_k, top_p=top_p)
        yield token
        if token in stop or count + 1 == max_new_tokens or cache.length == cache.max_len:
            return
        scores = model.forward([token], cache)


def sample(
    scores: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Pick the next token from float32[vocab] scores.

    temperature 0: the best score, the lowest id among equals. Otherwise softmax(scores /
    temperature) over the top_k best and, of these, the fewest whose probabilities reach top_p
    (nucleus sampling, arXiv 1904.09751). InputError for values out of range; BitNetError if the
    scores hold NaN or Inf.
    """
    if not np.isfinite(scores).all():
        raise BitNetError(
            "the model produced NaN or Inf instead of scores: the weights are damaged or were read "
            "in the wrong format; `bitnet-edu verify` finds the layer"
        )
    top_k, top_p = len(scores) if top_k is None else top_k, 1.0 if top_p is None else top_p
    if not (0 <= temperature < np.inf and top_k >= 1 and 0 < top_p <= 1):
        raise InputError(
            "sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1, found "
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}"
        )
    if temperature == 0:
        return int(scores.argmax())
    order = np.argsort(-scores)[:top_k]
    probabilities = softmax(scores[order].astype(np.float64) / temperature)
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        order, probabilities = order[:keep], probabilities[:keep]
    return int(rng.choice(order, p=probabilities / probabilities.sum()))
