"""A whole file or folder, or nothing: refused, interrupted and killed writers; who tidies up."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE

from bitnet_edu import BitNetError, CheckpointError, InputError, load
from bitnet_edu.files import atomic
from bitnet_edu.files.atomic import PREFIX, all_or_nothing
from bitnet_edu.files.convert import convert
from bitnet_edu.files.gguf import write_gguf
from bitnet_edu.files.hf import write_folder
from bitnet_edu.weights import random_weights

WRITER = """
import sys
from pathlib import Path
from bitnet_edu.files.atomic import all_or_nothing
with all_or_nothing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(bytes(100_000))
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process, in the middle of writing `a`."""
    run = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def write(path: Path, content: bytes = b"whole") -> None:
    with all_or_nothing(path) as temporary:
        temporary.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(atomic.fcntl is None, reason="Windows has no locks that a death ends")
def test_the_next_run_removes_what_a_killed_one_left_and_no_more(tmp_path, writer):
    foreign = tmp_path / ".bitnet_edu-another-machine-x7"  # whose locks may not be seen from here
    foreign.mkdir()
    (living,) = tmp_path.glob(f"{PREFIX}*")
    write(tmp_path / "b")
    assert names(tmp_path) == sorted([foreign.name, living.name, "b"])
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert (living / "a").exists()
    write(tmp_path / "b")
    assert names(tmp_path) == [foreign.name, "b"]


def test_a_living_writer_ends_well_beside_others(tmp_path, writer):
    write(tmp_path / "b")
    writer.communicate("")
    write(tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == bytes(100_000)


@pytest.mark.skipif(atomic.fcntl is None, reason="Windows has no locks that a death ends")
def test_a_folder_removed_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    locked, original = [], atomic._lock

    def late(folder: Path) -> int | None:
        locked.append(folder)
        if len(locked) == 1:
            folder.rmdir()
        return original(folder)

    monkeypatch.setattr(atomic, "_lock", late)
    write(tmp_path / "a")
    assert len(locked) == 2
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(atomic.fcntl is None, reason="Windows has no locks that a death ends")
def test_where_locks_do_not_work_nothing_is_removed(tmp_path, monkeypatch):
    left = tmp_path / f"{PREFIX}x7"
    left.mkdir()

    def unsupported(*_) -> None:
        raise OSError

    monkeypatch.setattr(atomic.fcntl, "flock", unsupported)
    write(tmp_path / "a")
    assert names(tmp_path) == [left.name, "a"]


def test_the_longest_name_that_a_file_may_have(tmp_path):
    name = "n" * 255
    write(tmp_path / name)
    assert names(tmp_path) == [name]
    with pytest.raises(BitNetError, match=r"could not be written .*too long"):
        write(tmp_path / f"{name}n")
    assert names(tmp_path) == [name]


def test_writers_refuse_without_leaving_anything(tmp_path):
    weights = random_weights(SHAPE)
    large = weights.embedding.astype(np.float32)
    large[3, 5] = 1e6
    bad = weights._replace(embedding=large, lm_head=large)
    with pytest.raises(CheckpointError, match="float16"):
        write_gguf(tmp_path / "a.gguf", SHAPE, bad)
    zero = weights.layers[0].up_proj._replace(
        packed=np.full_like(weights.layers[0].up_proj.packed, 0b01010101)
    )
    layers = (weights.layers[0]._replace(up_proj=zero), *weights.layers[1:])
    with pytest.raises(CheckpointError, match="master"):
        write_folder(tmp_path / "b", SHAPE, weights._replace(layers=layers), scheme="master")
    assert names(tmp_path) == []
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_folder(tmp_path / "c", SHAPE, weights)


@pytest.mark.parametrize("step", range(4))
def test_a_folder_that_is_replaced_is_never_half_a_model(tmp_path, monkeypatch, step):
    """As by a death at each step: what is there then is the old model, the new one or none."""
    old, new = tmp_path / "old", tmp_path / "new"
    convert("tiny", old)
    (old / "notes.txt").write_text("mine")
    convert("tiny", new)
    moved, original = [], Path.replace

    def replace(self: Path, target: Path) -> None:
        if len(moved) == step:
            raise KeyboardInterrupt
        moved.append(self.name)
        original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    try:
        with all_or_nothing(old) as temporary:
            new.rename(temporary)
    except KeyboardInterrupt:
        with pytest.raises(CheckpointError, match=r"config\.json is missing"):
            load(str(old))
    assert (old / "notes.txt").read_text() == "mine"
    assert "config.json" not in moved


def test_a_replaced_folder_loads(tmp_path):
    convert("tiny", tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    with all_or_nothing(tmp_path / "old") as temporary:
        convert("tiny", temporary)
    assert load(str(tmp_path / "old")).tokenizer is not None
    assert (tmp_path / "old" / "notes.txt").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_conversions_leave_nothing_that_loads_and_nothing_for_ever(tmp_path):
    target, moment = tmp_path / "m", random.Random(0)
    convert("tiny", tmp_path / "warm")
    for _ in range(10):
        child = os.fork()
        if not child:
            convert("tiny", target)
            os._exit(0)
        time.sleep(moment.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if target.exists():
            assert load(str(target)).tokenizer.bos_token
            shutil.rmtree(target)
    convert("tiny", target)
    assert names(tmp_path) == ["m", "warm"]
