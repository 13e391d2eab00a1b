"""The production kernel: packed ternary weights times int8 activations, at the speed of memory.

Read it with chapter 7. In Hugging Face's layout a byte holds four weights of the *same column* and
of four different rows, so 64 bytes of weights need 64 activations, loaded once for four rows:

    codes_k = weights & (3 << 2k)                     k = 0..3: no shift, the sum is shifted instead
    sums_k += codes_k . activations                   one vpdpbusd: 64 products, added in fours
    out_k   = (sum of sums_k >> 2k) - sum(activations)    codes are w + 1

Everything is exact in int32 below 2**17 columns: |128 * 128 * columns| < 2**31, where 128 is both
the largest masked code (2 << 6) and the largest activation.

Numba has no vector type, so `_dot_tile` writes LLVM's vector code itself: a Python loop there is
unrolled machine code here. `KERNELS` lists what a CPU must offer; "portable" asks for nothing and
compiles to whatever vectors the machine has (NEON on Arm).
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import at, cpu_features, jit, pointer

MAX_COLUMNS = 2**17 - 1
BLOCK_BYTES = 49152  # of weights that stay in the caches while all tokens are multiplied with them
AHEAD = 8192  # bytes that memory is asked for ahead of their use
STEP = 64  # columns per turn of the loop, and what a row of activations is best padded to
INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _vector(type_: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(type_, lanes)


def _splat(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its name."""
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


# --- One step per instruction set: sums + codes . activations ---------------------------------


