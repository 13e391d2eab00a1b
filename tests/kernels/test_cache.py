"""Compiled code is kept between processes, wherever it can be, and never outlives its sources."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        *("__init__.py", "errors.py", "container.py", "load.py"),
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


DAMAGES = {
    "cut off": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "a bit turned": lambda whole: whole[:-100] + bytes([whole[-100] ^ 4]) + whole[-99:],
    "nonsense": lambda whole: b"nonsense" * 100,
    "zeros": lambda whole: bytes(len(whole)),
    "another's": None,  # a whole file in the place of another
}


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_files_count_as_missing(tmp_path, damage, kind):
    package = copy_of_package(tmp_path)
    run(package)
    folder = package / "kernels" / "__pycache__"
    files = [file for file in folder.glob(f"*.{kind}") if "_count_invalid" in file.name]
    assert files
    for file in files:
        change = DAMAGES[damage]
        if change:
            file.write_bytes(change(file.read_bytes()))
        else:
            file.unlink()
            file.mkdir()
    assert run(package)[0] == "0"


def test_without_room_for_the_cache_it_still_runs(tmp_path):
    """Any fault while writing: a full disk is one that needs root to make."""
    script = """
import contextlib, errno
from numba.core.caching import IndexDataCacheFile
@contextlib.contextmanager
def full(self, path):
    raise OSError(errno.ENOSPC, "No space left on device")
    yield
IndexDataCacheFile._open_for_write = full
""" + SCRIPT  # fmt: skip
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run_ = [sys.executable, "-c", script]
    done = subprocess.run(run_, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 ")


def test_without_the_compiler_one_line_says_so():
    for code in ("import bitnet_edu; bitnet_edu.load()", "import bitnet_edu.kernels.ladder"):
        environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
        run_ = [sys.executable, "-c", code]
        done = subprocess.run(run_, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.rstrip().endswith("can't run a model, so unset it")
        assert "BitNetError: NUMBA_DISABLE_JIT is set" in done.stderr


CALLER = """
from numba import njit
from bitnet_edu.kernels.ladder import times_code
@njit
def twice(w, value):
    return 2 * times_code(w, value)
print(twice(-1, 21))
"""


def test_a_function_of_the_readers_own_may_call_ours(tmp_path):
    """It is compiled with the compiler's lock in hand, and ours within it."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run_ = [sys.executable, "-c", CALLER]
    done = subprocess.run(run_, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "-42\n"), done.stderr


def test_only_one_place_compiles():
    """What Numba compiles goes through `bits.py`: its cache, and no exception in a thread."""
    for file in Path(bitnet_edu.__file__).parent.rglob("*.py"):
        if file.name != "bits.py":
            assert "njit" not in file.read_text(encoding="utf-8"), file
