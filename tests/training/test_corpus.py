"""The corpus: the same for the same seed, and nothing of the exam is ever trained on."""

import random
import re

import pytest

from bitnet_edu.training import corpus
from bitnet_edu.training.facts import FACTS


def training_chats(seed: int, count: int) -> list:
    return [corpus.document(seed, index) for index in range(count)]


def test_same_seed_same_corpus() -> None:
    assert training_chats(3, 200) == training_chats(3, 200)
    assert training_chats(3, 200) != training_chats(4, 200)


def test_exam_is_the_same_every_time_and_covers_every_category() -> None:
    exam = corpus.held_out_questions(20)
    assert exam == corpus.held_out_questions(20)
    assert all(corpus.is_held_out(question) for question in exam)
    made = {make(random.Random(0)).category for make in corpus.MAKERS}
    assert {question.category for question in exam} == made


@pytest.fixture(scope="module")
def trained() -> dict[str, set[str]]:
    """What 10,000 training chats contain, by role, normalized."""
    contents: dict[str, set[str]] = {"system": set(), "user": set(), "assistant": set()}
    for chat in training_chats(0, 10_000):
        for message in chat if not isinstance(chat, str) else []:
            contents[message["role"]].add(corpus.normalize(message["content"]))
    return contents


def test_no_exam_question_is_trained_on(trained) -> None:
    """Compared as asked, after normalizing, and not only by the hash that decides."""
    exam = [q for q in corpus.held_out_questions(150) if q.category != "memory"]
    assert len(exam) > 1000
    assert [q.prompt for q in exam if corpus.normalize(q.prompt) in trained["user"]] == []


def test_held_out_sums_are_trained_on_in_neither_order(trained) -> None:
    sums = (re.match(r"(\d+) \+ (\d+) ", answer) for answer in trained["assistant"])
    seen = {match.groups() for match in sums if match}
    exam = [q.identity for q in corpus.held_out_questions(300) if q.category == "arithmetic"]
    pairs = [identity.split("+") for identity in exam if re.fullmatch(r"\d+\+\d+", identity)]
    assert len(pairs) > 50
    assert len(seen) > 1000
    assert not [(x, y) for x, y in pairs if (x, y) in seen or (y, x) in seen]


@pytest.mark.parametrize("make", corpus.MAKERS, ids=lambda make: make.__name__)
def test_every_own_answer_is_marked_right(make) -> None:
    rng = random.Random(5)
    for _ in range(500):
        question = make(rng)
        assert corpus.is_right(question, question.answer), question


@pytest.mark.parametrize("make", corpus.MAKERS, ids=lambda make: make.__name__)
def test_an_answer_to_another_question_is_marked_wrong(make) -> None:
    rng = random.Random(6)
    wrong = 0
    for _ in range(200):
        question, other = make(rng), make(rng)
        wrong += not corpus.is_right(question, other.answer)
    # all unknown subjects and some small talk share their answers; elsewhere they rarely fit
    assert wrong > {"unknown": -1, "small_talk": 120, "word_facts": 100}.get(make.__name__, 140)


def test_the_keys_of_a_fact_fit_no_other_fact() -> None:
    for fact in FACTS:
        marked = corpus.Question("facts", "", fact.direct, "", fact.keys)
        assert all(corpus.is_right(marked, answer) for answer in fact.answers)
        for other in FACTS:
            if other is not fact:
                assert not any(corpus.is_right(marked, answer) for answer in other.answers)


@pytest.mark.parametrize(
    ("key", "reply", "right"),
    [
        ("= 12", "7 + 5 = 12.", True),
        ("= 12", "7 + 5 = 120.", False),
        ("= 12", "", False),
        ("-1, 0 or +1", "It can be -1, 0 or +1.", True),
    ],
)
def test_keys_are_whole_words(key: str, reply: str, right: bool) -> None:
    assert corpus.is_right(corpus.Question("x", "", "", "", (key,)), reply) is right
