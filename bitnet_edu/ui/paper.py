"""The published results: every table sortable, every cell linked, and ours beside them."""

from typing import Any

import anywidget
from IPython.display import HTML

from bitnet_edu.book import paper
from bitnet_edu.ui.figure import live_figure, static_figure


def paper_tables() -> HTML:
    """The panel for a page, with or without a kernel."""
    return static_figure("paper", paper_state())


def paper_panel() -> anywidget.AnyWidget:
    """The panel as a widget."""
    return live_figure("paper", paper_state())


def paper_state() -> dict[str, Any]:
    """All that the page needs: tables with units and sources, our verdicts, the disagreements."""
    return {
        "tables": [_table(*name) for name in paper.tables()],
        "claims": [claim._asdict() for claim in paper.OURS],
        "recomputed": _recomputed(),
        "disagreements": [{"title": d.title, "text": d.text} for d in paper.disagreements()],
    }


def _table(source: str, name: str) -> dict[str, Any]:
    cells = paper.published().query("paper == @source and table == @name")
    return {
        "paper": source,
        "name": name,
        "url": cells["url"].iloc[0],
        "rows": cells["row"].unique().tolist(),
        "columns": cells["column"].unique().tolist(),
        "cells": {
            f"{cell.row}|{cell.column}": [cell.value, cell.unit, cell.status]
            for cell in cells.itertuples()
        },
    }


def _recomputed() -> dict[str, Any]:
    frame = paper.recomputed_table_1()
    return {
        "columns": frame.columns.tolist(),
        "rows": [[name, *(f"{value:.3f}" for value in row)] for name, *row in frame.itertuples()],
    }
