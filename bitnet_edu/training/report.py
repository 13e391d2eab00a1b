"""What a finished model says of itself: training_report.json and the model card."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from bitnet_edu.training.corpus import Question, held_out_questions, is_right
from bitnet_edu.training.data import exam_batch
from bitnet_edu.training.evaluate import Examinee, accuracy

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
too. The corpus is written by `bitnet_edu/training/corpus.py`; no data was downloaded.

Its world is small: what this book teaches, small talk, sums up to 100, letters and words, short
stories. Elsewhere it says that it does not know, or is wrong.

Loss on held-out answers: {held_out_loss} nats a token, computed by transformers in float32. Greedy
answers to held-out questions, marked by the keys that a right answer must contain:

| category | right | asked | share |
| --- | --- | --- | --- |
{table}

A question is held out by a hash of what it asks: the two numbers of a sum, the word of a letter
task, the wording of a question about a fact or a product, the subject of an unknown topic. It was
never trained on as asked, but its parts are known from other questions: a fact is trained on in
other wordings, and a word in other tasks. Wrong answers of early versions were read while the
corpus was written, so this is a check of generalization, not a blind test.
"""


PER_CATEGORY = 150  # questions of the whole exam
SPOT_CHECK = 12  # questions that a test asks again


def examine(
    examinee: Examinee, per_category: int = PER_CATEGORY
) -> tuple[dict, list[tuple[Question, str]]]:
    """Marks by category, and the held-out questions with the model's replies."""
    questions = held_out_questions(per_category)
    replies = list(examinee.answers(questions))
    marks = {
        category: {"right": right, "asked": asked, "share": round(right / asked, 4)}
        for category, (right, asked) in accuracy(questions, replies).items()
    }
    return marks, list(zip(questions, replies, strict=True))


def write_report(folder: Path, facts: dict) -> dict:
    """Sit the exam and write training_report.json and README.md into `folder`.

    `facts` holds what only the training knows: steps, seed, tokens, minutes, threads, parameters.
    Returns the whole report.
    """
    examinee = Examinee(folder)
    batch = exam_batch(Tokenizer.from_file(str(folder / "tokenizer.json")))
    facts |= {
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "held_out_loss": round(examinee.loss(batch), 4),
    }
    marks, answered = examine(examinee)
    samples = [
        {
            "category": question.category,
            "chat": question.messages(),
            "reply": reply,
            "right": is_right(question, reply),
        }
        for question, reply in answered[:: max(1, len(answered) // 20)]
    ]
    report = {
        **facts,
        "accuracy": marks,
        "spot_check": examine(examinee, SPOT_CHECK)[0],
        "samples": samples,
    }
    text = json.dumps(report, indent=1) + "\n"
    (folder / "training_report.json").write_text(text, encoding="utf-8")
    rows = [
        f"| {name} | {mark['right']} | {mark['asked']} | {mark['share']:.1%} |"
        for name, mark in marks.items()
    ]
    card = CARD.format(**facts, megabytes=facts["weight_bytes"] / 1e6, table="\n".join(rows))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report
