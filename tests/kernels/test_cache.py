"""Compiled code is kept between processes, wherever it can be, and never outlives its sources."""

import os
import subprocess
import sys
from pathlib import Path

import bitnet_edu

SCRIPT = """
import numpy as np
from bitnet_edu.kernels import matmul
matmul.count_invalid(np.zeros((1, 1), np.uint8))
stats = matmul._count_invalid.stats
print(sum(stats.cache_hits.values()), matmul._count_invalid.stats.cache_path)
"""


def run(package: Path, **env: str) -> tuple[str, str]:
    """(cache hits, cache folder) of a new process that imports this copy of the package."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    hits, _, folder = done.stdout.strip().partition(" ")
    return hits, folder


def copy_of_package(folder: Path) -> Path:
    package = folder / "bitnet_edu"
    (package / "kernels").mkdir(parents=True)
    source = Path(bitnet_edu.__file__).parent
    for file in [
        "__init__.py",
        "errors.py",
        *(f"kernels/{f.name}" for f in source.glob("kernels/*.py")),
    ]:
        (package / file).write_bytes((source / file).read_bytes())
    return package


def test_second_process_finds_the_code_until_any_kernel_file_changes(tmp_path):
    package = copy_of_package(tmp_path)
    assert run(package)[0] == "0"
    hits, folder = run(package)
    assert hits == "1"
    assert Path(folder) == package / "kernels" / "__pycache__"
    with (package / "kernels" / "threads.py").open("a") as file:  # not the file of the function
        file.write("\n# changed\n")
    assert run(package)[0] == "0"


def test_without_any_writable_folder_it_still_runs(tmp_path):
    package = copy_of_package(tmp_path)
    (package / "kernels" / "__pycache__").write_text("a file, so that nothing can be written here")
    home = tmp_path / "home"
    home.write_text("not a folder")
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "LOCALAPPDATA": str(home)}
    assert run(package, **places) == ("0", "None")