def _dot_vnni(builder: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """64 unsigned times 64 signed bytes, four neighbours added into each of 16 sums."""
    codes, x = (builder.bitcast(v, sums.type) for v in (codes, x))
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", sums.type, sums, codes, x)


def _dot_avx2(builder: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """Pairs into int16 (2 * 128 * 128 just fits, for it is always negative), then into int32."""
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", _vector(INT16, 16), codes, x)
    ones = _splat(pairs.type, 1)
    return builder.add(sums, _call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, pairs, ones))


def _dot_portable(builder: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """Plain widening arithmetic that LLVM compiles for any machine; a product fits int16."""
    wide = _vector(INT16, x.type.count)
    products = builder.mul(builder.zext(codes, wide), builder.sext(x, wide))
    return builder.add(sums, builder.sext(products, sums.type))


def _dot_sdot(builder: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """Arm's 16 signed times 16 signed bytes, four neighbours added into each of 4 sums."""
    return _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums.type, sums, codes, x)


class Kernel(NamedTuple):
    """An instruction set: the CPU features it needs and the shape of its unrolled code."""

    features: tuple[str, ...]
    width: int  # bytes in a vector
    sums: int  # int32 sums in a vector
    tokens: int  # tokens that share decoded weights in prefill: as many as the registers hold
    dot: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
    signed: bool = False  # takes codes up to 127 only, so that 2 << 6 = 128 must be avoided


KERNELS = {
    "vnni": Kernel(("avx512vnni", "avx512bw"), 64, 16, 4, _dot_vnni),
    "avx2": Kernel(("avx2",), 32, 8, 2, _dot_avx2),
    "sdot": Kernel(("dotprod",), 16, 4, 4, _dot_sdot, signed=True),
    "portable": Kernel((), 16, 16, 2, _dot_portable),
}


def supported_kernels() -> tuple[str, ...]:
    """The names in `KERNELS` that this CPU can run, fastest first."""
    return tuple(name for name, k in KERNELS.items() if cpu_features().issuperset(k.features))


def kernel_name() -> str:
    """The fastest kernel that this CPU runs, or what BITNET_EDU_KERNEL names (InputError)."""
    name = os.environ.get("BITNET_EDU_KERNEL") or supported_kernels()[0]
    kernel_index(name)
    return name


def kernel_index(name: str) -> int:
    """The number by which compiled code knows a kernel. InputError if this CPU cannot run it."""
    if name not in supported_kernels():
        raise InputError(
            f"kernel {name!r} (see BITNET_EDU_KERNEL) cannot run here: this CPU has "
            f"{', '.join(supported_kernels())}"
        )
    return list(KERNELS).index(name)


# --- The unrolled loop -------------------------------------------------------------------------


def _dot_tile(name: str, tokens: int):
    """Make an intrinsic: one byte row of weights (four output rows) times `tokens` tokens.

    (weights, x, x_stride, steps, x_sums, out, out_token, out_row): addresses of uint8[64 * steps],
    of `tokens` rows of int8 that lie x_stride apart, and of int32[tokens] sums of these rows;
    writes int32 at out + 4 * (token * out_token + k * out_row). On a CPU that lacks the
    instructions it compiles to nothing; `kernel_index` keeps such a kernel from being called.
    """
    kernel = KERNELS[name]

    def codegen(context, builder, signature, args):
        if name not in supported_kernels():
            return context.get_dummy_value()
        weights, x, x_stride, steps, x_sums, out, out_token, out_row = args
        bytes_, sums = _vector(INT8, kernel.width), _vector(INT32, kernel.sums)

        def load(address, type_):  # align=1: a memory-mapped tensor may start anywhere
            return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)

        zero = _splat(sums, 0)
        accumulators = [
            [cgutils.alloca_once_value(builder, zero) for _ in range(4)] for _ in range(tokens)
        ]
        with cgutils.for_range(builder, steps, intp=INT64) as loop:
            if tokens == 1:  # else arithmetic is the limit
                ahead = builder.add(builder.mul(loop.index, INT64(STEP)), INT64(AHEAD))
                prefetch_line(builder, builder.add(weights, ahead))
            for part in range(0, STEP, kernel.width):
                column = builder.add(builder.mul(loop.index, INT64(STEP)), INT64(part))
                w = load(builder.add(weights, column), bytes_)
                codes = [builder.and_(w, _splat(bytes_, 3 << 2 * k)) for k in range(4)]
                if kernel.signed:
                    codes[3] = builder.and_(
                        builder.lshr(w, _splat(bytes_, 2)), _splat(bytes_, 3 << 4)
                    )
                for token in range(tokens):
                    row = builder.add(x, builder.mul(x_stride, INT64(token)))
                    activations = load(builder.add(row, column), bytes_)
                    for accumulator, code in zip(accumulators[token], codes, strict=True):
                        value = kernel.dot(builder, builder.load(accumulator), code, activations)
                        builder.store(value, accumulator)

        four = _vector(INT32, 4)
        for token in range(tokens):
            total = sum_lanes(builder, [builder.load(a) for a in accumulators[token]])
            shifts = [0, 2, 4, 4 if kernel.signed else 6]
            total = builder.ashr(total, ir.Constant(four, shifts))
            x_sum = load(builder.add(x_sums, INT64(4 * token)), INT32)
            for k in range(4):
                value = builder.sub(builder.extract_element(total, INT32(k)), x_sum)
                index = builder.mul(out_token, INT64(token))
                index = builder.add(index, builder.mul(out_row, INT64(k)))
                address = builder.add(out, builder.mul(index, INT64(4)))
                builder.store(value, builder.inttoptr(address, INT32.as_pointer()), align=4)
        return context.get_dummy_value()

    def typer(typingctx, weights, x, x_stride, steps, x_sums, out, out_token, out_row):
        return types.void(*[types.int64] * 8), codegen

    return intrinsic(typer)


def prefetch_line(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a cache line, to be read soon; nothing happens at an address that isn't there."""
    place = builder.inttoptr(address, INT8.as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, INT32(0), INT32(3), INT32(1))


@intrinsic
def prefetch(typingctx, address):
    def codegen(context, builder, signature, args):
        prefetch_line(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@jit
def fetch(address, size):
    """Ask for `size` bytes of memory, to be read soon."""
    for line in range(address, address + size, 64):
        prefetch(line)


def sum_lanes(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """N vectors -> one vector with their N sums, by adding neighbours until N lanes are left."""
    element, n = vectors[0].type.element, len(vectors)
    add = builder.fadd if isinstance(element, ir.FloatType) else builder.add

    def add_neighbours(a: ir.Value, b: ir.Value, lanes: int) -> ir.Value:
        choices = (list(range(start, 2 * lanes, 2)) for start in (0, 1))
        masks = (ir.Constant(_vector(INT32, lanes), choice) for choice in choices)
        return add(*(builder.shuffle_vector(a, b, mask) for mask in masks))

    lanes = vectors[0].type.count
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [add_neighbours(a, b, lanes) for a, b in pairs]
    while lanes > n:
        lanes //= 2
        vectors = [add_neighbours(vectors[0], vectors[0], lanes)]
    return vectors[0]


VNNI, AVX2, SDOT, PORTABLE = range(len(KERNELS))
NO_KERNEL = -1  # multiplies nothing: benchmark.py measures what is left
_TOKENS = tuple(kernel.tokens for kernel in KERNELS.values())
_vnni_one, _vnni_tile = _dot_tile("vnni", 1), _dot_tile("vnni", _TOKENS[VNNI])
_avx2_one, _avx2_tile = _dot_tile("avx2", 1), _dot_tile("avx2", _TOKENS[AVX2])
_sdot_one, _sdot_tile = _dot_tile("sdot", 1), _dot_tile("sdot", _TOKENS[SDOT])
_portable_one, _portable_tile = _dot_tile("portable", 1), _dot_tile("portable", _TOKENS[PORTABLE])


@jit
def ternary_rows(kernel, weights, rows, columns, first, last, x, x_sums, tokens, out):
    """out[t, r + k * rows] = sum over c of w[r + k * rows, c] * x[t, c], exactly.

    For the byte rows first <= r < last, k = 0..3 and t < tokens. weights: the address of
    uint8[rows, columns], x: int8[>= tokens, >= columns], x_sums: int32[>= tokens], the sum of each
    row of x, out: int32[>= tokens, >= 4 * rows], kernel: an index into `KERNELS`.
    """
    block = rows if tokens == 1 else max(1, BLOCK_BYTES // columns)
    for begin in range(first, last, block):
        end = min(begin + block, last)
        token = 0
        while token < tokens:
            tile = _TOKENS[max(kernel, 0)]
            if tokens - token < tile:
                tile = 1
            _multiply_tile(kernel, weights, rows, columns, begin, end, x, x_sums, token, tile, out)
            token += tile


@jit
def _multiply_tile(kernel, weights, rows, columns, begin, end, x, x_sums, token, tile, out):
    """Byte rows begin..end for `tile` tokens, which is 1 or what this kernel takes at a time."""
    steps, x_row, out_row = columns // STEP, x.strides[0], out.strides[0] // 4
    x_at, sums_at, out_at = at(x[token:]), at(x_sums[token:]), at(out[token])
    for r in range(begin, end):
        row = weights + r * columns
        args = row, x_at, x_row, steps, sums_at, out_at + 4 * r, out_row, rows
        if kernel == VNNI:
            if tile > 1:
                _vnni_tile(*args)
            else:
                _vnni_one(*args)
        elif kernel == AVX2:
            if tile > 1:
                _avx2_tile(*args)
            else:
                _avx2_one(*args)
        elif kernel == SDOT:
            if tile > 1:
                _sdot_tile(*args)
            else:
                _sdot_one(*args)
        elif kernel == PORTABLE:
            if tile > 1:
                _portable_tile(*args)
            else:
                _portable_one(*args)
        tail = carray(pointer(row, np.uint8), columns)
        for c in range(STEP * steps, columns):  # the last columns, fewer than 64
            byte = np.int32(tail[c])
            for t in range(token, token + tile):
                for k in range(4):
                    out[t, r + k * rows] += (byte >> 2 * k & 3) * x[t, c]
