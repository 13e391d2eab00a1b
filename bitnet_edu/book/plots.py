"""The book's figures: one set of colours and shapes for every picture of the same thing."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's palette: distinguishable with every common form of colour blindness.
MINUS, ZERO, PLUS = "#D55E00", "#BBBBBB", "#0072B2"
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
TERNARY = ListedColormap([MINUS, ZERO, PLUS])

STYLE = {
    "figure.figsize": (7.0, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=SERIES),
}


def figure(rows: int = 1, columns: int = 1, **options) -> tuple[Figure, Axes | np.ndarray]:
    """`plt.subplots` in the book's style."""
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, **options)


def show(fig: Figure, alt: str) -> HTML:
    """The figure as an image with a text alternative, the same in JupyterLab, Colab, the book."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=160)
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    style = f"max-width:100%;width:{fig.get_figwidth() * 100:.0f}px;background:#fff"
    return HTML(f'<img alt="{alt}" style="{style}" src="data:image/png;base64,{data}">')


def draw_ternary(ax: Axes, codes: np.ndarray, numbers: bool = True) -> None:
    """A matrix of codes, int[rows, columns] in {-1, 0, 1}, as coloured squares."""
    ax.pcolormesh(codes, cmap=TERNARY, vmin=-1, vmax=1, edgecolors="white", linewidth=1.5)
    for (row, column), code in np.ndenumerate(codes) if numbers else ():
        color = "black" if code == 0 else "white"
        ax.text(
            column + 0.5,
            row + 0.5,
            f"{code:+d}" if code else "0",
            color=color,
            ha="center",
            va="center",
        )
    _matrix_axes(ax)


def draw_int8(ax: Axes, q: np.ndarray, largest: int = 127) -> None:
    """A matrix of integers as numbered squares: stronger colour, larger size; hue, the sign."""
    signs = LinearSegmentedColormap.from_list("signs", [MINUS, "white", PLUS])
    ax.pcolormesh(
        q, cmap=signs, vmin=-largest, vmax=largest, edgecolors=ZERO, linewidth=0.8, alpha=0.75
    )
    for (row, column), value in np.ndenumerate(q):
        ax.text(column + 0.5, row + 0.5, f"{value}", ha="center", va="center", fontsize=8)
    _matrix_axes(ax)


def draw_floats(ax: Axes, values: np.ndarray, numbers: bool = False) -> None:
    """A matrix of floats as circles: the area is the size, the colour the sign."""
    rows, columns = values.shape
    largest = np.abs(values).max() or 1.0
    for (row, column), value in np.ndenumerate(values):
        radius = 0.46 * np.sqrt(abs(value) / largest)
        color = PLUS if value > 0 else MINUS
        ax.add_patch(plt.Circle((column + 0.5, row + 0.5), radius, color=color, alpha=0.75))
        if numbers:
            ax.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8)
    ax.set_xlim(0, columns)
    ax.set_ylim(0, rows)
    _matrix_axes(ax)


def draw_branch(ax: Axes, y: float, steps: list[tuple[str, str]], name: str = "") -> None:
    """One half of a block at height y: (label, colour) boxes, leaving the residual stream and back.

    Boxes stand at x = 0, 1, 2, ...; the stream is the thick line below them.
    """
    stream, last = y - 0.62, len(steps) - 1
    _arrow(ax, (-0.95, stream), (last + 0.95, stream), 2.5)
    ax.plot([-0.7, -0.7, -0.42], [stream, y, y], color="black", lw=1)
    ax.plot([last + 0.42, last + 0.7, last + 0.7], [y, y, stream], color="black", lw=1)
    circle = {"boxstyle": "circle,pad=0.15", "fc": "white"}
    ax.text(last + 0.7, stream, "+", ha="center", va="center", bbox=circle)
    for x, (label, color) in enumerate(steps):
        box = {"boxstyle": "round,pad=0.02", "fc": color, "ec": "black", "lw": 0.8}
        ax.add_patch(FancyBboxPatch((x - 0.4, y - 0.3), 0.8, 0.6, **box))
        ax.text(x, y, label, ha="center", va="center", fontsize=8.5)
        if x:
            _arrow(ax, (x - 0.58, y), (x - 0.42, y), 1)
    ax.text(-0.95, y + 0.45, name, fontsize=10, fontweight="bold")
    ax.set_xlim(-1, last + 1)
    ax.autoscale(axis="y")
    ax.axis("off")


def _arrow(ax: Axes, start: tuple, end: tuple, width: float) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": width})


def _matrix_axes(ax: Axes) -> None:
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
