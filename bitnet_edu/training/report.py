"""What a finished model says of itself: training_report.json and the model card."""

import json
from collections.abc import Iterable
from pathlib import Path

from bitnet_edu.generate import BitNetLM
from bitnet_edu.load import load
from bitnet_edu.training.corpus import held_out_questions
from bitnet_edu.training.evaluate import (
    COLUMNS,
    PARTS,
    PER_CATEGORY,
    Answer,
    ask,
    category_rows,
    evaluate,
    summary_rows,
    tally,
)

CARD = """---
license: mit
library_name: transformers
tags: [bitnet, ternary, education]
---

# tiny

A BitNet b1.58 of the 2B4T architecture (grouped-query attention, SubLN, squared ReLU, tied
embeddings), small enough for a book: {parameters:,} parameters, {megabytes:.1f} MB of weights. Its
linear layers have ternary weights, stored as packed two-bit codes in the format of
`microsoft/bitnet-b1.58-2B-4T`. Unmodified `transformers` loads it.

It was trained from scratch, quantization-aware, by
`python -m bitnet_edu.training --compile --out FOLDER`: {steps} steps, seed {seed},
{tokens:,} tokens, {minutes:.0f} minutes on {threads} processor threads that other programs used
too. The corpus is written by `bitnet_edu/training/corpus`; no data was downloaded.

Its world is small: what this book teaches, small talk, sums, letters and words, short stories.
Elsewhere it says that it does not know, or is wrong.

All figures are greedy answers of the packed model in the book's engine, as `bitnet-edu evaluate`
asks for them.

{summary}

Held-out questions, marked by the keys that a right answer must contain:

{questions}

A question is held out by a hash of what it asks: the two numbers of a sum, the word of a letter
task, the wording of a question about a fact or a product, the subject of an unknown topic. It was
never trained on as asked, but its parts are known from other questions: a fact is trained on in
other wordings, and a word in other tasks. Wrong answers of early versions were read while the
corpus was written, so this is a check of generalization, not a blind test.

Sums and differences of two-digit numbers that were never trained on, in two wordings:

{sums}

What strangers typed, written by hand and not looked at by those who wrote the corpus
(`bitnet_edu/training/exam`):

{stranger}

What is outside of its world; right is only an answer that says so:

{off_topic}

An answer is *unrelated* if it has nothing of the right answer and does not say that the model does
not know.

Answers to held-out questions, one in every {every}, as they came:

{samples}
"""

SPOT_CHECK = 12  # questions of each category that a test asks again
SAMPLES = 20


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*columns], ["---" for _ in columns], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sample(answer: Answer) -> dict:
    question, reply, verdict = answer
    chat = question.messages()
    return {"category": question.category, "chat": chat, "reply": reply, "verdict": verdict}


def quote(sample: dict) -> str:
    """A sample for the card: the last question, and the answer."""
    asked, reply = sample["chat"][-1]["content"], sample["reply"]
    return f"- {sample['category']}: “{asked}”\n  — “{reply}” ({sample['verdict']})"


def spot_check(model: BitNetLM) -> dict[str, float]:
    """Marks for a few questions of every category."""
    return tally(ask(model, "questions", held_out_questions(SPOT_CHECK)))["all"]


def write_report(folder: Path, facts: dict, questions: int = PER_CATEGORY) -> dict:
    """Sit the exam and write training_report.json and README.md into `folder`.

    `facts` holds what only the training knows: steps, seed, tokens, minutes, threads, parameters.
    Returns the whole report: these, the figures of `evaluate`, and samples of answers.
    """
    model = load(folder)
    figures, answers = evaluate(model, questions)
    every = max(1, len(answers["questions"]) // SAMPLES)
    samples = [sample(answer) for answer in answers["questions"][::every]]
    size = (folder / "model.safetensors").stat().st_size
    report = {
        **facts,
        "weight_bytes": size,
        **figures,
        "spot_check": spot_check(model),
        "samples": samples,
    }
    text = json.dumps(report, indent=1) + "\n"
    (folder / "training_report.json").write_text(text, encoding="utf-8")
    columns = ("category", *COLUMNS)
    card = CARD.format(
        **facts,
        **{part: markdown(columns, category_rows(figures[part])) for part in PARTS},
        megabytes=size / 1e6,
        summary=markdown(("measured", "value", "of"), summary_rows(figures)),
        samples="\n".join(map(quote, samples)),
        every=every,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report
