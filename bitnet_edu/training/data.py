"""Documents to batches: tokens, who may look at whom, and which tokens the loss counts.

Documents come from a function: number i of an endless stream. A batch depends on nothing but that
function, the tokenizer and a few whole numbers, the numbers of the documents that come next and of
those that wait. Whoever notes these numbers can go on with the same batches later.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bitnet_edu.errors import InputError
from bitnet_edu.tokenizer import BITNET_CHAT_TEMPLATE, Tokenizer
from bitnet_edu.training.corpus import held_out_questions
from bitnet_edu.training.model import IGNORED
from bitnet_edu.training.tokenizer import END_OF_TURN

Message = dict[str, str]  # {"role": ..., "content": ...}
Document = list[Message] | str
Documents = Callable[[int], Document]  # number i, always the same
Encoded = tuple[list[int], list[int]]  # token ids and targets
POOL = 64  # documents that wait for a row with room for them
FAR = 2**40  # long chats are made of documents from here on, which short rows never reach


@dataclass
class Batch:
    """`ids`, `targets` int64[B, T]; `mask` bool[B, 1, T, T], True where a query may see a key."""

    ids: Tensor
    targets: Tensor
    mask: Tensor

    @property
    def counted(self) -> int:
        """Tokens that the loss counts."""
        return int((self.targets != IGNORED).sum())

    def share(self, rank: int, world: int) -> "Batch":
        """Every `world`-th row, the part of one process of several."""
        return Batch(*(part[rank::world] for part in (self.ids, self.targets, self.mask)))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) for part in (self.ids, self.targets, self.mask)))


def fingerprint(documents: Documents, count: int = 200) -> str:
    """A hash of the first documents, which tells one endless corpus from another."""
    return hashlib.sha256(json.dumps([documents(n) for n in range(count)]).encode()).hexdigest()


def texts(documents: Iterable[Document]) -> Iterator[str]:
    """Every message with its role mark, and every plain text: what the tokenizer learns from."""
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (f"{m['role'].capitalize()}: {m['content']}" for m in document)


def encode(tokenizer: Tokenizer, document: Document) -> Encoded:
    """Token ids of a document, and its targets: the next token, where the loss counts it.

    A plain text counts everywhere. Of a chat, written by the tokenizer's template, only what the
    assistant says with its end mark; each answer is encoded by itself, for that is how it is
    generated after its prompt. What follows the last answer is left out. InputError for a chat that
    the template refuses.
    """
    if isinstance(document, str):
        end = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token else None
        ids = [*tokenizer.encode(document), *([] if end is None else [end])]
        return ids, [*ids[1:], IGNORED]
    ids, counted = [], []
    for text, counts in chat_pieces(tokenizer, document):
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids, counted = ids + piece, counted + [counts] * len(piece)
    following = zip(ids[1:], counted[1:], strict=True)
    return ids, [token if count else IGNORED for token, count in following] + [IGNORED]


def chat_pieces(tokenizer: Tokenizer, chat: list[Message]) -> Iterator[tuple[str, bool]]:
    """The text of a chat by turns: a prompt, which doesn't count, and its answer, which does."""
    if tokenizer.chat_template == BITNET_CHAT_TEMPLATE:
        yield from bitnet_pieces(tokenizer.bos_token, chat)
        return
    told = ""
    for number, message in enumerate(chat):
        if message["role"] == "assistant":
            prompt = tokenizer.chat_text(chat[:number])
            whole = tokenizer.chat_text(chat[: number + 1], add_generation_prompt=False)
            if not (prompt.startswith(told) and whole.startswith(prompt)):
                raise InputError("the chat template changes earlier turns: it can't be trained on")
            yield prompt[len(told) :], False
            yield whole[len(prompt) :], True
            told = whole


def bitnet_pieces(begin: str, chat: list[Message]) -> Iterator[tuple[str, bool]]:
    """What BITNET_CHAT_TEMPLATE writes, without Jinja: a fifth of the time."""
    prompt = begin
    for message in chat:
        said = f"{message['content'].strip()}{END_OF_TURN}"
        if message["role"] == "assistant":
            yield f"{prompt}Assistant: ", False
            yield said, True
            prompt = ""
        else:
            prompt += f"{message['role'].capitalize()}: {said}"


