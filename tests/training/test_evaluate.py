"""The exam: its questions, its marks, its figures, and that the engine's are transformers'."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import bitnet_edu
from bitnet_edu.errors import InputError
from bitnet_edu.files.source import TINY
from bitnet_edu.training import evaluate as exam
from bitnet_edu.training.corpus import Question, held_out_questions, is_right
from bitnet_edu.training.report import write_report

REFUSAL = "I am sorry, I do not know that. I only know a small world."


@pytest.fixture(scope="module")
def tiny():
    return bitnet_edu.load("tiny")


# The questions


def test_strangers_ask_enough_of_everything() -> None:
    questions = exam.strangers_questions()
    least = {"book": 60, "smalltalk": 40, "letters": 40, "story": 25, "memory": 40}
    asked = Counter(question.category for question in questions)
    assert asked >= Counter(least | {"wordfacts": 30, "sums": 40})
    assert len({(question.history, question.prompt) for question in questions}) == len(questions)
    for question in questions:
        assert all(key.strip() == key != "" for keys in question.keys for key in keys), question
        assert question.keys
        assert [role for role, _ in question.history] == ["user", "assistant"] * (
            len(question.history) // 2
        )
        assert bool(question.history) == (question.category == "memory")
        assert question.min_words == (25 if question.category == "story" else 0)


def test_off_topic_prompts_are_many_and_all_different() -> None:
    prompts = [question.prompt for question in exam.off_topic_prompts()]
    assert len(set(prompts)) == len(prompts) >= 200


def test_held_out_sums() -> None:
    questions = exam.held_out_sums(200)
    assert questions == exam.held_out_sums(200)
    assert Counter(q.category for q in questions) == {"in signs": 200, "in words": 200}
    assert len({q.prompt for q in questions}) == 400
    signs = Counter()
    for question in questions:
        x, sign, y = re.fullmatch(
            r"(?:What is )?(\d\d) (\+|-|plus|minus) (\d\d)\??", question.prompt
        ).groups()
        signs[sign] += 1
        result = int(x) + int(y) if sign in ("+", "plus") else int(x) - int(y)
        assert question.keys == ((str(result),),)
    assert min(signs.values()) > 70


def test_the_corpus_holds_these_sums_out() -> None:
    """It says which: its own held-out sums of such numbers are held out here, too."""
    answers = [q.answer for q in held_out_questions(150) if q.category == "arithmetic"]
    found = [re.search(r"\b(\d\d) ([+-]) (\d\d) = \S+$", answer) for answer in answers]
    sums = [(int(match[1]), match[2], int(match[3])) for match in found if match]
    assert len(sums) > 20
    assert np.mean([exam.sum_is_held_out(*triple) for triple in sums]) > 0.8


# The marks

BIG = exam.StrangerQuestion("book", "How big?", (("30", "thirty"), ("layers",)))
SUM = exam.StrangerQuestion("sums", "12 - 30", (("-18",),))
SPELL = exam.StrangerQuestion("letters", "spell cat", (("c a t",),))
FIRST = exam.StrangerQuestion("letters", "first letter of pumpkin", (("p",),))
COUNT = exam.StrangerQuestion("letters", "letters in carrot", (("6", "six"),))
STORY = exam.StrangerQuestion("story", "A fox!", (("fox",),), min_words=5)
OFF = exam.StrangerQuestion("general", "Who won in 1998?", ())
HELD_OUT = Question("facts", "", "What?", "", ("-1", "three"))


@pytest.mark.parametrize(
    ("question", "reply", "verdict"),
    [
        (BIG, "It has Thirty layers.", "right"),
        (BIG, "It has 300 layers.", "partly"),
        (BIG, "It has 300 players.", "unrelated"),
        (BIG, REFUSAL, "refused"),
        (BIG, f"{REFUSAL} Ask me about 30 layers.", "refused"),
        (SUM, "12 - 30 = -18.", "right"),
        (SUM, "12 − 30 = −18", "right"),
        (SUM, "30 - 12 = 18, so 12 minus 30 is minus 18.", "right"),
        (SUM, "12 - 30 = 18", "partly"),
        (SUM, "-18 is less than 12", "unrelated"),
        (SUM, "12-30=-180", "partly"),
        (SUM, "It is the scale.", "unrelated"),
        (SPELL, "c-a-t", "right"),
        (SPELL, "C, A, T.", "right"),
        (SPELL, "c a t s", "right"),
        (SPELL, "cat", "unrelated"),
        (FIRST, "p u m p k i n starts with p.", "right"),
        (FIRST, "P is the first letter of p-u-m-p-k-i-n.", "right"),
        (FIRST, "p u m p k i n starts with n.", "unrelated"),
        (COUNT, "c 1, a 2, r 3, r 4, o 5, t 6: 6 letters", "right"),
        (COUNT, "It has six letters.", "right"),
        (COUNT, "6 is not it, 7 is", "unrelated"),
        (STORY, "Once there was a fox.", "right"),
        (STORY, "A fox.", "partly"),
        (OFF, REFUSAL, "right"),
        (OFF, "Sorry, that is OUTSIDE OF MY SMALL WORLD.", "right"),
        (OFF, "1998 is an even number.", "unrelated"),
        (OFF, "It is a small world.", "unrelated"),
        (HELD_OUT, "-1, three", "right"),
        (HELD_OUT, "three", "partly"),
        (HELD_OUT, "", "unrelated"),
    ],
)
def test_marks(question, reply, verdict) -> None:
    assert exam.mark(question, reply) == verdict


def test_own_answers_of_the_corpus_are_right() -> None:
    for question in held_out_questions(5):
        assert exam.mark(question, question.answer) == "right", question


# The figures


class Parrot:
    """Has tiny's tokenizer; says what `reply` says, and is as sure as an oracle of any text."""

    def __init__(self, tiny, reply):
        self.tokenizer, self.reply = tiny.tokenizer, reply
        self.vocabulary = tiny.config.vocab_size

    def require_tokenizer(self):
        return self.tokenizer

    def logits(self, ids):
        scores = np.zeros((len(ids), self.vocabulary), np.float32)
        scores[np.arange(len(ids) - 1), ids[1:]] = 60
        return scores

    def stream(self, messages, max_new_tokens):
        yield self.reply(messages)


