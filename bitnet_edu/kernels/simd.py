"""The production kernel: packed ternary weights times int8 activations, at the speed of memory.

Read it with chapters 7 and 8. In Hugging Face's layout a byte holds four weights of the *same
column* and of four different rows, so 64 bytes of weights need 64 activations, loaded once for
four rows:

    codes_k = weights & (3 << 2k)                     k = 0..3: no shift, the sum is divided instead
    sums_k += codes_k . activations                   one vpdpbusd: 64 products, added in fours
    out_k   = (sum of sums_k) / 4**k - sum(activations)    codes are w + 1

In base 3 a byte holds five, b = 81 t4 + 27 t3 + 9 t2 + 3 t1 + t0 (`packing.pack_base3_rows`), and
its digits come out from the top: if b < 81, then b - 81 wraps around and is the larger of the two,
so two times min(b, b - 81), in unsigned bytes, leave b mod 81, and what was taken is 81 t4.

Everything is exact in int32 below 2**17 columns: |128 * 128 * columns| < 2**31, where 128 is both
the largest masked code (2 << 6) and the largest activation.

Numba has no vector type, so `_row` writes LLVM's vector code itself: a Python loop there is
unrolled machine code here. `KERNELS` lists what a CPU must offer; "portable" asks for nothing and
compiles to whatever vectors the machine has.
"""

import contextlib
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
BLOCK_BYTES = 49152  # of weights that stay in the caches while a few tokens pass
MANY = 96  # tokens for which it pays to unpack the codes
AHEAD = 8192  # bytes of keys and values that memory is asked for ahead; of weights: tuning.py
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


