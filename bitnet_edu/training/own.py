"""A corpus of one's own: a text file, or a JSONL file of conversations, to documents.

Text: UTF-8, the paragraphs between blank lines are documents. JSONL: on each line an object,
`{"messages": [{"role": ..., "content": ...}, ...]}`, `{"prompt": ..., "response": ...}` or
`{"text": ...}`. Whatever is wrong raises InputError, which names the line.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bitnet_edu.errors import InputError
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.data import Document, Documents, Message, encode

ROLES = ("system", "user", "assistant")
FORMS = '{"messages": [...]}, {"prompt": ..., "response": ...} or {"text": ...}'


class Entry(NamedTuple):
    """A document and where it stands."""

    line: int
    document: Document


class Corpus(NamedTuple):
    """A file that was read."""

    file: Path
    entries: list[Entry]
    hash: str  # of its bytes


def read_corpus(file: Path) -> Corpus:
    """The documents of a file. A name in .jsonl, or a first line that is a JSON object, decides
    which kind it is."""
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"the corpus {file} cannot be read ({reason}): name a text file") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{file}, line {line}: this is not UTF-8: save it as UTF-8") from None
    # not `splitlines`, which also cuts at characters that JSON strings may hold
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    entries = list(conversations(file, lines) if is_jsonl(file, lines) else paragraphs(lines))
    if not entries:
        raise InputError(f"{file} is empty: write some text into it")
    return Corpus(file, entries, hashlib.sha256(content).hexdigest())


def is_jsonl(file: Path, lines: list[str]) -> bool:
    if file.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return True
    try:
        return isinstance(json.loads(next((line for line in lines if line.strip()), "")), dict)
    except (ValueError, RecursionError):
        return False


def paragraphs(lines: list[str]) -> Iterator[Entry]:
    """What stands between blank lines."""
    part: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            part.append(line.rstrip())
        elif part:
            yield Entry(number - len(part), "\n".join(part))
            part = []


def conversations(file: Path, lines: list[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield Entry(number, parse_line(line))
            except InputError as error:
                raise InputError(f"{file}, line {number}: {error}") from None


def parse_line(line: str) -> Document:
    """One line of JSONL."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no JSON ({error}): write one object a line, {FORMS}") from None
    keys = set(value) if isinstance(value, dict) else set()
    if keys >= {"prompt", "response"}:
        pair = (("user", value["prompt"]), ("assistant", value["response"]))
        return [message(role, content) for role, content in pair]
    if "messages" in keys:
        return parse_messages(value["messages"])
    if "text" in keys:
        return require_text(value["text"], "text")
    raise InputError(f"expected {FORMS}, found {line.strip():.60}")


def parse_messages(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError('"messages" must be a list of {"role": ..., "content": ...}')
    chat = [message(m.get("role"), m.get("content")) for m in messages]
    if not any(m["role"] == "assistant" for m in chat):
        raise InputError("no message has the role assistant: there is nothing to learn to say")
    return chat


def message(role: object, content: object) -> Message:
    if role not in ROLES:
        raise InputError(f"the role must be one of {', '.join(ROLES)}, not {role!r:.40}")
    return {"role": role, "content": require_text(content, f"what the {role} says")}


def require_text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} must be text that is not blank, not {value!r:.40}")
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


def longest_chat(corpus: Corpus, tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens of the longest conversation, and its line; (0, 0) without any."""
    longest = (0, 0)
    for line, document in corpus.entries:
        if not isinstance(document, str):
            try:
                size = len(encode(tokenizer, document)[0])
            except InputError as error:
                raise InputError(f"{corpus.file}, line {line}: {error}") from None
            longest = max(longest, (size, line))
    return longest


def fitted(corpus: Corpus, tokenizer: Tokenizer, length: int, context: int) -> list[Document]:
    """All documents in at most `length` tokens each: texts are cut, a chat can't be."""
    size, line = longest_chat(corpus, tokenizer)
    if size > length:
        room = "a row has" if size <= context else "the model's context has"
        advice = f"choose --length {size}, or " if size <= context else ""
        raise InputError(
            f"{corpus.file}, line {line}: this conversation has {size} tokens and {room} room for "
            f"{min(length, context)}: {advice}shorten it"
        )
    documents: list[Document] = []
    for _, document in corpus.entries:
        whole = not isinstance(document, str)
        documents += [document] if whole else cut(tokenizer, document, length)
    return documents


def cut(tokenizer: Tokenizer, text: str, length: int) -> Iterator[str]:
    """A text in pieces of at most `length` tokens, halved at a space where there is one."""
    if len(encode(tokenizer, text)[0]) <= length or len(text) < 2:
        yield text
        return
    middle = len(text) // 2
    space = max(text.rfind(" ", 1, middle), text.rfind("\n", 1, middle))
    at = space if space > 0 else middle
    yield from cut(tokenizer, text[:at], length)
    yield from cut(tokenizer, text[at:].lstrip(" \n"), length)


def split(
    documents: list[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(training, held out): at least one document each, drawn by chance."""
    if not 0 < share < 1:  # NaN isn't, either
        raise InputError(
            f"the held-out share is a number between 0 and 1, such as 0.1, not {share}"
        )
    if len(documents) < 2:
        raise InputError(
            "the corpus has one document: write more, with blank lines between them, so that one "
            "can be held out"
        )
    order = list(range(len(documents)))
    random.Random(f"{seed}/held out").shuffle(order)
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    return [documents[i] for i in sorted(order[count:])], [documents[i] for i in order[:count]]


def endless(documents: list[Document], seed: int) -> Documents:
    """Document number i of all of them over and over, in a new order every time."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        numbers = list(range(len(documents)))
        random.Random(f"{seed}/{epoch}").shuffle(numbers)
        return numbers

    return lambda number: documents[order(number // len(documents))[number % len(documents)]]


def mixed(one: Documents, other: Documents) -> Documents:
    """Documents of both by turns."""
    return lambda number: (other if number % 2 else one)(number // 2)
