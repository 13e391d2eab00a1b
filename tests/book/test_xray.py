"""The X-ray counts bytes; here the codes themselves are counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_edu.book.xray import code_counts, entropy_bits, xray
from bitnet_edu.packing import pack_hf, unpack_hf
from bitnet_edu.weights import BITNET_2B4T, random_weights


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_counts_are_those_of_the_unpacked_codes(quarter_rows, columns, seed):
    codes = np.random.default_rng(seed).integers(-1, 2, (4 * quarter_rows, columns), np.int8)
    expected = [(codes == code).sum() for code in (-1, 0, 1)]
    assert code_counts(pack_hf(codes)).tolist() == expected


def test_entropy_of_known_histograms():
    assert entropy_bits(np.array([0, 8, 0])) == 0
    assert entropy_bits(np.array([4, 0, 4])) == 1
    assert entropy_bits(np.array([5, 5, 5])) == pytest.approx(np.log2(3))


def test_every_matrix_of_every_layer_is_seen():
    config = BITNET_2B4T._replace(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3
    )._replace(num_attention_heads=4, num_key_value_heads=2)
    weights = random_weights(config)
    rows = xray(weights)
    assert [(r.layer, r.matrix) for r in rows] == [
        (layer, name) for layer in range(3) for name in config.matrix_shapes
    ]
    down = unpack_hf(weights.layers[2].down_proj.packed)
    assert rows[-1].zero_share == pytest.approx((down == 0).mean())
    assert rows[-1].scale == weights.layers[2].down_proj.scale
