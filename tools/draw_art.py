"""Draws the book's logo, favicon and cover: a float matrix, and what absmean rounding makes of it.

Run from the repository root: .venv/bin/python tools/draw_art.py
Floats are circles (area = size), integers are squares; -1, 0 and +1 keep the book's three colours.
"""

from pathlib import Path

import numpy as np

from bitnet_edu.quantize import absmean_ternary

MINUS, ZERO, PLUS, INK, PAPER = "#D55E00", "#BBBBBB", "#0072B2", "#1F2933", "#FFFFFF"
FILL = {-1: MINUS, 0: ZERO, 1: PLUS}
SIGN = {-1: "−1", 0: "0", 1: "+1"}
OUT = Path("book/_static")


def text(x: float, y: float, size: float, words: str, fill: str = INK, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" font-weight="{weight}" '
        f'fill="{fill}" text-anchor="middle">{words}</text>'
    )


def circle(x: float, y: float, value: float, largest: float, cell: float) -> str:
    """One float: its area says how large, its colour which sign; the ring is the largest."""
    full = 0.46 * cell
    centre = f'cx="{x:.1f}" cy="{y:.1f}"'
    return (
        f'<circle {centre} r="{full:.1f}" fill="{PAPER}" stroke="#DDE1E6"/>'
        f'<circle {centre} r="{full * np.sqrt(abs(value) / largest):.1f}" '
        f'fill="{PLUS if value > 0 else MINUS}"/>'
    )


def square(x: float, y: float, code: int, cell: float, label: bool = True) -> str:
    """One ternary weight, with its value written on it."""
    side = 0.86 * cell
    box = (
        f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" '
        f'height="{side:.1f}" rx="{cell * 0.1:.1f}" fill="{FILL[code]}"/>'
    )
    ink = INK if code == 0 else PAPER
    return box + (text(x, y + 0.12 * cell, 0.36 * cell, SIGN[code], ink, 600) if label else "")


def svg(width: float, height: float, title: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" aria-label="{title}" font-family="system-ui, Segoe UI, Roboto, sans-serif">'
        f"<title>{title}</title>{body}</svg>\n"
    )


def cover() -> str:
    """A 6 x 8 float matrix on the left, its absmean rounding on the right."""
    rows, columns, cell, top, left, gap = 6, 8, 50, 84, 36, 196
    w = np.random.default_rng(158).normal(size=(rows, columns)).astype(np.float32)
    codes, scale = absmean_ternary(w)
    largest = float(np.abs(w).max())
    second = left + columns * cell + gap
    width, height = second + columns * cell + left, top + rows * cell + 72
    parts = [f'<rect width="{width}" height="{height}" rx="18" fill="#F6F7F9"/>']
    for r, c in np.ndindex(rows, columns):
        x, y = left + (c + 0.5) * cell, top + (r + 0.5) * cell
        parts.append(circle(x, y, float(w[r, c]), largest, cell))
        parts.append(square(x + second - left, y, int(codes[r, c]), cell))
    middle, line = left + columns * cell + gap / 2, top + rows * cell / 2
    parts += [
        f'<path d="M{middle - 56:.0f} {line:.0f}h112m-14 -11l14 11l-14 11" stroke="{INK}" '
        'stroke-width="3" fill="none" stroke-linecap="round" stroke-linejoin="round"/>',
        text(middle, line - 46, 20, "divide by the"),
        text(middle, line - 20, 20, "mean magnitude"),
        text(middle, line + 36, 20, "round, clip"),
    ]
    for x, above, below in (
        (left, "float32 weights", f"{32 * w.size} bits"),
        (second, "ternary weights", f"{2 * w.size} bits packed, and one scale: {scale:.3f}"),
    ):
        centre = x + columns * cell / 2
        parts += [text(centre, 54, 25, above, weight=600), text(centre, height - 30, 20, below)]
    title = "Float weights, drawn as circles, become ternary weights: minus one, zero, plus one"
    return svg(width, height, title, "".join(parts))


MARK = np.array([[1, 0, -1], [-1, 1, 0], [0, -1, 1]])


def mark(cell: float, x: float = 0, y: float = 0) -> str:
    """The 3 x 3 ternary tile that is the book's sign."""
    return "".join(
        square(x + (c + 0.5) * cell, y + (r + 0.5) * cell, int(MARK[r, c]), cell, label=False)
        for r, c in np.ndindex(MARK.shape)
    )


def favicon() -> str:
    return svg(48, 48, "BitNet from Scratch", mark(16))


def logo() -> str:
    """The sign alone: the book's title stands beside it as real text."""
    return svg(96, 96, "BitNet from Scratch", mark(32))


if __name__ == "__main__":
    for name, draw in (("cover", cover), ("logo", logo), ("favicon", favicon)):
        (OUT / f"{name}.svg").write_text(draw(), encoding="utf-8")
