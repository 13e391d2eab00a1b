"""The three layouts: round trips for any codes, and transformers' own packing for the first."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import integration, torch

from bitnet_edu.packing import (
    pack_base3,
    pack_hf,
    pack_i2s,
    unpack_base3,
    unpack_hf,
    unpack_i2s,
)

ternary = st.integers(-1, 1)


def codes_of(rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> st.SearchStrategy:
    shapes = st.tuples(rows, columns)
    return shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=ternary))


fours = codes_of(st.integers(1, 6).map(lambda n: 4 * n), st.integers(1, 17))


@given(fours)
def test_hf_layout_is_transformers_own(codes):
    packed = pack_hf(codes)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(
        packed, integration.pack_weights(torch.tensor(codes).float()).numpy()
    )
    theirs = integration.unpack_weights(torch.from_numpy(packed), torch.float32).numpy()
    np.testing.assert_array_equal(unpack_hf(packed), theirs)


@given(fours)
def test_hf_round_trip(codes):
    np.testing.assert_array_equal(unpack_hf(pack_hf(codes)), codes)


@given(
    st.sampled_from([64, 128]).flatmap(
        lambda block: st.tuples(
            st.just(block),
            codes_of(st.integers(1, 3), st.integers(1, 3).map(lambda n: block * n)),
        )
    )
)
def test_i2s_round_trip(case):
    block, codes = case
    packed = pack_i2s(codes, block)
    assert packed.shape == (codes.size // 4,)
    np.testing.assert_array_equal(unpack_i2s(packed, codes.shape, block), codes)


@pytest.mark.parametrize("block", [64, 128])
def test_i2s_puts_each_weight_where_bitnet_cpp_reads_it(block):
    """Weight j of a block: byte j mod block/4, the first quarter in the highest bits."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (2, 2 * block), dtype=np.int8)
    packed, flat = pack_i2s(codes, block), codes.reshape(-1)
    for index, code in enumerate(flat):
        start, j = index // block * block // 4, index % block
        byte = packed[start + j % (block // 4)]
        assert byte >> (6 - 2 * (j // (block // 4))) & 3 == code + 1


@given(codes_of(st.integers(1, 5), st.integers(1, 23)))
def test_base3_round_trip_in_a_byte_for_five(codes):
    packed = pack_base3(codes)
    assert packed.shape == (len(codes), -(-codes.shape[1] // 5))
    assert packed.max() <= 242
    np.testing.assert_array_equal(unpack_base3(packed, codes.shape[1]), codes)


def test_base3_reads_the_first_weight_as_the_lowest_digit():
    assert pack_base3(np.array([[1, -1, -1, -1, -1]]))[0, 0] == 2
    assert pack_base3(np.array([[-1, -1, -1, -1, 1]]))[0, 0] == 2 * 81


@pytest.mark.parametrize("pack", [pack_hf, pack_i2s, pack_base3])
def test_codes_outside_the_alphabet_are_refused(pack):
    with pytest.raises(ValueError, match="-1, 0 or \\+1"):
        pack(np.full((4, 128), 2))
    with pytest.raises(ValueError, match="-1, 0 or \\+1"):
        pack(np.full((4, 128), 0.5))
    with pytest.raises(ValueError, match="matrix"):
        pack(np.zeros(128))


@given(fours, st.data())
def test_a_pair_of_3_is_refused_wherever_it_is(codes, data):
    packed = pack_hf(codes).reshape(-1)
    packed[data.draw(st.integers(0, len(packed) - 1))] |= 3 << data.draw(
        st.sampled_from([0, 2, 4, 6])
    )
    with pytest.raises(ValueError, match="11"):
        unpack_hf(packed.reshape(-1, codes.shape[1]))


def test_foreign_bytes_and_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="11"):
        unpack_i2s(np.full(32, 0b11_00_00_00, np.uint8), (1, 128))
    with pytest.raises(ValueError, match="242"):
        unpack_base3(np.full((1, 1), 243, np.uint8), 5)
    with pytest.raises(ValueError, match="multiple of 4"):
        pack_hf(np.zeros((6, 4)))
    with pytest.raises(ValueError, match="block"):
        pack_i2s(np.zeros((1, 100)))
