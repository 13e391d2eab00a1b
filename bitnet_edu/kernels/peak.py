"""How many int8 products could there be in a second? A kernel's own instruction, little else.

The tile is that of simd.py, four vectors of codes times the activations of a few tokens, but the
codes stay in registers and the activations in the first-level cache: no memory is waited for, no
code is decoded, and no sum added up.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.kernels.bits import at, cached_jit
from bitnet_edu.kernels.simd import (
    INT8,
    INT32,
    INT64,
    KERNELS,
    for_kernel,
    load_any,
    multiply_pairs,
    pairs,
    singles,
)
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


@intrinsic
def _spin(typingctx, kernel, codes, x, sums):
    """sums[t, k] += codes[k] . x[t, step % COLUMNS], STEPS times: addresses of `operands`."""
    return for_kernel(_spin_with, kernel, 3)


def _spin_with(builder, kernel, codes, x, sums):
    bytes_, vector = ir.VectorType(INT8, kernel.width), ir.VectorType(INT32, kernel.sums)

    def load(address, index):
        return load_any(builder, builder.add(address, INT64(VECTOR * index)), bytes_)

    rows = [load(codes, k) for k in range(4)]
    places = (pairs if kernel.matrix else singles)(kernel.tokens, 4)
    zero = ir.Constant(vector, [0] * kernel.sums)
    totals = [cgutils.alloca_once_value(builder, zero) for _ in places]
    with cgutils.for_range(builder, INT64(STEPS), intp=INT64) as loop:
        column = builder.mul(builder.and_(loop.index, INT64(COLUMNS - 1)), INT64(VECTOR))
        q = [load(builder.add(x, column), COLUMNS * token) for token in range(kernel.tokens)]
        for total, place in zip(totals, places, strict=True):
            (t, k), value = place[0], builder.load(total)
            if kernel.matrix:
                t2, k2 = place[-1]
                value = multiply_pairs(builder, value, rows[k], rows[k2], q[t], q[t2])
            else:
                value = kernel.dot(builder, value, rows[k], q[t])
            builder.store(value, total)
    for total, place in zip(totals, places, strict=True):
        total = builder.load(total)
        for lane in range(kernel.sums):
            token, k = place[lane % len(place)]
            where = INT64(VECTOR * (4 * token + k) + 4 * lane)
            where = builder.inttoptr(builder.add(sums, where), INT32.as_pointer())
            value = builder.extract_element(total, INT32(lane))
            builder.store(builder.add(builder.load(where), value), where)


@cached_jit
def spin(kernel, codes, x, sums, chunks, thread, counters):
    """Let all threads multiply, `chunks` times. kernel: as `kernel_type` makes it."""
    while take(counters) < chunks:
        _spin(kernel, at(codes), at(x), at(sums[thread]))
        finish(counters)
    wait_for(counters, chunks)
