"""How this package compiles, and small things that Numba cannot say."""

import functools
import hashlib
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, register_jitable

# Compiled code raises nothing: a thread that stopped half-way would leave the others waiting.
# So division follows NumPy, and NaN is looked for where it matters (pointwise.py).
OPTIONS = {"nogil": True, "error_model": "numpy"}
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# For calls from compiled code; Python gets the plain function, slow but the same.
jit = register_jitable(**INNER)
# Sums in any order, so that they vectorize. NaN and Inf stay what they are.
sum_jit = register_jitable(**INNER, fastmath={"reassoc", "nsz"})


def cached_jit(function):
    """What Python calls: compiled once per machine and version of *any* file of this folder.

    Numba keeps machine code beside the source or, if that is read-only, in the user's cache folder,
    and looks for changes only in the file of `function`. With no place to write, each process
    compiles anew.
    """
    try:
        compiled = njit(**OPTIONS, cache=True)(function)
    except RuntimeError:
        return njit(**OPTIONS)(function)
    index = compiled._cache._cache_file
    index._source_stamp = index._source_stamp, _sources()
    return compiled


@functools.cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@jit
def at(array):
    """Where an array begins, as an int64."""
    return np.int64(array.ctypes.data)


@jit
def ceil_div(a, b):
    return (a + b - 1) // b


@intrinsic
def pointer(typingctx, address, dtype):
    """An int64 address as a pointer to `dtype`, for `numba.carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), codegen


@intrinsic
def as_float(typingctx, bits):
    """The float32 that has the lower 32 bits of this integer."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


@intrinsic
def narrow(typingctx, number, like):
    """float32 -> the type of `like`: float32, or uint16 with the bits of the nearest float16."""

    def codegen(context, builder, signature, args):
        if signature.return_type == types.float32:
            return args[0]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return like(types.float32, like), codegen
