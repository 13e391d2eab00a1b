"""What the int8 peak counts as done has been done: every product, with every kernel."""

import numpy as np
import pytest

from bitnet_edu.kernels.peak import COLUMNS, STEPS, operands, products_of_a_chunk, spin
from bitnet_edu.kernels.simd import KERNELS, kernel_type, supported_kernels
from bitnet_edu.kernels.threads import run


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", supported_kernels())
def test_no_product_is_left_out(name, threads):
    kernel, chunks = KERNELS[name], 5
    codes, x, sums = operands(name, threads)
    run(spin, (kernel_type(name), codes, x, sums, chunks), threads)
    codes, x = codes[:, : kernel.width].astype(np.int64), x[..., : kernel.width].astype(np.int64)
    rounds = chunks * STEPS // COLUMNS
    expected = rounds * np.einsum("kb, tcb -> tk", codes, x)
    lanes = sums.sum(axis=(0, 3), dtype=np.int32)  # int32 wraps around, in both
    np.testing.assert_array_equal(lanes, expected.astype(np.int32))
    assert products_of_a_chunk(name) == STEPS * kernel.width * sums[0, :, :, 0].size


def test_operands_differ_so_that_no_product_is_made_twice():
    for name in KERNELS:
        codes, x, _ = operands(name, 1)
        assert len(np.unique(codes, axis=0)) == 4
        assert len(np.unique(x.reshape(-1, x.shape[-1]), axis=0)) == KERNELS[name].tokens * COLUMNS
