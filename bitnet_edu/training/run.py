"""A whole training in a folder: checkpoints, the log, the progress bar, and the model at the end.

While it runs, `FOLDER/checkpoint.safetensors` holds all that is needed to go on, and
`FOLDER/training.csv` a line for every step. At the end the checkpoint makes room for the model, and
`FOLDER/training.json` tells how it was made.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import distributed

from bitnet_edu.errors import BitNetError, InputError
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.files.config import read_json, write_json
from bitnet_edu.tokenizer import Tokenizer
from bitnet_edu.training import checkpoint, log
from bitnet_edu.training.data import Batch
from bitnet_edu.training.export import export
from bitnet_edu.training.train import Training, leave_processes, mean_loss

CHECKPOINT, LOG, RECORD = "checkpoint.safetensors", "training.csv", "training.json"
SAVES = 10  # in a training, and at least one in each
STEPS_BETWEEN = 500


class Result(NamedTuple):
    """What a training came to; losses are nats a counted token."""

    steps: int
    tokens: int
    seconds: float
    loss: float  # of the last batch
    held_out_loss_before: float
    held_out_loss_after: float


def require_free(folder: Path, resume: bool) -> bool:
    """Whether there is a training to go on with. InputError where something else is in the way."""
    if not os.path.lexists(folder):
        return False
    begun, finished = (folder / CHECKPOINT).is_file(), (folder / RECORD).is_file()
    if resume and (begun or finished):
        return True
    if begun:
        raise InputError(
            f"{folder} holds a training that was cut off: go on with --resume, or choose another "
            "--out"
        )
    what = "holds no training that was cut off" if resume else "exists already"
    raise InputError(f"{folder} {what}: choose another --out")


def run(
    training: Training,
    tokenizer: Tokenizer,
    folder: Path,
    held_out: list[Batch],
    *,
    corpus: str,
    resume: bool = False,
    tokenizer_from: Path | None = None,
) -> Result:
    """Train to the end and export into `folder`, which must be new, or hold the checkpoint of this
    very training and resume=True. corpus: a name or hash of the documents.

    Of several processes only the first one measures and writes; the others' losses are 0.
    """
    recipe, first = training.recipe, training.rank == 0
    identity = checkpoint.identity_of(training, tokenizer, corpus)
    going_on = require_free(folder, resume)
    if training.world > 1:
        distributed.barrier()  # nobody writes before all have looked
    if going_on and not (folder / CHECKPOINT).is_file():
        return finished(folder / RECORD, identity)
    if going_on:
        results = checkpoint.restore(training, folder / CHECKPOINT, identity)
        if first:
            log.keep_until(folder / LOG, training.step)
    else:
        results = {"before": mean_loss(training.model, held_out) if first else 0.0}
        if first:
            begin(training, folder, identity, results)
    between = max(1, min(STEPS_BETWEEN, recipe.steps // SAVES))
    with log.shown(recipe) if first else nullcontext() as show:
        while training.step < recipe.steps:
            progress = training.advance()
            if not first:
                continue
            due = training.step % between == 0 or training.step == recipe.steps
            measured = mean_loss(training.model, held_out) if due else None
            log.append(folder / LOG, log.log_row(progress, measured))
            show(progress, measured)
            if due:
                results |= {"loss": progress.loss, "after": measured}
                save(
                    training, folder / CHECKPOINT, checkpoint.state_of(training, identity, results)
                )
    state = checkpoint.state_of(training, identity, results)
    if first:
        export(training.model, tokenizer, folder, tokenizer_from)
        with all_or_nothing(folder / RECORD) as new:
            write_json(new, state)
        (folder / CHECKPOINT).unlink()
    if training.world > 1:
        leave_processes()
    return result_of(state)


def result_of(state: dict) -> Result:
    losses = [state["results"].get(name, 0.0) for name in ("loss", "before", "after")]
    return Result(state["step"], state["tokens"], state["seconds"], *losses)


def finished(record: Path, identity: dict) -> Result:
    """What a training came to that was done already. InputError if it was another one."""
    state = read_json(record)
    checkpoint.require_same(record, state["identity"], identity)
    return result_of(state)


def begin(training: Training, folder: Path, identity: dict, results: dict) -> None:
    """Make the folder, with the checkpoint of step 0 and the log; from here on a training that is
    cut off can go on."""
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitNetError(f"{folder} cannot be made ({error}): choose another --out") from error
    state = checkpoint.state_of(training, identity, results)
    size = 4 * sum(parameter.numel() for parameter in training.model.parameters())
    with all_or_nothing(folder, size) as new:
        new.mkdir()
        checkpoint.write(training, new / CHECKPOINT, state)
        rows = log.log_line(*log.FIELDS), log.log_line(0, None, results["before"], None, 0, 0)
        (new / LOG).write_bytes(b"".join(rows))


def save(training: Training, file: Path, state: dict) -> None:
    try:
        checkpoint.save(training, file, state)
    except BitNetError as error:
        raise BitNetError(
            f"{error}; the last checkpoint is whole: free some of the disk, then go on with "
            "--resume"
        ) from error
