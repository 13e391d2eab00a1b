"""The screened head gives the exact head's token, or says that it can't tell. Never another."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from bitnet_edu.errors import InputError
from bitnet_edu.kernels import screen as module
from bitnet_edu.kernels.border import address
from bitnet_edu.kernels.screen import Screen, screened_rows
from bitnet_edu.kernels.simd import kernel_name, kernel_type, supported_kernels
from bitnet_edu.sampling import Sampling, sample

WORDS, HIDDEN = 700, 130
KEYS = [1, 2**40, 2**64 - 1, 77, 78, 79]
SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.05),
    Sampling(30.0),
    Sampling(0.6, 1),
    Sampling(0.6, 20),
    Sampling(2.0, 10**6),
    Sampling(0.6, None, 0.9),
    Sampling(1e-3, None, 0.9),
    Sampling(3.0, None, 0.99),
    Sampling(1.0, None, 1e-6),
    Sampling(0.8, 30, 0.9),
    Sampling(1e-320, None, 0.5),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@njit
def all_rows(kernel, codes, scales, x, scores, scratch):
    screened_rows(kernel, codes, scales, x, 0, scores.shape[1], scores, 0, scratch)


def scores_of(screen, x, threads=1, kernel=None):
    """(those of the int8 copy, the exact ones), float32[T, words] each."""
    codes, vocab = screen.copy.codes, len(screen.head)
    screened, exact = (np.empty((len(x), vocab), np.float32) for _ in range(2))
    place, scratch = address(codes, np.int8, codes.shape, "codes"), np.empty(10**6, np.uint8)
    chosen = kernel_type(kernel or kernel_name())
    all_rows(chosen, place, screen.copy.scales, x, screened, scratch)
    screen.read(screen.copy.ids, x, exact, threads)
    return screened, exact


@pytest.mark.parametrize("kernel", supported_kernels())
@pytest.mark.parametrize("hidden", [4, 63, 64, 130, 2560])
def test_every_kernel_gives_the_same_screened_scores(kernel, hidden):
    screen, x = Screen(normal(50, hidden)), normal(3, hidden, seed=1)
    x[1], x[2, 1:] = -x[1].max(), 0
    screen.copy.codes[:2] = [[127], [-127]]  # the largest sums
    screened, _ = scores_of(screen, x, kernel=kernel)
    unit = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    coarse = np.rint(x / unit)
    fine = np.rint((x - coarse * unit) / unit * 254)
    sums = (254 * coarse + fine) @ screen.copy.codes.T.astype(np.float64)
    expected = screen.copy.scales * (unit / 254 * sums)
    np.testing.assert_allclose(screened, expected, rtol=1e-6, atol=1e-5 * np.abs(x).max())


def choices(screen, x, sampling, keys=KEYS, threads=1):
    """What the screen chooses for every row of x and every key: None, or the exact head's token."""
    found = []
    for vector, screened, exact in zip(x, *scores_of(screen, x, threads), strict=True):
        for key in keys:
            token = screen.choose(screened.copy(), vector, key, sampling.numbers, threads)
            if np.isfinite(exact).all():
                assert token in (None, sample(exact, key, sampling))
            else:
                assert token is None  # whoever reads the whole head will say what is wrong
            found.append(token)
    return found


def near_ties():
    return normal(HIDDEN) + 1e-3 * normal(WORDS, HIDDEN)


