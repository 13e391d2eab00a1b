"""The exam: what a packed model answers to questions that it was never trained on.

Asked of the fast engine, greedily: what is marked is what people run. Three kinds of questions:
those that the corpus holds out, sums and differences of held-out numbers, and what strangers
typed (see exam/README.md), some of it outside of the model's world, where only one answer is
right: that it does not know.
"""

import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitnet_edu.errors import InputError, require_whole
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.corpus import (
    Message,
    Question,
    held_out_questions,
    is_held_out,
    is_right,
)

if TYPE_CHECKING:
    from bitnet_edu.generate import BitNetLM

EXAM = Path(__file__).parent / "exam"
PER_CATEGORY = 200  # questions of the whole exam
MAX_NEW_TOKENS = 160  # of an answer; the longest right ones are stories
REFUSAL = re.compile(r"\b(only know a|outside of my) small world\b", re.IGNORECASE)
# letters one by one, as people write them: a-b-c, a, b, c
SPELLED = re.compile(r"(?<=\b[a-z])(?:, ?|-)(?=[a-z]\b)", re.IGNORECASE)
SUMS = ("sums", "in signs", "in words")  # categories whose key is the last number of the answer
NUMBER = re.compile(r"(?:(?<!\w)[-−])?\d+")

Progress = Callable[[str, int, int], None]  # told what is asked, how many are done, of how many


@dataclass(frozen=True)
class StrangerQuestion:
    """Of each list in `keys` one alternative must stand in a right answer."""

    category: str
    prompt: str
    keys: tuple[tuple[str, ...], ...]
    history: tuple[tuple[str, str], ...] = ()
    min_words: int = 0

    def messages(self) -> list[Message]:
        pairs = [*self.history, ("user", self.prompt)]
        return [{"role": role, "content": content} for role, content in pairs]


class Answer(NamedTuple):
    """`verdict`: "right"; "refused", an honest "I do not know"; "partly", which has a key of the
    right answer or all numbers that were asked about; or "unrelated"."""

    question: Question | StrangerQuestion
    reply: str
    verdict: str


class Evaluation(NamedTuple):
    figures: dict[str, Any]  # see `evaluate`
    answers: dict[str, list[Answer]]  # by part of the exam


# ---------------------------------------------------------------- the questions


def strangers_questions() -> list[StrangerQuestion]:
    """What strangers ask of the model's world, written by hand."""
    return [
        StrangerQuestion(
            row["category"],
            row["prompt"],
            tuple(map(tuple, row["keys"])),
            tuple(map(tuple, row["history"])),
            row.get("min_words", 0),
        )
        for row in read_lines(EXAM / "stranger.jsonl")
    ]


def off_topic_prompts() -> list[StrangerQuestion]:
    """What strangers ask that is outside of the model's world. No answer but a refusal is right."""
    rows = read_lines(EXAM / "off_topic.jsonl")
    return [StrangerQuestion(row["category"], row["prompt"], ()) for row in rows]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sum_is_held_out(x: int, sign: str, y: int) -> bool:
    """Whether the corpus keeps these two numbers out of the training."""
    identity = f"{min(x, y)}+{max(x, y)}" if sign == "+" else f"{x}-{y}"
    return is_held_out(Question("arithmetic", identity, "", "", ()))


def held_out_sums(count: int, seed: int = 0) -> list[StrangerQuestion]:
    """`count` sums and differences of two-digit numbers, each asked in two wordings."""
    rng = random.Random(seed)
    triples = [*product(range(10, 100), "+-", range(10, 100))]
    rng.shuffle(triples)
    held_out = (triple for triple in triples if sum_is_held_out(*triple))
    questions = []
    for (x, sign, y), _ in zip(held_out, range(count), strict=False):
        key = ((str(x + y if sign == "+" else x - y),),)
        word = {"+": "plus", "-": "minus"}[sign]
        for category, prompt in (
            ("in signs", f"What is {x} {sign} {y}?"),
            ("in words", f"{x} {word} {y}"),
        ):
            questions.append(StrangerQuestion(category, prompt, key))
    return questions


def first_of_each(
    questions: Iterable[StrangerQuestion], per_category: int
) -> list[StrangerQuestion]:
    kept: dict[str, list[StrangerQuestion]] = defaultdict(list)
    for question in questions:
        kept[question.category].append(question)
    return [question for part in kept.values() for question in part[:per_category]]


