"""How this package compiles, and small things that Numba cannot say."""

import functools
import hashlib
import platform
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_jitable

FLOATS = ir.VectorType(ir.FloatType(), 16)

# Compiled code raises nothing: a thread that stopped half-way would leave the others waiting.
# So division follows NumPy, and NaN is looked for where it matters (pointwise.py).
OPTIONS = {"nogil": True, "error_model": "numpy"}
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# For calls from compiled code; Python gets the plain function, slow but the same.
jit = register_jitable(**INNER)
# Sums in any order, so that they vectorize. NaN and Inf stay what they are.
sum_jit = register_jitable(**INNER, fastmath={"reassoc", "nsz"})
# Largest numbers likewise, which takes a promise that none is NaN.
max_jit = register_jitable(**INNER, fastmath={"nnan", "nsz"})


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


@functools.cache
def cpu_features() -> frozenset[str]:
    """What Numba compiles for: the features of this CPU, unless NUMBA_CPU_FEATURES names others."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


def has_float16() -> bool:
    """Whether this CPU converts float16: all 64-bit Arm, and x86 since 2012."""
    return "f16c" in cpu_features() or platform.machine() in ("aarch64", "arm64")


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


def load_floats(builder: ir.IRBuilder, address: ir.Value, half: bool = False) -> ir.Value:
    """LLVM code that loads 16 float32 numbers, or 16 float16 made float32."""
    stored = ir.VectorType(ir.HalfType(), 16) if half else FLOATS
    numbers = builder.load(builder.inttoptr(address, stored.as_pointer()), align=2 if half else 4)
    return builder.fpext(numbers, FLOATS) if half else numbers


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """LLVM code for a * b + c of 16 floats, in one instruction where there is one."""
    signature = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fmuladd.v16f32")
    return builder.call(function, [a, b, c])


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
