"""The parity ledger: each claim "ours equals theirs" is one row, checked as it is printed."""

import json
from pathlib import Path

import numpy as np


class Ledger:
    """The comparisons of one chapter. `check` prints a row and raises AssertionError if it fails.

    Inside a checkout of the book the rows are also kept in _build/ledger/<chapter>.json, from
    which the page "The parity ledger" is built; those of an earlier run are dropped at the start.
    """

    def __init__(self, chapter: str):
        self.chapter = chapter
        self.rows: list[dict] = []
        folder = ledger_folder()
        self.file = folder / f"{chapter}.json" if folder else None
        if self.file:
            self.file.unlink(missing_ok=True)

    def check(
        self, what: str, ours: np.ndarray, theirs: np.ndarray, bound: float = 0.0, why: str = ""
    ) -> None:
        """Compare two arrays of one shape. bound 0: equality; `why`: where the bound comes from."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape} differ"
        difference = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
        verdict = "exact" if difference == 0 else f"max difference {difference:.1e}"
        row = {"chapter": self.chapter, "what": what, "elements": ours.size}
        row |= {"max_difference": difference, "bound": float(bound), "why": why}
        self.rows.append(row)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        print(f"{what:<34} {ours.size:>9,} values  {verdict:<22}  bound {bound:.1e}")
        # written so that NaN fails too
        assert difference <= bound, (
            f"{what}: difference {difference:.3g} exceeds the bound {bound:.3g}"
        )


def ledger_folder() -> Path | None:
    """Where a checkout of the book keeps its rows, or None outside of one."""
    for folder in (Path.cwd(), Path.cwd().parent):
        if (folder / "_toc.yml").exists():
            return folder / "_build" / "ledger"
    return None


def read_ledger(file: Path) -> list[dict]:
    """The rows of one chapter, in the order of its checks."""
    return json.loads(file.read_text(encoding="utf-8"))