# ---------------------------------------------------------------- the marks


def mark(question: Question | StrangerQuestion, reply: str) -> str:
    """The verdict on a reply; see `Answer`."""
    refused = REFUSAL.search(reply) is not None
    if isinstance(question, Question):
        right = is_right(question, reply)
        one_key = [replace(question, keys=(key,), min_words=0) for key in question.keys]
        found = [is_right(part, reply) for part in one_key]
    elif not question.keys:  # off topic
        right, found = refused, []
    else:
        found = [any(says(question, key, reply) for key in keys) for keys in question.keys]
        right = all(found) and not refused and len(reply.split()) >= question.min_words
    if right:
        return "right"
    if refused:
        return "refused"
    in_world = isinstance(question, Question) or question.keys
    if any(found) or (in_world and same_numbers(question.prompt, reply)):
        return "partly"
    return "unrelated"


def says(question: StrangerQuestion, key: str, reply: str) -> bool:
    """Whether `key` stands in the reply as whole words; a number or a letter that is to be found
    out, as the last of its kind."""
    reply = SPELLED.sub(" ", reply).replace("−", "-")
    if question.category in ("letters", *SUMS):
        numbers = NUMBER.findall(re.sub(r"\bis minus (?=\d)", "is -", reply))
        if numbers and NUMBER.fullmatch(key):
            return numbers[-1] == key
    if question.category == "letters" and len(key) == 1:
        spelled = re.compile(r"\b[a-z](?: [a-z]\b){2,}")
        letters = re.findall(r"\b[a-z]\b", spelled.sub("", reply.lower()))
        return letters[-1:] == [key]
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", reply, re.IGNORECASE) is not None


def same_numbers(prompt: str, reply: str) -> bool:
    """Whether all numbers of the prompt stand in the reply, too."""
    numbers, repeated = re.findall(r"\d+", prompt), re.findall(r"\d+", reply)
    return bool(numbers) and set(numbers) <= set(repeated)


