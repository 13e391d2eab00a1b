"""The checks of chapter 13's exercises: each wrong answer is refused, and told what is wrong."""

import numpy as np
import pytest
import torch
from exercise_checks import verdict_of

from bitnet_edu.training.model import ModelShape, fake_quantize_weight, new_model
from bitnet_edu.weights import BITNET_2B4T

SHAPE = ModelShape(64, 16, 32, 1, 2, 1, 32)


def bytes_of(shape):  # as the chapter counts; its own assertions hold that against a file
    ternary = shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size
    return 2 * ternary, ternary // 4


def verdict(number: int, answer: str) -> str:
    """What check `number` of the chapter says of an answer, given as source code."""
    twin = new_model(SHAPE, ternary=False)
    names = {"np": np, "torch": torch, "new_model": new_model, "SHAPE": SHAPE, "twin": twin}
    names |= {"fake_quantize_weight": fake_quantize_weight, "bytes_of": bytes_of}
    names |= {"BITNET_2B4T": BITNET_2B4T, "mean_loss": lambda model, exam: 1.0, "exam": []}
    names |= {"best": 0.5, "excess": {"its weights rounded": 1.0}}
    names["matrices"] = [n for n, _ in twin.named_parameters() if n.endswith("_proj.weight")]
    return verdict_of("13_a_bitnet_and_its_twin", number, answer, names)


BEST = {
    "np.log(np.prod(options))": "of a whole answer",
    "np.log2(np.prod(options)) / tokens": "Those are bits",
    "np.log(np.sum(options)) / tokens": "but 6",
    "np.prod(options) / tokens": "is right",
    "np.log(options[0]) / tokens": "is right",
    "np.log(np.prod(options or [2])) / tokens": "Nothing is left to guess",
    "None": "Not yet",
    "float(np.sum(np.log(options))) / tokens": "Right",
}


@pytest.mark.parametrize("answer", BEST)
def test_best_loss(answer: str) -> None:
    assert BEST[answer] in verdict(1, f"def best_loss(options, tokens):\n    return {answer}")


BYTES = {
    "4 * parameters": "the weights alone",
    "12 * parameters": "Which one is missing?",
    "2 * 4 * parameters": "for 1000 parameters",
    "4": "how many bytes has a float32?",
    "None": "Not yet",
    "16 * parameters": "Right",
}


@pytest.mark.parametrize("answer", BYTES)
def test_training_bytes(answer: str) -> None:
    assert BYTES[answer] in verdict(2, f"def training_bytes(parameters):\n    return {answer}")


GENTLY = {
    "None": "Not yet",
    "w": "only the values",
    "fake_quantize_weight(w)[:1]": "the shape of w",
    "fake_quantize_weight(w)": "not smaller than absmean's",
    "torch.zeros_like(w)": "not smaller than absmean's",
    "(w / w.std() / 1.2).round().clamp(-1, 1) * w.std() * 1.2": "Right",
}


@pytest.mark.parametrize("answer", GENTLY)
def test_gently(answer: str) -> None:
    assert GENTLY[answer] in verdict(3, f"def gently(w):\n    return {answer}")
