"""Execute every notebook once: for the book, for the exercises' checks, for the table of run times.

    python tools/run_notebooks.py [NOTEBOOK ...]

The outputs go into Jupyter Book's cache, which the build takes them from. Behind a notebook's last
cell, and unseen by the book, its exercises are solved with the solutions of the text and checked
again; the whole is kept in _build/executed for tests/notebooks. _build/times.json holds seconds and
peak memory of each chapter, which the page of the parity ledger shows.
"""

import json
import re
import sys
from pathlib import Path

import nbformat
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "_build"
TIMES = BUILD / "times.json"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)
PROBE = """import time
import psutil
from bitnet_edu.system import peak_memory

print(time.time() - psutil.Process().create_time(), peak_memory())"""


def hidden(source: str, tag: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})


def solved_exercises(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """For each check of an exercise two cells: the solution from the text below it, and the check.

    AssertionError if there is no such text.
    """
    cells, check = [], None
    for cell in notebook.cells:
        if check is not None and cell.cell_type == "markdown":
            solution = SOLUTION.search(cell.source)
            assert solution, f"no solution below the check:\n{check.source}"
            cells += [hidden(solution[1], "solution"), hidden(check.source, "solved")]
            check = None
        if "exercise-check" in cell.metadata.get("tags", []):
            assert check is None, f"no solution below the check:\n{check.source}"
            check = cell
    assert check is None, f"no solution below the check:\n{check.source}"
    return cells


def run(path: Path) -> dict[str, float]:
    """Execute one notebook, cache its outputs, keep the solved copy; seconds and peak bytes.

    Raises what nbclient raises where a cell fails, hangs or kills the kernel.
    """
    notebook = nbformat.read(path, as_version=4)
    own = len(notebook.cells)
    notebook.cells += [hidden(PROBE, "probe"), *solved_exercises(notebook)]
    NotebookClient(
        notebook,
        timeout=CONFIG["execute"]["timeout"],
        record_timing=False,  # the cache would take the times for a part of the code
        resources={"metadata": {"path": path.parent}},
    ).execute()
    BUILD.joinpath("executed").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, BUILD / "executed" / path.name)
    seconds, peak = map(float, notebook.cells[own].outputs[0].text.split())
    notebook.cells = notebook.cells[:own]
    get_cache(BUILD / ".jupyter_cache").cache_notebook_bundle(
        CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds}),
        check_validity=False,
        overwrite=True,
    )
    return {"seconds": round(seconds, 1), "peak_bytes": int(peak)}


def main(paths: list[Path]) -> int:
    """Run all; the number of notebooks that failed."""
    failed = 0
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    for path in paths:
        try:
            times[path.stem] = run(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"{path.name} failed:\n{error}", file=sys.stderr, flush=True)
            continue
        TIMES.write_text(json.dumps(times, indent=1), encoding="utf-8")
        cost = times[path.stem]
        gigabytes = cost["peak_bytes"] / 1e9
        print(f"{path.name:34} {cost['seconds']:6.1f} s {gigabytes:6.2f} GB", flush=True)
    return failed


if __name__ == "__main__":
    chosen = [Path(name).resolve() for name in sys.argv[1:]]
    sys.exit(min(main(chosen or sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))), 1))
