"""Either a whole file or folder appears, or nothing does."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitnet_edu.errors import BitNetError, InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks: what a killed run leaves stays there
    fcntl = None

# A lock of another machine can't always be seen through a shared disk, hence the machine's name.
PREFIX = f".bitnet_edu-{socket.gethostname()[:64].replace(os.sep, '_')}-"


@contextmanager
def all_or_nothing(destination: Path, size: int = 0) -> Iterator[Path]:
    """A temporary path beside `destination` that takes its name if all goes well, else vanishes.

    size: about how many bytes will be written, to find out first whether they fit. What killed
    runs left in the parent folder is removed. A file that exists is replaced, a folder keeps what
    the new one does not have.
    """
    try:
        named = "\0" not in str(destination) and bool(os.fsencode(destination))
    except (TypeError, UnicodeError):  # neither text nor a path, or a lone surrogate in it
        named = False
    if not named:
        raise InputError(f"{destination!r} cannot be the name of a file: choose another")
    parent = destination.absolute().parent
    try:
        _remove_abandoned(parent)
        if (free := shutil.disk_usage(parent).free) < size:
            raise BitNetError(
                f"{destination} needs about {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} "
                "GB left: free some or choose another disk"
            )
        with _locked_folder(parent) as folder:
            temporary = folder / destination.name
            yield temporary
            if destination.is_dir():
                _move_into(temporary, destination)
            else:
                temporary.rename(destination)
    except OSError as error:
        raise BitNetError(
            f"{destination} could not be written ({error}): nothing was left behind"
        ) from error


def _move_into(new: Path, folder: Path) -> None:
    """Replace files of a model one by one; without its config.json, half of it is no model."""
    (folder / "config.json").unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)


@contextmanager
def _locked_folder(parent: Path) -> Iterator[Path]:
    """A new folder, gone at the end, which is locked as long as this process lives."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = _lock(folder)
    while fcntl and not folder.exists():  # taken for abandoned before it was locked
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder's lock, or None if another process has it."""
    if fcntl is None:
        return None
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of killed runs: the system unlocks what a dead process had locked."""
    for folder in parent.glob(f"{PREFIX}*"):
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
