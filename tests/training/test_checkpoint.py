"""A training that is killed, really, goes on to the bit; whatever else went wrong, it can go on."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitnet_edu import load
from bitnet_edu.errors import BitNetError, CheckpointError, InputError
from bitnet_edu.training import checkpoint, job, log, run
from bitnet_edu.training.job import Job, train_job

TEXT = "\n\n".join(f"Line {n} says that {n} and {n + 1} are {2 * n + 1}." for n in range(60))
TOY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TOY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
OPTIONS = {"steps": 12, "rows": 2, "length": 32, "threads": 1}

# A training of its own process that kills itself: at a step, in the middle of writing a checkpoint,
# in the middle of a line of the log, while the model is exported, or before its record is written.
SCRIPT = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from bitnet_edu.training import checkpoint, export, job, log, run, train

where, number, folder, corpus = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
job.SMALL = replace(job.SMALL, **{toy})
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
calls = {{"write": 0, "step": 0, "line": 0}}

def half(path, tensors, *notes):
    calls["write"] += 1
    whole(path, tensors, *notes)
    if (where, calls["write"]) == ("write", number):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        die()

def step(self):
    calls["step"] += 1
    if (where, calls["step"]) == ("step", number):
        die()
    return advance(self)

def line(file, text):
    calls["line"] += 1
    if (where, calls["line"]) == ("line", number):
        append(file, text[: len(text) // 2])
        die()
    append(file, text)

whole, checkpoint.write_tensors = checkpoint.write_tensors, half
advance, train.Training.advance = train.Training.advance, step
append, log.append = log.append, line
if where == "export":
    export.write_tokenizer = lambda *arguments: die()
if where == "record":
    run.write_json = lambda *arguments: die()
job.train_job(job.Job(folder, corpus, resume=True, **{options}))
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(job, "SMALL", replace(job.SMALL, **TOY))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def rows(folder: Path) -> list[dict]:
    with (folder / run.LOG).open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def test_a_killed_training_goes_on_to_the_bit(tmp_path, corpus) -> None:
    train_job(Job(tmp_path / "whole", corpus, **OPTIONS))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(toy=TOY, options=OPTIONS), encoding="utf-8")
    folder = tmp_path / "killed"
    kills = [("write", 1), ("step", 5), ("write", 3), ("line", 3), ("export", 0), ("record", 0)]
    for where, number in [*kills, ("never", 0)]:
        arguments = [where, str(number), str(folder), str(corpus)]
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert done.returncode == (0 if where == "never" else -signal.SIGKILL), done.stderr
    assert without_times(folder) == without_times(tmp_path / "whole")
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(13)]
    seconds = [float(row["seconds"]) for row in rows(folder)]
    assert seconds == sorted(seconds)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # nothing half-written is left, neither in the folder nor beside it
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"corpus.txt", "killed", "script.py", "whole"}


@pytest.fixture
def stopped(tmp_path, corpus, monkeypatch) -> Job:
    """A training that was stopped at step 7 and can go on."""
    found = Job(tmp_path / "out", corpus, **OPTIONS)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train_job(found)
    return found


def stop_at(patch, step: int, error: BaseException | None = None) -> None:
    append = log.append

    def stopping(file: Path, line: bytes) -> None:
        if line.startswith(b"%d," % step):
            raise error or KeyboardInterrupt
        append(file, line)

    patch.setattr(log, "append", stopping)


def test_a_checkpoint_is_safetensors_and_json(stopped) -> None:
    file = stopped.out / run.CHECKPOINT
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    assert {name, f"exp_avg.{name}", f"exp_avg_sq.{name}"} <= set(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    state = checkpoint.read_state(file)
    assert state["step"] == 6
    assert state["identity"]["steps"] == 12
    json.dumps(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 13}, "steps 12 instead of 13"),
        ({"learning_rate": 0.1}, r"peak_rates \[0.002, .*\] instead of \[0.1, "),
        ({"rows": 3}, "rows 2 instead of 3"),
        ({"length": 40}, "length 32 instead of 40"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"held_out": 0.5}, "another corpus"),
        ({"text": TEXT + "\n\nOne more."}, "another tokenizer, another corpus"),
        ({"text": TEXT + "\n"}, "another corpus"),
        ({"toy": {"hidden_size": 64}}, "hidden_size 32 instead of 64"),
    ],
)
def test_another_training_is_refused_and_named(stopped, monkeypatch, change, named) -> None:
    before = (stopped.out / run.CHECKPOINT).read_bytes()
    if text := change.pop("text", None):
        stopped.corpus.write_text(text, encoding="utf-8")
    monkeypatch.setattr(job, "SMALL", replace(job.SMALL, **change.pop("toy", {})))
    with pytest.raises(InputError, match=f"belongs to a training with .*{named}"):
        train_job(replace(stopped, resume=True, **change))
    assert (stopped.out / run.CHECKPOINT).read_bytes() == before
    assert len(rows(stopped.out)) == 7


def test_without_resume_nothing_is_touched(stopped, tmp_path) -> None:
    with pytest.raises(InputError, match="go on with --resume"):
        train_job(stopped)
    (tmp_path / "other").mkdir()
    for resume in (False, True):
        with pytest.raises(InputError, match="choose another --out"):
            train_job(replace(stopped, out=tmp_path / "other", resume=resume))
    assert list((tmp_path / "other").iterdir()) == []


def test_a_damaged_checkpoint_is_refused(stopped) -> None:
    file = stopped.out / run.CHECKPOINT
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
        train_job(replace(stopped, resume=True))


def test_a_loss_that_is_no_number_stops_before_it_is_saved(tmp_path, corpus, monkeypatch) -> None:
    wanted = Job(tmp_path / "out", corpus, **OPTIONS)
    with monkeypatch.context() as patch:
        poisoned(patch, at=8)
        with pytest.raises(BitNetError, match=r"step 8: the loss is nan.*lower learning rate"):
            train_job(wanted)
    assert checkpoint.read_state(wanted.out / run.CHECKPOINT)["step"] == 7
    assert all(t.isfinite().all() for t in load_file(wanted.out / run.CHECKPOINT).values())
    assert [row["step"] for row in rows(wanted.out)] == [str(step) for step in range(8)]
    train_job(replace(wanted, resume=True))
    assert len(load(str(wanted.out)).logits([1, 2])) == 2


def poisoned(patch, at: int) -> None:
    """Every weight of one matrix is NaN from step `at` on."""
    advance = job.Training.advance

    def step(self):
        if self.step + 1 == at:
            self.model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
        return advance(self)

    patch.setattr(job.Training, "advance", step)


def test_a_huge_learning_rate_is_one_clear_error_or_survived(tmp_path, corpus) -> None:
    try:
        train_job(Job(tmp_path / "out", corpus, **OPTIONS, learning_rate=1e30))
    except BitNetError as error:
        assert "lower learning rate" in str(error)  # noqa: PT017


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, corpus, monkeypatch) -> None:
    wanted = Job(tmp_path / "out", corpus, **OPTIONS)
    write, calls = checkpoint.write_tensors, []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) == 4:
            path = Path("/dev/full")
        write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(BitNetError, match=r"No space left.*free some of the disk, then go on"):
            train_job(wanted)
    assert checkpoint.read_state(wanted.out / run.CHECKPOINT)["step"] == 2
    assert sorted(path.name for path in wanted.out.iterdir()) == [run.CHECKPOINT, run.LOG]
    with monkeypatch.context() as patch:  # and now the log
        patch.setattr(run, "LOG", "full")
        (wanted.out / "full").symlink_to("/dev/full")
        patch.setattr(log, "keep_until", lambda *arguments: None)
        with pytest.raises(BitNetError, match=r"No space left.*go on with --resume"):
            train_job(replace(wanted, resume=True))
    assert checkpoint.read_state(wanted.out / run.CHECKPOINT)["step"] == 2


def test_the_log_keeps_whole_lines_up_to_the_checkpoint(tmp_path) -> None:
    file = tmp_path / "log.csv"
    lines = [log.log_line(*log.FIELDS), *(log.log_line(step, 1.5) for step in range(5))]
    file.write_bytes(b"".join(lines) + b"5,1")
    log.keep_until(file, 5)
    assert file.read_bytes() == b"".join(lines)
    log.keep_until(file, 2)
    assert file.read_bytes() == b"".join(lines[:4])
    os.remove(file)  # noqa: PTH107
    log.keep_until(file, 2)
    assert file.read_bytes() == lines[0]
