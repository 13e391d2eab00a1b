"""Thousands of damaged files: each is refused with one line, or read rightly (see fuzz.py)."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

HERE = Path(__file__).parent
# what the fuzzer asks of a file that loads can only be asked if some do
COUNTS = {"safetensors": 1500, "config": 1500, "gguf": 1000}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_refused_or_read_rightly(kind, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    python = [sys.executable, "-W", "error::RuntimeWarning"]
    command = [str(HERE / "fuzz.py"), kind, str(COUNTS[kind]), "0", str(tmp_path)]
    done = subprocess.run([*python, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert int(done.stdout) > COUNTS[kind] / 50, "hardly anything loads any more"


def test_the_fuzzer_finds_a_foreign_exception(tmp_path, monkeypatch):
    """The rule itself: any other error than ours ends the run."""
    monkeypatch.setattr(fuzz, "load", lambda path: {}["nothing"])
    with pytest.raises(KeyError):
        fuzz.check("config", "packed", tmp_path)
