"""The checks of chapter 12's exercises: each wrong answer is refused, and told what is wrong."""

import numpy as np
import pytest
import torch
from exercise_checks import verdict_of


def straight_through(x, quantize):
    return x + (quantize(x) - x).detach()


def verdict(number: int, answer: str) -> str:
    """What check `number` of the chapter says of an answer, given as source code."""
    names = {"np": np, "torch": torch, "straight_through": straight_through}
    return verdict_of("12_straight_through", number, answer, names)


CLIPPED = {
    "x.round().clamp(-1, 1)": "no gradient passes",
    "x.round().clamp(-1, 1).detach()": "no gradient passes",
    "straight_through(x, lambda x: x.round().clamp(-1, 1))": "passes beyond 1.5",
    "straight_through(x.clamp(-1, 1), torch.round)": "in the wrong place",
    "straight_through(x.clamp(-1.5, 1.5), torch.round)": "the value is not x, rounded",
    "x.clamp(-1.5, 1.5)": "the value is not x, rounded",
    "None": "Not yet",
    "straight_through(x, torch.round).clamp(-1, 1)": "Right",
}


@pytest.mark.parametrize("answer", CLIPPED)
def test_clipped(answer: str) -> None:
    assert CLIPPED[answer] in verdict(1, f"def clipped(x):\n    return {answer}")


STEPS = {
    "int(np.ceil((scale / 2 - w) / step))": "to the border, and not across",
    "int((scale - w) // step) + 1": "across earlier",
    "int(scale / 2 // step) + 1": "it takes",
    "int((scale / 2 - w) // step) + 2": "across earlier",
    "(scale / 2 - w) / step": "to the border, and not across",
    "None": "Not yet",
    "int(np.floor((scale / 2 - w) / step)) + 1": "Right",
}


@pytest.mark.parametrize("answer", STEPS)
def test_steps_to_cross(answer: str) -> None:
    assert STEPS[answer] in verdict(2, f"def steps_to_cross(w, scale, step):\n    return {answer}")


BINARY = {
    "(w - w.mean()).sign() * w.abs().mean()": "not passed straight through",
    "straight_through(w, lambda w: w.sign() * w.abs().mean())": "Is the mean subtracted?",
    "straight_through(w, lambda w: (w - w.mean()).sign())": "the level is not",
    "straight_through(w, lambda w: (w - w.mean()).sign() * (w - w.mean()).abs().mean())": (
        "the level is not"
    ),
    "(w + ((w - w.mean()).sign() * w.abs().mean() - w)).detach()": "not passed straight through",
    "None": "Not yet",
    "straight_through(w, lambda w: (w - w.mean()).sign() * w.abs().mean())": "Right",
}


@pytest.mark.parametrize("answer", BINARY)
def test_binary(answer: str) -> None:
    assert BINARY[answer] in verdict(3, f"def binary(w):\n    return {answer}")
