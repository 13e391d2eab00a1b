"""Every rung of the ladder is exact, and does as many operations as it says."""

import operator
from collections import Counter
from types import FunctionType, SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_edu.errors import InputError
from bitnet_edu.kernels import ladder
from bitnet_edu.kernels.ladder import RUNGS

ROWS_MULTIPLE_OF = {"two bits": 4, "bit-planes": 8}  # any number of rows for the others
each_rung = pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)


def exact(codes, q):
    return codes.astype(np.int32) @ q.astype(np.int32)


def check(rung, codes, q):
    sums = rung.function(rung.prepare(codes), q)
    assert sums.dtype == np.int32
    assert sums.shape == (len(codes),)
    np.testing.assert_array_equal(sums, exact(codes, q))


@each_rung
@settings(deadline=None)
@given(data=st.data())
def test_equals_int32_numpy(rung, data):
    multiple = ROWS_MULTIPLE_OF.get(rung.name, 1)
    rows = multiple * data.draw(st.integers(1, 24 // multiple), "rows / multiple")
    columns = data.draw(st.integers(1, 200), "columns")
    codes = data.draw(hnp.arrays(np.int8, (rows, columns), elements=st.integers(-1, 1)), "codes")
    q = data.draw(hnp.arrays(np.int8, columns), "q")
    check(rung, codes, q)


@each_rung
@pytest.mark.parametrize("value", [-128, -127, 0, 127])
@pytest.mark.parametrize("code", [-1, 0, 1])
def test_longest_row_of_the_extreme_values(rung, code, value):
    columns = 6912  # down_proj of the 2B4T model
    check(rung, np.full((8, columns), code, np.int8), np.full(columns, value, np.int8))


@each_rung
def test_one_weight_at_a_time(rung):
    """A weight that stands alone shows any confusion of rows, columns or digits."""
    columns = 23
    q = np.arange(1, columns + 1, dtype=np.int8)
    for row in range(8):
        for column in range(columns):
            codes = np.zeros((8, columns), np.int8)
            codes[row, column] = -1
            check(rung, codes, q)


@each_rung
def test_a_projection_of_the_2b4t_model(rung):
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (640, 2560), dtype=np.int8)
    check(rung, codes, rng.integers(-128, 128, 2560, dtype=np.int8))


def test_rows_that_do_not_fill_a_byte_are_refused():
    with pytest.raises(ValueError, match="12 output rows"):
        ladder.pack_bit_planes(np.zeros((12, 5), np.int8))


# An independent count: run the rung's Python source on integers that count what is done to them.


tally = Counter()
KINDS = {
    "multiplications": ["mul"],
    "additions": ["add", "sub", "neg"],
    "logic": ["and", "or", "xor", "lshift", "rshift", "eq"],
}


class Counting(int):
    __hash__ = int.__hash__


class Table(list):
    def __getitem__(self, index):
        tally["lookups"] += isinstance(index, Counting)
        return super().__getitem__(index)


def counted(kind, operation):
    def method(*operands):
        tally[kind] += 1
        result = operation(*map(int, operands))
        return result if isinstance(result, bool) else Counting(result)

    return method


for kind, names in KINDS.items():
    for name in names:
        method = counted(kind, getattr(operator, f"__{name}__"))
        setattr(Counting, f"__{name}__", method)
        if name in ("add", "mul"):  # a plain 0 may stand on the left
            setattr(Counting, f"__r{name}__", method)
Counting.__rsub__ = lambda self, other: Counting(other) - self

counting = np.vectorize(Counting, otypes=[object])
numpy_of_counting = SimpleNamespace(
    int8=Counting,
    int16=Counting,
    int32=Counting,
    zeros=lambda shape, _: counting(np.zeros(shape, int)),
    empty=lambda size, _: Table([Counting(0)] * size),
    array=lambda values, _: np.array(values, object),
)


def uncompiled(function):
    """The Python source of a rung or of its helper, with counting integers for NumPy's."""
    source = getattr(function, "py_func", function)
    return FunctionType(source.__code__, counting_globals)


counting_globals = vars(ladder) | {"np": numpy_of_counting}
for helper in ("times_code", "partial_sums"):
    counting_globals[helper] = uncompiled(getattr(ladder, helper))


@pytest.mark.parametrize("rung", RUNGS[1:], ids=lambda rung: rung.name)
@pytest.mark.parametrize("shape", [(8, 20), (16, 23), (8, 1)])
def test_counts_are_what_the_source_does(rung, shape):
    rng = np.random.default_rng(1)
    codes = rng.integers(-1, 2, shape, dtype=np.int8)
    q = counting(rng.integers(-128, 128, shape[1], dtype=np.int8))
    weights = rung.prepare(codes)
    if isinstance(weights, np.ndarray):
        weights = counting(weights)
    else:
        weights = [[Counting(w) for w in row] for row in weights]
    tally.clear()
    sums = uncompiled(rung.function)(weights, q)
    executed = {name: tally[name] for name in ("multiplications", "additions", "logic", "lookups")}
    np.testing.assert_array_equal(sums.astype(np.int32), exact(codes, q.astype(np.int32)))
    assert executed.items() < rung.count(codes)._asdict().items()


@each_rung
@pytest.mark.parametrize("shape", [(8, 20), (16, 23), (8, 1)])
def test_weight_bytes_are_what_was_prepared(rung, shape):
    weights = rung.prepare(np.ones(shape, np.int8))
    pointer = np.dtype(np.intp).itemsize
    size = weights.nbytes if isinstance(weights, np.ndarray) else pointer * shape[0] * shape[1]
    assert rung.count(np.ones(shape, np.int8)).weight_bytes == size


def test_dense_counts_one_multiplication_and_one_addition_a_weight():
    codes = np.ones((8, 20), np.int8)
    assert RUNGS[0].count(codes)[:4] == RUNGS[1].count(codes)[:4] == (160, 160, 0, 0)


def wrong_inputs(rung):
    """Ways to call a compiled rung with what does not fit; NumPy and lists check themselves."""
    codes, q = np.ones((16, 40), np.int8), np.ones(40, np.int8)
    weights = rung.prepare(codes)
    yield "q too short", weights, q[:4]
    yield "q too long", weights, np.ones(10**6, np.int8)
    yield "q empty", weights, q[:0]
    yield "q of floats", weights, q.astype(np.float32)
    yield "q a list", weights, q.tolist()
    yield "q a matrix", weights, q[None]
    yield "q strided", weights, np.ones(80, np.int8)[::2]
    yield "weights of another type", weights.astype(np.int32), q
    yield "weights strided", np.repeat(weights, 2, axis=-1)[..., ::2], q
    yield "weights without a row", weights[..., :0], q
    yield "weights as a list", weights.tolist(), q
    if rung.name in ("lookup table", "base 3"):
        yield "an index beyond the table", np.full_like(weights, 0xFF), q


WRONG = [(rung, *case) for rung in RUNGS[2:] for case in wrong_inputs(rung)]


@pytest.mark.parametrize(
    ("rung", "weights", "q"),
    [(rung, weights, q) for rung, _, weights, q in WRONG],
    ids=[f"{rung.name}: {name}" for rung, name, *_ in WRONG],
)
def test_compiled_rungs_refuse_what_does_not_fit(rung, weights, q):
    with pytest.raises(InputError):
        rung.function(weights, q)


def test_partial_sums_need_room():
    with pytest.raises(ValueError, match="too short"):
        ladder.partial_sums(np.ones(2, np.int8), np.zeros(8, np.int16))
