"""From logits to text: sampling, streaming, stop conditions."""

from collections.abc import Iterator, Sequence

import numpy as np

from bitnet_edu.errors import BitNetError, InputError
from bitnet_edu.layers import softmax
from bitnet_edu.model import BitNet, KVCache
from bitnet_edu.tokenizer import Messages, Tokenizer
from bitnet_edu.weights import BitNetConfig, Weights


class BitNetLM(BitNet):
    """A `BitNet` with its tokenizer: what `bitnet_edu.load` returns."""

    def __init__(self, config: BitNetConfig, weights: Weights, tokenizer: Tokenizer | None):
        super().__init__(config, weights)
        self.tokenizer = tokenizer

    def generate(self, ids: Sequence[int], max_new_tokens: int = 128, **options) -> list[int]:
        """The new token ids, the stop token included. Options as in `generate_ids`."""
        return list(generate_ids(self, ids, max_new_tokens, **options))

    def stream(
        self, ids_or_messages: Sequence[int] | Messages, max_new_tokens: int = 128, **options
    ) -> Iterator[str]:
        """Pieces of text as they are made; closing the generator stops the work.

        Takes token ids, or messages [{"role": ..., "content": ...}]. Options as in `generate_ids`.
        """
        ids = list(ids_or_messages)
        if ids and isinstance(ids[0], dict):
            ids = self.tokenizer.apply_chat_template(ids)
        yield from self.tokenizer.decode_stream(generate_ids(self, ids, max_new_tokens, **options))


def generate_ids(
    model: BitNet,
    ids: Sequence[int],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[int] | None = None,
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
    stop = set(model.config.eos_token_ids if stop is None else stop)
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
    if temperature < 0 or (top_k is not None and top_k < 1) or not 0 < (top_p or 1) <= 1:
        raise InputError("sampling needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    if temperature == 0:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")[:top_k]
    probabilities = softmax(scores[order].astype(np.float64) / temperature)
    if top_p is not None:
        keep = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
        order, probabilities = order[:keep], probabilities[:keep]
    return int(rng.choice(order, p=probabilities / probabilities.sum()))
