"""The village's talk: fixed, and as surprising as it says."""

import hashlib
from collections import Counter
from itertools import permutations, product
from math import exp, isclose

import pytest

from bitnet_edu.training import village
from bitnet_edu.training.data import encode

TALK = [village.draw(5, index) for index in range(20_000)]


def test_it_never_changes() -> None:
    """A change makes the committed logs of the size study worthless: they must be made anew."""
    text = "\n".join(village.document(0, index) for index in range(2000))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "b03ff552ecb6764a"


def test_the_lists_have_no_word_twice() -> None:
    for words in (village.FIRST, village.FAMILY, village.STREET, village.PET, village.LIKES):
        assert len(set(words)) == len(words)
    assert not {*village.FIRST} & {*village.FAMILY, *village.DIGITS, "say"}
    assert len(village.FIRST) == len(village.FAMILY) == max(village.CIRCLES)


def test_every_document_is_tokens_of_a_row() -> None:
    tokenizer = village.VillageTokenizer()
    for text, _ in TALK[:2000]:
        ids, targets = encode(tokenizer, text)
        words = [village.WORDS[i] for i in ids]
        assert words == ["<begin>", *text.split(), "<end>"]
        assert targets[:-1] == ids[1:]
        assert len(ids) <= 32


def test_probabilities_of_all_villagers_add_up() -> None:
    names = product(village.FIRST, village.FAMILY)
    assert isclose(sum(village.person_probability(*name) for name in names), 1)


def test_surprise_is_the_frequency() -> None:
    """What is said often enough to be counted is said as often as its surprise says."""
    counts, surprises = Counter(text for text, _ in TALK), dict(TALK)
    for text, count in counts.most_common(200):
        expected = len(TALK) * exp(-surprises[text])
        assert abs(count - expected) < 5 * expected**0.5 + 1, text
    kinds = Counter(village.kind_of(text) for text, _ in TALK)
    for maker, share in village.MAKERS.items():
        assert kinds[maker.__name__] / len(TALK) == pytest.approx(share, abs=0.02)


def test_a_text_has_one_surprise_and_no_other_way_to_be_drawn() -> None:
    """Probabilities of everything that can be said of one villager add up to the villager's."""
    surprises = dict(TALK)
    assert len(set(TALK)) == len(surprises)
    about = [text for text in surprises if text.startswith("ada abbot ")]
    assert len(about) == len(list(permutations(village.FACTS)))
    total = sum(exp(-surprises[text]) for text in about)
    assert isclose(total, 0.6 * village.person_probability("ada", "abbot"))
    sums = [text for text in surprises if village.kind_of(text) == "addition"]
    assert all(isclose(10_000 * exp(-surprises[text]), 0.2) for text in sums)


def test_what_is_said_is_true() -> None:
    told = {}
    for text, _ in TALK:
        words = text.split()
        kind = village.kind_of(text)
        if kind == "villager":
            for part in " ".join(words[2:]).split(" and "):
                verb = part.split()[0]
                assert told.setdefault((*words[:2], verb), part) == part
        elif kind == "echo":
            _, asked, answer = text.split(" : ")
            way = -1 if "backwards" in words else 1
            assert answer.split() == asked.split()[::way]
        else:
            a, b, total = ("".join(n.split()) for n in text.replace("=", "+").split("+"))
            assert int(a) + int(b) == int(total)
