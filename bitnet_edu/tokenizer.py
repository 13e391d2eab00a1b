"""Text to token ids and back, and a conversation to the prompt that a model was trained on."""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import DecodeStream

from bitnet_edu.errors import CheckpointError, InputError

Messages = Sequence[dict[str, str]]

# The template of microsoft/bitnet-b1.58-2B-4T, for files that bring none or a wrong one.
BITNET_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


class Tokenizer:
    """The `tokenizers` library's tokenizer with a chat template."""

    def __init__(
        self,
        backend: HFTokenizer,
        chat_template: str = BITNET_CHAT_TEMPLATE,
        bos_token: str = "",
        eos_token: str = "",
    ):
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
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None
        template_file = folder / "chat_template.jinja"
        if template_file.exists():
            config["chat_template"] = template_file.read_text(encoding="utf-8")
        return cls(
            backend,
            config.get("chat_template") or BITNET_CHAT_TEMPLATE,
            _token_text(config.get("bos_token")),
            _token_text(config.get("eos_token")),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids; the tokenizer's own start token comes first unless switched off."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids -> text. InputError for an id that the vocabulary does not have."""
        for token in ids:
            if self.backend.id_to_token(token) is None:
                raise InputError(f"token id {token} is not in this tokenizer's vocabulary")
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Pieces of text as the ids come, each of whole characters (UTF-8 is never split)."""
        decoder, seen = DecodeStream(skip_special_tokens=True), []
        sent = 0
        for token in ids:
            seen.append(token)
            piece = decoder.step(self.backend, token)
            if piece:
                sent += len(piece)
                yield piece
        # a sequence cut off inside a character still owes its last, replaced, character
        if rest := self.decode(seen)[sent:]:
            yield rest

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text, such as "<|eot_id|>", or None."""
        return self.backend.token_to_id(token)

    def chat_text(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as one string, by the chat template (sandboxed Jinja)."""
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise InputError(f"a message needs 'role' and 'content', this one is {message!r}")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}") from None

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        """A conversation [{"role": ..., "content": ...}, ...] -> the token ids of its prompt."""
        return self.encode(self.chat_text(messages, add_generation_prompt), False)


def _token_text(token: str | dict | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
