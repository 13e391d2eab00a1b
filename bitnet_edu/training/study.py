"""What size does to the gap: ternary models and their full-precision twins of several sizes.

`python -m bitnet_edu.training.study --out FOLDER` trains all of them on the same tokens of the
village's talk. It writes a CSV log for each, and `study.json`, which says what they are and where
they were trained. A run that has its log is not repeated, so a study that was stopped goes on.
"""

import argparse
import csv
import multiprocessing
import platform
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path

import torch

from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import write_json
from bitnet_edu.system import cpu_name
from bitnet_edu.training import village
from bitnet_edu.training.data import Batch, finite_batches
from bitnet_edu.training.model import BitNetForTraining, ModelShape, new_model
from bitnet_edu.training.train import Progress, Recipe, fast_bf16, mean_loss, train

STEPS, ROWS, LENGTH, WARMUP = 800, 8, 128, 50
EACH = 80  # steps between two measurements
DOCUMENTS = 1200  # of a measurement
TRAINING, TUNING, HELD_OUT = 0, 1, 2  # the village's random numbers of three purposes
KINDS = ("ternary", "full")
FIELDS = ("step", "tokens", "seconds", "loss", "tuning", "held_out", *village.KINDS)

LAYERS = 2
SEEDS = {32: 8, 64: 4, 128: 3, 256: 3}  # hidden -> runs of each kind
SWEEP = {  # the rates that were tried, by hidden size
    32: (4e-3, 8e-3, 16e-3, 32e-3),
    64: (4e-3, 8e-3, 16e-3),
    128: (2e-3, 4e-3, 8e-3),
}
RATES = {"ternary": 16e-3, "full": 8e-3}  # the best of the sweep at hidden size 32


@dataclass(frozen=True)
class Run:
    """One training. The seed is that of the start weights; all runs see the same tokens."""

    hidden: int
    kind: str
    rate: float  # the peak learning rate of the first half; the second half has two thirds of it
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.hidden}-{self.rate:g}-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        rates = (self.rate, self.rate * 2 / 3)
        return Recipe(STEPS, ROWS, LENGTH, 0, rates, warmup=WARMUP, seed=self.seed)


def rate_of(kind: str, hidden: int) -> float:
    """The learning rate of a size: from the smallest on it falls as the hidden size grows."""
    return RATES[kind] * 32 / hidden


def sweep() -> list[Run]:
    """The runs that chose the learning rates."""
    return [
        Run(hidden, kind, rate, 0)
        for hidden, rates in SWEEP.items()
        for rate in rates
        for kind in KINDS
    ]


def comparison() -> list[Run]:
    """The runs that are compared: one seed of every size first, then the others."""
    runs = [
        Run(hidden, kind, rate_of(kind, hidden), seed)
        for hidden, seeds in SEEDS.items()
        for seed in range(seeds)
        for kind in KINDS
    ]
    return sorted(runs, key=lambda run: run.seed > 0)


def shape_of(hidden: int) -> ModelShape:
    return ModelShape(
        vocab_size=len(village.WORDS),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=LENGTH,
    )


def measurement(seed: int, kind: str | None = None) -> list[Batch]:
    """Batches of documents that were drawn for `seed`, of one kind or of all."""
    texts = [village.document(seed, index) for index in range(DOCUMENTS)]
    kept = [text for text in texts if kind in (None, village.kind_of(text))]
    return finite_batches(kept, village.VillageTokenizer(), 16, LENGTH)


def follow(run: Run) -> list[tuple]:
    """Train by `run`; a row for every EACH steps, of FIELDS. Losses are nats a word.

    The loss on the tuning documents is measured at the end only, and None before.
    """
    parts = [measurement(HELD_OUT, kind) for kind in village.KINDS]
    words = [sum(batch.counted for batch in part) for part in parts]
    rows, losses = [], []

    def after_step(model: BitNetForTraining, progress: Progress) -> None:
        losses.append(progress.loss)
        if progress.step % EACH == 0:
            by_kind = [mean_loss(model, part) for part in parts]
            held_out = sum(map(mul, by_kind, words)) / sum(words)
            last = progress.step == STEPS
            tuning = mean_loss(model, measurement(TUNING)) if last else None
            measured = sum(losses) / len(losses), tuning, held_out, *by_kind
            rows.append((progress.step, progress.tokens, progress.seconds, *measured))
            losses.clear()

    model = new_model(shape_of(run.hidden), run.seed, run.kind == "ternary")
    tokenizer, documents = village.VillageTokenizer(), partial(village.document, TRAINING)
    train(model, run.recipe, tokenizer, documents, after_step, device="cpu")
    return rows


def rounded(row: tuple) -> list:
    return [round(value, 5) if isinstance(value, float) else value for value in row]


def write_log(run: Run, folder: Path) -> str:
    """Follow `run` on one thread and write its log, unless that is there; a line about it."""
    file = folder / f"{run.name}.csv"
    if not file.exists():
        torch.set_num_threads(1)
        rows = follow(run)
        with all_or_nothing(file) as new, new.open("w", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows(map(rounded, rows))
    with file.open(newline="") as lines:
        last = list(csv.DictReader(lines))[-1]
    return (
        f"{run.name}: held-out loss {float(last['held_out']):.4f}, {float(last['seconds']):.0f} s"
    )


def count(hidden: int) -> dict[str, int]:
    """Parameters of a size, and the bytes in which they are stored."""
    model = new_model(shape_of(hidden))
    matrices = [p.numel() for name, p in model.named_parameters() if "proj" in name]
    linear, embedding = sum(matrices), model.model.embed_tokens.weight.numel()
    rest = 2 * (sum(p.numel() for p in model.parameters()) - linear)  # bf16: embedding and norms
    return {
        "hidden": hidden,
        "layers": LAYERS,
        "linear": linear,
        "embedding": embedding,
        "bytes_full": rest + 2 * linear,
        "bytes_2_bits": rest + linear // 4 + 2 * len(matrices),  # with a bf16 scale for each matrix
        "bytes_1.6_bits": rest + -(-linear // 5) + 2 * len(matrices),
    }


def description() -> dict:
    """What the logs don't say: sizes, recipe, the text's own surprise, versions, machine."""
    recipe = Run(32, "full", 1.0, 0).recipe
    return {
        "sizes": [count(hidden) for hidden in SEEDS],
        "compared": [run.name for run in comparison()],
        "sweep": [run.name for run in sweep()],
        "tokens": STEPS * ROWS * LENGTH,
        "warmup": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "vocabulary": len(village.WORDS),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "processor": cpu_name(),
        "bf16": fast_bf16(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bitnet_edu.training.study", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the logs")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "study.json", description())
    runs = list(dict.fromkeys([*sweep(), *comparison()]))
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for line in pool.imap(partial(write_log, folder=options.out), runs, chunksize=1):
            print(line, flush=True)


if __name__ == "__main__":
    main()
