"""absmean and absmax against transformers' own quantizers, and what must hold for any input."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import integration, torch

from bitnet_edu.quantize import (
    SCALE_FLOOR,
    absmax_int8,
    absmean_ternary,
    int8_to_float,
    relative_error,
    signal_to_noise,
    ternary_to_float,
)

finite = st.floats(-1e4, 1e4, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=finite)
HALF_STEP = 0.5 * (1 + 1e-5)  # the product and both scales are rounded too


def random_rows(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of very different sizes, as activations have."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-8, 8, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 5, 64), (200, 2560)])
def test_absmax_is_transformers_activation_quantizer_bit_for_bit(shape):
    x = random_rows(0, shape)
    q, scale = absmax_int8(x)
    theirs, their_scale = integration.BitLinear(4, 4, bias=False).activation_quant(
        torch.from_numpy(x)
    )
    np.testing.assert_array_equal(q, theirs.numpy())
    np.testing.assert_array_equal(scale, 1 / their_scale.numpy())
    assert (q.dtype, scale.dtype) == (np.int8, np.float32)
    # the other class divides by the inverse scale where we multiply by the scale: one more rounding
    fake = integration.ActQuant.apply(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(int8_to_float(q, scale), fake, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(4, 4), (60, 100), (640, 2560)])
def test_absmean_is_transformers_weight_quantizer(shape):
    w = random_rows(1, (1, shape[0] * shape[1])).reshape(shape)
    codes, scale = absmean_ternary(w)
    theirs = integration.WeightQuant.apply(torch.from_numpy(w)).numpy()
    np.testing.assert_array_equal(codes, np.sign(theirs))
    # torch sums in float32, we in float64: the two means may be some last bits apart
    np.testing.assert_allclose(ternary_to_float(codes, scale), theirs, rtol=2e-6, atol=0)


@given(hnp.arrays(np.float32, (3, 8), elements=finite))
def test_absmax_agrees_with_transformers_on_any_input(x):
    q, _ = absmax_int8(x)
    theirs, _ = integration.BitLinear(4, 4, bias=False).activation_quant(torch.from_numpy(x))
    np.testing.assert_array_equal(q, theirs.numpy())


@given(matrices)
def test_absmax_keeps_every_value_within_half_a_step(x):
    q, scale = absmax_int8(x)
    assert scale.shape == (*x.shape[:-1], 1)
    assert np.all(np.abs(int8_to_float(q, scale) - x) <= HALF_STEP * scale)
    reaches = np.abs(x).max(axis=-1) >= SCALE_FLOOR
    assert np.all(np.abs(q.astype(int)).max(axis=-1)[reaches] == 127)


@given(matrices, st.sampled_from([-1.0, 0.25, 2.0, 1024.0]))
def test_absmax_codes_follow_the_sign_and_ignore_powers_of_two(x, factor):
    large = np.where(np.abs(x).max(axis=-1, keepdims=True) < 1e-3, np.float32(1), x)
    q, scale = absmax_int8(large)
    scaled, scaled_scale = absmax_int8(large * np.float32(factor))
    np.testing.assert_array_equal(scaled, q * np.sign(factor))
    np.testing.assert_array_equal(scaled_scale, scale * np.float32(abs(factor)))


@given(matrices)
def test_absmax_is_per_token(x):
    """A token's codes do not depend on its neighbours."""
    together, _ = absmax_int8(x)
    for row, codes in zip(x, together, strict=True):
        np.testing.assert_array_equal(absmax_int8(row)[0], codes)


@given(matrices)
def test_absmean_gives_ternary_codes_and_the_mean_magnitude(w):
    codes, scale = absmean_ternary(w)
    assert codes.shape == w.shape
    assert codes.dtype == np.int8
    assert set(np.unique(codes)) <= {-1, 0, 1}
    assert scale == pytest.approx(max(np.abs(w.astype(float)).mean(), SCALE_FLOOR), rel=1e-6)
    assert np.all(codes * w >= 0)


@given(hnp.arrays(np.int8, (4, 6), elements=st.integers(-1, 1)), st.floats(2**-7, 128, width=32))
def test_absmean_finds_the_codes_of_an_already_ternary_matrix(codes, scale):
    found, found_scale = absmean_ternary(ternary_to_float(codes, np.float32(scale)))
    np.testing.assert_array_equal(found, codes)
    assert found_scale <= scale * np.float32(1 + 1e-6)  # zeros pull the mean down, never up


def test_halves_round_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    np.testing.assert_array_equal(absmax_int8(x)[0], [[127, 0, 2, 2, 0, -2]])


def test_zero_stays_zero_and_finite():
    q, scale = absmax_int8(np.zeros((2, 3), np.float32))
    assert not q.any()
    assert np.all(np.isfinite(scale))
    codes, weight_scale = absmean_ternary(np.zeros((4, 4), np.float32))
    assert not codes.any()
    assert np.isfinite(weight_scale)


def test_error_measures_agree_with_their_definitions():
    exact = np.array([3.0, 4.0])
    assert relative_error(exact, exact) == 0
    assert relative_error(exact, np.zeros(2)) == 1
    assert signal_to_noise(exact, exact * 0.9) == pytest.approx(20)
