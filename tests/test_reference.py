"""The NumPy model: what its observer sees, and what must hold for any model of its kind.

That its numbers are those of transformers is shown in test_verify, over all forms of checkpoints.
"""

import numpy as np
import pytest
from checkpoints import Recipe, write

from bitnet_edu.files.hf import read_folder
from bitnet_edu.packing import unpack_hf
from bitnet_edu.proof import transformers
from bitnet_edu.quantize import absmax_int8
from bitnet_edu.reference import BitNetReference

IDS = np.random.default_rng(0).integers(0, 299, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), Recipe(tied=False))


@pytest.fixture(scope="module")
def model(folder):
    return BitNetReference(*read_folder(folder))


@pytest.fixture(scope="module")
def seen(model):
    arrays = {}
    model.logits(IDS, lambda name, array: arrays.__setitem__(name, array.copy()))
    return arrays


def test_logits_have_a_row_for_each_prefix(model):
    logits = model.logits(IDS)
    assert logits.shape == (20, 299)
    assert logits.dtype == np.float32
    for length in (1, 7, 19):
        np.testing.assert_allclose(
            model.logits(IDS[:length]), logits[:length], atol=1e-6 * np.ptp(logits)
        )


def test_observing_changes_nothing(model, seen):
    np.testing.assert_array_equal(model.logits(IDS), model.logits(IDS, lambda name, array: None))


def test_the_observer_sees_every_step_of_every_layer(model, seen):
    matrices = model.config.matrix_shapes
    expected = ["embedding"]
    for layer in range(model.config.num_hidden_layers):
        for name in matrices:
            inside = {
                "o_proj": ("queries", "keys", "values", "attention"),
                "down_proj": ("feed_forward",),
            }
            expected += [f"layers.{layer}.{part}" for part in inside.get(name, ())]
            parts = ("input", "codes", "int8", "sums")
            expected += [f"layers.{layer}.{name}.{part}" for part in parts]
            if name in ("o_proj", "down_proj"):
                half = "attention" if name == "o_proj" else "feed_forward"
                expected.append(f"layers.{layer}.after_{half}")
    assert list(seen) == [*expected, "norm"]
    for name, (out, n) in matrices.items():
        at = f"layers.1.{name}"
        assert seen[f"{at}.codes"].shape == (out, n)
        assert seen[f"{at}.int8"].shape == (20, n)
        assert seen[f"{at}.sums"].shape == (20, out)
        np.testing.assert_array_equal(
            seen[f"{at}.sums"],
            seen[f"{at}.int8"].astype(np.int64) @ seen[f"{at}.codes"].astype(np.int64).T,
        )
        np.testing.assert_array_equal(seen[f"{at}.int8"], absmax_int8(seen[f"{at}.input"])[0])
        packed = getattr(model.weights.layers[1], name).packed
        np.testing.assert_array_equal(seen[f"{at}.codes"], unpack_hf(packed))


def test_the_arrays_between_the_layers_are_those_of_transformers(folder, seen):
    pytest.importorskip("transformers")
    _, theirs = transformers.trace_transformers(transformers.load_transformers(folder), IDS)
    shared = seen.keys() & theirs.keys()
    assert len(shared) == 2 + 2 * (2 + 7 + 2)  # what stands before the two SubLNs, too
    for name in shared:
        ours = seen[name].astype(np.float64)
        # these tokens have no flip in these weights: see test_verify for those that do
        assert np.abs(ours - theirs[name]).max() <= 1e-6 * np.ptp(ours), name


def test_an_observer_may_replay_other_roundings(model):
    def coarse(name, array):
        if name.endswith("int8"):
            array[:] = array // 2 * 2

    assert np.abs(model.logits(IDS, coarse) - model.logits(IDS)).max() > 0


def test_one_token_depends_on_all_before_and_none_after(model):
    logits = model.logits(IDS)
    changed = IDS.copy()
    changed[8] = (changed[8] + 1) % 299
    after = np.abs(model.logits(changed) - logits).max(axis=1)
    assert after[:8].max() <= 1e-6 * np.ptp(logits)
    assert after[8:].min() > 1e-3 * np.ptp(logits)
