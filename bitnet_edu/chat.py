"""A conversation: messages in, pieces of text out, the KV cache kept between turns."""

from collections.abc import Iterator

from bitnet_edu.errors import ContextLengthError
from bitnet_edu.generate import BitNetLM, Stop, generate_ids, split_stop, until


class ChatSession:
    """A conversation with a model. `messages` is the transcript: read, save or edit it."""

    def __init__(self, model: BitNetLM, system: str | None = None, max_len: int | None = None):
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.cache = model.new_cache(max_len)
        self._cached_ids: list[int] = []

    def send(self, text: str, max_new_tokens: int = 512, **options) -> Iterator[str]:
        """Yield the answer piece by piece; options as in `BitNetLM.stream`.

        Closing the generator stops the answer, and what came so far stays in the transcript.
        ContextLengthError if no token of an answer would fit; an error of any kind leaves the
        transcript as it was.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self.answer(max_new_tokens, **options)
        except Exception:
            self.messages.pop()
            raise

    def answer(
        self,
        max_new_tokens: int = 512,
        *,
        stop: Stop = None,
        made: list[int] | None = None,
        **options,
    ) -> Iterator[str]:
        """Answer the last message of the transcript (after an edit: answer again)."""
        tokenizer = self.model.require_tokenizer()
        ids = tokenizer.apply_chat_template(self.messages)
        if len(ids) >= self.cache.max_len:
            raise ContextLengthError(
                f"the conversation is {len(ids)} tokens long and the context holds "
                f"{self.cache.max_len}: clear it, or take out some messages"
            )
        ends, strings = split_stop(stop, self.model.config.eos_token_ids)
        new_ids = self._rewind_to_common_prefix(ids)
        tokens = generate_ids(
            self.model, new_ids, max_new_tokens, cache=self.cache, stop=ends, **options
        )
        made = [] if made is None else made
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        try:
            for piece in until(tokenizer.decode_stream(self._record(tokens, made)), strings):
                message["content"] += piece
                yield piece
        except Exception:
            self.messages.pop()
            raise

    @property
    def system(self) -> str | None:
        """What the model is told before the user speaks: the first message, if it is one."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        kept = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *kept] if text else kept

    @property
    def context_used(self) -> int:
        """Tokens in the KV cache."""
        return self.cache.length

    def clear(self) -> None:
        """Forget the conversation, but not the system prompt."""
        system, self.messages = self.system, []
        self.system = system
        self.cache.truncate(0)
        self._cached_ids = []

    def _rewind_to_common_prefix(self, ids: list[int]) -> list[int]:
        """Keep what the cache already holds of `ids`; return the rest, at least one token."""
        cached = self._cached_ids[: self.cache.length]
        common = 0
        while common < min(len(cached), len(ids) - 1) and cached[common] == ids[common]:
            common += 1
        self.cache.truncate(common)
        self._cached_ids = list(ids)
        return ids[common:]

    def _record(self, tokens: Iterator[int], made: list[int]) -> Iterator[int]:
        for token in tokens:
            self._cached_ids.append(token)
            made.append(token)
            yield token
