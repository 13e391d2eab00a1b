"""Sampling against transformers' own logits processors; streams, stops and limits."""

import numpy as np
import pytest
from checkpoints import VOCABULARY, Recipe, write
from hypothesis import given
from hypothesis import strategies as st
from oracle import torch, transformers

from bitnet_edu import BitNetError, ContextLengthError, InputError, load
from bitnet_edu.generate import generate_ids, sample, until

PROMPT = [0, 70, 80, 90]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(str(write(tmp_path_factory.mktemp("model"), Recipe())))


@pytest.fixture(scope="module")
def greedy(model):
    """A long greedy text with no end token in force."""
    return model.generate(PROMPT, max_new_tokens=60, stop=())


# Sampling


class Draw:
    """Stands in for a random generator: keeps what it may choose from, and the probabilities."""

    def choice(self, order, p):
        self.order, self.p = order, p
        return order[0]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
def test_sampling_draws_from_the_distribution_of_transformers(temperature, top_k, top_p):
    scores = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    draw = Draw()
    sample(scores, draw, temperature=temperature, top_k=top_k, top_p=top_p)
    ours = np.zeros(VOCABULARY)
    ours[draw.order] = draw.p

    warped = transformers.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores)[None])
    if top_k is not None:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p is not None and top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    theirs = torch.softmax(warped.double(), -1)[0].numpy()
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_draws_follow_the_probabilities():
    scores = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.default_rng(0)
    draws = [sample(scores, rng, temperature=1.0) for _ in range(4000)]
    shares = np.bincount(draws, minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)  # four standard deviations


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), st.floats(1e-3, 5))
def test_greedy_is_the_limit_of_a_low_temperature_and_of_a_small_top_k(values, temperature):
    scores, rng = np.array(values, np.float32), np.random.default_rng(0)
    best = sample(scores, rng)
    assert best == int(scores.argmax())
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        assert scores[sample(scores, rng, temperature=temperature, **options)] == scores[best]
    assert scores[sample(scores, rng, temperature=1e-12)] == scores[best]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_even_when_greedy(model, options):
    with pytest.raises(InputError, match=next(iter(options))):
        model.generate(PROMPT, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    with pytest.raises(BitNetError, match="NaN or Inf"):
        sample(np.array([1, value], np.float32), np.random.default_rng(0))


# Generation


def test_greedy_tokens_are_the_best_of_each_whole_forward(model, greedy):
    scores = model.logits(np.array(PROMPT + greedy[:-1]))[len(PROMPT) - 1 :]
    assert scores.argmax(axis=1).tolist() == greedy


def test_a_seed_repeats_and_another_differs(model):
    def text(seed: int | None) -> list[int]:
        return model.generate(PROMPT, max_new_tokens=30, temperature=100.0, seed=seed, stop=())

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


def test_an_end_token_ends_and_is_returned(model, greedy):
    at = 7
    end = greedy[at]
    expected = greedy[: greedy.index(end) + 1]
    assert model.generate(PROMPT, max_new_tokens=60, stop=[end]) == expected
    assert model.generate(PROMPT, max_new_tokens=60, stop=end) == expected
    assert list(generate_ids(model, PROMPT, 60, stop={end})) == expected


def test_the_end_tokens_of_the_model_are_the_default(tmp_path, model, greedy):
    end = greedy[5]
    other = load(str(write(tmp_path)))
    other.config = other.config._replace(eos_token_ids=(end,))
    expected = greedy[: greedy.index(end) + 1]
    assert other.generate(PROMPT, max_new_tokens=60) == expected
    # strings come on top of the end tokens, token ids take their place
    assert other.generate(PROMPT, max_new_tokens=60, stop=["\0never\0"]) == expected
    unused = next(token for token in range(VOCABULARY) if token not in greedy)
    assert other.generate(PROMPT, max_new_tokens=60, stop=[unused]) == greedy


def test_eot_ends_a_turn_even_where_config_names_another_end(tmp_path):
    model = load(str(write(tmp_path)))
    assert model.config.eos_token_ids == (1, 2)


def test_the_stream_is_the_text_of_the_tokens(model, greedy):
    text = model.tokenizer.decode(greedy)
    made = []
    assert "".join(model.stream(PROMPT, max_new_tokens=60, stop=(), made=made)) == text
    assert made == greedy


def test_messages_are_prompted_by_the_chat_template(model):
    messages = [{"role": "user", "content": "Hello"}]
    ids = model.tokenizer.apply_chat_template(messages)
    expected = "".join(model.stream(ids, max_new_tokens=20))
    assert "".join(model.stream(messages, max_new_tokens=20)) == expected


def test_a_stop_string_ends_the_text_before_it_is_shown(model, greedy):
    text = model.tokenizer.decode(greedy)
    for length in (1, 3, 6):
        stop = text[20 : 20 + length]
        pieces = list(model.stream(PROMPT, max_new_tokens=60, stop=["\0no\0", stop]))
        assert "".join(pieces) == text[: text.index(stop)]
        ids = model.generate(PROMPT, max_new_tokens=60, stop=stop)
        assert ids == greedy[: len(ids)]
        assert stop in model.tokenizer.decode(ids)
        assert stop not in model.tokenizer.decode(ids[:-1])


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_until_passes_all_text_before_the_first_stop(pieces, strings):
    text = "".join(pieces)
    passed = list(until(iter(pieces), strings))
    # the first to be complete ends the text; of those complete at once, the first to begin
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in strings)]
    if not ends:
        assert "".join(passed) == text
    else:
        assert text.startswith("".join(passed))
        assert not any(s in "".join(passed) for s in strings)
        rest = text[len("".join(passed)) :]
        assert any(rest.startswith(s) for s in strings)
    assert "" not in passed


def test_until_keeps_back_only_what_may_become_a_stop():
    sent = iter(["ab", "c", "d", "x"])
    passing = until(sent, ["cde"])
    assert next(passing) == "ab"
    assert next(passing) == "cdx"


def test_closing_the_stream_stops_the_work(model):
    made = []
    pieces = model.stream(PROMPT, max_new_tokens=60, stop=(), made=made)
    next(pieces)
    count = len(made)
    pieces.close()
    assert len(made) == count < 60


# Limits


def test_generation_ends_where_the_context_ends(tmp_path):
    model = load(str(write(tmp_path, Recipe())))
    longest = model.config.max_position_embeddings
    ids = model.generate([5] * (longest - 3), max_new_tokens=50, stop=())
    assert len(ids) == 4  # three that fit, and the one that the full context predicts
    with pytest.raises(ContextLengthError, match=str(longest)):
        model.generate([5] * (longest + 1))


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([], {}, "non-empty"),
        ([VOCABULARY], {}, str(VOCABULARY)),
        ([-1], {}, "-1"),
        ([1.5], {}, "integers"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens"),
        (PROMPT, {"stop": [""]}, "empty"),
    ],
)
def test_prompts_and_counts_that_cannot_be_right(model, ids, options, words):
    with pytest.raises(InputError, match=words):
        model.generate(ids, **options)


def test_a_model_without_a_tokenizer_works_with_ids_alone(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = load(str(tmp_path))
    assert model.tokenizer is None
    assert len(model.generate(PROMPT, max_new_tokens=3, stop=())) == 3
    for attempt in (
        lambda: model.generate(PROMPT, stop="x"),
        lambda: list(model.stream(PROMPT)),
        lambda: list(model.stream([{"role": "user", "content": "x"}])),
    ):
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            attempt()
