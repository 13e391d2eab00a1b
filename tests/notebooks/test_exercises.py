"""Every exercise's check is itself checked: the empty stub is "Not yet", the solution is "Right".

The notebook runs once. Behind each check cell, the solution from the text below it is run in the
stub's place, and the check is called again.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def with_solutions(notebook):
    """The notebook with two more cells behind every check: the solution, and the check again."""
    cells, pending = [], None
    for cell in notebook.cells:
        if pending is not None and cell.cell_type == "markdown":
            solution = SOLUTION.search(cell.source)
            assert solution, f"no solution below the check:\n{pending.source}"
            again = nbformat.v4.new_code_cell(pending.source, metadata={"tags": ["solved"]})
            cells += [nbformat.v4.new_code_cell(solution[1]), again]
            pending = None
        if "exercise-check" in tags(cell):
            pending = cell
        cells.append(cell)
    notebook.cells = cells
    return notebook


def answer(cell) -> str:
    """What a check said: its last output, as text."""
    output = cell.outputs[-1]
    return output.text if output.output_type == "stream" else output.data["text/plain"].strip("'\"")


CHAPTERS = [path for path in sorted(FOLDER.glob("*.ipynb")) if "exercise-check" in path.read_text()]


def test_there_are_exercises():
    assert len(CHAPTERS) >= 8


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_checks_tell_stubs_from_solutions(path: Path):
    notebook = with_solutions(nbformat.read(path, as_version=4))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": FOLDER}}).execute()
    stubs = [answer(cell) for cell in notebook.cells if "exercise-check" in tags(cell)]
    solved = [answer(cell) for cell in notebook.cells if "solved" in tags(cell)]
    assert stubs
    assert all(text.startswith("Not yet") for text in stubs), stubs
    assert all(text.startswith("Right") for text in solved), solved
