"""From logits to text: sampling, streaming, stop conditions."""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from bitnet_edu.errors import (
    BitNetError,
    ContextLengthError,
    InputError,
    is_whole,
    require_whole,
)
from bitnet_edu.guess import Guesser, as_guesser
from bitnet_edu.layers import Observer
from bitnet_edu.model import BATCH, BitNet, KVCache, Settings
from bitnet_edu.sampling import GREEDY, Sampling
from bitnet_edu.tokenizer import Messages, Tokenizer, clean_text
from bitnet_edu.weights import BitNetConfig, Weights

Stop = str | int | Collection[str | int] | None
Progress = Callable[[int, int], None]


class BitNetLM:
    """An engine with its tokenizer: what `bitnet_edu.load` returns.

    `engine` does the computing; its settings and its main functions are at hand here, too.
    """

    def __init__(self, config: BitNetConfig, weights: Weights, tokenizer: Tokenizer | None):
        self.engine = BitNet(config, weights)
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer

    @property
    def settings(self) -> Settings:
        return self.engine.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.engine.settings = settings

    @property
    def threads(self) -> int:
        return self.engine.threads

    @threads.setter
    def threads(self, threads: int) -> None:
        self.engine.threads = threads

    @property
    def kernel(self) -> str:
        return self.engine.kernel

    @kernel.setter
    def kernel(self, kernel: str) -> None:
        self.engine.kernel = kernel

    def logits(self, ids: Sequence[int], observe: Observer | None = None) -> np.ndarray:
        """Scores after every prefix of the sequence, float32[T, vocab]: see `BitNet.logits`."""
        return self.engine.logits(ids, observe)

    def forward(
        self, ids: Sequence[int], cache: KVCache, observe: Observer | None = None
    ) -> np.ndarray:
        """Append tokens to the cache; the next one's scores, float32[vocab]: `BitNet.forward`."""
        return self.engine.forward(ids, cache, observe)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> None:
        """Append tokens to the cache, without any scores: `BitNet.prefill`."""
        self.engine.prefill(ids, cache)

    def next_tokens(
        self, ids: Sequence[int], cache: KVCache, sampling: Sampling, keys: np.ndarray
    ) -> list[int]:
        """Append tokens; choose what follows each of the last ones: `BitNet.next_tokens`."""
        return self.engine.next_tokens(ids, cache, sampling, keys)

    def new_cache(self, max_len: int | None = None, dtype: type | None = None) -> KVCache:
        """An empty KV cache: see `BitNet.new_cache`."""
        return self.engine.new_cache(max_len, dtype)

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Stop = None,
        progress: Progress | None = None,
        guess: bool | Guesser = True,
    ) -> list[int]:
        """The new token ids, with the one that ended them. Options as in `Sampling`, `stream`.

        Strings in `stop` end the text too; the last token may reach beyond them.
        """
        made: list[int] = []
        sampling = Sampling(temperature, top_k, top_p, seed)
        for _ in self._pieces(ids, max_new_tokens, sampling, stop, made, progress, guess):
            pass
        return made

    def stream(
        self,
        ids_or_messages: Sequence[int] | Messages,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Stop = None,
        made: list[int] | None = None,
        progress: Progress | None = None,
        guess: bool | Guesser = True,
    ) -> Iterator[str]:
        """Pieces of text as they are made; closing the generator stops the work.

        Takes token ids, or messages [{"role": ..., "content": ...}]. Sampling as in `Sampling`;
        `stop` holds token ids (default: the model's end tokens) and strings, before the first of
        which the text ends. `made`, a list, receives the token ids as they come. `progress` is
        told before each tile of the prompt how many of its tokens are read, of how many; what it
        raises stops the work. `guess`: whether to guess ahead, which changes the speed and nothing
        else (see guess.py); a `Guesser` of yours counts the steps. Bad arguments raise here,
        before any work is done.
        """
        tokenizer = self.require_tokenizer()
        if _are_messages(ids_or_messages):
            ids_or_messages = tokenizer.apply_chat_template(ids_or_messages)
        sampling = Sampling(temperature, top_k, top_p, seed)
        return self._pieces(ids_or_messages, max_new_tokens, sampling, stop, made, progress, guess)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or an InputError that says why there is none."""
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer.json, so it can't read or write text: "
                "put the file into its folder, or work with token ids"
            )
        return self.tokenizer

    def _pieces(
        self,
        ids: Sequence[int],
        count: int,
        sampling: Sampling,
        stop: Stop,
        made: list[int] | None,
        progress: Progress | None,
        guess: bool | Guesser,
    ) -> Iterator[str]:
        ends, strings = split_stop(stop, self.config)
        require_request(count, made, progress)
        tokens = generate_ids(self, ids, count, sampling, stop=ends, progress=progress, guess=guess)
        tokens = recorded(tokens, made)
        if self.tokenizer is None and not strings:
            return ("" for _ in tokens)
        return until(self.require_tokenizer().decode_stream(tokens), strings)


def split_stop(stop: Stop, config: BitNetConfig) -> tuple[frozenset[int], list[str]]:
    """What ends a text: token ids, and strings.

    None means the model's end tokens. Ids take their place, strings come on top, () is nothing.
    InputError for what is neither, for an id outside the vocabulary and for an empty string.
    """
    if stop is None or isinstance(stop, str) or is_whole(stop):
        stop = () if stop is None else (stop,)
        nothing_said = not stop
    elif isinstance(stop, Collection) and not isinstance(stop, bytes | bytearray | dict):
        nothing_said = False
    else:
        raise InputError(f"stop must be token ids and strings, not {stop!r}")
    strings = [clean_text(s, "a stop string") for s in stop if isinstance(s, str)]
    ids = [s for s in stop if not isinstance(s, str)]
    for token in ids:
        require_whole(token, 0, config.vocab_size - 1, "a token id in stop")
    if "" in strings:
        raise InputError("a stop string can't be empty: it would end every text at once")
    if nothing_said or (strings and not ids):
        ids = config.eos_token_ids
    return frozenset(int(token) for token in ids), strings


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


def recorded(tokens: Iterator[int], *lists: list[int] | None) -> Iterator[int]:
    """Pass tokens on, and append each to the lists (None is none) before it is seen."""
    lists = [made for made in lists if made is not None]
    return (token for token in tokens if [made.append(token) for made in lists] or True)


def generate_ids(
    model: BitNet | BitNetLM,
    ids: Sequence[int],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    *,
    stop: Collection[int] | None = None,
    cache: KVCache | None = None,
    progress: Progress | None = None,
    guess: bool | Guesser = True,
) -> Iterator[int]:
    """New token ids one by one: read the prompt tile by tile, then decode.

    Ends after max_new_tokens, after a token of `stop` (default: the model's end tokens), or when
    the context is full. `cache` may already hold tokens that come before `ids`. `progress` and
    `guess` as in `BitNetLM.stream`; what the cache holds, tell a `Guesser` beforehand. Whenever a
    token is handed out, the cache holds all that came before it. Before any work: InputError for
    bad arguments, ContextLengthError for a prompt that doesn't fit.
    """
    ids = token_ids(ids, model.config.vocab_size)
    require_request(max_new_tokens, progress=progress)
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be made by generate.Sampling, not {sampling!r}")
    guesser = as_guesser(guess)
    stop, strings = split_stop(stop, model.config)
    if strings:
        raise InputError("only text can end at a string: stop holds token ids here")
    longest = model.config.max_position_embeddings if cache is None else cache.max_len
    used = 0 if cache is None else cache.length
    if len(ids) > longest - used:
        raise ContextLengthError(
            f"{len(ids)} tokens do not fit after {used} in a context of {longest}: shorten the "
            "prompt or start a new conversation"
        )
    cache = cache or model.new_cache(min(longest, len(ids) + int(max_new_tokens)))
    return _generate(model, ids, max_new_tokens, sampling, stop, cache, progress, guesser)


def _generate(
    model: BitNet | BitNetLM,
    ids: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    cache: KVCache,
    progress: Progress | None,
    guesser: Guesser,
) -> Iterator[int]:
    count = min(max_new_tokens, cache.max_len - cache.length - len(ids) + 1)
    # one for each token: what is chosen doesn't depend on the steps in which it is
    keys = np.random.default_rng(sampling.seed).integers(0, 2**64, count, np.uint64)
    for first in range(0, len(ids), BATCH):
        if progress:
            progress(first, len(ids))
        part = ids[first : first + BATCH]
        if first + BATCH < len(ids):
            model.prefill(part, cache)
    guesser.extend(ids.tolist())
    made, guess = 0, []
    while made < count:
        tokens = _step(model, part, guess, cache, sampling, keys[made : made + 1 + len(guess)])
        guesser.judge(len(guess), len(tokens) - 1)
        known = cache.length
        for i, token in enumerate(tokens):
            cache.length = known + i
            yield token
            if token in stop:
                return
        made += len(tokens)
        guesser.extend(tokens)
        part, guess = tokens[-1:], guesser.guess(count - made - 1)


def _step(
    model: BitNet | BitNetLM,
    part: Sequence[int],
    guess: list[int],
    cache: KVCache,
    sampling: Sampling,
    keys: np.ndarray,
) -> list[int]:
    """Append `part` to the cache. What follows: the guessed tokens that are right, and one more."""
    start = cache.length
    try:
        chosen = model.next_tokens([*part, *guess] if guess else part, cache, sampling, keys)
    except BitNetError:
        if not guess:
            raise
        cache.truncate(start)  # perhaps it happens after a wrong guess only
        return _step(model, part, [], cache, sampling, keys[:1])
    finally:
        cache.truncate(min(cache.length, start + len(part)))
    right = 0
    while right < len(guess) and chosen[right] == guess[right]:
        right += 1
    return chosen[: right + 1]


def token_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """int64[T] of a list or array of token ids; InputError for anything else."""
    if isinstance(ids, np.ndarray):
        whole = ids.ndim == 1 and ids.dtype.kind in "iu"
    else:
        whole = isinstance(ids, Sequence) and all(map(is_whole, ids))
    if not whole or len(ids) == 0 or isinstance(ids, bytes | bytearray):
        raise InputError("token ids must be a non-empty one-dimensional list of integers")
    if (worst := min(ids)) < 0 or (worst := max(ids)) >= vocab_size:
        raise InputError(f"token id {worst} is outside the vocabulary of {vocab_size}")
    return np.array(ids, np.int64)


def require_request(
    max_new_tokens: int, made: list[int] | None = None, progress: Progress | None = None
) -> None:
    """InputError if one of these options of a generation is none."""
    require_whole(max_new_tokens, 1, None, "max_new_tokens")
    if made is not None and not isinstance(made, list):
        raise InputError("made must be a list: it receives the token ids")
    if progress is not None and not callable(progress):
        raise InputError("progress must be a function of two numbers")


def _are_messages(value: object) -> bool:
    """Whether this is meant as a conversation; what it holds is checked with the template."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict | str)
