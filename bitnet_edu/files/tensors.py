"""The tensors of a model's files, of whatever format: mapped into memory, taken once, checked."""

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bitnet_edu.errors import CheckpointError
from bitnet_edu.files.config import fault, open_regular, unreadable
from bitnet_edu.kernels.border import release
from bitnet_edu.kernels.matmul import count_nonfinite
from bitnet_edu.kernels.simd import MAX_COLUMNS
from bitnet_edu.weights import BitNetConfig

FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
DTYPES = FLOATS | {"U8": np.uint8}


class Stored(NamedTuple):
    """Where a tensor lies: its file and the file's name for its type, shape, first byte, length."""

    file: Path
    memory: mmap.mmap
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def bytes(self) -> np.ndarray:
        """The file's memory itself, read-only: uint8[nbytes]."""
        return np.frombuffer(self.memory, np.uint8, self.nbytes, self.offset)

    def array(self) -> np.ndarray:
        """The same as numbers, for the types in DTYPES."""
        array = self.bytes().view(DTYPES[self.kind]).reshape(self.shape)
        return np.require(array, requirements="A")  # a copy only if a file places it at odd bytes

    def release(self) -> None:
        """Take it out of memory, where the system can."""
        release(self.bytes())


class Tensors:
    """Tensors by name, each to be taken once with what it must be.

    source: the file to name where one is missing.
    """

    def __init__(self, source: Path):
        self.source = source
        self.stored: dict[str, Stored] = {}

    def add(self, name: str, stored: Stored) -> None:
        if other := self.stored.get(name):
            found = f"it in {other.file.name} too"
            raise fault(stored.file, name, "in one file alone", found)
        self.stored[name] = stored

    def take(self, name: str, shape: tuple[int, ...], kinds: Iterable[str]) -> Stored:
        expected = f"{' or '.join(kinds)} {list(shape)}"
        if name not in self.stored:
            raise fault(self.source, name, expected, "no such tensor")
        stored = self.stored.pop(name)
        if stored.shape != shape or stored.kind not in kinds:
            raise fault(stored.file, name, expected, f"{stored.kind} {list(stored.shape)}")
        return stored

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Floats in the file's dtype, none of them NaN or Inf."""
        stored = self.take(name, shape, FLOATS)
        array = stored.array()
        refuse_nonfinite(stored.file, name, array)
        stored.release()  # a model need not be in memory before it is worked with
        return array

    def norm(self, name: str, size: int) -> np.ndarray:
        """A norm's weights: float32[size]."""
        return self.floats(name, (size,)).astype(np.float32)

    def refuse_leftovers(self) -> None:
        if self.stored:
            name = min(self.stored)
            found = f"{len(self.stored)} surplus tensor(s)"
            expected = "absent, as no BitNet of this shape has it"
            raise fault(self.stored[name].file, name, expected, found)


def refuse_nonfinite(path: Path, name: str, array: np.ndarray) -> None:
    if array.size and (bad := count_nonfinite(array)):
        raise fault(path, name, "finite", f"NaN or Inf in {bad} place(s)")


def refuse_wide(path: Path, config: BitNetConfig) -> None:
    """Refuse a model whose rows are longer than the kernels can add up exactly."""
    if max(config.hidden_size, config.intermediate_size) > MAX_COLUMNS:
        found = f"{config.hidden_size} and {config.intermediate_size}"
        raise fault(path, "the hidden and intermediate size", f"at most {MAX_COLUMNS}", found)


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read-only. One descriptor is held, as long as an array lies in them."""
    with open_regular(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{path} is empty: fetch or copy it again") from None
        except OSError as error:
            raise unreadable(path, error) from None
