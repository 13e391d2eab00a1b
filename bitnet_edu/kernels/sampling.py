"""The next token from the scores of all words, in a few passes over them: nothing is sorted.

Words stand in arrays, in the order of their ids: ids, scores, and weights exp(score / temperature),
shifted so that the largest is 1. Top-k and top-p each keep the first words of an order (the larger
score first; of equal scores, the lower id), found by a histogram that is refined where it matters.

The draw is a race: word i arrives after E_i / w_i, where E_i is exponentially distributed, and the
first one wins: word i with probability w_i / (sum of w), as asked. (It is the Gumbel-max trick in
other words: score / temperature - log E.) E_i comes from a hash of the key and i alone. So who wins
depends on nothing but the key and the weights of those who can: not on the order, nor on threads,
nor on words that stay away because they would lose anyway.
"""

import math
from typing import NamedTuple

import numpy as np

from bitnet_edu.kernels.attention import exponentials
from bitnet_edu.kernels.bits import as_float, cached_jit, jit, sum_jit

BUCKETS = 2048
BLOCK = 128  # words that are looked at together
MOST_INVERSE = 1e300  # of a temperature: so that 0 / temperature is 0 down to the smallest of them


class Words(NamedTuple):
    """Some words, and room to work on them: kept, for to get fresh memory takes longer than a draw.

    ids are ascending. The last three hold a part of the words, so that these stay as they are.
    """

    ids: np.ndarray  # int32[n]
    scores: np.ndarray  # float32[n]
    weights: np.ndarray  # float32[n]
    buckets: np.ndarray  # int16[n]
    kept: np.ndarray  # uint8[n]
    some_ids: np.ndarray  # int32[n]
    some_scores: np.ndarray  # float32[n]
    some_weights: np.ndarray  # float32[n]


def room_for(n: int) -> Words:
    """Room for up to n words."""
    dtypes = np.int32, np.float32, np.float32, np.int16, np.uint8, np.int32, np.float32, np.float32
    return Words(*(np.empty(n, dtype) for dtype in dtypes))


@cached_jit
def put(words, scores):
    """All words of a vocabulary, float32[n]."""
    for i in range(len(scores)):
        words.ids[i], words.scores[i] = i, scores[i]


@cached_jit
def choose(words, n, key, temperature, top_k, top_p):
    """The id that is drawn from the first n words, which are overwritten.

    key: uint64, temperature: above 0, top_k: 1 or more, top_p: above 1 keeps all words.
    """
    n = keep_likely(words, n, temperature, top_k, top_p)
    winner, _ = race(words.ids[:n], words.weights[:n], key)
    return words.ids[winner]


@cached_jit
def keep_likely(words, n, temperature, top_k, top_p):
    """Move the words that may be drawn to the front, make their weights; returns how many."""
    _, largest = extremes(words.scores[:n])
    if top_k < n:
        n = keep_first(words, n, False, np.float64(top_k))
    boltzmann(words.scores[:n], largest, temperature, words.weights[:n])
    if top_p < 1:
        n = keep_first(words, n, True, top_p * mass(words.weights[:n]))
    return n


@jit
def boltzmann(scores, largest, temperature, weights):
    """weights = exp((scores - largest) / temperature), at least 1e-38, for scores <= largest."""
    inverse, shift = min(1 / temperature, MOST_INVERSE), np.float64(largest)
    for i in range(len(scores)):
        weights[i] = np.float32((np.float64(scores[i]) - shift) * inverse)
    exponentials(weights, np.float32(0))


@sum_jit
def mass(weights):
    total = np.float64(0)
    for i in range(len(weights)):
        total += np.float64(weights[i])
    return total


@jit
def keep_first(words, n, weighted, target):
    """Keep a word if fewer than `target` come before it (their weights, if `weighted`); how many.

    At least the first is kept. The words stay in the order of their ids.
    """
    ids, scores, weights, kept = words.ids[:n], words.scores[:n], words.weights[:n], words.kept[:n]
    last_score, last_id = last_kept(ids, scores, weights, weighted, target, words)
    for i in range(n):
        kept[i] = (scores[i] > last_score) | ((scores[i] == last_score) & (ids[i] <= last_id))
    count = 0
    for i in range(n):  # without a branch, for nobody could foretell it
        ids[count], scores[count], weights[count] = ids[i], scores[i], weights[i]
        count += kept[i]
    return count


