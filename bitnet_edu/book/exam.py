"""How well a model predicts the answers to questions that it was never trained on."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.corpus import held_out_questions
from bitnet_edu.training.evaluate import AnsweredQuestion, answer_scores, answered


class Verdict(NamedTuple):
    """1 is a perfect perplexity, the size of the vocabulary is that of a blind guess."""

    perplexity: float  # exp of the mean of -log(probability of the right token)
    right_tokens: float  # share of the answers' tokens that the model would have chosen itself


class HasLogits(Protocol):
    def logits(self, ids: np.ndarray) -> np.ndarray: ...


def answered_questions(
    tokenizer: Tokenizer, per_category: int, seed: int = 0
) -> list[AnsweredQuestion]:
    """Up to `per_category` held-out questions of every kind that tiny was trained for."""
    return [answered(tokenizer, question) for question in held_out_questions(per_category, seed)]


def judge(model: HasLogits, texts: Sequence[AnsweredQuestion]) -> Verdict:
    """Perplexity and share of right next tokens, over the tokens of all answers."""
    surprises, hits = [], []
    for text in texts:
        losses, first_choices = answer_scores(model, text)
        surprises.append(losses)
        hits.append(first_choices)
    return Verdict(
        perplexity=float(np.exp(np.concatenate(surprises).mean())),
        right_tokens=float(np.concatenate(hits).mean()),
    )
