"""Sampling against transformers' own logits processors, and against a plain sort in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import torch, transformers

from bitnet_edu import BitNetError, InputError
from bitnet_edu.sampling import Sampling, probabilities, sample

VOCABULARY = 301
KEYS = [0, 1, 2**32, 2**63, 2**64 - 1]
SETTINGS = [
    Sampling(temperature, top_k, top_p)
    for temperature in (0.3, 1.0, 4.0)
    for top_k, top_p in ((None, None), (7, None), (None, 0.7), (40, 0.5))
]


def normal(count=VOCABULARY, spread=1.0, seed=0):
    return (spread * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def by_sorting(scores, sampling):
    """(probabilities, the mass before each word): the definition, in float64 and with a sort."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")[: sampling.top_k]
    behind = scores[order].astype(np.float64) - scores.max()
    with np.errstate(over="ignore", invalid="ignore"):
        logs = np.where(behind == 0, 0, behind / float(sampling.temperature))
    weights = np.exp(np.maximum(logs, -87))
    before = np.concatenate([[0], np.cumsum(weights)[:-1]]) / weights.sum()
    top_p = 1 if sampling.top_p is None else sampling.top_p
    keep = before < top_p if top_p < 1 else np.ones(len(order), bool)
    shares, masses = np.zeros(len(scores)), np.full(len(scores), np.inf)
    shares[order[keep]] = weights[keep] / weights[keep].sum()
    masses[order] = before
    return shares, masses


def require_the_same(scores, sampling):
    """Equal sets and probabilities; the last word of a nucleus may be one that sums 1e-6 off."""
    found = probabilities(scores, sampling)
    expected, before = by_sorting(scores, sampling)
    differ = (found > 0) != (expected > 0)
    assert (np.abs(before[differ] - float(sampling.top_p or 0)) < 1e-6).all()
    if not differ.any():
        np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-12)
    assert found.sum() == pytest.approx(1)
    for key in KEYS:
        assert found[sample(scores, key, sampling)] > 0


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    scores = normal()
    ours = probabilities(scores, Sampling(temperature, top_k, top_p))
    warped = transformers.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores)[None])
    if top_k is not None:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p is not None and top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    theirs = torch.softmax(warped.double(), -1)[0].numpy()
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 0.999, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 50, 2999, 3000, 10**30])
def test_the_distribution_is_that_of_a_sort(seed, top_k, top_p):
    rng = np.random.default_rng(seed)
    scores = normal(3000, rng.choice([0.01, 1, 3, 50]), seed)
    if seed % 3 == 0:
        scores = np.round(scores)  # many ties
    require_the_same(scores, Sampling(10 ** rng.uniform(-2, 1.5), top_k, top_p))


HARD = {
    "one word": np.ones(1),
    "all equal": np.full(500, -3.25),
    "zeros of both signs": np.array([0.0, -0.0] * 50),
    "one hot": np.eye(1, 400, 77)[0] * 1e3,
    "two values": np.arange(300) % 2,
    "tiny": np.arange(-200, 200) * 1e-45,
    "huge": np.linspace(-3.4e38, 3.4e38, 200),
    "an outlier below": np.append(np.linspace(0, 9, 300), -1e30),
    "an outlier above": np.append(np.linspace(0, 9, 300), 1e30),
    "all magnitudes": np.concatenate([-np.logspace(-44, 38, 400), np.logspace(-44, 38, 400)]),
    "neighbours": np.nextafter(np.float32(1), np.float32(2), dtype=np.float32) ** np.arange(300),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-12, 0.7, 1e12, 1.7e308])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.5), (150, 0.9)])
def test_hard_scores(name, temperature, top_k, top_p):
    scores = HARD[name].astype(np.float32)
    require_the_same(scores, Sampling(temperature, top_k, top_p))


@given(
    st.lists(st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=60),
    st.floats(1e-3, 1e3),
    st.none() | st.integers(1, 70),
    st.none() | st.floats(1e-6, 1),
)
def test_any_scores(values, temperature, top_k, top_p):
    require_the_same(np.array(values, np.float32), Sampling(temperature, top_k, top_p))


def test_of_equal_scores_the_lowest_ids_are_kept():
    scores = np.array([1, 2, 1, 2, 1, 1], np.float32)
    for top_k, kept in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
        found = probabilities(scores, Sampling(1.0, top_k))
        np.testing.assert_array_equal(np.flatnonzero(found), kept)
    equal = probabilities(np.zeros(10, np.float32), Sampling(1.0, None, 0.35))
    np.testing.assert_allclose(equal, [0.25] * 4 + [0] * 6)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_probabilities(sampling):
    """Chi-square: with d degrees of freedom its mean is d, its variance 2 d."""
    scores = normal(60, 1.5)
    shares = probabilities(scores, sampling)
    draws = np.bincount(
        [sample(scores, 7919 * key, sampling) for key in range(20000)], minlength=60
    )
    assert draws[shares == 0].sum() == 0
    expected = 20000 * shares
    often = expected >= 5
    observed = np.append(draws[often], draws[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    square, degrees = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert square < degrees + 5 * np.sqrt(2 * degrees) + 1e-9


def test_a_rare_word_is_drawn_as_rarely_as_it_should_be():
    """One word of 2,000 equals has the share 1/2000, wherever it stands."""
    draws = [sample(np.zeros(2000, np.float32), key, Sampling(1.0)) for key in range(40000)]
    halves = np.histogram(draws, 20, (0, 2000))[0]
    assert np.abs(halves - 2000).max() < 5 * np.sqrt(2000)
    assert len(set(draws)) > 1990


def test_keys_alone_decide():
    scores = normal()
    draws = [sample(scores, key, Sampling(50.0)) for key in range(100)]
    assert draws == [sample(scores.copy(), np.uint64(key), Sampling(50.0)) for key in range(100)]
    assert len(set(draws)) > 70


def test_words_that_cannot_be_drawn_do_not_matter():
    scores = normal(2000, 3.0)
    kept = probabilities(scores, Sampling(1.0, 100)) > 0
    others = np.where(kept, scores, scores.min())
    for key in range(200):
        assert sample(scores, key, Sampling(1.0, 100)) == sample(others, key, Sampling(1.0, 100))


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), st.floats(1e-3, 5))
def test_greedy_is_the_limit_of_a_small_top_k_and_top_p(values, temperature):
    scores = np.array(values, np.float32)
    best = int(scores.argmax())
    for key in KEYS:
        assert sample(scores, key) == best
        for options in ({"top_k": 1}, {"top_p": 1e-12}):
            assert sample(scores, key, Sampling(temperature, **options)) == best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value, temperature):
    with pytest.raises(BitNetError, match="NaN or Inf"):
        sample(np.array([1, value], np.float32), 0, Sampling(temperature))


@pytest.mark.parametrize("key", [-1, 2**64, 0.5, "1", None])
def test_keys_that_are_none(key):
    with pytest.raises(InputError, match="key"):
        sample(np.ones(3, np.float32), key, Sampling(1.0))


@pytest.mark.parametrize(
    "scores", [np.ones(3), np.ones((2, 3), np.float32), np.ones(0, np.float32), [1.0], None]
)
def test_scores_that_are_none(scores):
    with pytest.raises(InputError, match="scores"):
        sample(scores, 0)
