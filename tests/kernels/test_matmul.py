"""Every kernel is bit-exact with int32 NumPy, on any shape, any values, any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_edu
from bitnet_edu.errors import InputError
from bitnet_edu.kernels.matmul import base3_of, count_invalid, count_nonfinite, ternary_matmul
from bitnet_edu.kernels.simd import KERNELS, MANY, MAX_COLUMNS, kernel_name, supported_kernels
from bitnet_edu.packing import pack_base3_rows, pack_hf

rows_of_four = st.integers(1, 40).map(lambda n: 4 * n)
# enough that some go to the lanes of unpacked codes, and some remain
rows_of_any = rows_of_four | st.sampled_from([32 * 4, 33 * 4, 75 * 4, 64 * 5 * 4])
tokens = st.integers(1, 11) | st.sampled_from([MANY - 1, MANY, MANY + 1, MANY + 13])
columns = st.integers(1, 300) | st.sampled_from([2560, 6911, 6912, 6913])


every_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in supported_kernels(), reason=f"this CPU cannot run the {name} kernel"
            ),
        )
        for name in KERNELS
    ],
)


def exact(codes, q):
    return q.astype(np.int32) @ codes.T.astype(np.int32)


@every_kernel
@settings(deadline=None, max_examples=60)
@given(rows_of_any, columns, tokens, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_bit_exact_on_any_shape(kernel, out, n, tokens, threads, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (out, n), dtype=np.int8)
    q = rng.integers(-128, 128, (tokens, n), dtype=np.int8)
    codes[rng.integers(out)] = 0
    codes[:, rng.integers(n)] = 0
    q[rng.integers(tokens)] = 0
    q[:, rng.integers(n)] = -128
    for packed, rows in ((pack_hf(codes), None), (pack_base3_rows(codes), out)):
        sums = ternary_matmul(packed, q, base3_rows=rows, threads=threads, kernel=kernel, ahead=64)
        np.testing.assert_array_equal(sums, exact(codes, q))


@every_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [MANY, MANY + 13, 256])
@pytest.mark.parametrize("n", [64, 200])
@pytest.mark.parametrize("out", [640, 1384])
def test_many_tokens_are_multiplied_with_unpacked_codes(kernel, out, n, tokens, threads):
    rng = np.random.default_rng(out + n + tokens)
    codes = rng.integers(-1, 2, (out, n), dtype=np.int8)
    q = rng.integers(-128, 128, (tokens, n), dtype=np.int8)
    for packed, rows in ((pack_hf(codes), None), (pack_base3_rows(codes), out)):
        sums = ternary_matmul(packed, q, base3_rows=rows, threads=threads, kernel=kernel)
        np.testing.assert_array_equal(sums, exact(codes, q))


@every_kernel
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60) | st.integers(160, 175), columns, tokens, st.integers(0, 2**32 - 1))
def test_base_3_writes_no_row_that_does_not_exist(kernel, out, n, tokens, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (out, n), dtype=np.int8)
    q = rng.integers(-128, 128, (tokens, n), dtype=np.int8)
    around = np.full(tokens * out + 64, 77, np.int32)
    sums = around[32:-32].reshape(tokens, out)
    ternary_matmul(pack_base3_rows(codes), q, sums, base3_rows=out, kernel=kernel)
    np.testing.assert_array_equal(sums, exact(codes, q))
    assert (around[:32] == 77).all()
    assert (around[-32:] == 77).all()


@given(rows_of_four, columns, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_base_3_is_made_of_two_bits_as_of_codes(out, n, threads, seed):
    codes = np.random.default_rng(seed).integers(-1, 2, (out, n), dtype=np.int8)
    np.testing.assert_array_equal(base3_of(pack_hf(codes), threads), pack_base3_rows(codes))


@every_kernel
@pytest.mark.parametrize("n", [2560, 6912, 6975, MAX_COLUMNS])
@pytest.mark.parametrize("code", [-1, 1])
@pytest.mark.parametrize("value", [-128, 127])
def test_extreme_sums_do_not_saturate(kernel, n, code, value):
    codes, q = np.full((8, n), code, np.int8), np.full((5, n), value, np.int8)
    assert (ternary_matmul(pack_hf(codes), q, kernel=kernel) == code * value * n).all()
    base3 = pack_base3_rows(codes)
    assert (ternary_matmul(base3, q, base3_rows=8, kernel=kernel) == code * value * n).all()


@every_kernel
def test_runs_on_a_read_only_array_at_an_odd_address(kernel):
    rng = np.random.default_rng(0)
    codes, q = rng.integers(-1, 2, (32, 130), np.int8), rng.integers(-128, 128, (3, 130), np.int8)
    packed = pack_hf(codes)
    memory = np.frombuffer(b"x" + packed.tobytes(), np.uint8)
    odd = memory[1:].reshape(packed.shape)
    assert odd.ctypes.data % 2 != memory.ctypes.data % 2
    assert not odd.flags.writeable
    np.testing.assert_array_equal(ternary_matmul(odd, q, kernel=kernel), exact(codes, q))


PACKED, Q = np.full((64, 128), 0x96, np.uint8), np.ones((2, 128), np.int8)
SUMS = np.empty((2, 256), np.int32)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("packed", "q", "sums", "threads", "message"),
    [
        (PACKED, Q[:, :-1], None, None, r"activations must be int8\[any, 128\]"),
        (PACKED, Q.astype(np.float32), None, None, "found float32"),
        (PACKED, Q.tolist(), None, None, "found list"),
        (PACKED, Q[0], None, None, "activations"),
        (PACKED, Q[:0], None, None, r"found int8\[0, 128\]"),
        (PACKED, np.asfortranarray(Q), None, None, "one piece"),
        (PACKED.view(np.int8), Q, None, None, "packed weights must be uint8"),
        (PACKED[:, ::2], Q[:, :64].copy(), None, None, "one piece"),
        (PACKED[:0], Q, None, None, "packed weights"),
        (PACKED[0], Q, None, None, "packed weights"),
        (PACKED, Q, SUMS[:, :4], None, r"int32\[2, 256\]"),
        (PACKED, Q, SUMS[:, ::-1], None, "one piece"),
        (PACKED, Q, np.empty((2, 512), np.int32)[:, ::2], None, "one piece"),
        (PACKED, Q, np.asfortranarray(SUMS), None, "one piece"),
        (PACKED, Q, read_only(SUMS), None, "read-only"),
        (PACKED, Q, SUMS.astype(np.int64), None, "sums must be int32"),
        (PACKED, Q, SUMS.view(np.float32), None, "sums must be int32"),
        (PACKED, PACKED[:2].view(np.int8), PACKED.reshape(-1)[:2048].view(np.int32).reshape(2, 256),
         None, "must not lie in the memory"),
        (PACKED, Q, None, 0, "threads must be a whole number from 1"),
        (PACKED, Q, None, -1, "threads must be a whole number from 1"),
        (PACKED, Q, None, 10**6, "threads must be a whole number from 1"),
        (PACKED, Q, None, 1.0, "whole number"),
        (PACKED, Q, None, True, "whole number"),
        (np.zeros((1, MAX_COLUMNS + 1), np.uint8), np.zeros((1, MAX_COLUMNS + 1), np.int8), None,
         None, "exact up to"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(packed, q, sums, threads, message):
    with pytest.raises(InputError, match=message):
        ternary_matmul(packed, q, sums, threads=threads)


@pytest.mark.parametrize("rows", [0, 250, 256, -1, 255.0, "255", True])
def test_refuses_a_number_of_base_3_rows_that_these_bytes_do_not_have(rows):
    with pytest.raises(InputError, match="rows of base-3 weights"):
        ternary_matmul(np.zeros((51, 128), np.uint8), Q, base3_rows=rows)
    assert ternary_matmul(np.zeros((51, 128), np.uint8), Q, base3_rows=253).shape == (2, 253)


@pytest.mark.parametrize("ahead", [-1, 1.5, 2**40, "far"])
def test_refuses_a_distance_that_is_none(ahead):
    with pytest.raises(InputError, match="ahead"):
        ternary_matmul(PACKED, Q, ahead=ahead)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_count_nonfinite_finds_each(dtype):
    numbers = np.random.default_rng(0).standard_normal((7, 33)).astype(dtype)
    numbers[0, 0] = np.finfo(np.float16).max  # the largest, or near it, is no infinity
    assert count_nonfinite(numbers) == 0
    for count, (place, value) in enumerate(
        [((6, 32), np.nan), ((0, 1), np.inf), ((3, 3), -np.inf), ((3, 4), -np.nan)], 1
    ):
        numbers[place] = value
        assert count_nonfinite(numbers) == count
    with pytest.raises(InputError, match="floats"):
        count_nonfinite(numbers.astype(np.float64))


def test_a_kernel_that_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("BITNET_EDU_KERNEL", "abacus")
    with pytest.raises(
        InputError, match=r"'abacus' .*BITNET_EDU_KERNEL.* cannot run here: this CPU has .*portable"
    ):
        kernel_name()


@every_kernel
def test_the_environment_forces_a_kernel(kernel):
    script = (
        "import numpy as np; from bitnet_edu.kernels.matmul import ternary_matmul;"
        "from bitnet_edu.kernels.simd import kernel_name;"
        "print(kernel_name(), *ternary_matmul(np.full((1, 200), 0b10_00_01_10, np.uint8),"
        " np.full((1, 200), -128, np.int8))[0].tolist())"
    )
    env = {**os.environ, "BITNET_EDU_KERNEL": kernel}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [kernel, "-25600", "0", "25600", "-25600"], done.stderr


@given(st.binary(min_size=1, max_size=300))
@settings(deadline=None)
def test_count_invalid_finds_every_pair_of_ones(data):
    packed = np.frombuffer(data, np.uint8).reshape(1, -1)
    expected = sum(any(byte >> shift & 3 == 3 for shift in (0, 2, 4, 6)) for byte in data)
    assert count_invalid(packed) == expected


def test_addresses_are_taken_at_the_border_alone():
    """Everywhere else in the package, Python does not ask an array where it lies."""
    package = Path(bitnet_edu.__file__).parent
    for file in package.rglob("*.py"):
        if file.name not in ("border.py", "bits.py"):  # bits.py: `at`, for compiled code
            assert ".ctypes" not in file.read_text(encoding="utf-8"), file