def twins():
    return np.repeat(normal(WORDS // 7, HIDDEN), 7, axis=0)


def with_outliers():
    head = normal(WORDS, HIDDEN)
    head[:, 5] *= 100
    return head


def of_all_sizes():
    return normal(WORDS, HIDDEN) * np.logspace(-30, 2, WORDS, dtype=np.float32)[:, None]


HEADS = {
    "normal": lambda: normal(WORDS, HIDDEN),
    "whole steps": lambda: normal(WORDS, 128),
    "near-ties": near_ties,
    "twins": twins,
    "outliers": with_outliers,
    "heavy tails": lambda: np.random.default_rng(0).standard_cauchy((WORDS, HIDDEN)),
    "all sizes": of_all_sizes,
    "all equal": lambda: np.tile(normal(HIDDEN), (WORDS, 1)),
    "zeros": lambda: np.zeros((WORDS, HIDDEN)),
    "some zeros": lambda: normal(WORDS, HIDDEN) * (np.arange(WORDS) % 3 == 0)[:, None],
    "tiny": lambda: normal(WORDS, HIDDEN) * 1e-38,
    "denormal": lambda: normal(WORDS, HIDDEN) * 1e-43,
    "huge": lambda: normal(WORDS, HIDDEN) * 1e36,
    "one word": lambda: normal(1, HIDDEN),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("most", [module.MOST_ROWS, 40])
def test_the_screen_never_gives_another_token(monkeypatch, name, dtype, most):
    monkeypatch.setattr(module, "MOST_ROWS", most)
    screen = Screen(HEADS[name]().astype(dtype), 2)
    hidden = screen.head.shape[1]
    sizes = np.array([0, 1e-40, 1e-3, 0.02, 0.1, 0.5, 3, 1e6, 1e37], np.float32)
    x = normal(len(sizes), hidden, seed=1) * sizes[:, None]
    for sampling in SETTINGS:
        choices(screen, x, sampling)


def worst_case(share):
    """A head, and the x for which int8 errs as far as it can.

    Word 3's rounding error points along x. Word 5, which int8 keeps exactly, scores in between what
    int8 sees of word 3 and its exact score: that `share` of the way.
    """
    head = 1e-3 * normal(40, HIDDEN)
    head[3] = normal(HIDDEN, seed=2)
    copy = Screen(head).copy
    error = head[3].astype(np.float64) - np.float64(copy.scales[3]) * copy.codes[3]
    x = (error / np.linalg.norm(error)).astype(np.float32)
    seen = np.float64(copy.scales[3]) * copy.codes[3] @ x.astype(np.float64)
    wanted = seen + share * np.linalg.norm(error)
    head[5] = np.sign(x) * np.float32(wanted / np.abs(x).sum())
    return head, x


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95, 1.05])
def test_the_worst_case_of_the_bound_is_seen_through(share):
    head, x = worst_case(share)
    screen = Screen(head)
    for sampling in (*SETTINGS, Sampling(1e-4), Sampling(1e-4, None, 0.9), Sampling(1e-4, 2)):
        found = choices(screen, x[None], sampling)
        if sampling.temperature in (0, 1e-4, 1e-320):
            assert found == [3 if share < 1 else 5] * len(KEYS)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_many_positions_many_threads(sampling):
    screen = Screen(normal(WORDS, 512).astype(ml_dtypes.bfloat16), 3)
    x = 0.1 * normal(9, 512, seed=3)
    expected = choices(screen, x, sampling)
    for tokens in range(1, 10):
        for threads in (2, 3):
            found = choices(screen, x[:tokens], sampling, threads=threads)
            assert found == expected[: len(found)]


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(module, "MOST_ROWS", int(rng.choice([10, 100, 4096])))
    head = normal(int(rng.choice([50, 400, 3000])), int(rng.choice([64, 200])), seed=seed)
    screen = Screen(head.astype(rng.choice([np.float32, ml_dtypes.bfloat16])))
    sizes = 10 ** rng.uniform(-2.5, 0.5, (8, 1)).astype(np.float32)
    x = normal(8, head.shape[1], seed=seed + 100) * sizes
    for _ in range(25):
        top_k = rng.choice([None, 1, 7, 100])
        top_p = rng.choice([None, 0.05, 0.5, 0.9, 0.999])
        sampling = Sampling(10 ** rng.uniform(-1.5, 0.7), top_k and int(top_k), top_p)
        choices(screen, x, sampling, rng.integers(0, 2**64, 3, np.uint64).tolist())


@given(st.lists(st.sampled_from([0.0, 1.0, 1.001, -1.0, 30.0]), min_size=1, max_size=30), st.data())
def test_any_small_head(values, data):
    head = np.outer(np.array(values, np.float32), np.ones(3, np.float32))
    sampling = data.draw(st.sampled_from(SETTINGS))
    choices(Screen(head), np.float32([[1, 0.5, 0.25]]), sampling, [data.draw(st.integers(0, 99))])


def test_what_is_clear_is_decided_and_what_is_flat_is_not(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 60)
    screen = Screen(normal(WORDS, HIDDEN))
    clear, flat = normal(5, HIDDEN, seed=1), 0.01 * normal(5, HIDDEN, seed=1)
    for sampling in SETTINGS:
        decided = [token is not None for token in choices(screen, clear, sampling)]
        if sampling.temperature < 2:  # hotter, it is as flat as the other
            assert all(decided)
    for sampling in (Sampling(0.6, None, 0.9), Sampling(3.0, None, 0.99), Sampling(1.0, 300)):
        assert choices(screen, flat, sampling) == [None] * 30
    assert choices(screen, 0 * flat, Sampling()) == [None] * 30


def test_the_copy_bounds_its_error():
    for name, make in HEADS.items():
        head = make().astype(np.float32)
        screen = Screen(head, 2)
        x = normal(6, head.shape[1], seed=5) * 10.0 ** np.arange(-3, 3, dtype=np.float32)[:, None]
        x *= np.float32(1e-4 if name == "huge" else 1)  # nothing overflows
        screened, found = scores_of(screen, x)
        wide = head.astype(np.float64) @ x.T.astype(np.float64)
        bound = screen.copy.slack.astype(np.float64) * np.linalg.norm(
            x.astype(np.float64), axis=1, keepdims=True
        )
        for scores in (found, wide.T):
            assert (np.abs(scores - screened) <= bound).all(), name


def test_threads_do_not_change_the_copy():
    head = normal(WORDS, HIDDEN)
    copies = [Screen(head, threads).copy for threads in (1, 2, 3)]
    for other in copies[1:]:
        for name in ("codes", "scales", "slack"):
            np.testing.assert_array_equal(getattr(other, name), getattr(copies[0], name))
    scale = np.abs(head).max(axis=1) / np.float32(127)
    np.testing.assert_array_equal(copies[0].scales, scale)
    np.testing.assert_array_less(np.abs(head / scale[:, None] - copies[0].codes), 0.5001)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_screen_hides_no_nan(value, dtype):
    head = normal(50, HIDDEN).astype(dtype)
    head[7, 3] = value
    with pytest.raises(InputError, match="1 NaN or Inf"):
        Screen(head)


@pytest.mark.parametrize("head", [np.ones((2, 3)), np.ones(3, np.float32), None])
def test_heads_that_are_none(head):
    with pytest.raises(InputError, match="a head"):
        Screen(head)


def test_the_error_of_the_split_is_reckoned_with():
    """Word 0 loses all that the split of x can lose, and wins by half of that, against word 1."""
    hidden, step = 20, 1 / 127
    x = np.full((1, hidden), 60 * step + 100.49 * step / 254)
    x[0, 0] = 1
    lost = (hidden - 1) * 0.49 * step / 254
    head = np.zeros((2, hidden), np.float32)
    head[0] = 1
    head[1, 0] = x.sum() - lost / 2
    screen, x = Screen(head), x.astype(np.float32)
    screened, exact = scores_of(screen, x)
    assert exact[0, 0] > exact[0, 1]
    assert screened[0, 0] < screened[0, 1]
    assert choices(screen, x, Sampling()) == [0] * len(KEYS)
