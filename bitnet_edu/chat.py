"""A conversation: messages in, pieces of text out, the KV cache kept between turns."""

from collections.abc import Iterator

from bitnet_edu.errors import ContextLengthError
from bitnet_edu.generate import BitNetLM, generate_ids


class ChatSession:
    """A conversation with a model. `messages` is the transcript: read, save or edit it."""

    def __init__(self, model: BitNetLM, system: str | None = None, max_len: int | None = None):
        self.model = model
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cache = model.new_cache(max_len)
        self._cached_ids: list[int] = []

    def send(self, text: str, max_new_tokens: int = 512, **options) -> Iterator[str]:
        """Yield the answer piece by piece; options as in `generate_ids`.

        Closing the generator stops the answer, and what came so far stays in the transcript.
        ContextLengthError, with the transcript unchanged, if no token of an answer would fit.
        """
        self.messages.append({"role": "user", "content": text})
        yield from self.answer(max_new_tokens, **options)

    def answer(self, max_new_tokens: int = 512, **options) -> Iterator[str]:
        """Answer the last message of the transcript (after an edit: answer again)."""
        ids = self.model.tokenizer.apply_chat_template(self.messages)
        if len(ids) >= self.cache.max_len:
            self.messages.pop()
            raise ContextLengthError(
                f"the conversation is {len(ids)} tokens long and the context holds "
                f"{self.cache.max_len}: clear it, or take out some messages"
            )
        new_ids = self._rewind_to_common_prefix(ids)
        pieces = []
        tokens = self._record(
            generate_ids(self.model, new_ids, max_new_tokens, cache=self.cache, **options)
        )
        try:
            for piece in self.model.tokenizer.decode_stream(tokens):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    @property
    def context_used(self) -> int:
        """Tokens in the KV cache."""
        return self.cache.length

    def clear(self) -> None:
        """Forget the conversation, but not the system prompt."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
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

    def _record(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self._cached_ids.append(token)
            yield token
