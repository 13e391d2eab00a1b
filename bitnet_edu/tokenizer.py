"""Text to token ids and back, and a conversation to the prompt that a model was trained on."""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from bitnet_edu.chat_template import MAX_SECONDS, render
from bitnet_edu.errors import CheckpointError, InputError, clean_text, is_whole
from bitnet_edu.tokenizer_json import read_parts, refusing

Message = dict[str, Any]  # {"role": ..., "content": ...}, and what else a template may know
Messages = Sequence[Message]

# The template of microsoft/bitnet-b1.58-2B-4T, for files that bring none or a wrong one.
BITNET_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# One of these a template must be able to write; some refuse a system message, or want one.
TRIALS = (("user",), ("system", "user"), ("user", "assistant"))
# Decoders that only ever add to what they wrote before, and those that join what came so far.
STEADY = {"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"}
JOINING = {"Fuse", "ByteLevel"}
# What transformers takes out of decoded text (`clean_up_tokenization_spaces`).
TIDIED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
REASONING = ("reasoning_content", "thinking", "reasoning")


class Tokenizer:
    """The `tokenizers` library's tokenizer with a chat template.

    special_tokens: further ones that the template may name, such as {"pad_token": "<pad>"}.
    tidies: whether `decode` takes out spaces before punctuation. Raises CheckpointError, which
    names `template_file`, for a template that can't write any conversation.
    """

    note: str | None = None  # what its user should know of where it came from

    def __init__(
        self,
        backend: HFTokenizer,
        chat_template: str = BITNET_CHAT_TEMPLATE,
        bos_token: str = "",
        eos_token: str = "",
        special_tokens: Mapping[str, str] | None = None,
        *,
        tidies: bool = False,
        template_file: str | Path = "",
    ):
        backend.no_truncation()  # a tokenizer.json may carry settings of the training
        backend.no_padding()
        self.backend = backend
        self.bos_token = clean_text(bos_token, "the start token")
        self.eos_token = clean_text(eos_token, "the end token")
        named = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        named = {name: token for name, token in named.items() if token}
        self.special_tokens = named | _plain(dict(special_tokens or {}))
        self.chat_template = clean_text(chat_template, "the chat template")
        self.tidies = tidies
        self._pausing = _pausing_tokens(backend)
        self._require_template(template_file)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and what lies beside it, as transformers' AutoTokenizer does.

        CheckpointError names the file at fault.
        """
        parts = read_parts(folder)
        return cls(
            parts.backend,
            BITNET_CHAT_TEMPLATE if parts.template is None else parts.template,
            parts.tokens.get("bos_token", ""),
            parts.tokens.get("eos_token", ""),
            parts.tokens,
            tidies=parts.tidies,
            template_file=parts.template_file,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids; the tokenizer's own start token comes first unless switched off."""
        text = clean_text(text, "what is to be encoded")
        with refusing(InputError, "this tokenizer cannot encode the text"):
            return self.backend.encode(text, add_special_tokens=bool(add_special_tokens)).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Token ids -> text. InputError for an id that the vocabulary does not have."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise InputError(f"token ids must be a list of whole numbers, not {ids!r:.80}")
        ids = list(ids)
        for token in ids:
            if not is_whole(token) or not 0 <= token < 2**32 or self._unknown(int(token)):
                raise InputError(f"token id {token!r} is not in this tokenizer's vocabulary")
        text = self._text([int(token) for token in ids], skip_special_tokens)
        return tidy(text) if self.tidies else text

    def decode_stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Pieces of text as the ids come, each of whole characters (UTF-8 is never split).

        Together they are what `decode` makes of all ids; bytes that make no character become
        U+FFFD. Ids without a token, which a model's padded vocabulary may have, are silent.
        """
        pieces = self._raw_pieces(ids)
        return tidied(pieces) if self.tidies else pieces

    def _raw_pieces(self, ids: Iterator[int]) -> Iterator[str]:
        told: list[int] = []  # the last ids whose text is out: what comes may depend on them
        fresh: list[int] = []
        for token in ids:
            fresh.append(int(token))
            if self._pausing is None or token in self._pausing or self._unknown(int(token)):
                continue
            before, text = self._text(told), self._text(told + fresh)
            if text.endswith("\ufffd") or not text.startswith(before) or text == before:
                continue  # a character may be unfinished
            yield text[len(before) :]
            # a decoder may treat what comes first in its own way: keep something before it
            told, fresh = (fresh if self._text(fresh) else told + fresh), []
        if rest := self._text(told + fresh)[len(self._text(told)) :]:
            yield rest

    def _text(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        if not ids:
            return ""
        with refusing(InputError, "this tokenizer cannot decode the tokens"):
            return self.backend.decode(ids, skip_special_tokens=bool(skip_special_tokens))

    def _unknown(self, token: int) -> bool:
        return self.backend.id_to_token(token) is None

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text, such as "<|eot_id|>", or None."""
        return self.backend.token_to_id(clean_text(token, "a token"))

    @property
    def largest_id(self) -> int:
        """The highest id that a text can be given: of the vocabulary or put around each text."""
        with contextlib.suppress(InputError):
            return max([*self.backend.get_vocab().values(), *self.encode("")], default=-1)
        return max(self.backend.get_vocab().values(), default=-1)

    def chat_text(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as one string, by the chat template (sandboxed Jinja).

        InputError for messages of another form, or that the template refuses.
        """
        variables = {
            **self.special_tokens,
            "messages": checked_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
        }
        source = clean_text(self.chat_template, "the chat template")
        return clean_text(render(source, variables), "the prompt")

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        """A conversation [{"role": ..., "content": ...}, ...] -> the token ids of its prompt."""
        return self.encode(self.chat_text(messages, add_generation_prompt), False)

    def _require_template(self, file: str | Path) -> None:
        refusals, start = [], time.monotonic()
        for roles in TRIALS:
            if time.monotonic() - start > MAX_SECONDS:
                break
            try:
                self.chat_text([{"role": role, "content": "Hello"} for role in roles])
            except InputError as error:
                refusals.append(str(error))
            else:
                return
        raise CheckpointError(f"{file}: {refusals[0]}" if file else refusals[0])


def checked_messages(messages: Messages) -> list[Message]:
    """Messages as plain values for a template: no None, no lone surrogates, nothing with methods.

    Each needs a role and a content: text, or a list of parts such as {"type": "text", "text": ..}.
    InputError for what has none.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"a conversation is a list of messages, not {messages!r:.80}")
    checked = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (isinstance(content, str) or parts) or not isinstance(message.get("role"), str):
            raise InputError(f"a message needs a 'role' and a 'content', found {message!r:.80}")
        try:
            plain = _plain({key: value for key, value in message.items() if value is not None})
        except RecursionError:
            raise InputError("a message holds itself, or lists too deep") from None
        thoughts = [plain[name] for name in REASONING if plain.get(name) is not None]
        if thoughts:  # templates know them by different names, as in transformers
            plain = {"thinking": thoughts[0], **plain, "reasoning_content": thoughts[0]}
        checked.append(plain)
    return checked


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return clean_text(value, "what a message holds")


