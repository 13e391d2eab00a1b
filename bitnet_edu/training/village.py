"""The text of the size study: talk of a made-up village, whose entropy is known exactly.

Every document is drawn from a few short lists by fixed rules, and `surprise` says how unlikely it
was. No model, however large, can have a lower expected loss than the mean of that. The village has
its own words and its own random numbers, so that a study of models stays repeatable when the book's
other corpus changes.
"""

import random
from math import log

# Who lives in the village (first and family names), where, with which pet, and what they like
LISTS = """
ada ben cleo dan eve finn gia hal ida jon kim leo mia ned ola pam quin ray sue tom
una vic wim yan zoe abe bea cal dot eli fay gus hope ivy joe kay liv max nan otto

abbot baker carter dyer eaton fisher gardner hunter irving jager keeper lambert miller norman
oakley potter quarles ryder sawyer tanner usher vintner weaver yeoman zeller archer brewer cooper
draper farmer glover hooper joiner mason page reeve slater thatcher turner wright

elm oak ash birch cedar hazel holly maple pine willow alder beech cherry lime poplar rowan mill
bridge church market castle station river meadow hill well tower garden school harbor

newt cat dog hen goat frog crow hare mole toad carp duck swan lamb pony mouse snail owl bee ferret
gecko parrot rabbit turtle canary cricket donkey goose pigeon spider

tea bread jam rain snow chess songs maps clocks kites boats plums figs soup honey cheese books
lamps drums masks stamps coins shells ropes wool clay glass salt mint roses
"""
FIRST, FAMILY, STREET, PET, LIKES = (part.split() for part in LISTS.split("\n\n"))
CIRCLES = (5, 10, 20, 40)  # whoever is in a smaller circle is talked about more often
DIGITS = list("0123456789")
GRAMMAR = ("<begin>", "<end>", "lives", "in", "street", "keeps", "a", "likes", "and")
SYMBOLS = ("say", "again", "backwards", ":", "+", "=")
WORDS = sorted({*GRAMMAR, *SYMBOLS, *DIGITS, *FIRST, *FAMILY, *STREET, *PET, *LIKES})
FACTS = {
    "lives": ("lives in {} street", STREET),
    "keeps": ("keeps a {}", PET),
    "likes": ("likes {}", LIKES),
}


def fact(first: str, family: str, kind: str) -> str:
    """What is true of a villager, always the same: a word drawn once, by the name."""
    return random.Random(f"{first} {family} {kind}").choice(FACTS[kind][1])


def person_probability(first: str, family: str) -> float:
    """How often a villager is talked about."""
    place = 1 + max(FIRST.index(first), FAMILY.index(family))
    return sum(1 / size**2 for size in CIRCLES if place <= size) / len(CIRCLES)


def villager(rng: random.Random) -> tuple[str, float]:
    """ "ada baker lives in elm street and keeps a newt and likes tea", the three in any order."""
    circle = rng.choice(CIRCLES)
    first, family = rng.choice(FIRST[:circle]), rng.choice(FAMILY[:circle])
    kinds = rng.sample(list(FACTS), 3)
    told = (FACTS[kind][0].format(fact(first, family, kind)) for kind in kinds)
    return f"{first} {family} {' and '.join(told)}", log(6) - log(person_probability(first, family))


def echo(rng: random.Random) -> tuple[str, float]:
    """ "say again : tea jam rain : tea jam rain", or backwards; two to six words."""
    way, count = rng.choice(("again", "backwards")), rng.randint(2, 6)
    words = [rng.choice(LIKES) for _ in range(count)]
    answer = words if way == "again" else words[::-1]
    surprise = log(2) + log(5) + count * log(len(LIKES))
    return f"say {way} : {' '.join(words)} : {' '.join(answer)}", surprise


def addition(rng: random.Random) -> tuple[str, float]:
    """ "4 7 + 8 5 = 1 3 2", of numbers below 100, every digit a word."""
    a, b = rng.randrange(100), rng.randrange(100)
    text = f"{' '.join(str(a))} + {' '.join(str(b))} = {' '.join(str(a + b))}"
    return text, 2 * log(100)


MAKERS = {villager: 0.6, echo: 0.2, addition: 0.2}
KINDS = tuple(maker.__name__ for maker in MAKERS)


def draw(seed: int, index: int) -> tuple[str, float]:
    """Document number `index`, and its surprise: -log of its probability, in nats."""
    rng = random.Random(f"village {seed}/{index}")
    maker = rng.choices(list(MAKERS), list(MAKERS.values()))[0]
    text, surprise = maker(rng)
    return text, surprise - log(MAKERS[maker])


def document(seed: int, index: int) -> str:
    return draw(seed, index)[0]


def kind_of(text: str) -> str:
    """Which of KINDS a document is."""
    first = text.split()[0]
    return "echo" if first == "say" else "addition" if first in DIGITS else "villager"


class VillageTokenizer:
    """Every word is a token; as much of a tokenizer as training needs."""

    eos_token = "<end>"

    def __init__(self) -> None:
        self.ids = {word: number for number, word in enumerate(WORDS)}

    def token_id(self, word: str) -> int:
        return self.ids[word]

    def encode(self, text: str) -> list[int]:
        """int ids of the words, after the one that begins a document; KeyError for a new word."""
        return [self.ids[word] for word in ("<begin>", *text.split())]
