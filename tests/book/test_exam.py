import numpy as np
import pytest

import bitnet_edu
from bitnet_edu.book.exam import answered_questions, judge
from bitnet_edu.training.corpus import held_out_questions


@pytest.fixture(scope="module")
def texts():
    return answered_questions(bitnet_edu.load("tiny").tokenizer, per_category=2, seed=3)


class Oracle:
    """Puts a score of `height` on the token that comes next and 0 on the others."""

    def __init__(self, height: float):
        self.height = height

    def logits(self, ids):
        scores = np.zeros((len(ids), ids.max() + 1), np.float32)
        scores[np.arange(len(ids) - 1), ids[1:]] = self.height
        return scores


def test_the_marked_tokens_are_the_right_answer_and_its_end(texts):
    tokenizer = bitnet_edu.load("tiny").tokenizer
    for text, question in zip(texts, held_out_questions(2, seed=3), strict=True):
        answer = tokenizer.decode(text.ids[text.start :], skip_special_tokens=False)
        assert answer == question.answer.strip() + "<|eot_id|>"
        assert question.prompt.strip() in tokenizer.decode(text.ids[: text.start])


def test_an_oracle_is_perfect_and_a_blind_guess_has_the_perplexity_of_the_vocabulary():
    ids = np.arange(20)
    text = (ids, 5)
    assert judge(Oracle(60.0), [text]).perplexity == pytest.approx(1)
    assert judge(Oracle(60.0), [text]).right_tokens == 1
    assert judge(Oracle(0.0), [text]).perplexity == pytest.approx(20)
    assert judge(Oracle(-1.0), [text]).right_tokens == 0


def test_only_the_answers_tokens_count():
    class LateOracle(Oracle):  # right from position 9 on only
        def logits(self, ids):
            scores = super().logits(ids)
            scores[:9] = -scores[:9]
            return scores

    ids = np.arange(20)
    assert judge(LateOracle(60.0), [(ids, 10)]).right_tokens == 1
    assert judge(LateOracle(60.0), [(ids, 9)]).right_tokens == pytest.approx(10 / 11)


def test_huge_scores_do_not_overflow():
    assert judge(Oracle(1e30), [(np.arange(4), 1)]).perplexity == 1