class Stream:
    """Documents 0, 1, 2, ... (up to `count`) in nearly this order, each once, as rows have room."""

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, longest: int, count: int | None = None
    ) -> None:
        self.encoded = lambda number: encode(tokenizer, documents(number))
        self.longest, self.count = longest, count
        self.next = 0
        self.waiting: dict[int, Encoded] = {}

    def state(self) -> list[int]:
        """The number of the next document, and those that wait."""
        return [self.next, *self.waiting]

    def restore(self, state: list[int]) -> None:
        self.next, *numbers = state
        self.waiting = {number: self.encoded(number) for number in numbers}

    def take(self, room: int) -> Encoded | None:
        """The longest-waiting document of at most `room` tokens, or None if none fits."""
        start = self.next
        while len(self.waiting) < POOL and (self.count is None or self.next < self.count):
            document = self.encoded(self.next)
            if len(document[0]) <= self.longest:
                self.waiting[self.next] = document
            elif self.next > start + 1000 and not self.waiting:
                raise InputError(f"no document has at most {self.longest} tokens: use longer rows")
            self.next += 1
        for number, (ids, _) in self.waiting.items():
            if len(ids) <= room:
                return self.waiting.pop(number)
        return None

    def batch(self, rows: int, length: int) -> Batch:
        """Whole documents packed into `rows` rows of `length` tokens; none sees another."""
        ids = np.zeros((rows, length), np.int64)
        targets = np.full((rows, length), IGNORED)
        owner = np.full((rows, length), -1)
        for row in range(rows):
            used = number = 0
            while fitting := self.take(length - used):
                part = slice(used, used + len(fitting[0]))
                ids[row, part], targets[row, part] = fitting
                owner[row, part] = number
                used, number = part.stop, number + 1
        mask = (owner[:, :, None] == owner[:, None, :]) & np.tri(length, dtype=bool)
        return Batch(*map(torch.from_numpy, (ids, targets, mask[:, None])))


class Batches:
    """The batches of a training; in every `long_every`-th the rows are four times as long."""

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, rows: int, length: int, long_every: int
    ) -> None:
        self.rows, self.length, self.long_every = rows, length, long_every
        self.short = Stream(documents, tokenizer, length)
        self.long = Stream(partial(long_chat, documents), tokenizer, 4 * length)
        self.number = 0

    def __next__(self) -> Batch:
        self.number += 1
        if self.long_every and self.number % self.long_every == 0:
            return self.long.batch(self.rows // 4, 4 * self.length)
        return self.short.batch(self.rows, self.length)

    def state(self) -> list[list[int]]:
        """What `restore` needs to go on from here: whole numbers."""
        return [[self.number], self.short.state(), self.long.state()]

    def restore(self, state: list[list[int]]) -> None:
        [self.number], short, long = state
        self.short.restore(short)
        self.long.restore(long)


def long_chat(documents: Documents, number: int) -> Document:
    """One to eight chats joined into a longer one, so that the model meets far positions."""
    parts = [documents(FAR + 8 * number + part) for part in range(1 + number % 8)]
    joined: list[Message] = []
    for part in parts:
        if not isinstance(part, str) and not (joined and part[0]["role"] == "system"):
            joined = joined + part
    return joined or parts[0]


def finite_batches(
    documents: list[Document], tokenizer: Tokenizer, rows: int, length: int
) -> list[Batch]:
    """All of these documents, once: the batches of a held-out loss. InputError if none fits."""
    stream = Stream(documents.__getitem__, tokenizer, length, len(documents))
    batches = []
    while (batch := stream.batch(rows, length)).counted:
        batches.append(batch)
    if not batches:
        raise InputError(f"no held-out document has at most {length} tokens: use longer rows")
    return batches


def exam_documents(per_category: int = 150) -> list[Document]:
    """Held-out questions of all categories of the book's own corpus, with their answers."""
    questions = held_out_questions(per_category)
    random.Random(0).shuffle(questions)
    return [
        [*question.messages(), {"role": "assistant", "content": question.answer}]
        for question in questions
    ]


def exam_batch(tokenizer: Tokenizer, rows: int = 32, length: int = 256) -> Batch:
    """One batch of held-out questions with their answers."""
    documents = exam_documents()
    return Stream(documents.__getitem__, tokenizer, length, len(documents)).batch(rows, length)
