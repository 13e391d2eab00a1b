"""How well a model predicts the answers to questions that it was never trained on."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training.corpus import held_out_questions


class AnsweredQuestion(NamedTuple):
    """A conversation as token ids; those from `start` on are its last, right, answer."""

    ids: np.ndarray  # int[T]
    start: int


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
    texts = []
    for question in held_out_questions(per_category, seed):
        turns = [*question.history, ("user", question.prompt)]
        messages = [{"role": role, "content": content} for role, content in turns]
        start = len(tokenizer.apply_chat_template(messages))
        messages.append({"role": "assistant", "content": question.answer})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        texts.append(AnsweredQuestion(np.array(ids), start))
    return texts


def judge(model: HasLogits, texts: Sequence[AnsweredQuestion]) -> Verdict:
    """Perplexity and share of right next tokens, over the tokens of all answers."""
    surprises, hits = [], []
    for ids, start in texts:
        scores = model.logits(ids)[start - 1 : -1].astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)  # so that exp cannot overflow
        right = scores[np.arange(len(scores)), ids[start:]]
        surprises.append(np.log(np.exp(scores).sum(axis=-1)) - right)
        hits.append(scores.argmax(axis=-1) == ids[start:])
    return Verdict(
        perplexity=float(np.exp(np.concatenate(surprises).mean())),
        right_tokens=float(np.concatenate(hits).mean()),
    )
