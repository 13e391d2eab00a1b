"""What `bitnet-edu train` does: a corpus, a start and a recipe become a model in a folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from bitnet_edu.errors import InputError, require_whole
from bitnet_edu.training import own, run
from bitnet_edu.training.data import (
    Batch,
    Documents,
    exam_documents,
    fingerprint,
    finite_batches,
    texts,
)
from bitnet_edu.training.model import ModelShape, new_model
from bitnet_edu.training.start import Start, start_from
from bitnet_edu.training.train import (
    Recipe,
    Training,
    find_device,
    new_tokenizer,
    own_corpus,
    tokenizer_of,
)

# What starts from random weights. I2_S wants rows in multiples of 128.
SMALL = ModelShape(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BATCH, LENGTH = 2048, 128  # tokens in a batch, and in a row
STEPS, RATE = 1000, 2e-3
STEPS_FURTHER, RATE_FURTHER = 250, 1e-3  # of a model that has learned before
HELD_OUT = 0.1
MEASURED = 8  # batches of what is held out
EXAM = 20  # questions of each category of the book's corpus


T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """The options of `bitnet-edu train`; None stands for a default that depends on the others."""

    out: Path
    corpus: Path | None = None
    start: str | None = None
    steps: int | None = None
    rows: int | None = None
    length: int | None = None
    held_out: float | None = None
    learning_rate: float | None = None
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    resume: bool = False


def train_job(job: Job) -> dict:
    """Do it, and say in plain values what came out. Raises BitNetError of every kind."""
    run.require_free(job.out, job.resume)
    if job.threads is not None:
        torch.set_num_threads(require_whole(job.threads, 1, 4096, "the number of threads"))
    read = own.read_corpus(job.corpus) if job.corpus else None
    recipe = recipe_of(job)
    on_gpu = find_device(job.device).type == "cuda"
    start = start_from(job.start, recipe, on_gpu) if job.start else from_scratch(read, job.seed)
    recipe = with_room(job, recipe, start, read)
    material = own_material(job, recipe, start, read) if read else book_material(job, recipe, start)
    training = Training(start.model, recipe, start.tokenizer, material.documents, device=job.device)
    result = run.run(
        training,
        start.tokenizer,
        job.out,
        material.held_out,
        corpus=material.name,
        resume=job.resume,
        tokenizer_from=start.folder,
    )
    parameters = sum(parameter.numel() for parameter in start.model.parameters())
    told = {"out": str(job.out), **result._asdict(), "parameters": parameters} | material.counts
    return told | {"is_first": training.rank == 0}


class Material(NamedTuple):
    """What is learned, and what is held out of it."""

    documents: Documents
    held_out: list[Batch]
    name: str  # what tells this corpus from others
    counts: dict[str, int]


def own_material(job: Job, recipe: Recipe, start: Start, read: own.Corpus) -> Material:
    """A corpus of one's own; with tiny's beside it where tiny is to learn it and forget nothing."""
    share = HELD_OUT if job.held_out is None else job.held_out
    context = start.model.shape.max_position_embeddings
    documents = own.fitted(read, start.tokenizer, recipe.length, context)
    learned, held_out = own.split(documents, share, job.seed)
    stream = own.endless(learned, job.seed)
    if start.is_tiny:
        stream = own.mixed(stream, own_corpus(job.seed))
    batches = finite_batches(held_out, start.tokenizer, recipe.rows, recipe.length)
    counts = {"documents": len(learned), "held_out_documents": len(held_out)}
    return Material(stream, batches[:MEASURED], f"{read.hash} {share} {start.is_tiny}", counts)


def book_material(job: Job, recipe: Recipe, start: Start) -> Material:
    """The book's own corpus, which never ends, and its held-out questions."""
    if job.held_out is not None:
        raise InputError("--held-out is for a corpus of your own: the book's has its own questions")
    exam = exam_documents(EXAM)
    length = min(256, start.model.shape.max_position_embeddings)
    batches = finite_batches(exam, start.tokenizer, 2 * recipe.rows, length)
    stream, counts = own_corpus(job.seed), {"held_out_documents": len(exam)}
    return Material(stream, batches, fingerprint(stream), counts)


def from_scratch(read: own.Corpus | None, seed: int) -> Start:
    """Random weights of the shape SMALL, and a tokenizer that learns from the corpus."""
    if read:
        lines = texts(entry.document for entry in read.entries)
        tokenizer = tokenizer_of(lines, SMALL.vocab_size)
    else:
        tokenizer = new_tokenizer(SMALL, seed)
    shape = replace(SMALL, vocab_size=tokenizer.largest_id + 1)  # a short text has few tokens
    return Start(new_model(shape, seed), tokenizer, None)


def recipe_of(job: Job) -> Recipe:
    """The recipe, as far as the options tell: `with_room` completes it."""
    steps = chosen(job.steps, STEPS_FURTHER if job.start else STEPS)
    rate = chosen(job.learning_rate, RATE_FURTHER if job.start else RATE)
    length = chosen(job.length, LENGTH)
    return Recipe(
        steps=steps,
        rows=chosen(job.rows, max(4, BATCH // max(1, length))),
        length=length,
        long_every=0,
        peak_rates=(rate, rate * 2 / 3),
        warmup=min(150, steps // 10),
        seed=job.seed,
    )


def chosen(option: T | None, default: T) -> T:
    return default if option is None else option


def with_room(job: Job, recipe: Recipe, start: Start, read: own.Corpus | None) -> Recipe:
    """Rows as long as the longest conversation wants them, if no length was asked for."""
    context = start.model.shape.max_position_embeddings
    length = recipe.length
    if job.length is None:
        longest = own.longest_chat(read, start.tokenizer)[0] if read else 0
        length = min(context, length)
        while length < min(longest, context):
            length = min(2 * length, context)
    rows = chosen(job.rows, max(4, BATCH // length))
    # far positions, which a corpus of one's own has or has not
    long_every = 6 if read is None and rows >= 4 and 4 * length <= context else 0
    return replace(recipe, length=length, rows=rows, long_every=long_every)