def tally(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """Category -> how many were asked and how the answers were, with the sum under "all"."""
    verdicts: dict[str, list[str]] = defaultdict(list)
    for question, _, verdict in answers:
        verdicts[question.category].append(verdict)
    verdicts["all"] = [verdict for category in list(verdicts) for verdict in verdicts[category]]
    kinds = ("right", "refused", "partly", "unrelated")
    return {
        category: {"asked": len(found), "share": round(found.count("right") / len(found), 4)}
        | {kind: found.count(kind) for kind in kinds}
        for category, found in verdicts.items()
    }


# ---------------------------------------------------------------- the loss


class AnsweredQuestion(NamedTuple):
    """A conversation as token ids; those from `start` on are its last, right, answer."""

    ids: np.ndarray  # int64[T]
    start: int


def answered(tokenizer: Tokenizer, question: Question) -> AnsweredQuestion:
    messages = question.messages()
    prompt = tokenizer.apply_chat_template(messages)
    messages = [*messages, {"role": "assistant", "content": question.answer}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    # some templates end a prompt with more than what comes before an answer
    same = [one == other for one, other in zip(prompt, ids, strict=False)]
    start = same.index(False) if False in same else len(same)
    return AnsweredQuestion(np.array(ids), max(start, 1))


def answer_scores(model: Any, text: AnsweredQuestion) -> tuple[np.ndarray, np.ndarray]:
    """For each token of the answer: float64 -log(its probability), and whether it was the first
    choice."""
    ids, start = text
    scores = model.logits(ids)[start - 1 : -1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)  # so that exp cannot overflow
    right = scores[np.arange(len(scores)), ids[start:]]
    losses = np.log(np.exp(scores).sum(axis=-1)) - right
    return losses, scores.argmax(axis=-1) == ids[start:]


def answer_losses(
    model: "BitNetLM", questions: list[Question], progress: Progress | None = None
) -> np.ndarray:
    """float64[N]: the cross-entropy in nats of every token of the right answers."""
    tokenizer, losses = model.require_tokenizer(), []
    for done, question in enumerate(questions, 1):
        losses.append(answer_scores(model, answered(tokenizer, question))[0])
        if progress:
            progress("loss on held-out answers", done, len(questions))
    losses = np.concatenate(losses)
    if losses.size == 0:
        raise InputError("this model's chat template leaves out what the assistant says")
    return losses


# ---------------------------------------------------------------- the exam


def ask(
    model: "BitNetLM",
    part: str,
    questions: Iterable[Question | StrangerQuestion],
    progress: Progress | None = None,
) -> list[Answer]:
    """The greedy answers to all questions, with the verdicts."""
    questions, answers = list(questions), []
    for done, question in enumerate(questions, 1):
        reply = "".join(model.stream(question.messages(), MAX_NEW_TOKENS)).strip()
        answers.append(Answer(question, reply, mark(question, reply)))
        if progress:
            progress(part, done, len(questions))
    return answers


def evaluate(
    model: "BitNetLM", questions: int = PER_CATEGORY, progress: Progress | None = None
) -> Evaluation:
    """Ask up to `questions` questions of every category.

    The figures: `held_out_loss` (mean cross-entropy in nats over the tokens of held-out answers);
    the shares `question_accuracy` (of held-out questions answered right), `addition_accuracy`
    (sums and differences), `stranger_accuracy`, `refusal_rate` (of off-topic prompts answered by
    an honest "I do not know") and `unrelated_answers` (of all answers; see `Answer`); in `trials`
    the number of each; and for each part a table by category. InputError for a model that cannot
    chat.
    """
    require_questions(questions)
    start = time.perf_counter()
    held_out = held_out_questions(questions)
    losses = answer_losses(model, held_out, progress)
    parts = {
        "questions": held_out,
        "sums": held_out_sums(questions),
        "stranger": first_of_each(strangers_questions(), questions),
        "off_topic": first_of_each(off_topic_prompts(), questions),
    }
    answers = {part: ask(model, part, asked, progress) for part, asked in parts.items()}
    tables = {part: tally(marked) for part, marked in answers.items()}
    whole = {part: table["all"] for part, table in tables.items()}
    asked = sum(part["asked"] for part in whole.values())
    unrelated = sum(part["unrelated"] for part in whole.values())
    figures = {
        "held_out_loss": round(float(losses.mean()), 4),
        "question_accuracy": whole["questions"]["share"],
        "addition_accuracy": whole["sums"]["share"],
        "stranger_accuracy": whole["stranger"]["share"],
        "refusal_rate": whole["off_topic"]["share"],
        "unrelated_answers": round(unrelated / asked, 4),
        "trials": {
            "held_out_loss": len(losses),
            "question_accuracy": whole["questions"]["asked"],
            "addition_accuracy": whole["sums"]["asked"],
            "stranger_accuracy": whole["stranger"]["asked"],
            "refusal_rate": whole["off_topic"]["asked"],
            "unrelated_answers": asked,
        },
        **tables,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return Evaluation(figures, answers)


def require_questions(questions: int) -> None:
    require_whole(questions, 1, None, "the number of questions")


# ---------------------------------------------------------------- the figures as text

PARTS = ("questions", "sums", "stranger", "off_topic")
COLUMNS = ("right", "asked", "share", "refused", "unrelated")


def summary_rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, the value, and of how many trials."""
    rows = []
    for name, trials in figures["trials"].items():
        value, loss = figures[name], name == "held_out_loss"
        shown, unit = (f"{value:.4f} nats", "tokens") if loss else (f"{value:.1%}", "answers")
        rows.append((name.replace("_", " "), shown, f"{trials:,} {unit}"))
    return rows


def category_rows(marks: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """A table of the figures: the category, then COLUMNS."""
    return [
        (name, *(f"{row[c]:.1%}" if c == "share" else f"{row[c]}" for c in COLUMNS))
        for name, row in marks.items()
    ]


def render(figures: dict[str, Any], name: str) -> Any:
    """The figures as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table

    summary = Table("measured", "value", "of", title=name, title_justify="left", box=None)
    for row in summary_rows(figures):
        summary.add_row(*row)
    table = Table("part", "category", *COLUMNS, box=None)
    for part in PARTS:
        for row in category_rows(figures[part]):
            table.add_row(part.replace("_", " "), *row)
    note = (
        "All questions are from the small world of the embedded model tiny, or just outside of it: "
        "of a model with another training they say little."
    )
    return Group(summary, "", table, "", note, f"{figures['seconds']:.0f} seconds")
