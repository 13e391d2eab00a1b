"""The layout microscope: point at a byte, see which weights it holds, in each storage layout."""

from collections.abc import Callable
from typing import Any

import numpy as np
from IPython.display import HTML

from bitnet_edu.packing import pack_base3, pack_hf, pack_i2s
from bitnet_edu.ui.figure import static_figure


def layout_microscope(codes: np.ndarray) -> HTML:
    """The figure for int8[out, in]; out a multiple of 4, in one of 5, out*in one of 128."""
    return static_figure("microscope", microscope_state(codes))


def microscope_state(codes: np.ndarray) -> dict[str, Any]:
    """The codes, and for each layout its bytes and the byte and place of each weight."""
    rows, columns = codes.shape
    layouts = {
        "Hugging Face": (pack_hf, columns),
        "I2_S, x86": (pack_i2s, 32),
        "I2_S, Arm": (lambda c: pack_i2s(c, block=64), 16),
        "base 3": (pack_base3, 16),
    }
    return {
        "rows": rows,
        "columns": columns,
        "codes": codes.reshape(-1).tolist(),
        "layouts": [_layout(name, codes, *how) for name, how in layouts.items()],
    }


def _layout(name: str, codes: np.ndarray, pack: Callable, bytes_per_line: int) -> dict[str, Any]:
    byte_of, place = [], []
    one = np.full(
        codes.shape, -1, np.int8
    )  # -1 is stored as 0: only the probed weight leaves a mark
    for where in np.ndindex(codes.shape):
        one[where] = 0
        packed = pack(one).reshape(-1)
        one[where] = -1
        byte_of.append(int(packed.argmax()))
        place.append(int(packed.max()))  # 1, 4, 16, 64 or 1, 3, 9, 27, 81
    packed = pack(codes).reshape(-1).tolist()
    return {
        "name": name,
        "line": bytes_per_line,
        "bytes": packed,
        "byteOf": byte_of,
        "place": place,
        "bits": 8 * len(packed) / codes.size,
    }
