"""Documents to batches: tokens, who may look at whom, and which tokens the loss counts."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_edu.training.corpus import Message, held_out_questions, training_documents
from bitnet_edu.training.tokenizer import BEGIN, END, END_OF_TURN

IGNORED = -1
Encoded = tuple[list[int], list[int]]  # token ids and targets
POOL = 64  # documents that wait for a row with room for them


@dataclass
class Batch:
    """`ids`, `targets` int64[B, T]; `mask` bool[B, 1, T, T], True where a query may see a key."""

    ids: Tensor
    targets: Tensor
    mask: Tensor


def texts(documents: list[list[Message] | str]) -> Iterator[str]:
    """Every message with its role mark, and every plain text: what the tokenizer learns from."""
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (f"{m['role'].capitalize()}: {m['content']}" for m in document)


def encode(tokenizer: Tokenizer, document: list[Message] | str) -> Encoded:
    """Token ids of a document, and its targets: the next token, where the loss counts it.

    A plain text counts everywhere; of a chat only what the assistant says, with its end mark.
    """
    begin, end, end_of_turn = (tokenizer.token_to_id(t) for t in (BEGIN, END, END_OF_TURN))
    if isinstance(document, str):
        ids = [begin, *tokenizer.encode(document, add_special_tokens=False).ids, end]
        return ids, [*ids[1:], IGNORED]
    ids, counted = [begin], [False]
    for message in document:
        role = f"{message['role'].capitalize()}: "
        role = tokenizer.encode(role, add_special_tokens=False).ids
        content = tokenizer.encode(message["content"], add_special_tokens=False).ids
        ids += [*role, *content, end_of_turn]
        counted += [False] * len(role) + [message["role"] == "assistant"] * (len(content) + 1)
    following = zip(ids[1:], counted[1:], strict=True)
    return ids, [token if count else IGNORED for token, count in following] + [IGNORED]


def batches(
    tokenizer: Tokenizer,
    documents: Iterator[list[Message] | str],
    rows: int,
    length: int,
) -> Iterator[Batch]:
    """Pack whole documents into `rows` rows of `length` tokens; no document sees another."""
    encoded = (encode(tokenizer, document) for document in documents)
    encoded = (pair for pair in encoded if len(pair[0]) <= length)
    pool: list[Encoded] = []
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    padding = tokenizer.token_to_id(END)
    while True:
        ids = torch.full((rows, length), padding)
        targets = torch.full((rows, length), IGNORED)
        owner = torch.full((rows, length), -1)
        for row in range(rows):
            used = number = 0
            while fitting := take(pool, encoded, length - used):
                document, target = fitting
                part = slice(used, used + len(document))
                ids[row, part], targets[row, part] = torch.tensor(document), torch.tensor(target)
                owner[row, part] = number
                used, number = used + len(document), number + 1
        mask = (owner[:, :, None] == owner[:, None, :]) & causal
        yield Batch(ids, targets, mask[:, None])


def take(pool: list[Encoded], encoded: Iterator[Encoded], room: int) -> Encoded | None:
    """The longest-waiting document of at most `room` tokens, or None if none fits."""
    pool += islice(encoded, POOL - len(pool))
    for index, (ids, _) in enumerate(pool):
        if len(ids) <= room:
            return pool.pop(index)
    return None


def training_batches(tokenizer: Tokenizer, seed: int, rows: int, length: int) -> Iterator[Batch]:
    """The endless stream of training batches: in every sixth the rows are four times as long."""
    documents = training_documents(seed)
    short = batches(tokenizer, documents, rows, length)
    long = batches(tokenizer, long_chats(documents), rows // 4, 4 * length)
    while True:
        for _ in range(5):
            yield next(short)
        yield next(long)


def long_chats(documents: Iterator[list[Message] | str]) -> Iterator[list[Message]]:
    """One to eight chats joined into a longer one, so that the model meets far positions."""
    for count in cycle(range(1, 9)):
        joined: list[Message] = []
        while count:
            document = next(documents)
            if not isinstance(document, str) and not (joined and document[0]["role"] == "system"):
                joined, count = joined + document, count - 1
        yield joined


def exam_batch(tokenizer: Tokenizer, rows: int = 32, length: int = 256) -> Batch:
    """One batch of held-out questions of all categories with their answers."""
    questions = held_out_questions(per_category=150)
    random.Random(0).shuffle(questions)
    documents = (
        [*question.messages(), {"role": "assistant", "content": question.answer}]
        for question in questions
    )
    return next(batches(tokenizer, documents, rows, length))
