"""The border between Python and compiled code: whatever becomes an address passes here.

Compiled code trusts its arguments. So an array is checked once, before its address is taken, and
nowhere else in the package does Python ask an array where it lies.
"""

import mmap

import numpy as np

from bitnet_edu.errors import InputError


def checked(
    array: np.ndarray,
    dtype: type | tuple[type, ...],
    shape: tuple[int | None, ...],
    what: str,
    *,
    writable: bool = False,
) -> np.ndarray:
    """`array` itself if it has this dtype (or one of them) and shape, rows without gaps.

    None in `shape` is any length from 1 up. Raises InputError, which names `what`, else.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes or not _fits(array, shape):
        names = " or ".join(np.dtype(d).name for d in dtypes)
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{what} must be {names}[{sizes}], found {_describe(array)}")
    if not array.flags.c_contiguous:
        raise InputError(
            f"{what} must lie in one piece (C order): np.ascontiguousarray makes it so"
        )
    if writable and not array.flags.writeable:
        raise InputError(f"{what} will be written to, but the array is read-only")
    return array


def address(array: np.ndarray, dtype: type | tuple[type, ...], shape: tuple, what: str) -> int:
    """Where the array begins, after `checked`. It must be kept alive as long as this is used."""
    return checked(array, dtype, shape, what).ctypes.data


def release(array: np.ndarray) -> None:
    """Take a memory-mapped array out of memory, where the system can. Who looks reads it again."""
    memory = array
    while isinstance(memory, np.ndarray | memoryview):
        memory = memory.base if isinstance(memory, np.ndarray) else memory.obj
    if isinstance(memory, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        offset = array.ctypes.data - np.frombuffer(memory, np.uint8, 1).ctypes.data
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if (length := offset + array.nbytes - first) > 0:
            memory.madvise(mmap.MADV_DONTNEED, first, length)


def aligned_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """np.zeros at a multiple of 64 bytes, so that no vector straddles two cache lines."""
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _fits(array: np.ndarray, shape: tuple[int | None, ...]) -> bool:
    pairs = zip(array.shape, shape, strict=False)
    same = all(found == size if size is not None else found > 0 for found, size in pairs)
    return array.ndim == len(shape) and same


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__