@jit
def last_kept(ids, scores, weights, weighted, target, room):
    """(score, id) of the last word that `keep_first` keeps. room: `Words`, for scratch."""
    n, before = len(scores), 0.0
    low, high = extremes(scores)
    masses = np.empty(BUCKETS)
    while low < high:
        buckets = room.buckets[:n]
        find_buckets(scores, low, high, buckets)
        masses[:] = 0
        for i in range(n):
            masses[buckets[i]] += np.float64(weights[i]) if weighted else 1.0
        bucket, before = where_reached(masses, before, target)
        n = gather(buckets, bucket, ids, scores, weights, room)
        ids, scores, weights = room.some_ids[:n], room.some_scores[:n], room.some_weights[:n]
        low, high = extremes(scores)
    last = 0  # all that are left are equal
    while last + 1 < n and before + (np.float64(weights[last]) if weighted else 1.0) < target:
        before += np.float64(weights[last]) if weighted else 1.0
        last += 1
    return high, ids[last]


@jit
def where_reached(masses, before, target):
    """The bucket in which the sum reaches `target`, or the last with anything; the sum before."""
    bucket = 0  # never empty: it holds the largest
    for i in range(1, BUCKETS):
        if before + masses[bucket] >= target:
            break
        if masses[i] > 0:
            before += masses[bucket]
            bucket = i
    return bucket, before


@jit
def find_buckets(scores, low, high, buckets):
    """Equal shares of the way from `high`, in bucket 0, to `low`, in the last one."""
    top, scale = np.float64(high), (BUCKETS - 1) / (np.float64(high) - np.float64(low))
    for i in range(len(scores)):
        place = np.int32((top - np.float64(scores[i])) * scale)
        buckets[i] = np.int16(min(place, np.int32(BUCKETS - 1)))


@jit
def gather(buckets, bucket, ids, scores, weights, room):
    """Copy the words of one bucket into the second half of `room`; returns how many."""
    count, n = 0, len(buckets)
    for first in range(0, n, BLOCK):
        end = min(first + BLOCK, n)
        if not occurs(bucket, buckets[first:end]):
            continue
        for i in range(first, end):
            if buckets[i] == bucket:
                room.some_ids[count] = ids[i]
                room.some_scores[count], room.some_weights[count] = scores[i], weights[i]
                count += 1
    return count


@jit
def occurs(number, numbers):
    found = np.int16(0)
    for i in range(len(numbers)):
        found |= np.int16(numbers[i] == number)
    return found != 0


@jit
def extremes(scores):
    """The smallest and the largest, compared as integers, which vectorizes."""
    bits = scores.view(np.int32)
    low = high = ordered(bits[0])
    for i in range(len(bits)):
        low, high = min(low, ordered(bits[i])), max(high, ordered(bits[i]))
    return as_float(np.int64(ordered(low))), as_float(np.int64(ordered(high)))


@jit
def ordered(bits):
    """The bits of a float32 as an int32 that is ordered like it; and back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit
def uniform(key, word):
    """A random number in (0, 1), a multiple of 2**-53 that depends on key and word alone.

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with the word as counter.
    """
    z = key + (np.uint64(word) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (np.float64(np.int64(z >> np.uint64(12))) + 0.5) * 2.0**-52


@jit
def waiting_time(u):
    """Exponentially distributed; exact where it matters, for small u: those are who wins."""
    return -math.log1p(-u)


@jit
def race(ids, weights, key):
    """(index, weight / waiting time) of the word whose ratio is largest; the lower id of equals."""
    winner, best = 0, -1.0
    for first in range(0, len(ids), BLOCK):
        end = min(first + BLOCK, len(ids))
        if not any_can_win(ids[first:end], weights[first:end], key, best):
            continue
        for i in range(first, end):
            if can_win(ids[i], weights[i], key, best):
                ratio = np.float64(weights[i]) / waiting_time(uniform(key, ids[i]))
                if ratio > best:
                    winner, best = i, ratio
    return winner, best


@jit
def can_win(word, weight, key, best):
    """False only if the word's ratio is below `best`: a waiting time is at least u.

    The margin is far above all rounding. So skipping a word changes nothing.
    """
    return np.float64(weight) > best * (uniform(key, word) * (1 - 1e-9))


@jit
def any_can_win(ids, weights, key, best):
    found = 0
    for i in range(len(ids)):
        found |= can_win(ids[i], weights[i], key, best)
    return found != 0
