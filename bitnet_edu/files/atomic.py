"""Either a whole file or folder appears, or nothing does."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet_edu.errors import BitNetError


@contextmanager
def all_or_nothing(destination: Path, size: int) -> Iterator[Path]:
    """A temporary path beside `destination` that takes its name if all goes well, else vanishes."""
    parent = destination.absolute().parent
    try:
        if (free := shutil.disk_usage(parent).free) < size:
            raise BitNetError(
                f"{destination} needs about {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} "
                "GB left: free some or choose another disk"
            )
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=parent) as folder:
            temporary = Path(folder, destination.name)
            yield temporary
            temporary.rename(destination)
    except OSError as error:
        raise BitNetError(
            f"{destination} could not be written ({error}): nothing was left behind"
        ) from error
