"""How many int8 products could there be in a second? A kernel's own instruction, little else.

The tile is that of simd.py, four vectors of codes times the activations of a few tokens, but the
codes stay in registers and the activations in the first-level cache: no memory is waited for, no
code is decoded, and no sum added up.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import at, cached_jit
from bitnet_edu.kernels.simd import AVX2, INT8, INT32, INT64, KERNELS, SDOT, VNNI, supported_kernels
from bitnet_edu.kernels.threads import finish, take, wait_for

STEPS = 2**14  # in a chunk
COLUMNS = 64  # vectors of activations that each token has; they come round again and again
VECTOR = 64  # bytes kept for a vector, of codes, activations or sums


def products_of_a_chunk(name: str) -> int:
    """Multiply-adds that `spin` does in one chunk, with the kernel of this name."""
    kernel = KERNELS[name]
    return STEPS * 4 * kernel.tokens * kernel.width


def operands(name: str, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `spin`: (codes uint8[4, VECTOR], activations int8[tokens, COLUMNS, VECTOR], sums).

    sums: int32[threads, tokens, 4, VECTOR / 4], zeros, of which a kernel uses its first lanes.
    """
    rng, tokens = np.random.default_rng(0), KERNELS[name].tokens
    codes = rng.integers(0, 3, (4, VECTOR), np.uint8)
    x = rng.integers(-127, 128, (tokens, COLUMNS, VECTOR), np.int8)
    return codes, x, np.zeros((threads, tokens, 4, VECTOR // 4), np.int32)


def _spin_with(name: str):
    """Make an intrinsic: sums[t, k] += codes[k] . x[t, step % COLUMNS], STEPS times.

    (codes, x, sums): addresses of a thread's `operands`. On a CPU that lacks the instructions it
    compiles to nothing.
    """
    kernel = KERNELS[name]

    def codegen(context, builder, signature, args):
        if name not in supported_kernels():
            return context.get_dummy_value()
        bytes_, sums = ir.VectorType(INT8, kernel.width), ir.VectorType(INT32, kernel.sums)

        def place(address, index, type_):
            address = builder.add(address, INT64(VECTOR * index))
            return builder.inttoptr(address, type_.as_pointer())

        codes = [builder.load(place(args[0], k, bytes_), align=1) for k in range(4)]
        places = [place(args[2], i, sums) for i in range(4 * kernel.tokens)]
        totals = [cgutils.alloca_once_value(builder, builder.load(p, align=4)) for p in places]
        with cgutils.for_range(builder, INT64(STEPS), intp=INT64) as loop:
            column = builder.mul(builder.and_(loop.index, INT64(COLUMNS - 1)), INT64(VECTOR))
            for token in range(kernel.tokens):
                row = place(builder.add(args[1], column), COLUMNS * token, bytes_)
                x = builder.load(row, align=1)
                for total, code in zip(totals[4 * token : 4 * token + 4], codes, strict=True):
                    builder.store(kernel.dot(builder, builder.load(total), code, x), total)
        for total, p in zip(totals, places, strict=True):
            builder.store(builder.load(total), p, align=4)
        return context.get_dummy_value()

    def typer(typingctx, codes, x, sums):
        return types.void(*[types.int64] * 3), codegen

    return intrinsic(typer)


_vnni, _avx2, _sdot, _portable = (_spin_with(name) for name in KERNELS)


@cached_jit
def spin(kernel, codes, x, sums, chunks, thread, counters):
    """Let all threads multiply, `chunks` times. kernel: an index into `KERNELS`."""
    args = at(codes), at(x), at(sums[thread])
    while take(counters) < chunks:
        if kernel == VNNI:
            _vnni(*args)
        elif kernel == AVX2:
            _avx2(*args)
        elif kernel == SDOT:
            _sdot(*args)
        else:
            _portable(*args)
        finish(counters)
    wait_for(counters, chunks)
