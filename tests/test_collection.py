"""Floors 0 to 5 are tested without torch and transformers: their tests can be collected."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import FLOORS

TESTS = Path(__file__).parent
UPPER = {room for rooms in FLOORS[6:] for room in rooms} | {"browser", "notebooks", "tools"}
WITHOUT = """
import sys
for name in ("torch", "transformers", "accelerate"):
    sys.modules[name] = None  # as if it were not installed
import pytest
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def lower_tests() -> list[Path]:
    """All test files but those of the upper floors' rooms."""
    return [
        path
        for path in sorted(TESTS.rglob("test_*.py"))
        if path.relative_to(TESTS).parts[0] not in UPPER
        and path.stem.removeprefix("test_") not in UPPER | {"repository", "collection"}
    ]


def collect(*paths: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, *map(str, paths)]
    return subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)


def test_floors_0_to_5_are_collected_without_torch():
    paths = lower_tests()
    assert {path.stem for path in paths} >= {"test_layers", "test_hf", "test_matmul", "test_model"}
    result = collect(*paths)
    assert result.returncode == 0, result.stdout[-3000:]


def test_a_test_that_imports_torch_is_found(tmp_path):
    path = tmp_path / "test_heavy.py"
    path.write_text("import torch\n\n\ndef test_nothing():\n    pass\n")
    assert collect(path).returncode == pytest.ExitCode.INTERRUPTED
