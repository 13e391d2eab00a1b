"""The layout microscope shows where the packing functions really put each weight."""

import numpy as np

from bitnet_edu.ui.microscope import microscope_state


def test_every_weight_is_found_again_in_its_byte() -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (16, 40)).astype(np.int8)
    state = microscope_state(codes)
    assert [layout["bits"] for layout in state["layouts"]] == [2, 2, 2, 1.6]
    for layout in state["layouts"]:
        stored = np.array(layout["bytes"])[layout["byteOf"]] // layout["place"]
        base = 3 if layout["name"] == "base 3" else 4
        assert np.array_equal(stored % base - 1, codes.reshape(-1)), layout["name"]
