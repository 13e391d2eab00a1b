"""Every part of a block against the same part of transformers, and the invariants behind them."""

from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import activations, integration, modeling, torch, transformers

from bitnet_edu.layers import (
    attention,
    bit_linear,
    integer_matmul,
    rms_norm,
    rope,
    rope_frequencies,
    softmax,
    squared_relu,
)
from bitnet_edu.packing import pack_hf

EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def assert_close(ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
    """Equal to within `bound` times the largest value."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


@pytest.mark.parametrize(("tokens", "n"), [(1, 4), (7, 60), (5, 2560), (3, 6912)])
@pytest.mark.parametrize("size", [1e-4, 1, 1e4])
def test_rms_norm_is_transformers(tokens, n, size):
    x, weight = normal(tokens, n) * np.float32(size), normal(n)
    theirs = modeling.BitNetRMSNorm(n, eps=1e-5)
    theirs.weight.data = torch.from_numpy(weight)
    # mean, root, quotient and product: a handful of roundings
    assert_close(rms_norm(x, weight, 1e-5), theirs(torch.from_numpy(x)).detach().numpy(), 4 * EPS)


@given(hnp.arrays(np.float32, (2, 8), elements=st.floats(-1e3, 1e3, width=32)))
def test_rms_norm_makes_the_mean_square_one(x):
    y = rms_norm(x, np.ones(8, np.float32), 1e-5).astype(np.float64)
    mean_square = np.mean(x.astype(np.float64) ** 2, axis=-1)
    expected = mean_square / (mean_square + 1e-5)
    np.testing.assert_allclose(np.mean(y * y, axis=-1), expected, rtol=1e-5, atol=1e-12)


def test_squared_relu_is_transformers():
    x = normal(4, 100)
    np.testing.assert_array_equal(
        squared_relu(x), activations.ACT2FN["relu2"](torch.from_numpy(x)).numpy()
    )


@pytest.mark.parametrize(("out", "n"), [(4, 4), (60, 100), (640, 2560), (2560, 6912)])
def test_bit_linear_is_both_of_transformers_classes(out, n):
    """AutoBitLinear multiplies by its scale, BitLinear divides by its own."""
    x, codes = normal(3, n), rng.integers(-1, 2, (out, n), dtype=np.int8)
    scale = np.float32(0.017)
    ours = bit_linear(x, codes, scale)

    multiplies = integration.AutoBitLinear(n, out, bias=False)
    multiplies.weight.data = torch.from_numpy(codes).float()
    multiplies.weight_scale.fill_(scale)
    # transformers sums up to n rounded products; the error of such a sum grows like its square root
    bound = np.sqrt(n) * EPS
    assert_close(ours, multiplies(torch.from_numpy(x)).detach().numpy(), bound)

    divides = integration.BitLinear(n, out, bias=False, dtype=torch.float32)
    divides.weight.copy_(torch.from_numpy(pack_hf(codes)))
    divides.weight_scale.fill_(1 / scale)
    # its sums are whole numbers, as ours
    assert_close(ours, divides(torch.from_numpy(x)).numpy(), 4 * EPS)


@given(
    hnp.arrays(np.int8, (2, 12), elements=st.integers(-128, 127)),
    hnp.arrays(np.int8, (4, 12), elements=st.integers(-1, 1)),
)
def test_integer_matmul_is_exact(q, codes):
    exact = q.astype(np.int64) @ codes.astype(np.int64).T
    ours = integer_matmul(q, codes)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, exact)


@pytest.mark.parametrize("columns", [6912, 131_071, 131_072, 200_001])
@pytest.mark.parametrize("value", [-128, 127])
def test_integer_matmul_is_exact_at_its_extremes(columns, value):
    q = np.full((1, columns), value, np.int8)
    codes = np.ones((2, columns), np.int8)
    codes[1, ::2] = -1
    codes[1, 0] = 0
    exact = q.astype(np.int64) @ codes.astype(np.int64).T
    np.testing.assert_array_equal(integer_matmul(q, codes), exact)


def their_rotary(head_dim: int, theta: float, positions: int = 4096):
    config = transformers.BitNetConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=positions,
    )
    return modeling.BitNetRotaryEmbedding(config)


def test_rope_frequencies_of_the_real_model_are_transformers_bit_for_bit():
    theirs = their_rotary(128, 500000.0).inv_freq.numpy()
    np.testing.assert_array_equal(rope_frequencies(128, 500000.0), theirs)


@pytest.mark.parametrize("head_dim", [2, 4, 12, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
def test_rope_frequencies_of_any_model(head_dim, theta):
    ours, theirs = rope_frequencies(head_dim, theta), their_rotary(head_dim, theta).inv_freq.numpy()
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)  # torch's own pow is not always exact


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 12), (20, 5, 128)])
def test_rope_is_transformers_over_the_whole_context(heads, kv_heads, head_dim):
    positions = np.array([0, 1, 2, 100, 2047, 4095])
    q, k = normal(6, heads, head_dim), normal(6, kv_heads, head_dim)
    rotary = their_rotary(head_dim, 500000.0)
    q_torch, k_torch = (torch.from_numpy(x.transpose(1, 0, 2)[None]) for x in (q, k))
    cos, sin = rotary(q_torch, torch.from_numpy(positions)[None])
    for ours, theirs in zip(
        (q, k), modeling.apply_rotary_pos_emb(q_torch, k_torch, cos, sin), strict=True
    ):
        theirs = theirs[0].numpy().transpose(1, 0, 2)
        assert_close(rope(ours, positions, 500000.0), theirs, 2 * EPS)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rope_makes_scores_depend_on_the_distance_alone(m, n, shift):
    local = np.random.default_rng(1)
    q, k = local.standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(i: int, j: int) -> float:
        rotated = [rope(x, np.array([p]), 10000.0) for x, p in ((q, i), (k, j))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=2e-3)


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
    x = normal(3, 2, 8)
    rotated = rope(x, np.array([0, 7, 300]), 10000.0)
    np.testing.assert_array_equal(rotated[0], x[0])
    lengths = [np.linalg.norm(y, axis=-1) for y in (x, rotated)]
    np.testing.assert_allclose(*lengths, rtol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_attention_is_transformers(heads, kv_heads, tokens, seen):
    q, k, v = normal(tokens, heads, 12), normal(seen, kv_heads, 12), normal(seen, kv_heads, 12)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False)
    mask = torch.full((tokens, seen), torch.finfo(torch.float32).min).triu(seen - tokens + 1)
    theirs, _ = modeling.eager_attention_forward(
        module,
        *(torch.from_numpy(x.transpose(1, 0, 2)[None].copy()) for x in (q, k, v)),
        mask,
        scaling=12**-0.5,
    )
    assert_close(attention(q, k, v), theirs[0].numpy(), 8 * EPS)


def test_attention_cannot_see_the_future():
    q, k, v = normal(6, 4, 8), normal(6, 2, 8), normal(6, 2, 8)
    before = attention(q, k, v)
    k[4:], v[4:] = 100, -100
    np.testing.assert_array_equal(attention(q, k, v)[:4], before[:4])
    assert np.abs(attention(q, k, v)[4:] - before[4:]).max() > 1


@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-1e4, 1e4, width=32)))
def test_softmax_is_a_distribution_whatever_the_size_of_the_scores(x):
    p = softmax(x)
    assert np.all(p >= 0)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(p, torch.softmax(torch.from_numpy(x), -1).numpy(), atol=1e-6)
