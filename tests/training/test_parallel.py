"""Two processes of torchrun train as one does, and only the first one writes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="this torch has no torch.distributed")

# Answers of very different length, so that the two halves of a batch count differently many tokens.
CORPUS = "\n".join(
    f'{{"prompt": "Count to {n}.", "response": "{" ".join(map(str, range(1, n + 1)))}"}}'
    for n in range(1, 25)
)
SCRIPT = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from bitnet_edu.training import job
job.SMALL = replace(
    job.SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)
job.Training = partial(job.Training, bf16=False)
job.train_job(job.Job(Path(sys.argv[2]), Path(sys.argv[1]), steps=20, rows=5, threads=1))
"""


def losses(folder: Path) -> list[float]:
    with (folder / "training.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def test_two_processes_have_the_losses_of_one(tmp_path) -> None:
    script, corpus = tmp_path / "script.py", tmp_path / "corpus.jsonl"
    script.write_text(SCRIPT, encoding="utf-8")
    corpus.write_text(CORPUS, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(script), str(corpus), str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=1200
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("20/20: loss") == 1  # the second process is silent
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 20
    assert one[-1] < 0.9 * one[0]
    # the first losses differ by float32's rounding alone, later ones by codes that it turned
    assert two[:5] == pytest.approx(one[:5], rel=1e-6)
    assert two == pytest.approx(one, rel=1e-4)
