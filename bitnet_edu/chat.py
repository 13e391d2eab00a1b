"""A conversation: messages in, pieces of text out, the KV cache kept between turns."""

from bisect import bisect_left
from collections.abc import Callable, Iterator

from bitnet_edu.errors import ContextLengthError, InputError
from bitnet_edu.generate import (
    BitNetLM,
    Progress,
    Stop,
    generate_ids,
    recorded,
    require_request,
    split_stop,
    until,
)
from bitnet_edu.guess import Guesser, as_guesser
from bitnet_edu.sampling import Sampling
from bitnet_edu.tokenizer import Message, clean_text


class ChatSession:
    """A conversation with a model. `messages` is the transcript: read, save or edit it."""

    def __init__(self, model: BitNetLM, system: str | None = None, max_len: int | None = None):
        self.model = model
        self.messages: list[Message] = []
        self.system = system
        self.cache = model.new_cache(max_len)
        self._cached_ids: list[int] = []

    def send(
        self,
        text: str,
        max_new_tokens: int = 512,
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
        """Yield the answer piece by piece; options as in `BitNetLM.stream`.

        Closing the generator stops the answer. Whatever ends it (that, Ctrl-C, an error): if no
        piece of text came, the transcript is as it was before, else what came stays. Bad
        arguments, and a conversation that leaves no room for an answer (ContextLengthError), are
        refused here, before any work is done.
        """
        question = {"role": "user", "content": clean_text(text, "a message")}
        sampling = Sampling(temperature, top_k, top_p, seed)
        return self._answer([question], max_new_tokens, sampling, stop, made, progress, guess)

    def answer(
        self,
        max_new_tokens: int = 512,
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
        """Answer the last message of the transcript (after an edit: answer again)."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        return self._answer([], max_new_tokens, sampling, stop, made, progress, guess)

    @property
    def system(self) -> str | None:
        """What the model is told before the user speaks: the first message, if it is one."""
        first = self.messages[0] if self.messages else None
        return first.get("content") if _is_system(first) else None

    @system.setter
    def system(self, text: str | None) -> None:
        kept = [message for message in self.messages if not _is_system(message)]
        text = clean_text(text, "the system message") if text is not None else ""
        self.messages = [{"role": "system", "content": text}, *kept] if text else kept

    @property
    def context_used(self) -> int:
        """Tokens in the KV cache."""
        return self.cache.length

    def prompt(self, *more: Message) -> list[int]:
        """Token ids of the transcript, with `more` messages at its end, up to the answer.

        ContextLengthError if no token of an answer would fit.
        """
        if not isinstance(self.messages, list):
            raise InputError(f"the transcript must be a list of messages, not {self.messages!r}")
        if not (conversation := self.messages + list(more)):
            raise InputError("there is nothing to answer yet: send a message")
        ids = self.model.require_tokenizer().apply_chat_template(conversation)
        if len(ids) >= self.cache.max_len:
            raise ContextLengthError(
                f"the conversation is {len(ids)} tokens long and the context holds "
                f"{self.cache.max_len}: clear it, or take out some messages"
            )
        if not ids:
            raise InputError("this model's chat template makes nothing of the conversation")
        return ids

    def clear(self) -> None:
        """Forget the conversation, but not the system prompt."""
        system, self.messages = self.system, []
        self.system = system
        self.cache.truncate(0)
        self._cached_ids = []

    def drop_oldest(self, room: int, *more: Message, look: Callable[[], None]) -> None:
        """Drop the oldest turns until the prompt with `more` at its end has at most `room` tokens.

        At worst all turns go; the system message stays. `look` is called before each count of
        tokens and may raise to stop: then nothing is dropped.
        """
        system = [m for m in self.messages if _is_system(m)]
        talk = [m for m in self.messages if not _is_system(m)]
        cuts = [i for i, m in enumerate(talk) if m["role"] == "user"] + [len(talk)]

        def fits(cut: int) -> bool:
            look()
            conversation = [*system, *talk[cut:], *more]
            return len(self.model.require_tokenizer().apply_chat_template(conversation)) <= room

        kept = 1  # turns; doubled, so that no more is counted than about twice what fits
        while kept < len(cuts) and fits(cuts[-1 - kept]):
            kept *= 2
        first, last = max(0, len(cuts) - 1 - kept), len(cuts) - 1
        self.messages = system + talk[cuts[bisect_left(cuts, True, first, last, key=fits)] :]

    def _answer(
        self,
        question: list[Message],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Stop,
        made: list[int] | None,
        progress: Progress | None,
        guess: bool | Guesser,
    ) -> Iterator[str]:
        """Check everything now, and work once the first piece is asked for."""
        stops = split_stop(stop, self.model.config)
        require_request(max_new_tokens, made, progress)
        guesser = as_guesser(guess)
        self.prompt(*question)
        return self._turn(question, max_new_tokens, sampling, *stops, made, progress, guesser)

    def _turn(
        self,
        question: list[Message],
        max_new_tokens: int,
        sampling: Sampling,
        ends: frozenset[int],
        strings: list[str],
        made: list[int] | None,
        progress: Progress | None,
        guesser: Guesser,
    ) -> Iterator[str]:
        new_ids = self._rewind(self.prompt(*question))
        guesser.extend(self._cached_ids[: self.cache.length])
        tokens = generate_ids(
            self.model,
            new_ids,
            max_new_tokens,
            sampling,
            stop=ends,
            cache=self.cache,
            progress=progress,
            guess=guesser,
        )
        pieces = self.model.require_tokenizer().decode_stream(
            recorded(tokens, self._cached_ids, made)
        )
        before, answer = len(self.messages), {"role": "assistant", "content": ""}
        self.messages += [*question, answer]
        try:
            for piece in until(pieces, strings):
                answer["content"] += piece
                yield piece
        except BaseException:
            if not answer["content"]:
                del self.messages[before:]
            raise

    def _rewind(self, ids: list[int]) -> list[int]:
        """Keep what the cache already holds of `ids`; return the rest, at least one token."""
        cached = self._cached_ids[: self.cache.length]
        common = 0
        while common < min(len(cached), len(ids) - 1) and cached[common] == ids[common]:
            common += 1
        self.cache.truncate(common)
        self._cached_ids = list(ids)
        return ids[common:]


def _is_system(message: Message) -> bool:
    return isinstance(message, dict) and message.get("role") == "system"
