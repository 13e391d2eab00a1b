"""Guessing ahead: several tokens a step, and still the same ones.

A decode step reads all weights for a single token, while further tokens in the same step cost
arithmetic only. So we guess how the text goes on, feed the guess together with the last token, and
let the model choose at every place: what it chooses up to the first wrong guess, and in its place,
is what it would have chosen one by one (speculative decoding, Leviathan et al., arXiv 2211.17192;
here without a draft model's probabilities, for a choice is a function of the scores and of one
random number). The guess costs nothing: the last tokens were seen before, so what followed them
then may follow now (prompt lookup, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Sequence

from bitnet_edu.errors import InputError, require_whole

NGRAMS = 5, 3  # how many last tokens must have been seen before; with two, chance is too common
LONGEST = 15  # with the token before them 16, which the kernels take by fours
START, MOST = 4.0, 30.0  # credit, in tokens
PER_TOKEN, PER_HIT = 1 / 32, 1 / 3  # credit earned


class Guesser:
    """Knows a text and guesses how it goes on; `longest` 0: never.

    How many tokens are worth a guess is a matter of credit. A wrong one takes 1, a right one
    brings 1/3, any token of the text 1/32; half of the credit may be guessed at a time. So after T
    tokens with A right guesses at most 4 + T / 32 + A / 3 guesses were wrong. As long as a further
    token in a step costs less than 3/4 of a step, A right ones save more than A / 3 wrong ones
    cost, and a text that no guess fits pays for 4 + T / 32 further tokens at worst. No clock is
    involved: the same text takes the same steps on every machine.

    """

    def __init__(self, longest: int = LONGEST):
        self.longest = require_whole(longest, 0, LONGEST, "the longest guess")
        self.steps = self.guessed = self.accepted = 0
        self._credit = START
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it lies

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        if not self.longest:
            return
        known = self._tokens
        for token in tokens:
            for n in NGRAMS:
                if len(known) >= n:
                    self._next[tuple(known[-n:])] = len(known)
            known.append(token)

    def guess(self, room: int) -> list[int]:
        """Up to `room` tokens that may come next: what followed when the end last occurred.

        Where that reaches the end of the text itself it starts over: the text may be a loop.
        """
        length = min(int((self._credit + 1) / 2), self.longest, room)
        for n in NGRAMS if length > 0 else ():
            if at := self._next.get(tuple(self._tokens[-n:])):
                period = len(self._tokens) - at
                return [self._tokens[at + i % period] for i in range(length)]
        return []

    def judge(self, guessed: int, accepted: int) -> None:
        """A step was made with so many guessed tokens, of which the first `accepted` were right."""
        self.steps += 1
        self.guessed += guessed
        self.accepted += accepted
        earned = (accepted + 1) * PER_TOKEN + accepted * PER_HIT
        self._credit = min(MOST, self._credit + earned - (guessed - accepted))

    def counts(self) -> dict[str, int]:
        """Calls of the engine; tokens fed on trial; those of them that were right."""
        return {
            "steps": self.steps,
            "guessed_tokens": self.guessed,
            "accepted_tokens": self.accepted,
        }


def as_guesser(guess: bool | Guesser) -> Guesser:
    """True: a new guesser; False: one that never guesses. InputError for what is neither."""
    if isinstance(guess, Guesser):
        return guess
    if not isinstance(guess, bool):
        raise InputError(f"guess must be True, False or a Guesser, not {guess!r}")
    return Guesser(LONGEST if guess else 0)
