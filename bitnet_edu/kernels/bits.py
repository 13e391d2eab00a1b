"""How this package compiles, and small things that Numba cannot say."""

import contextlib
import ctypes
import functools
import hashlib
import pickle
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import get_host_cpu_features
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_jitable

from bitnet_edu.errors import BitNetError

FLOATS = ir.VectorType(ir.FloatType(), 16)

if config.DISABLE_JIT:
    raise BitNetError(
        "NUMBA_DISABLE_JIT is set: without its compiler this package can't run a model, so unset it"
    )

# Compiled code raises nothing: a thread that stopped half-way would leave the others waiting.
# So division follows NumPy, and NaN is looked for where it matters (pointwise.py).
OPTIONS = {"nogil": True, "error_model": "numpy"}
INNER = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# For calls from compiled code; Python gets the plain function, slow but the same.
jit = register_jitable(**INNER)
# Sums in any order, so that they vectorize. NaN and Inf stay what they are.
sum_jit = register_jitable(**INNER, fastmath={"reassoc", "nsz"})
# Products and sums in one instruction where there is one.
fused_jit = register_jitable(**INNER, fastmath={"contract"})


def cached_jit(function):
    """What Python calls: compiled once per machine and version of *any* file of this folder.

    Numba keeps machine code beside the source or, if that is read-only, in the user's cache folder.
    It is a help, never needed: what can't be written is not kept, what isn't whole is not read, and
    with no place at all each process compiles anew.
    """
    try:
        compiled = njit(**OPTIONS, cache=True)(function)
    except (RuntimeError, OSError):
        compiled = njit(**OPTIONS)(function)
    compiled.compile = functools.partial(_aside, compiled.compile)
    if not isinstance(compiled._cache, FunctionCache):
        return compiled
    cache = compiled._cache
    cache._guard_against_spurious_io_errors = lambda: contextlib.suppress(Exception)
    stamp = cache._cache_file._source_stamp, _sources()
    cache._cache_file = _CacheFile(cache._cache_path, cache._impl.filename_base, stamp)
    return compiled


def _aside(compile_: Callable, signature: tuple) -> Any:
    """Compile on another thread while this one waits: Ctrl-C in the middle of LLVM would crash."""
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or global_compiler_lock.is_locked():  # by a function that calls this one
        return compile_(signature)
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(compile_(signature))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="bitnet_edu compiler")
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
    return outcome.result()


class _CacheFile(IndexDataCacheFile):
    """Numba's index and data, each with a checksum in front: a damaged one counts as missing."""

    def _load_index(self) -> dict:
        version, stamp, overloads = self._load(self._index_path) or (None, None, None)
        fresh = (version, stamp) == (self._version, self._source_stamp)
        return overloads if fresh else {}

    def _save_index(self, overloads: dict) -> None:
        self._save(self._index_path, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str):
        return self._load(self._data_path(name))

    def _save_data(self, name: str, data) -> None:
        self._save(self._data_path(name), data)

    def _save(self, path: str, value) -> None:
        content = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load(self, path: str):
        try:
            whole = Path(path).read_bytes()
        except OSError:
            return None
        checksum, content = whole[:32], whole[32:]
        return pickle.loads(content) if hashlib.sha256(content).digest() == checksum else None


def cache_folder() -> Path | None:
    """Where machine code is kept from one process to the next, if anywhere."""
    cache = cached_jit(_nothing)._cache
    return Path(cache._cache_path) if isinstance(cache, FunctionCache) else None


def _nothing():
    pass


def cpu_identity() -> str:
    """This processor and this version of the kernels, in some fifty characters."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return f"{name} {hashlib.sha256((features + _sources()).encode()).hexdigest()[:16]}"


@functools.cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# feature of an Arm for LLVM, which doesn't see it everywhere: macOS's name, Linux's entry and bit
ARM_FEATURES = {"dotprod": ("FEAT_DotProd", 16, 20), "i8mm": ("FEAT_I8MM", 26, 13)}


def _arm_features() -> list[str]:
    """Those of `ARM_FEATURES` that this machine has, by its system's word."""
    if platform.machine() not in ("aarch64", "arm64") or sys.platform not in ("darwin", "linux"):
        return []
    return [name for name, places in ARM_FEATURES.items() if _system_has(*places)]


def _system_has(mac_name: str, entry: int, bit: int) -> bool:
    system = ctypes.CDLL(None)
    if sys.platform == "darwin":
        found, size = ctypes.c_int(0), ctypes.c_size_t(4)
        name = f"hw.optional.arm.{mac_name}".encode()
        failed = system.sysctlbyname(name, ctypes.byref(found), ctypes.byref(size), None, 0)
        return not failed and found.value == 1
    system.getauxval.restype, system.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return bool(system.getauxval(entry) >> bit & 1)  # 16: AT_HWCAP, 26: AT_HWCAP2


@functools.cache
def cpu_features() -> frozenset[str]:
    """What Numba compiles for: the features of this CPU, unless NUMBA_CPU_FEATURES names others."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


if config.CPU_FEATURES is None and (found := _arm_features()):  # before Numba compiles anything
    config.CPU_FEATURES = ",".join([get_host_cpu_features(), *(f"+{name}" for name in found)])


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


@intrinsic
def is_full_half(typingctx, number):
    """Whether float16 bits in a uint16 mean Inf or NaN; of a float32, always False."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return ir.IntType(1)(0)
        exponent = ir.IntType(16)(0x7C00)
        return builder.icmp_unsigned("==", builder.and_(args[0], exponent), exponent)

    return types.boolean(number), codegen
