"""What is chosen where the engine runs: by the clock alone, kept if possible, never in results."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from bitnet_edu.errors import InputError
from bitnet_edu.kernels import tuning
from bitnet_edu.kernels.tuning import AHEADS, Tuning, measure, recall, remember, tuning_for
from bitnet_edu.model import BitNet
from bitnet_edu.packing import pack_base3_rows, pack_hf
from bitnet_edu.weights import BitNetConfig, TernaryMatrix, random_weights

SHAPE = BitNetConfig(96, 64, 100, 2, 4, 2, 640, 500000.0, 1e-5, None, ())
CODES = np.random.default_rng(0).integers(-1, 2, (64, 128), np.int8)
TWO_BITS = [TernaryMatrix(pack_hf(CODES), np.float32(1))] * 3
BASE3 = [TernaryMatrix(pack_base3_rows(CODES), np.float32(1), 64)] * 3
HEAD = np.ones((50, 128), ml_dtypes.bfloat16)


class Clock:
    """Time that passes only in what is measured: seconds by (kind, ahead)."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(tuning, "ternary_matmul", self.products)
        monkeypatch.setattr(tuning, "run", self.head)

    def products(self, packed, q, *, base3_rows, threads, kernel, ahead):
        self.now += self.seconds.get(("base3" if base3_rows else "2bit", ahead), 1.0)

    def head(self, function, args, threads):
        self.now += self.seconds.get(("head", args[-2]), 1.0)


def chosen(monkeypatch, matrices=TWO_BITS, **seconds):
    times = {tuple(k.split("_")) if "_" in k else k: v for k, v in seconds.items()}
    times = {(kind, int(ahead)): value for (kind, ahead), value in times.items()}
    Clock(monkeypatch, times)
    found, steady = measure(matrices, HEAD, "portable", 1)
    assert steady
    return found


def test_the_shortest_time_decides(monkeypatch):
    near, far = AHEADS[1:]
    times = {f"2bit_{near}": 0.8, f"base3_{far}": 0.7, f"head_{far}": 0.5}
    assert chosen(monkeypatch, **times) == Tuning("base3", near, far, far)
    times = {f"2bit_{near}": 0.6, f"base3_{far}": 0.7}
    assert chosen(monkeypatch, **times) == Tuning("2bit", near, far, 0)


def test_what_is_hardly_faster_is_left_alone(monkeypatch):
    near, far = AHEADS[1:]
    times = {f"2bit_{near}": 0.98, "base3_0": 0.98, f"head_{far}": 0.99}
    assert chosen(monkeypatch, **times) == Tuning("2bit", 0, 0, 0)


def test_what_lies_in_base_3_stays_so(monkeypatch):
    found = chosen(monkeypatch, BASE3, **{f"base3_{AHEADS[1]}": 0.5})
    assert found == Tuning("base3", 0, AHEADS[1], 0)


def test_each_choice_can_really_be_measured():
    for matrices in (TWO_BITS, BASE3):
        found, _ = measure(matrices, HEAD, "portable", 2)
        assert {found.ahead, found.base3_ahead, found.head_ahead} <= set(AHEADS)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.delenv("BITNET_EDU_TUNING", raising=False)
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_a_large_model_is_measured_once_and_a_small_one_never(monkeypatch, folder):
    counted = []
    found = Tuning("base3", 0, AHEADS[1], AHEADS[2])
    monkeypatch.setattr(tuning, "measure", lambda *args: counted.append(args) or (found, True))
    assert tuning_for(TWO_BITS, HEAD, "portable", 1) == Tuning()
    assert tuning_for(BASE3, HEAD, "portable", 1) == Tuning("base3")
    assert not counted
    monkeypatch.setattr(tuning, "ENOUGH", 1)
    for _ in range(3):
        assert tuning_for(TWO_BITS, HEAD, "portable", 1) == found
    assert len(counted) == 1
    for other in ((BASE3, "portable", 1), (TWO_BITS, "avx2", 1), (TWO_BITS, "portable", 2)):
        tuning_for(other[0], HEAD, *other[1:])
    assert len(counted) == 4
    monkeypatch.setattr(tuning, "cpu_identity", lambda: "another processor")
    tuning_for(TWO_BITS, HEAD, "portable", 1)
    assert len(counted) == 5


def test_what_a_busy_machine_shows_is_not_kept(monkeypatch, folder):
    clock = Clock(monkeypatch, {})
    disturbed = itertools.cycle([0, 5, 5, 0, 5])

    def products(*args, **kwargs):
        clock.now += next(disturbed)
        clock.products(*args, **kwargs)

    monkeypatch.setattr(tuning, "ternary_matmul", products)
    monkeypatch.setattr(tuning, "ENOUGH", 1)
    assert not measure(TWO_BITS[:1], HEAD, "portable", 1)[1]
    tuning_for(TWO_BITS[:1], HEAD, "portable", 1)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"a": 7}', '{"a": {"packing": "base3"', '{"a": {"packing": "base4"}}',
     '{"a": {"ahead": -1}}', '{"a": {"ahead": 1e99}}', '{"a": {"ahead": "far"}}',
     '{"a": {"distance": 0}}', '{"a": {"ahead": [0]}}', "\0\0", "[" * 100000],
)  # fmt: skip
def test_whatever_lies_there_is_measured_anew(folder, content):
    (folder / tuning.FILE).write_text(content)
    assert recall("a") is None
    found = Tuning("base3", 0, AHEADS[1])
    remember("a", found)
    assert recall("a") == found
    assert [path.name for path in folder.iterdir()] == [tuning.FILE]


def test_without_a_place_nothing_is_kept(monkeypatch, tmp_path):
    for place in (None, tmp_path / "missing", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(tuning, "cache_folder", lambda place=place: place)
        remember("a", Tuning())
        assert recall("a") is None


@pytest.mark.parametrize(
    "wrong", ["fast", "packing=base4", "ahead=-1", "ahead=1e3", "far=1", "=", "ahead=²"]
)
def test_an_unreadable_choice_in_the_environment(monkeypatch, wrong):
    monkeypatch.setenv("BITNET_EDU_TUNING", f"packing=2bit {wrong}")
    with pytest.raises(InputError, match="BITNET_EDU_TUNING holds"):
        BitNet(SHAPE, random_weights(SHAPE)).logits([1])


def test_no_choice_changes_a_bit(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 96, 20)
    weights = random_weights(SHAPE)
    results = []
    for packing, ahead in itertools.product(("2bit", "base3"), (0, 64, 2**30)):
        choice = Tuning(packing, ahead, ahead, ahead)
        monkeypatch.setenv("BITNET_EDU_TUNING", str(choice))
        model = BitNet(SHAPE, weights)
        assert model.tuning() == choice._replace(
            ahead=min(ahead, 2**20), base3_ahead=min(ahead, 2**20), head_ahead=min(ahead, 2**20)
        )
        cache = model.new_cache(21)
        results.append([*model.logits(ids), model.forward(ids, cache), model.forward([5], cache)])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
