"""What a training tells while it runs: a line of a CSV file for every step, and a progress bar."""

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from bitnet_edu.errors import BitNetError
from bitnet_edu.files.atomic import all_or_nothing
from bitnet_edu.training.train import Progress, Recipe

FIELDS = ("step", "loss", "held_out_loss", "learning_rate", "tokens", "seconds")
LINES = 20  # of a whole training, where there is no terminal


def log_line(*values: object) -> bytes:
    """One line of the log; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def log_row(progress: Progress, held_out_loss: float | None) -> bytes:
    rate, seconds = f"{progress.learning_rate:.6g}", f"{progress.seconds:.3f}"
    return log_line(progress.step, progress.loss, held_out_loss, rate, progress.tokens, seconds)


def append(file: Path, line: bytes) -> None:
    """Add a line, or say that the disk refuses: half a line may stay; `keep_until` removes it."""
    try:
        with file.open("ab", buffering=0) as log:
            if log.write(line) != len(line):
                raise OSError("no space for a whole line")
    except OSError as error:
        raise BitNetError(
            f"{file} could not be written ({error}): free some of the disk, then go on with "
            "--resume; the last checkpoint is whole"
        ) from error


def keep_until(file: Path, step: int) -> None:
    """Drop what a training wrote after the checkpoint from which it goes on."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = [
        line
        for line in lines[1:]
        if line.endswith(b"\n")
        and (number := line.split(b",")[0]).isdigit()
        and int(number) <= step
    ]
    with all_or_nothing(file) as new:
        new.write_bytes(b"".join([log_line(*FIELDS), *kept]))


class Show(Protocol):
    def __call__(self, progress: Progress, held_out_loss: float | None) -> None: ...


@contextmanager
def shown(recipe: Recipe, begun: Progress | None = None) -> Iterator[Show]:
    """A function that shows each step on stderr: a bar in a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield lambda progress, held_out: print_line(recipe, progress, held_out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=recipe.steps)
        last = ""

        def show(progress: Progress, held_out: float | None) -> None:
            nonlocal last
            last = last if held_out is None else f", held out {held_out:.3f}"
            bar.update(task, completed=progress.step, description=summary(progress) + last)

        yield show


def print_line(recipe: Recipe, progress: Progress, held_out: float | None) -> None:
    each = max(1, recipe.steps // LINES)
    if held_out is None and progress.step % each and progress.step != recipe.steps:
        return
    left = progress.seconds / progress.step * (recipe.steps - progress.step)
    measured = "" if held_out is None else f", held out {held_out:.3f}"
    line = f"{progress.step}/{recipe.steps}: {summary(progress)}{measured}, {left:.0f} s left"
    print(line, file=sys.stderr, flush=True)


def summary(progress: Progress) -> str:
    return f"loss {progress.loss:.3f}, {progress.tokens / progress.seconds:.0f} tokens/s"