def _dot_avxvnni(builder: ir.IRBuilder, sums: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """The same on 32 bytes, which many CPUs have that lack AVX-512."""
    codes, x = (builder.bitcast(v, sums.type) for v in (codes, x))
    return _call(builder, "llvm.x86.avx512.vpdpbusd.256", sums.type, sums, codes, x)


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

    features: tuple[tuple[str, ...], ...]  # all of one of these
    width: int  # bytes in a vector
    sums: int  # int32 sums in a vector
    tokens: int  # tokens that share a packed row: as many as the registers hold
    wide: int  # tokens that share unpacked rows, where there are many; 0: they never are
    dot: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
    signed: bool = False  # takes codes up to 127 only, so that 2 << 6 = 128 must be avoided
    matrix: bool = False  # multiplies two rows with two tokens at once
    adds_in_int16: bool = False  # two products at a time, so that they must be small


KERNELS = {
    "vnni": Kernel((("avx512vnni", "avx512bw"),), 64, 16, 4, 12, _dot_vnni),
    "avxvnni": Kernel((("avxvnni",), ("avx512vnni", "avx512vl")), 32, 8, 3, 6, _dot_avxvnni),
    "avx2": Kernel((("avx2",),), 32, 8, 2, 5, _dot_avx2, adds_in_int16=True),
    "i8mm": Kernel((("dotprod", "i8mm"),), 16, 4, 4, 0, _dot_sdot, signed=True, matrix=True),
    "sdot": Kernel((("dotprod",),), 16, 4, 4, 12, _dot_sdot, signed=True),
    "portable": Kernel(((),), 16, 16, 2, 2, _dot_portable),
}


def supported_kernels() -> tuple[str, ...]:
    """The names in `KERNELS` that this CPU can run, fastest first."""
    have = cpu_features()
    return tuple(name for name, k in KERNELS.items() if any(map(have.issuperset, k.features)))


def kernel_name() -> str:
    """The fastest kernel that this CPU runs, or what BITNET_EDU_KERNEL names (InputError)."""
    name = os.environ.get("BITNET_EDU_KERNEL") or supported_kernels()[0]
    kernel_type(name)
    return name


def kernel_type(name: str) -> tuple[int, ...]:
    """By what compiled code knows a kernel. InputError if this CPU cannot run it.

    A tuple, of which only the length matters: that belongs to its type, and so each kernel gets
    machine code of its own, compiled when it is used first.
    """
    if name not in supported_kernels():
        raise InputError(
            f"kernel {name!r} (see BITNET_EDU_KERNEL) cannot run here: this CPU has "
            f"{', '.join(supported_kernels())}"
        )
    return (0,) * (1 + list(KERNELS).index(name))


def kernel_of(type_: types.BaseTuple) -> Kernel | None:
    """The kernel that such a tuple stands for; None if it cannot run here."""
    named = list(KERNELS)[len(type_) - 1]
    return KERNELS[named] if named in supported_kernels() else None


def for_kernel(write: Callable, kernel: types.BaseTuple, numbers: int) -> tuple:
    """What an intrinsic of a kernel and `numbers` integers returns; `write` writes its code.

    For a kernel that cannot run here it does nothing.
    """
    chosen = kernel_of(kernel)

    def codegen(context, builder, signature, args):
        if chosen:
            write(builder, chosen, *args[1:])
        return context.get_dummy_value()

    return types.void(kernel, *[types.int64] * numbers), codegen


# --- From a vector of packed bytes to vectors of codes ----------------------------------------


def _two_bits(builder: ir.IRBuilder, kernel: Kernel, w: ir.Value) -> list[tuple[ir.Value, int]]:
    """Four vectors of codes, each with what their sums must be divided by."""
    parts = [(builder.and_(w, _splat(w.type, 3 << 2 * k)), 4**k) for k in range(4)]
    if kernel.signed:
        shifted = builder.lshr(w, _splat(w.type, 2))
        parts[3] = builder.and_(shifted, _splat(w.type, 3 << 4)), 4**2
    return parts


def _base3(builder: ir.IRBuilder, kernel: Kernel, w: ir.Value) -> list[tuple[ir.Value, int]]:
    """Five vectors of codes. Of the top digit, 81 = 0b01010001 and 162 = 0b10100010 end in it."""
    rest, top = _take_digit(builder, w, 81)
    top = builder.and_(top, _splat(w.type, 3)), 1
    if kernel.width == 64 and "avx512vbmi" in cpu_features():
        first, second = (ir.Constant(w.type, list(half)) for half in (TWO_BITS[:64], TWO_BITS[64:]))
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return [*_two_bits(builder, kernel, _call(builder, name, w.type, first, rest, second)), top]
    digits = []
    for power in (27, 9, 3):
        rest, digit = _take_digit(builder, rest, power)
        digits.append((digit, power))
    return [(rest, 1), *reversed(digits), top]


def _take_digit(builder: ir.IRBuilder, value: ir.Value, power: int) -> tuple[ir.Value, ir.Value]:
    """(value mod power, the digit times power), for bytes below 3 * power."""
    rest = value
    for _ in range(2):
        less = builder.sub(rest, _splat(value.type, power))
        rest = _call(builder, f"llvm.umin.v{value.type.count}i8", value.type, rest, less)
    return rest, builder.sub(value, rest)


# entry r < 81: the four low base-3 digits of r, as the two bits of a 2-bit byte
TWO_BITS = [sum(r // 3**k % 3 << 2 * k for k in range(4)) for r in range(81)] + [0] * 47
# packings by name, for compiled code again tuples: as long as a byte has digits
PACKINGS = {"2bit": (0,) * 4, "base3": (0,) * 5}
DECODE = {4: _two_bits, 5: _base3}


# --- The unrolled loop -------------------------------------------------------------------------


@intrinsic
def _multiply_row(
    typingctx, kernel, packing, tile, weights, x, x_stride, steps, x_sums, ahead,
    out, out_token, out_row, outputs,
):  # fmt: skip
    """One byte row of weights, which is four or five output rows, times `tile` tokens.

    tile: 1, or the kernel's `tokens`. weights, x, x_sums, out: addresses of uint8[64 * steps], of
    `tile` rows of int8 that lie x_stride apart, of int32[tile] sums of these rows; writes int32 at
    out + 4 * (token * out_token + k * out_row) for each k * out_row < outputs. ahead: bytes that
    memory is asked for ahead of their use, or 0.
    """
    chosen, digits = kernel_of(kernel), len(packing)

    def codegen(context, builder, signature, args):
        _, _, tile, *args = args
        if chosen:
            many = builder.icmp_signed(">", tile, INT64(1))
            with builder.if_else(many) as branches:
                for branch, tokens in zip(branches, (chosen.tokens, 1), strict=True):
                    with branch:
                        _row(builder, chosen, digits, tokens, *args)
        return context.get_dummy_value()

    return types.void(kernel, packing, *[types.int64] * 11), codegen


def _row(
    builder, kernel, digits, tokens, weights, x, x_stride, steps, x_sums, ahead,
    out, out_token, out_row, outputs,
):  # fmt: skip
    """Write the code of `_multiply_row` for one kernel, packing and number of tokens."""
    bytes_, zero = _vector(INT8, kernel.width), _splat(_vector(INT32, kernel.sums), 0)
    decode = DECODE[digits]
    by_pairs = kernel.matrix and tokens > 1
    places = pairs(tokens, digits) if by_pairs else singles(tokens, digits)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in places]
    with cgutils.for_range(builder, steps, intp=INT64) as loop:
        first = builder.mul(loop.index, INT64(STEP))
        if tokens == 1:  # else arithmetic is the limit
            prefetch_ahead(builder, builder.add(weights, first), ahead)
        for part in range(0, STEP, kernel.width):
            column = builder.add(first, INT64(part))
            codes = decode(builder, kernel, load_any(builder, builder.add(weights, column), bytes_))
            rows = (builder.add(x, builder.mul(x_stride, INT64(token))) for token in range(tokens))
            q = [load_any(builder, builder.add(row, column), bytes_) for row in rows]
            for sum_, place in zip(sums, places, strict=True):
                value = builder.load(sum_)
                if by_pairs:
                    (t, k), *_, (t2, k2) = place
                    value = multiply_pairs(builder, value, codes[k][0], codes[k2][0], q[t], q[t2])
                else:
                    [(t, k)] = place
                    value = kernel.dot(builder, value, codes[k][0], q[t])
                builder.store(value, sum_)

    totals = [builder.load(sum_) for sum_ in sums]
    while totals:
        # as many at once as make a power of two, and fit a vector
        n = 1 if by_pairs else min(kernel.sums, 1 << len(totals).bit_length() - 1)
        total = totals[0] if by_pairs else sum_lanes(builder, totals[:n])
        lanes = [place for some in places[:n] for place in some]
        totals, places = totals[n:], places[n:]
        divisor = ir.Constant(total.type, [codes[k][1] for _, k in lanes])
        total = builder.sdiv(total, divisor, flags=("exact",))
        for lane, (token, k) in enumerate(lanes):
            x_sum = load_any(builder, builder.add(x_sums, INT64(4 * token)), INT32)
            value = builder.sub(builder.extract_element(total, INT32(lane)), x_sum)
            row = builder.mul(out_row, INT64(k))
            index = builder.add(builder.mul(out_token, INT64(token)), row)
            # fives do not always come out even: some of the last rows may not exist
            exists = builder.icmp_signed("<", row, outputs)
            with builder.if_then(exists) if digits == 5 and k else contextlib.nullcontext():
                store(builder, value, builder.add(out, builder.mul(index, INT64(4))))


def load_any(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    """A load of any alignment: a memory-mapped tensor may start anywhere."""
    return builder.load(builder.inttoptr(address, type_.as_pointer()), align=1)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def singles(tokens: int, digits: int) -> list[list[tuple[int, int]]]:
    """Which (token, digit) each vector of sums belongs to."""
    return [[(token, k)] for token in range(tokens) for k in range(digits)]


def pairs(tokens: int, digits: int) -> list[list[tuple[int, int]]]:
    """Which (token, digit) each of four sums belongs to; the fifth digit is its own partner."""
    seconds = [(k, min(k + 1, digits - 1)) for k in range(0, digits, 2)]
    firsts = range(0, tokens, 2)
    return [[(t + i, k) for k in pair for i in (0, 1)] for t in firsts for pair in seconds]


def multiply_pairs(
    builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value, x: ir.Value, y: ir.Value
) -> ir.Value:
    """Arm's matrix instruction: sums [a.x, a.y, b.x, b.y] of eight columns, twice."""
    for half in (range(8), range(8, 16)):
        mask = ir.Constant(_vector(INT32, 16), [*half, *(16 + lane for lane in half)])
        rows, columns = builder.shuffle_vector(a, b, mask), builder.shuffle_vector(x, y, mask)
        sums = _call(builder, "llvm.aarch64.neon.smmla.v4i32.v16i8", sums.type, sums, rows, columns)
    return sums


# --- Many tokens: codes are unpacked once, side by side, and stay in the caches -----------------


@intrinsic
def _unpack(typingctx, kernel, packing, weights, columns, steps, codes, size):
    """Byte rows of packed weights, a lane of the kernel's vectors each, to codes w + 1 of a byte.

    weights: the address of uint8[lanes, columns], of which 64 * steps columns are unpacked; codes:
    that of uint8[digits, 64 * steps / group, 2, lanes, group], `size` bytes a digit, of which this
    fills one of the two in the third place: neighbours are `group` columns, then the rows.
    """

    chosen, decode = kernel_of(kernel), DECODE[len(packing)]

    def codegen(context, builder, signature, args):
        if chosen and chosen.wide:
            _unpack_side_by_side(builder, chosen, decode, *args[2:])
        return context.get_dummy_value()

    return types.void(kernel, packing, *[types.int64] * 5), codegen


def _unpack_side_by_side(builder, kernel, decode, weights, columns, steps, codes, size):
    bytes_, lanes, group = _vector(INT8, kernel.width), kernel.sums, kernel.width // kernel.sums
    groups = _vector(ir.IntType(8 * group), lanes)
    with cgutils.for_range(builder, steps, intp=INT64) as loop:
        for part in range(0, STEP, kernel.width):
            column = builder.add(builder.mul(loop.index, INT64(STEP)), INT64(part))
            first = builder.add(weights, column)
            places = [builder.add(first, builder.mul(columns, INT64(i))) for i in range(lanes)]
            rows = [load_any(builder, place, groups) for place in places]
            out = builder.add(codes, builder.mul(column, INT64(2 * lanes)))
            for i, vector in enumerate(_transposed(builder, rows)):
                place = builder.add(out, INT64(2 * kernel.width * i))
                for code in decode(builder, kernel, builder.bitcast(vector, bytes_)):
                    store(builder, _divided(builder, *code), place, align=1)
                    place = builder.add(place, size)


def _divided(builder: ir.IRBuilder, code: ir.Value, divisor: int) -> ir.Value:
    """Codes 0, 1, 2 from their multiples."""
    if divisor & 1:  # a power of 3; of a power of 2, the bits are shifted
        ones = _splat(code.type, divisor)
        more = [builder.icmp_unsigned(op, code, ones) for op in (">=", ">")]
        return code if divisor == 1 else builder.add(*(builder.zext(m, code.type) for m in more))
    return builder.lshr(code, _splat(code.type, divisor.bit_length() - 1))


def _transposed(builder: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """N vectors of N numbers, columns for rows: blocks change places, half as large each time."""
    n = len(vectors)
    half = n // 2
    while half:
        left = [lane + (n - half) * (lane // half % 2) for lane in range(n)]
        masks = [ir.Constant(_vector(INT32, n), [lane + far for lane in left]) for far in (0, half)]
        for i in range(n):
            if not i & half:
                pair = vectors[i], vectors[i + half]
                for place, mask in zip((i, i + half), masks, strict=True):
                    vectors[place] = builder.shuffle_vector(*pair, mask)
        half //= 2
    return vectors


@intrinsic
def _multiply_codes(typingctx, kernel, codes, x, x_stride, steps, x_sums, out, out_token):
    """What `_unpack` made of two times `lanes` rows, times as many tokens as `wide` says.

    Without any sum across lanes, as each has a row of its own. x, x_sums, out: addresses of
    int8[wide, 64 * steps] whose rows lie x_stride apart, of int32[wide] their sums; writes int32 at
    out + 4 * (token * out_token + row).
    """
    return for_kernel(_tile, kernel, 7)


def _tile(builder, kernel, codes, x, x_stride, steps, x_sums, out, out_token):
    if not kernel.wide:
        return
    bytes_, sums_ = _vector(INT8, kernel.width), _vector(INT32, kernel.sums)
    group = kernel.width // kernel.sums
    number = ir.IntType(8 * group)
    sums = [
        [cgutils.alloca_once_value(builder, _splat(sums_, 0)) for _ in range(2)]
        for _ in range(kernel.wide)
    ]
    groups = builder.mul(steps, INT64(STEP // group))
    with cgutils.for_range(builder, groups, intp=INT64) as loop:
        column = builder.mul(loop.index, INT64(group))
        place = builder.add(codes, builder.mul(loop.index, INT64(2 * kernel.width)))
        rows = [
            load_any(builder, builder.add(place, INT64(i * kernel.width)), bytes_) for i in (0, 1)
        ]
        for token in range(kernel.wide):
            place = builder.add(x, builder.add(builder.mul(x_stride, INT64(token)), column))
            q = broadcast(builder, load_any(builder, place, number), kernel.sums)
            q = builder.bitcast(q, bytes_)
            for sum_, row in zip(sums[token], rows, strict=True):
                builder.store(kernel.dot(builder, builder.load(sum_), row, q), sum_)
    for token in range(kernel.wide):
        x_sum = load_any(builder, builder.add(x_sums, INT64(4 * token)), INT32)
        x_sum = broadcast(builder, x_sum, kernel.sums)
        place = builder.add(out, builder.mul(out_token, INT64(4 * token)))
        for i, sum_ in enumerate(sums[token]):
            value = builder.sub(builder.load(sum_), x_sum)
            store(builder, value, builder.add(place, INT64(4 * kernel.sums * i)))


def broadcast(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    """A vector that holds a number in every lane."""
    vector = ir.Constant(_vector(number.type, lanes), ir.Undefined)
    vector = builder.insert_element(vector, number, INT32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(_vector(INT32, lanes), [0] * lanes))


def prefetch_line(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a cache line, to be read soon; nothing happens at an address that isn't there."""
    place = builder.inttoptr(address, INT8.as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, INT32(0), INT32(3), INT32(1))


def prefetch_ahead(builder: ir.IRBuilder, place: ir.Value, ahead: ir.Value, size: int = 64) -> None:
    """Ask for the `size` bytes that lie `ahead` bytes further on; for nothing if that is 0."""
    with builder.if_then(builder.icmp_signed("!=", ahead, INT64(0))):
        for line in range(0, size, 64):
            prefetch_line(builder, builder.add(builder.add(place, ahead), INT64(line)))


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


_TOKENS = tuple(kernel.tokens for kernel in KERNELS.values())
_WIDE = tuple(kernel.wide for kernel in KERNELS.values())
_LANES = tuple(kernel.sums for kernel in KERNELS.values())
_WIDTH = tuple(kernel.width for kernel in KERNELS.values())


@jit
def ternary_rows(
    kernel, packing, weights, rows, columns, outputs, first, last, x, x_sums, tokens, out, ahead,
    scratch,
):  # fmt: skip
    """out[t, r + k * rows] = sum over c of w[r + k * rows, c] * x[t, c], exactly.

    For the byte rows first <= r < last, t < tokens and all k with r + k * rows < outputs. weights:
    the address of uint8[rows, columns], packed as `packing`, one of `PACKINGS`, says; x:
    int8[>= tokens, >= columns], x_sums: int32[>= tokens], the sum of each row of x, out:
    int32[>= tokens, >= outputs], kernel: as `kernel_type` makes it, ahead: as in `_multiply_row`,
    scratch: uint8[>= scratch_size(columns, tokens)].
    """
    whole, begin = first, 0
    if tokens >= MANY and _WIDE[len(kernel) - 1] > 0:
        digits, block = len(packing), 2 * _LANES[len(kernel) - 1]
        # only rows all of whose digits exist
        whole += max(0, min(last, outputs - (digits - 1) * rows) - first) // block * block
        begin = tokens // _WIDE[len(kernel) - 1] * _WIDE[len(kernel) - 1]
        for r in range(first, whole, block):
            many_tokens(
                kernel, packing, weights, rows, columns, r, x, x_sums, begin, out, scratch, outputs
            )
        few_tokens(
            kernel, packing, weights, rows, columns, outputs, first, whole, x, x_sums, begin,
            tokens, out, ahead,
        )  # fmt: skip
    few_tokens(
        kernel, packing, weights, rows, columns, outputs, whole, last, x, x_sums, 0, tokens, out,
        ahead,
    )  # fmt: skip


@jit
def many_tokens(
    kernel, packing, weights, rows, columns, first, x, x_sums, tokens, out, scratch, outputs
):
    """`ternary_rows` for two times `lanes` byte rows and a multiple of the kernel's `wide`."""
    lanes, steps, place = _LANES[len(kernel) - 1], columns // STEP, at(scratch)
    size = 2 * lanes * STEP * steps
    for half in range(2):
        row = weights + (first + half * lanes) * columns
        _unpack(kernel, packing, row, columns, steps, place + half * _WIDTH[len(kernel) - 1], size)
    for token in range(0, tokens, _WIDE[len(kernel) - 1]):
        x_at, sums_at = at(x[token:]), at(x_sums[token:])
        for k in range(len(packing)):
            out_at = at(out[token, first + k * rows :])
            _multiply_codes(
                kernel, place + k * size, x_at, x.strides[0], steps, sums_at, out_at,
                out.strides[0] // 4,
            )  # fmt: skip
    if STEP * steps < columns:
        for r in range(first, first + 2 * lanes):
            _rest_of_row(
                packing, weights + r * columns, rows, columns, outputs, r, x, 0, tokens, out
            )


def scratch_size(columns: int, tokens: int) -> int:
    """Bytes that a thread unpacks codes into: five digits of the byte rows that pass at a time."""
    return 5 * 2 * max(_LANES) * columns if tokens >= MANY else 0


@jit
def few_tokens(
    kernel, packing, weights, rows, columns, outputs, first, last, x, x_sums, begin, end, out, ahead
):
    """`ternary_rows` for the tokens from `begin` to before `end`, straight from packed weights."""
    steps, x_row, out_row = columns // STEP, x.strides[0], out.strides[0] // 4
    block = max(1, last - first if end - begin == 1 else BLOCK_BYTES // columns)
    for top in range(first, last, block):
        token = begin
        while token < end:
            tile = _TOKENS[len(kernel) - 1] if end - token >= _TOKENS[len(kernel) - 1] else 1
            x_at, sums_at, out_at = at(x[token:]), at(x_sums[token:]), at(out[token])
            for r in range(top, min(top + block, last)):
                row, place = weights + r * columns, out_at + 4 * r
                _multiply_row(
                    kernel, packing, tile, row, x_at, x_row, steps, sums_at, ahead,
                    place, out_row, rows, outputs - r,
                )  # fmt: skip
                if STEP * steps < columns:
                    _rest_of_row(packing, row, rows, columns, outputs, r, x, token, tile, out)
            token += tile


@jit
def _rest_of_row(packing, row, rows, columns, outputs, r, x, token, tile, out):
    """The last columns, fewer than 64, of a byte row."""
    packed = carray(pointer(row, np.uint8), columns)
    for c in range(columns // STEP * STEP, columns):
        byte = np.int32(packed[c])
        for k in range(len(packing)):
            code = byte & 3 if len(packing) == 4 else byte % 3
            byte = byte >> 2 if len(packing) == 4 else byte // 3
            if r + k * rows < outputs:
                for t in range(token, token + tile):
                    out[t, r + k * rows] += code * x[t, c]