def tidy(text: str) -> str:
    """Decoded text without the spaces before punctuation, as transformers does it."""
    for words in TIDIED:
        text = text.replace(words, words.strip())
    return text


def tidied(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of `tidy` of a text whose pieces come one by one."""
    text, sent = "", 0
    for piece in pieces:
        text += piece
        # what follows can change the end: the longest that is taken for one has 4 characters, and
        # what one replacement leaves may be part of the next
        safe = len(tidy(text)) - 8
        if safe > sent:
            yield tidy(text)[sent:safe]
            sent = safe
    if rest := tidy(text)[sent:]:
        yield rest


def _pausing_tokens(backend: HFTokenizer) -> set[int] | None:
    """Tokens after which the text so far may yet change; None if it may after every token.

    A byte-fallback decoder turns a run of bytes into characters only as a whole: one byte that
    doesn't fit makes U+FFFD of all. A special token in between is silent and ends no run.
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps = decoder.get("decoders", [decoder] if decoder else [])
    joined = False
    for step in steps:
        if step["type"] not in STEADY | JOINING or (joined and step["type"] != "Strip"):
            return None
        joined = joined or step["type"] in JOINING
        if joined and step.get("stop"):
            return None
    if not any(step["type"] == "ByteFallback" for step in steps):
        return set()
    special = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    as_bytes = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return special | {token for token in as_bytes if token is not None}
