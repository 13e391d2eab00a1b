"""The checks of a chapter's exercises, run on answers of the tests' own."""

import json
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def verdict_of(notebook: str, number: int, answer: str, names: dict[str, Any]) -> str:
    """What check `number` of a notebook says of an answer, given as source code.

    names: what the chapter has defined before.
    """
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    checks = [cell for cell in cells if "exercise-check" in cell["metadata"].get("tags", [])]
    check, call = "".join(checks[number - 1]["source"]).rstrip().rsplit("\n", 1)
    exec(answer, names)
    exec(check, names)
    return eval(call, names)
