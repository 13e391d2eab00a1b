"""Text to token ids and back, and a conversation to the prompt that a model was trained on."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import DecodeStream

from bitnet_edu.errors import CheckpointError, InputError
from bitnet_edu.files.config import fault, read_json

Message = dict[str, Any]  # {"role": ..., "content": ...}, and what else a template may know
Messages = Sequence[Message]

# The template of microsoft/bitnet-b1.58-2B-4T, for files that bring none or a wrong one.
BITNET_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def clean_text(text: str, what: str) -> str:
    """`text`, with U+FFFD for lone surrogates, which are no characters and have no UTF-8.

    The one place where text comes in. InputError, which names `what`, for what is no `str`.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} must be text, not {text!r:.80}")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


class Tokenizer:
    """The `tokenizers` library's tokenizer with a chat template."""

    note: str | None = None  # what its user should know of where it came from

    def __init__(
        self,
        backend: HFTokenizer,
        chat_template: str = BITNET_CHAT_TEMPLATE,
        bos_token: str = "",
        eos_token: str = "",
    ):
        backend.no_truncation()  # a tokenizer.json may carry settings of the training
        backend.no_padding()
        self.backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json (CheckpointError names the one at fault)."""
        try:
            backend = HFTokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        path = folder / "tokenizer_config.json"
        config = read_json(path, {})
        template = config.get("chat_template") or BITNET_CHAT_TEMPLATE
        template_file = folder / "chat_template.jinja"
        if template_file.exists():
            path, template = template_file, template_file.read_text("utf-8", "replace")
        bos, eos = (_token_text(config.get(f"{name}_token")) for name in ("bos", "eos"))
        for text in (template, bos, eos):
            if not isinstance(text, str):
                raise fault(path, "the chat template and special tokens", "text", repr(text))
        return cls(backend, template, bos, eos)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids; the tokenizer's own start token comes first unless switched off."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids -> text. InputError for an id that the vocabulary does not have."""
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < 2**32 or self.backend.id_to_token(token) is None:
                raise InputError(f"token id {token} is not in this tokenizer's vocabulary")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Pieces of text as the ids come, each of whole characters (UTF-8 is never split)."""
        decoder, seen, sent = DecodeStream(skip_special_tokens=True), [], 0
        for token in ids:
            seen.append(token)
            if piece := decoder.step(self.backend, token):
                sent += len(piece)
                yield piece
        # a sequence cut off inside a character still owes its last, replaced, character
        if rest := self.backend.decode(seen)[sent:]:
            yield rest

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text, such as "<|eot_id|>", or None."""
        return self.backend.token_to_id(token)

    def chat_text(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as one string, by the chat template (sandboxed Jinja)."""
        for message in messages:
            texts = isinstance(message, dict) and (message.get("role"), message.get("content"))
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(f"a message needs a 'role' and a 'content', found {message!r}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except Exception as error:  # a template is a small program and can fail in any way
            raise InputError(f"the chat template refuses these messages: {error}") from None

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        """A conversation [{"role": ..., "content": ...}, ...] -> the token ids of its prompt."""
        return self.encode(self.chat_text(messages, add_generation_prompt), False)


def _token_text(token: str | dict | None) -> str:
    return token.get("content") if isinstance(token, dict) else token or ""


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
