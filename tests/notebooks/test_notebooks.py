"""The one execution of every notebook (tools/run_notebooks.py), and what its checks said.

Every check is itself checked: the empty stub is "Not yet", the solution of the text is "Right".
"""

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_cache import get_cache

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "_build"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXERCISES = [path for path in NOTEBOOKS if "exercise-check" in path.read_text(encoding="utf-8")]

spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "tools" / "run_notebooks.py")
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def executed(path: Path):
    """What the last `make book` made of a notebook; a failure where it is not of this text."""
    copy = BUILD / "executed" / path.name
    assert copy.exists(), f"{path.name} has not been executed: run `make book` first"
    done = nbformat.read(copy, as_version=4)
    source = code(nbformat.read(path, as_version=4))
    assert code(done)[: len(source)] == source, f"{path.name} has changed: run `make book` again"
    return done


def answers(notebook, tag: str) -> list[str]:
    """What the checks with this tag said: their last outputs, as text."""
    cells = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    last = [cell.outputs[-1] for cell in cells]
    return [
        o.text if o.output_type == "stream" else o.data["text/plain"].strip("'\"") for o in last
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_executed_without_an_error(path: Path) -> None:
    for cell in executed(path).cells:
        if cell.cell_type == "code":
            assert cell.execution_count, cell.source
            assert [o for o in cell.outputs if o.output_type == "error"] == []


def test_the_book_executed_nothing_again() -> None:
    """One entry of the cache for each notebook: a second run would have added another."""
    records = get_cache(BUILD / ".jupyter_cache").list_cache_records()
    assert sorted(Path(record.uri).name for record in records) == [path.name for path in NOTEBOOKS]


def test_every_chapter_that_compares_has_written_its_rows() -> None:
    page = BUILD / "html" / "notebooks" / "99_parity_ledger.html"
    assert page.exists(), "the book is not built: run `make book`"
    text = page.read_text(encoding="utf-8")
    assert re.search(r"All \d+ chapters that compare have written their rows", text)
    assert "not run yet</td>" not in text
    assert "ran before a change</td>" not in text
    assert f"{len(NOTEBOOKS) - 1} chapters measured" in text


def test_there_are_exercises() -> None:
    assert len(EXERCISES) >= 8


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_checks_tell_stubs_from_solutions(path: Path) -> None:
    notebook = executed(path)
    stubs, solved = answers(notebook, "exercise-check"), answers(notebook, "solved")
    assert len(stubs) == len(solved) > 0
    assert all(text.startswith("Not yet") for text in stubs), stubs
    assert all(text.startswith("Right") for text in solved), solved


def test_seconds_and_memory_of_every_notebook_were_measured() -> None:
    times = json.loads((BUILD / "times.json").read_text(encoding="utf-8"))
    assert set(times) >= {path.stem for path in NOTEBOOKS}
    for name, cost in times.items():
        assert cost["seconds"] > 0, name
        assert cost["peak_bytes"] > 2**25, f"{name}: no Python is that small"


def test_a_failing_notebook_is_reported(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(run_notebooks, "TIMES", tmp_path / "_build" / "times.json")
    check = nbformat.v4.new_code_cell("n + 1", metadata={"tags": ["exercise-check"]})
    text = "<details><summary>Solution</summary>\n\n```python\nn = 41\n```\n\n</details>"
    solution = nbformat.v4.new_markdown_cell(text)
    stub = nbformat.v4.new_code_cell("n = 0")
    good, bad = tmp_path / "01_good.ipynb", tmp_path / "02_bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[stub, check, solution]), good)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), bad)
    assert run_notebooks.main([bad, good]) == 1
    assert "02_bad.ipynb failed" in capfd.readouterr().err
    done = nbformat.read(tmp_path / "_build" / "executed" / "01_good.ipynb", as_version=4)
    assert answers(done, "exercise-check") == ["1"]
    assert answers(done, "solved") == ["42"]
    assert set(json.loads((tmp_path / "_build" / "times.json").read_text())) == {"01_good"}


def test_a_check_without_a_solution_is_refused() -> None:
    check = nbformat.v4.new_code_cell("check()", metadata={"tags": ["exercise-check"]})
    for cells in ([check], [check, nbformat.v4.new_markdown_cell("## Where next")]):
        with pytest.raises(AssertionError, match="no solution"):
            run_notebooks.solved_exercises(nbformat.v4.new_notebook(cells=cells))
