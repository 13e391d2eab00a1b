"""Work for several threads that nobody has to wait for: numbered tickets, handed out one by one.

A step of the model is a fixed sequence of stages, a stage a number of equal chunks. All chunks of
all stages are numbered through; every thread runs the same function, takes the next number, waits
until all chunks of earlier stages are finished, and works. So a thread that starts late, or never,
or loses its core to another program, costs at most the one chunk it holds: the others do the rest.
There are no barriers, and no threading layer of Numba's (whose threads collapse on a busy machine,
or abort when two Python threads use them at once).
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import ceil_div, jit

MOST_THREADS = 16  # memory, not arithmetic, is the limit long before
PARTS = 2  # chunks a thread, at least
MOST_BYTES = 2**22  # in a chunk
NEXT, DONE = 0, 16  # where in the counters: two cache lines apart
LOOKS = 200_000  # 50 microseconds or more, longer than any chunk should take


def default_threads() -> int:
    """The physical cores this process may use, at most 16; BITNET_EDU_THREADS overrides it."""
    if os.environ.get("BITNET_EDU_THREADS", "").isdigit():
        return max(1, int(os.environ["BITNET_EDU_THREADS"]))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [MOST_THREADS, allowed or 1, psutil.cpu_count(logical=False) or MOST_THREADS]
    try:  # a container's share of the machine: "quota period", or "max period" for no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limits.append(max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return min(limits)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="bitnet_edu")


def run(function, args: tuple, threads: int) -> None:
    """Call function(*args, thread, counters) here and on `threads` - 1 helpers until all is done.

    `function` is compiled with nogil=True, takes its chunks by `take` and ends with `wait_for`.
    """
    counters = np.zeros(32, np.int64)  # new ones each time: a late helper finds its work done
    helpers = [_pool().submit(function, *args, thread, counters) for thread in range(1, threads)]
    function(*args, 0, counters)
    for helper in helpers:
        helper.cancel()


@intrinsic
def _fetch_add(typingctx, array, index, amount):
    """array[index] += amount as one atomic operation; returns the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw(
            "add", _pointer(context, builder, signature, args), args[2], "acq_rel"
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