SHARES = ("question_accuracy", "addition_accuracy", "stranger_accuracy", "refusal_rate")


def test_who_knows_all_is_right_everywhere(tiny) -> None:
    known = [*held_out_questions(2), *exam.strangers_questions(), *exam.held_out_sums(2)]
    answers = {
        json.dumps(question.messages()): question.answer
        if isinstance(question, Question)
        else " ".join(["word"] * question.min_words + [", ".join(k[0] for k in question.keys)])
        for question in known
    }
    parrot = Parrot(tiny, lambda messages: answers.get(json.dumps(messages), REFUSAL))
    calls = []
    figures = exam.evaluate(parrot, 2, lambda *call: calls.append(call)).figures
    assert [figures[name] for name in SHARES] == [1, 1, 1, 1]
    assert figures["unrelated_answers"] == 0
    assert figures["held_out_loss"] == 0
    trials = figures["trials"]
    assert trials["addition_accuracy"] == 4
    assert trials["stranger_accuracy"] == 14
    assert trials["unrelated_answers"] == sum(trials[name] for name in SHARES)
    assert ("sums", 4, 4) in calls


def test_who_refuses_all_is_only_right_off_topic(tiny) -> None:
    figures = exam.evaluate(Parrot(tiny, lambda messages: REFUSAL), 2).figures
    assert figures["refusal_rate"] == 1
    assert figures["addition_accuracy"] == figures["stranger_accuracy"] == 0
    assert figures["stranger"]["all"]["refused"] == figures["trials"]["stranger_accuracy"]
    assert figures["unrelated_answers"] == 0


def test_who_babbles_is_unrelated(tiny) -> None:
    figures = exam.evaluate(Parrot(tiny, lambda messages: "Xyzzy."), 2).figures
    assert [figures[name] for name in SHARES] == [0, 0, 0, 0]
    assert figures["unrelated_answers"] == 1


