"""Work for several threads that nobody has to wait for: numbered tickets, handed out one by one.

A step of the model is a fixed sequence of stages, a stage a number of equal chunks. All chunks of
all stages are numbered through; every thread runs the same function, takes the next number, waits
until all chunks of earlier stages are finished, and works. So a thread that starts late, or never,
or loses its core to another program, costs at most the one chunk it holds: the others do the rest.
There are no barriers, and no threading layer of Numba's (whose threads collapse on a busy machine,
or abort when two Python threads use them at once).

What helpers work on are addresses. So none of them may still be at work once `run` is left, however
it is left: when Ctrl-C strikes, the tickets are withdrawn and the helpers waited for.
"""

import contextlib
import functools
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np
import psutil
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.container import cpu_limit
from bitnet_edu.errors import InputError, require_whole
from bitnet_edu.kernels.bits import cached_jit, ceil_div, jit

MOST_THREADS = 256
DEFAULT_MOST = 16  # memory, not arithmetic, is the limit long before
PARTS = 2  # chunks a thread, at least
MOST_BYTES = 2**22  # in a chunk
NEXT, DONE, HELPERS, WITHDRAWN = 0, 16, 32, 48  # in the counters: two cache lines apart
NO_TICKET = 2**60  # beyond all chunks
LOOKS = 200_000  # 50 microseconds or more, longer than any chunk should take


def checked_threads(threads: int) -> int:
    """`threads` itself, if that many can work. InputError for anything but 1 to MOST_THREADS."""
    return require_whole(threads, 1, MOST_THREADS, "threads")


def default_threads() -> int:
    """The physical cores that this process may use, at most 16; BITNET_EDU_THREADS overrides it."""
    if wanted := os.environ.get("BITNET_EDU_THREADS"):
        if not (wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= MOST_THREADS):
            raise InputError(
                f"BITNET_EDU_THREADS must be a number from 1 to {MOST_THREADS}, not {wanted!r}: "
                "set it so, or unset it"
            )
        return int(wanted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [DEFAULT_MOST, allowed or 1, psutil.cpu_count(logical=False) or DEFAULT_MOST]
    return max(1, int(min(*limits, cpu_limit())))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="bitnet_edu")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of the threads


def run(function, args: tuple, threads: int) -> None:
    """Call function(*args, thread, counters) here and on `threads` - 1 helpers until all is done.

    `function` is compiled with nogil=True, takes its chunks by `take` and ends with `wait_for`.
    An exception, Ctrl-C above all, leaves only when no helper is at work any more.
    """
    counters = np.zeros(64, np.int64)  # new ones each time: a late helper finds its work done
    if threads > 1:
        _compile(function, (*args, 0, counters))
    try:
        for thread in range(1, threads):
            _submit(function, args, thread, counters)
        function(*args, 0, counters)
    except BaseException:
        _withdraw(counters)
        raise


def run_long(function, args: tuple, threads: int) -> None:
    """`run` for what takes seconds: all of it on helpers, while this thread listens to Ctrl-C."""
    counters = np.zeros(64, np.int64)
    _compile(function, (*args, 0, counters))
    try:
        jobs = [_submit(function, args, thread, counters) for thread in range(threads)]
        if jobs[0] is None:
            return function(*args, 0, counters)
        while not wait(jobs[:1], 0.05).done:  # waiting without end hears nothing on Windows
            pass
        jobs[0].result()
    except BaseException:
        _withdraw(counters)
        raise


def _submit(function, args: tuple, thread: int, counters: np.ndarray) -> Future | None:
    # no thread may be to be had: then fewer do the same
    with contextlib.suppress(RuntimeError):
        return _pool().submit(_help, function, args, thread, counters)


def _help(function, args: tuple, thread: int, counters: np.ndarray) -> None:
    if join_in(counters):
        try:
            function(*args, thread, counters)
        finally:
            leave(counters)


def _withdraw(counters: np.ndarray) -> None:
    while True:
        try:
            return withdraw(counters)
        except BaseException:  # a second Ctrl-C: the first one travels, once the helpers are gone
            continue


def _compile(function, args: tuple) -> None:
    """Compile what helpers will call: a compiler in several threads can't be interrupted."""
    kind = function, *map(_kind, args)
    if kind not in _compiled:
        for part in (join_in, leave):
            part(np.zeros(64, np.int64))
        withdraw(np.zeros(64, np.int64))
        function.compile(tuple(map(numba.typeof, args)))
        _compiled.add(kind)


