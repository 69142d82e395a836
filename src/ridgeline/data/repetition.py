"""How much of a document repeats itself, as character shares of repeated n-grams, over many documents at once.

Definitions: Rae et al. 2021 (Gopher), table A1, as the public pipelines compute them:

- *top n-gram*: the most frequent n-gram (the first met among equals; it counts even when it occurs once), its
  words joined by one space: occurrences x its characters / characters of the text.
- *duplicate n-grams*: scan from the left; an n-gram that was met before adds its characters (words joined by
  nothing) and the scan jumps n words; any other is remembered and the scan moves one word.

Python's sets do this at a few MB/s. Here an n-gram is a 64-bit number: the difference of two prefix sums of a
polynomial hash modulo 2**64, so that any span of characters costs the same. A bitmap of hash buckets finds the
few that can repeat, only those are sorted, and the scan visits only them. Two different n-grams of one batch share
a number with a probability of about 1e-8; then a share changes by one n-gram.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 1 << 64)
BUCKETS = 1 << 18  # of a batch of about 2**18 characters: the counts stay in a core's cache


def mix(values: Words) -> Words:
    """The finaliser of splitmix64: a permutation of 64-bit numbers in which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Spans:
    """Hashes of spans ``[start, end)`` of a sequence of numbers; equal sequences have equal hashes."""

    def __init__(self, values: npt.NDArray[np.integer]) -> None:
        powers = _powers(BASE, len(values))
        self.inverse = _powers(INVERSE, len(values) + 1)
        self.prefix = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(mix(values.astype(np.uint64) + np.uint64(1)) * powers, out=self.prefix[1:])

    def hash(self, starts: Ints, ends: Ints) -> Words:
        """uint64 of the shape of ``starts``."""
        return mix((self.prefix[ends] - self.prefix[starts]) * self.inverse[starts])


def repetition(spans: Spans, bounds: Ints, offsets: Ints) -> tuple[dict[int, Ints], dict[int, Ints]]:
    """Characters in the top n-gram and in duplicate n-grams of every document.

    Args:
        spans: hashes over the characters of all words of all documents, without what separates words.
        bounds: ``[words + 1]``, where each word starts in that sequence.
        offsets: ``[documents + 1]``, the first word of each document.

    Returns:
        ``{n: int64 [documents]}`` for n in TOP, and for n in DUPLICATE; 0 where a document is shorter than n words.
    """
    words = len(bounds) - 1
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    salt = mix(document.astype(np.uint64) + np.uint64(1))
    word_hash = spans.hash(bounds[:-1], bounds[1:])
    sequence = Spans(word_hash)
    top, duplicate = {}, {}
    for n in TOP + DUPLICATE:
        first = np.flatnonzero(document[: max(words - n + 1, 0)] == document[n - 1 :])
        starts, ends = bounds[first], bounds[first + n]
        if n in TOP:
            keys = sequence.hash(first, first + n) ^ salt[first]
            top[n] = _top(keys, ends - starts + n - 1, document[first], len(offsets) - 1)
        else:
            keys = spans.hash(starts, ends) ^ salt[first]
            duplicate[n] = _duplicate(keys, first, ends - starts, document[first], len(offsets) - 1, n)
    return top, duplicate


def _repeated(keys: Words) -> tuple[Ints, Ints]:
    """Positions (ascending) of the keys that occur more than once, and a group number for each of them."""
    buckets = (keys & np.uint64(BUCKETS - 1)).astype(np.int64)
    possible = np.flatnonzero(np.bincount(buckets, minlength=BUCKETS)[buckets] > 1)
    order = np.argsort(keys[possible])
    ordered = keys[possible][order]
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    group = np.cumsum(new) - 1
    several = np.bincount(group, minlength=1)[group] > 1
    positions, groups = possible[order][several], group[several]
    ascending = np.argsort(positions)
    return positions[ascending], groups[ascending]


def _top(keys: Words, lengths: Ints, document: Ints, documents: int) -> Ints:
    """Occurrences x characters of each document's most frequent n-gram, the first one among equals."""
    out = np.zeros(documents, np.int64)
    known, first = np.unique(document, return_index=True)
    out[known] = lengths[first]
    positions, groups = _repeated(keys)
    if not len(positions):
        return out
    _, earliest, counts = np.unique(groups, return_index=True, return_counts=True)
    position = positions[earliest]
    order = np.lexsort((position, -counts, document[position]))
    owner, best = np.unique(document[position][order], return_index=True)
    chosen = order[best]
    out[owner] = counts[chosen] * lengths[position[chosen]]
    return out


def _duplicate(keys: Words, first: Ints, lengths: Ints, document: Ints, documents: int, n: int) -> Ints:
    """The left-to-right scan, over the n-grams that occur more than once: any other is only ever stepped over."""
    out = np.zeros(documents, np.int64)
    positions, groups = _repeated(keys)
    met = bytearray(int(groups.max()) + 1 if len(groups) else 0)
    resume, hits = -1, []
    for index, (word, group) in enumerate(zip(first[positions].tolist(), groups.tolist(), strict=True)):
        if word < resume:
            continue
        if met[group]:
            hits.append(index)
            resume = word + n
        else:
            met[group] = 1
    chosen = positions[np.array(hits, np.int64)]
    np.add.at(out, document[chosen], lengths[chosen])
    return out


def _powers(base: int, count: int) -> Words:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers) if count else powers