@pytest.mark.parametrize("number", [0, -1, 1.5, "3", True])
def test_a_number_of_questions_that_is_none(tiny, number) -> None:
    with pytest.raises(InputError, match="the number of questions"):
        exam.evaluate(tiny, number)


def test_a_template_without_answers_is_refused(tiny) -> None:
    class Deaf:
        def apply_chat_template(self, messages, add_generation_prompt=True):
            return [1, 2, 3]

    parrot = Parrot(tiny, lambda messages: "")
    parrot.tokenizer = Deaf()
    with pytest.raises(InputError, match="leaves out"):
        exam.answer_losses(parrot, held_out_questions(1))


def test_a_prompt_that_ends_with_more_than_comes_before_an_answer() -> None:
    class Thinking:
        def apply_chat_template(self, messages, add_generation_prompt=True):
            return [1, 2, 9, 9] if add_generation_prompt else [1, 2, 5, 6]

    ids, start = exam.answered(Thinking(), held_out_questions(1)[0])
    assert (ids.tolist(), start) == ([1, 2, 5, 6], 2)


def test_tables(tiny) -> None:
    figures = exam.evaluate(Parrot(tiny, lambda messages: REFUSAL), 1).figures
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(exam.render(figures, "a model"))
    text = console.export_text()
    assert re.search(r"refusal rate +100.0% +10 answers", text)
    assert re.search(r"stranger +memory +0 +1 +0.0% +1 +0", text)


def test_no_torch_is_needed() -> None:
    code = "import bitnet_edu.training.evaluate, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    modules = set(result.stdout.split())
    assert "bitnet_edu.training.evaluate" in modules
    assert not {"torch", "transformers"} & modules


# The engine


@pytest.fixture(scope="module")
def theirs():
    return torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")).eval()


@torch.no_grad()
def test_the_loss_is_that_of_transformers(tiny, theirs) -> None:
    questions = held_out_questions(2)
    losses = []
    for question in questions:
        ids, start = exam.answered(tiny.tokenizer, question)
        ids = torch.from_numpy(ids)
        logits = theirs(ids[None]).logits[0, start - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[start:], reduction="none"))
    ours, theirs_ = exam.answer_losses(tiny, questions), torch.cat(losses).numpy()
    assert ours.shape == theirs_.shape
    assert ours.mean() == pytest.approx(theirs_.mean(), abs=1e-3)


@torch.no_grad()
def test_the_answers_are_those_of_transformers(tiny, theirs) -> None:
    questions = [*held_out_questions(1)[:3], *exam.off_topic_prompts()[:2]]
    for question, reply, verdict in exam.ask(tiny, "few", questions):
        ids = torch.tensor([tiny.tokenizer.apply_chat_template(question.messages())])
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=exam.MAX_NEW_TOKENS,
            max_length=None,
            do_sample=False,
        )
        assert tiny.tokenizer.decode(output[0, ids.shape[1] :].tolist()).strip() == reply
        assert verdict == exam.mark(question, reply)


# The report


def test_report_and_card_are_written_from_the_exam(tmp_path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    facts = {"steps": 10, "seed": 0, "tokens": 20, "minutes": 1.0, "threads": 2, "parameters": 3}
    report = write_report(folder, facts, questions=1)
    assert json.loads((folder / "training_report.json").read_text(encoding="utf-8")) == report
    assert report["steps"] == 10
    assert report["trials"]["stranger_accuracy"] == 7
    model, card = bitnet_edu.load(folder), (folder / "README.md").read_text(encoding="utf-8")
    for sample in report["samples"]:
        reply = "".join(model.stream(sample["chat"])).strip()
        assert reply == sample["reply"]
        assert f"“{reply}”" in card
    assert len(report["samples"]) == report["trials"]["question_accuracy"]
    strangers = {question.prompt for question in exam.strangers_questions()}
    assert not strangers & {sample["chat"][-1]["content"] for sample in report["samples"]}
    for part in exam.PARTS:
        for category, row in report[part].items():
            assert f"| {category} | {row['right']} | {row['asked']} |" in card
    assert all(
        (sample["verdict"] == "right") == is_right(question, sample["reply"])
        for sample, question in zip(report["samples"], held_out_questions(1), strict=True)
    )
