"""The next token from half the bytes of the head, and always the one that the whole head gives.

`Screen` keeps each row w of the head, one for each word, as int8 too: w = s c + e. For the hidden
vector x, reading only c gives w . x up to |e . x| <= |e| |x| (Cauchy-Schwarz), and the length |e|
of a row's error is known beforehand:

    s c . x - |e| |x|  <=  w . x  <=  s c . x + |e| |x|.

x is split in two int8 parts, x = a (q + p / 254) up to a / 508 in each place, so that c . x is two
sums of integers, as fast as memory delivers c; that error, at most sqrt(n) / 60,000 of |x|, times
the length of the row, widens the bounds a little. They tell which words can matter; of them alone
the rows are read and multiplied exactly, and `kernels.sampling` does with their exact scores what
it would do with those of all words.

- The best word: whose upper bound reaches the largest lower bound. The k best likewise, with the
  k-th largest lower bound.
- A draw from all words is a race whose noise is known for each word. So the same holds with
  bounds of (score / temperature + noise). The best words are read, too: the exact code subtracts
  the largest score, and shall round as it always does.
- A nucleus: the words with the highest upper bounds are read, until the mass of all others is
  small. Their mass, which counts in the whole, is only bounded: so there is a smallest and a
  largest set that the nucleus may be. If the winner in the largest is in the smallest, it has won.

Where that doesn't decide, because the scores are too close together, the whole head must be read.

Rounding counts too: a float32 sum of n products, added up in any order, is off by at most
n u / (1 - n u) times |w| |x| with u = 2**-24 (Higham, Accuracy and Stability, 3.1). It happens in
the screen and in the exact score; a few more roundings are covered by n + 8 in place of n. What is
smaller than any float32 is covered by `LEAST`, and where a sum might overflow nothing is decided.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import cgutils
from numba.extending import intrinsic

from bitnet_edu.errors import InputError
from bitnet_edu.kernels.bits import as_float, at, cached_jit, jit, pointer, sum_jit
from bitnet_edu.kernels.border import address, checked, release
from bitnet_edu.kernels.head import head_rows
from bitnet_edu.kernels.matmul import count_nonfinite
from bitnet_edu.kernels.pointwise import largest_magnitude, round_to_int8
from bitnet_edu.kernels.sampling import (
    BLOCK,
    Words,
    boltzmann,
    can_win,
    choose,
    extremes,
    keep_first,
    last_kept,
    mass,
    occurs,
    race,
    room_for,
)
from bitnet_edu.kernels.simd import (
    INT8,
    INT32,
    INT64,
    KERNELS,
    STEP,
    for_kernel,
    load_any,
    prefetch_ahead,
    store,
    sum_lanes,
)
from bitnet_edu.kernels.threads import chunk_count, finish, run, take, wait_for

MOST_ROWS = 4096  # that are read exactly; for more, the whole head is the shorter way
REST = 1e-4  # the mass of words that a nucleus leaves unread, as a share of all upper bounds
MARGIN = 1e-3  # of weights: two float32 exponentials and their arguments are off by 1e-5 at most
SURE = 1e-9  # of masses: float64 sums in another order are off by 1e-11 at most
LEAST = 1e-37  # in a bound: what underflow may do
LARGE = 1e30  # bounds from here on may hide a sum that overflows
PIECE = 2**14  # words that are copied before the head's own memory is given back
SPLIT = 60_000  # 127 * 508 and a little less, for what float64 rounds
MOST_HIDDEN = 2**16  # 255 * 127 times so many are less than 2**31
WORTH_A_THREAD = 2**21  # bytes of rows: for less, waking another is not worth it
UNDECIDED = -1


class Copy(NamedTuple):
    """A head in int8, and room to work: arrays for compiled code."""

    codes: np.ndarray  # int8[vocab, hidden]
    scales: np.ndarray  # float32[vocab]
    slack: np.ndarray  # float32[vocab]: |score - screened score| <= slack * |x|
    ids: np.ndarray  # int32[vocab]: 0, 1, 2, ...
    upper: np.ndarray  # float32[vocab]: the upper bounds
    wanted: np.ndarray  # int16[vocab]: 1 for a word to be read
    words: Words  # [vocab], for the lower bounds, then for the words that were read


class Screen:
    """The int8 copy of a head, bfloat16 or float32[vocab, hidden], made by `threads` threads.

    InputError if the head holds NaN or Inf.
    """

    def __init__(self, head: np.ndarray, threads: int = 1):
        checked(head, (np.float32, ml_dtypes.bfloat16), (None, None), "a head")
        vocab, hidden = head.shape
        if hidden > MOST_HIDDEN:
            raise InputError(f"a head with rows of {hidden} numbers can't be screened: too long")
        self.head = head
        self.copy = Copy(
            np.empty((vocab, hidden), np.int8),
            *(np.empty(vocab, np.float32) for _ in range(2)),
            np.arange(vocab, dtype=np.int32),
            np.empty(vocab, np.float32),
            np.empty(vocab, np.int16),
            room_for(vocab),
        )
        place, size = self._place(), head.itemsize
        rows = np.empty((threads, hidden), np.float32)
        for first in range(0, vocab, PIECE):
            last = min(first + PIECE, vocab)
            run(copy_rows, (place, size, self.copy, rows, first, last, threads), threads)
            release(head[first:last])  # from now on only few of its rows are read
        if not np.isfinite(self.copy.slack).all() and (bad := count_nonfinite(head)):
            raise InputError(f"a head with {bad} NaN or Inf can't be screened: it has no best word")

    def choose(
        self,
        scores: np.ndarray,
        x: np.ndarray,
        key: int,
        numbers: tuple[float, int, float],
        threads: int = 1,
    ) -> int | None:
        """The token that exact scores would give, or None if only these can tell.

        scores: float32[vocab], those of the copy; x: float32[hidden]; numbers: temperature, top_k
        and top_p as in `kernels.sampling.choose`, temperature 0 for the best. Afterwards `scores`
        are exact where rows were read.
        """
        args = np.uint64(key), *numbers
        rows = np.empty(min(MOST_ROWS, len(scores)), np.int32)
        count, rest, highest = find_rows(self.copy, scores, x, *args, rows)
        if count == UNDECIDED:
            return None
        self.read(rows[:count], x[None], scores[None], threads)
        token = decide(self.copy.words, scores, rows[:count], rest, highest, *args)
        return None if token == UNDECIDED else int(token)

    def read(self, rows: np.ndarray, x: np.ndarray, scores: np.ndarray, threads: int) -> None:
        """scores[t, r] = the exact score for all r of `rows`, int32[n].

        x: float32[T, hidden], scores: float32[T, vocab].
        """
        size = len(rows) * self.head[0].nbytes
        threads = min(threads, 1 + size // WORTH_A_THREAD)
        args = self._place(), self.head.itemsize, rows, x, scores
        run(exact_rows, (*args, chunk_count(size, threads)), threads)

    def _place(self) -> int:
        return address(self.head, self.head.dtype.type, self.head.shape, "a head")


# --- The copy ------------------------------------------------------------------------------------


@cached_jit
def copy_rows(head, number_bytes, copy, rows, begin, end, threads, thread, counters):
    """Fill codes, scales and slack of the words begin..end. rows: float32[threads, hidden]."""
    count, hidden = end - begin, copy.codes.shape[1]
    chunks = chunk_count(count * hidden * number_bytes, threads)
    chunk, row = take(counters), rows[thread]
    while chunk < chunks:
        for r in range(begin + chunk * count // chunks, begin + (chunk + 1) * count // chunks):
            load_row(head + r * hidden * number_bytes, number_bytes, row)
            copy.scales[r], copy.slack[r] = copy_row(row, copy.codes[r])
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


@jit
def load_row(place, number_bytes, row):
    """float32 numbers from bfloat16 (2 bytes) or float32 ones."""
    if number_bytes == 2:
        halves = carray(pointer(place, np.uint16), len(row))
        for i in range(len(row)):
            row[i] = as_float(np.int64(halves[i]) << 16)
    else:
        numbers = carray(pointer(place, np.float32), len(row))
        for i in range(len(row)):
            row[i] = numbers[i]


@jit
def copy_row(row, codes):
    """Fill int8 codes; returns (scale, slack). Slack is Inf or NaN if the row holds either."""
    largest, hidden = largest_magnitude(row), len(row)
    if not largest < np.inf:
        return np.float32(1), np.float32(np.inf)
    scale, inverse = largest / np.float32(127), np.float32(0)
    if largest > LARGE**-1:  # of smaller numbers nothing is kept: all of them are slack
        inverse = np.float32(127) / largest
    round_to_int8(row, inverse, codes)
    error, kept, whole = squares(row, scale, codes)
    u = (hidden + 8) * 2.0**-24
    slack = math.sqrt(error) + math.sqrt(hidden * kept) / SPLIT
    slack += u / (1 - u) * (math.sqrt(whole) + math.sqrt(kept))
    return scale, np.float32(slack * (1 + 1e-6) + LEAST)  # more than float64 sums can be off


@sum_jit
def squares(row, scale, codes):
    """|w - s c|**2, |s c|**2 and |w|**2."""
    error, kept, whole = 0.0, 0.0, 0.0
    for i in range(len(row)):
        w, approximate = np.float64(row[i]), np.float64(scale) * np.float64(codes[i])
        error += (w - approximate) * (w - approximate)
        kept += approximate * approximate
        whole += w * w
    return error, kept, whole


# --- The screened scores -------------------------------------------------------------------------


@intrinsic
def _two_dots(typingctx, kernel, codes, q, hidden, steps, sums, ahead):
    """sums[k] = codes . q[k], in the kernel's own way: see `OFFSETS`.

    codes, q, sums: addresses of int8[64 * steps], of int8[2, hidden], of int32[2]. ahead: as in
    simd.py.
    """
    return for_kernel(_two_dots_with, kernel, 6)


def _two_dots_with(builder, kernel, codes, q, hidden, steps, sums, ahead):
    bytes_, zero = ir.VectorType(INT8, kernel.width), ir.VectorType(INT32, kernel.sums)
    zero = ir.Constant(zero, [0] * kernel.sums)
    totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2)]
    with cgutils.for_range(builder, steps, intp=INT64) as loop:
        first = builder.mul(loop.index, INT64(STEP))
        prefetch_ahead(builder, builder.add(codes, first), ahead)
        for part in range(0, STEP, kernel.width):
            column = builder.add(first, INT64(part))
            code = load_any(builder, builder.add(codes, column), bytes_)
            for k, total in enumerate(totals):
                place = builder.add(builder.add(q, column), builder.mul(hidden, INT64(k)))
                x = load_any(builder, place, bytes_)
                builder.store(_signed_dot(builder, kernel, builder.load(total), code, x), total)
    total = sum_lanes(builder, [builder.load(total) for total in totals])
    store(builder, total, sums)


def _signed_dot(builder, kernel, sums, codes, x):
    """Codes -127..127, where the kernel takes the first factor unsigned."""
    if kernel.signed:
        return kernel.dot(builder, sums, codes, x)
    if kernel.adds_in_int16:  # 2 * 127 * 127 fits, twice 255 * 127 does not: the sign goes to x
        zero = ir.Constant(codes.type, [0] * kernel.width)
        negative = builder.icmp_signed("<", codes, zero)
        x = builder.select(negative, builder.sub(zero, x), x)
        codes = builder.select(negative, builder.sub(zero, codes), codes)
        return kernel.dot(builder, sums, codes, x)
    flip = ir.Constant(codes.type, [128] * kernel.width)
    return kernel.dot(builder, sums, builder.xor(codes, flip), x)  # code + 128


# what is added to each code before it is multiplied
OFFSETS = tuple(0 if k.signed or k.adds_in_int16 else 128 for k in KERNELS.values())


@jit
def screened_rows(kernel, codes, scales, x, first, last, scores, ahead, scratch):
    """scores[t, r] = scales[r] * (codes[r] . x[t]), but for the error that `slack` covers.

    codes: the address of int8[vocab, hidden], x: float32[T, hidden], scores: float32[T, vocab],
    scratch: uint8[>= 2 * hidden + 8], kernel: as `kernel_type` makes it.
    """
    tokens, hidden = x.shape
    steps = hidden // STEP
    sums = carray(pointer(at(scratch), np.int32), 2)
    q = carray(pointer(at(scratch[8:]), np.int8), (2, hidden))
    for t in range(tokens):
        unit = split(x[t], q[0], q[1])
        extra = OFFSETS[len(kernel) - 1] * add_up(q[0, : STEP * steps])
        finer_extra = OFFSETS[len(kernel) - 1] * add_up(q[1, : STEP * steps])
        for r in range(first, last):
            row = codes + r * hidden
            _two_dots(kernel, row, at(q), hidden, steps, at(sums), ahead)
            coarse, fine = np.int64(sums[0] - extra), np.int64(sums[1] - finer_extra)
            rest = carray(pointer(row, np.int8), hidden)
            for i in range(STEP * steps, hidden):
                coarse += rest[i] * np.int64(q[0, i])
                fine += rest[i] * np.int64(q[1, i])
            scores[t, r] = np.float32(np.float64(scales[r]) * (unit * (254 * coarse + fine)))


@jit
def split(x, coarse, fine):
    """x = unit * (254 * coarse + fine), up to unit / 2; returns the unit."""
    largest = np.float64(largest_magnitude(x))
    step = largest / 127 if largest > 0 else 1.0
    inverse = 1 / step
    for i in range(len(x)):
        q = np.rint(x[i] * inverse)
        coarse[i] = np.int8(q)
        fine[i] = np.int8(np.rint((x[i] - q * step) * inverse * 254))
    return step / 254


@jit
def add_up(q):
    total = np.int32(0)
    for i in range(len(q)):
        total += np.int32(q[i])
    return total


# --- Which words to read -------------------------------------------------------------------------


@cached_jit
def exact_rows(head, number_bytes, rows, x, scores, chunks, thread, counters):
    """scores[t, r] = row r of the head . x[t] for all r in `rows`."""
    chunk, n = take(counters), len(rows)
    while chunk < chunks:
        for i in range(chunk * n // chunks, (chunk + 1) * n // chunks):
            head_rows(head, number_bytes, x, rows[i], rows[i] + 1, scores, 0)
        finish(counters)
        chunk = take(counters)
    wait_for(counters, chunks)


@cached_jit
def find_rows(copy, scores, x, key, temperature, top_k, top_p, rows):
    """(how many words must be read, and of the others: their mass, their largest upper bound).

    The ids go into `rows`; UNDECIDED if these are too many, or the bounds too large. The mass is
    made of upper bounds, relative to a word with the largest lower bound; only a nucleus needs it.
    """
    upper, wanted, lower, weights = copy.upper, copy.wanted, copy.words.scores, copy.words.weights
    rest, highest, vocab = 0.0, np.float32(-np.inf), len(scores)
    if not find_bounds(scores, copy.slack, norm(x), upper, lower):
        return UNDECIDED, rest, highest
    _, best = extremes(lower)
    if temperature == 0:
        threshold = best
    elif top_k < vocab:
        threshold, _ = last_kept(copy.ids, lower, lower, False, np.float64(top_k), copy.words)
    elif top_p < 1:
        limit(upper, best, lower)
        boltzmann(lower, best, temperature, weights)
        threshold, rest = likely_words(copy, len(rows))
        highest = highest_below(threshold, upper, lower)
    else:
        boltzmann(lower, best, temperature, weights)
        _, ratio = race(copy.ids, weights, key)
        limit(upper, best, lower)
        boltzmann(lower, best, temperature, weights)
        find_runners(copy.ids, upper, best, weights, key, ratio * (1 - MARGIN), wanted)
        return list_rows(wanted, rows), rest, highest
    for i in range(vocab):
        wanted[i] = upper[i] >= threshold
    return list_rows(wanted, rows), rest, highest


@jit
def norm(x):
    """Euclidean length as float32, not below the true one."""
    return np.float32(max(math.sqrt(square(x)), 1e-3) * (1 + 1e-6))


@sum_jit
def square(x):
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@jit
def find_bounds(scores, slack, length, upper, lower):
    """Fill upper and lower bounds; False if any is so large that a sum may have overflowed."""
    fine, large = np.int32(1), np.float32(LARGE)
    for i in range(len(scores)):
        reach = slack[i] * length
        upper[i], lower[i] = scores[i] + reach, scores[i] - reach
        fine &= np.int32(reach < large) & np.int32(abs(scores[i]) < large)  # and none is NaN
    return fine != 0


@jit
def limit(x, most, out):
    for i in range(len(x)):
        out[i] = most if x[i] > most else x[i]


@jit
def likely_words(copy, most):
    """(the lowest upper bound of those that have nearly all the mass, the mass of the others)."""
    ids, upper, weights, room = copy.ids, copy.upper, copy.words.weights, copy.words
    threshold, _ = last_kept(ids, upper, weights, True, (1 - REST) * mass(weights), room)
    count, rest = mass_below(threshold, upper, weights)
    if len(ids) - count > most:
        threshold, _ = last_kept(ids, upper, weights, False, np.float64(most), room)
        count, rest = mass_below(threshold, upper, weights)
    return threshold, rest * (1 + MARGIN)


@sum_jit
def mass_below(threshold, scores, weights):
    """(how many words have a score below the threshold, their mass)."""
    count, total = 0, 0.0
    for i in range(len(scores)):
        below = scores[i] < threshold
        count += below
        total += np.float64(weights[i]) * below
    return count, total


@jit
def highest_below(threshold, scores, below):
    """The largest score below the threshold. below: scratch."""
    for i in range(len(scores)):
        below[i] = scores[i] if scores[i] < threshold else np.float32(-np.inf)
    _, highest = extremes(below)
    return highest


@jit
def find_runners(ids, upper, best, weights, key, ratio, wanted):
    """Who can win the race against `ratio`, or be the best."""
    for i in range(len(ids)):
        wanted[i] = (upper[i] >= best) | can_win(ids[i], weights[i], key, ratio)


@jit
def list_rows(wanted, rows):
    """Fill `rows` with the places that are wanted; returns how many, or UNDECIDED if too many."""
    count, n = 0, len(wanted)
    for first in range(0, n, BLOCK):
        end = min(first + BLOCK, n)
        if occurs(1, wanted[first:end]):
            for i in range(first, end):
                if wanted[i]:
                    if count == len(rows):
                        return UNDECIDED
                    rows[count] = i
                    count += 1
    return count


# --- Who wins ------------------------------------------------------------------------------------


@cached_jit
def decide(words, scores, rows, rest, highest, key, temperature, top_k, top_p):
    """The id that the exact scores of all words would give, from those of `rows`; or UNDECIDED."""
    n = len(rows)
    for i in range(n):
        words.ids[i], words.scores[i] = rows[i], scores[rows[i]]
    if temperature == 0:
        return words.ids[first_best(words.scores[:n])]
    if rest > 0:
        return decide_nucleus(words, n, rest, highest, key, temperature, top_p)
    return choose(words, n, key, temperature, top_k, top_p)


@jit
def first_best(scores):
    best = 0
    for i in range(len(scores)):
        if scores[i] > scores[best]:
            best = i
    return best


@jit
def decide_nucleus(words, n, rest, highest, key, temperature, top_p):
    """The winner in the largest set that the nucleus can be, if it is in the smallest too."""
    _, largest = extremes(words.scores[:n])
    boltzmann(words.scores[:n], largest, temperature, words.weights[:n])
    least = mass(words.weights[:n])
    most = least + rest  # the largest score is at least the largest lower bound
    n = keep_first(words, n, True, top_p * most * (1 + 2 * SURE))
    ids, scores, weights = words.ids[:n], words.scores[:n], words.weights[:n]
    lowest, _ = extremes(scores)
    if lowest <= highest or mass(weights) < top_p * most * (1 + SURE):  # others may be in it
        return UNDECIDED
    winner, _ = race(ids, weights, key)
    before = 0.0
    for i in range(n):
        if scores[i] > scores[winner] or (scores[i] == scores[winner] and i < winner):
            before += np.float64(weights[i])
    return ids[winner] if before < top_p * least * (1 - SURE) else UNDECIDED
