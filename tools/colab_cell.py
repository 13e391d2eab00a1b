"""Gives every chapter the code cell that installs the package on Colab; the book hides it.

Run from the repository root: .venv/bin/python tools/colab_cell.py [--check]
With --check it changes nothing and exits 1 if a chapter lacks the cell.
"""

import sys
from pathlib import Path

import nbformat
import yaml

REPOSITORY = yaml.safe_load(Path("_config.yml").read_text())["repository"]["url"]
SOURCE = f"""import sys

if "google.colab" in sys.modules:  # Colab has its own torch and transformers
    %pip install -q "bitnet-edu[ui] @ git+{REPOSITORY}\""""
TAG = "remove-cell"  # the built page does without it


def add_cell(notebook: nbformat.NotebookNode) -> bool:
    """Put the cell before the first code cell, or bring it up to date; True if it had to."""
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    cell = notebook.cells[first]
    if cell.source == SOURCE and TAG in cell.metadata.get("tags", []):
        return False
    new = nbformat.v4.new_code_cell(SOURCE, metadata={"tags": [TAG]})
    replace = "google.colab" in cell.source
    notebook.cells[first : first + replace] = [new]
    for number, cell in enumerate(notebook.cells):  # as nbstripout numbers them
        cell["id"] = str(number)
    return True


def main() -> int:
    check = "--check" in sys.argv
    changed = []
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if add_cell(notebook):
            changed.append(str(path))
            if not check:
                nbformat.write(notebook, path)
    print("\n".join(changed) or "every chapter has the cell")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