def _kind(value: Any) -> Any:
    """What Numba distinguishes of an argument, found in less time than Numba needs."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.ndim, value.flags.c_contiguous, value.flags.num
    return tuple(map(_kind, value)) if isinstance(value, tuple) else type(value)


_compiled: set[tuple] = set()


@intrinsic
def _fetch_add(typingctx, array, index, amount):
    """array[index] += amount as one atomic operation; returns the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw(
            "add", _pointer(context, builder, signature, args), args[2], "seq_cst"
        )

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def _load(typingctx, array, index):
    """array[index], never from a register: other threads write it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(context, builder, signature, args), "acquire", 8)

    return types.int64(array, types.int64), codegen


def _pointer(context, builder, signature, args):
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def _sleep(typingctx):
    """Give up this core for a moment, so that a thread that was pushed off its own can have it."""

    def codegen(context, builder, signature, args):
        number = ir.IntType(32)
        name, moment = ("Sleep", 0) if os.name == "nt" else ("usleep", 20)  # microseconds
        function = ir.FunctionType(number, [number])
        function = cgutils.get_or_insert_function(builder.module, function, name)
        builder.call(function, [number(moment)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def now(typingctx):
    """Nanoseconds of a clock, from some moment on: what a profile is made of."""

    def codegen(context, builder, signature, args):
        wide = ir.IntType(64)
        place = builder.alloca(ir.ArrayType(wide, 2))  # seconds and nanoseconds
        parts = [builder.bitcast(place, wide.as_pointer())]
        if os.name == "nt":  # steps of 100 ns
            function = ir.FunctionType(ir.VoidType(), [wide.as_pointer()])
            name, clock, units = "GetSystemTimePreciseAsFileTime", [], [100]
        else:
            function = ir.FunctionType(ir.IntType(32), [ir.IntType(32), wide.as_pointer()])
            steady = 6 if sys.platform == "darwin" else 1  # CLOCK_MONOTONIC
            name, clock, units = "clock_gettime", [ir.IntType(32)(steady)], [10**9, 1]
            parts.append(builder.gep(parts[0], [wide(1)]))
        function = cgutils.get_or_insert_function(builder.module, function, name)
        builder.call(function, [*clock, parts[0]])
        time = wide(0)
        for part, unit in zip(parts, units, strict=True):
            time = builder.add(time, builder.mul(builder.load(part), wide(unit)))
        return time

    return types.int64(), codegen


@jit
def chunk_count(size, threads):
    """Into how many equal chunks to cut work on `size` bytes: some for each thread, none too large.

    Memory is read fastest in long runs; but who waits for the last chunk waits for a whole one.
    """
    parts = PARTS * threads
    return parts * ceil_div(size, parts * MOST_BYTES)


@jit
def take(counters):
    """The number of the next chunk that nobody has."""
    return _fetch_add(counters, NEXT, 1)


@jit
def finish(counters):
    """Tell the others that one more chunk is finished."""
    _fetch_add(counters, DONE, 1)


@jit
def finished(counters, chunks):
    """Whether `chunks` chunks are finished."""
    return _load(counters, DONE) >= chunks


@jit
def wait_for(counters, chunks):
    """Return once `chunks` chunks are finished.

    Who waits keeps looking, for it is a matter of microseconds, unless another program has taken
    the core of a thread in the middle of its chunk: then looking on would only take more from it.
    """
    looks = 0
    while not finished(counters, chunks):
        looks += 1
        if looks > LOOKS:
            _sleep()


@cached_jit
def join_in(counters):
    """A helper begins; False if the tickets are withdrawn, and then it must not."""
    _fetch_add(counters, HELPERS, 1)
    if _fetch_add(counters, WITHDRAWN, 0) == 0:
        return True
    _fetch_add(counters, HELPERS, -1)
    return False


@cached_jit
def leave(counters):
    """A helper has ended."""
    _fetch_add(counters, HELPERS, -1)


@cached_jit
def withdraw(counters):
    """Let there be no more tickets and nothing to wait for; return when all helpers have ended."""
    if _fetch_add(counters, WITHDRAWN, 1) == 0:
        _fetch_add(counters, NEXT, NO_TICKET)
        _fetch_add(counters, DONE, NO_TICKET)
    while _fetch_add(counters, HELPERS, 0) > 0:
        _sleep()
