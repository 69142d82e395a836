"""What is measured on every document, kept or not: the quantities of the Gopher rules (Rae et al. 2021).

A *word* is what stands between white space, with the punctuation around it peeled off as words of their own:
``("Yes," he`` is the four words ``("``, ``Yes``, ``,"``, ``he``. Punctuation is what Unicode files under P or S. A word
of nothing but punctuation is a *symbol word*; it is not counted by ``words`` and ``mean_word_length``, and it is
counted by everything else. Every value is finite: a share of nothing is 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ridgeline.data.repetition import DUPLICATE, TOP, Ints, Spans, repetition

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
FEATURES = (
    "characters",
    "words",
    "mean_word_length",
    "hash_word_ratio",
    "ellipsis_word_ratio",
    "bullet_line_ratio",
    "ellipsis_line_ratio",
    "alpha_word_ratio",
    "stop_words",
    "duplicate_line_ratio",
    "duplicate_paragraph_ratio",
    "duplicate_line_char_ratio",
    "duplicate_paragraph_char_ratio",
    *(f"top_{n}_gram_char_ratio" for n in TOP),
    *(f"duplicate_{n}_gram_char_ratio" for n in DUPLICATE),
)
SPACE, PUNCTUATION, LETTER = 1, 2, 4
PARAGRAPHS = re.compile(r"\n{2,}")
LINES = re.compile(r"\n+")
BATCH_CHARACTERS = 1 << 18


def measure(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Every feature of every text, ``float64 [documents, len(FEATURES)]``. The result does not depend on batching."""
    out = np.zeros((len(texts), len(FEATURES)))
    start = total = 0
    for position, text in enumerate(texts):
        if total and total + len(text) > BATCH_CHARACTERS:
            out[start:position] = _measure(texts[start:position])
            start, total = position, 0
        total += len(text)
    if start < len(texts):
        out[start:] = _measure(texts[start:])
    return out


def _measure(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    lengths = np.array([len(text) for text in texts], np.int64)
    columns: dict[str, npt.NDArray[np.float64] | Ints] = {"characters": lengths}
    words = _Words(texts, lengths)
    columns["words"] = words.total(~words.symbol)
    columns["mean_word_length"] = _share(words.total(np.where(words.symbol, 0, words.length)), columns["words"])
    columns["alpha_word_ratio"] = _share(words.total(words.alpha), words.count)
    columns["stop_words"] = words.stop_words()
    lines = np.array([_lines(text) for text in texts], np.float64).reshape(len(texts), 8)
    columns["hash_word_ratio"] = _share(lines[:, 0], words.count)
    columns["ellipsis_word_ratio"] = _share(lines[:, 1], words.count)
    names = ("bullet_line_ratio", "ellipsis_line_ratio", "duplicate_line_ratio", "duplicate_paragraph_ratio")
    columns.update({name: lines[:, 2 + position] for position, name in enumerate(names)})
    columns["duplicate_line_char_ratio"] = _share(lines[:, 6], lengths)
    columns["duplicate_paragraph_char_ratio"] = _share(lines[:, 7], lengths)
    top, duplicate = repetition(words.spans, words.bounds, words.offsets)
    columns.update({f"top_{n}_gram_char_ratio": _share(value, lengths) for n, value in top.items()})
    columns.update({f"duplicate_{n}_gram_char_ratio": _share(value, lengths) for n, value in duplicate.items()})
    return np.stack([np.asarray(columns[name], np.float64) for name in FEATURES], axis=1)


class _Words:
    """The words of all texts of a batch, as spans of one array of characters that no white space is left in."""

    def __init__(self, texts: Sequence[str], lengths: Ints) -> None:
        # One newline after each text keeps words from reaching into the next document.
        joined = "\n".join(texts) + "\n"
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        classes = _classes(codes)
        solid = (classes & SPACE) == 0
        compact = np.zeros(len(codes) + 1, np.int64)
        np.cumsum(solid, out=compact[1:])
        starts, ends, self.symbol = _peel(solid, solid & ((classes & PUNCTUATION) == 0))
        self.spans = Spans(codes[solid])
        self.bounds = np.append(compact[starts], compact[-1])
        self.length = ends - starts
        letters = np.zeros(len(codes) + 1, np.int64)
        np.cumsum((classes & LETTER) != 0, out=letters[1:])
        self.alpha = letters[ends] > letters[starts]
        text_starts = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(lengths + 1, out=text_starts[1:])
        self.offsets = np.searchsorted(starts, text_starts).astype(np.int64)
        self.count = np.diff(self.offsets)

    def total(self, values: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Ints:
        """Sum of a value per word over each document."""
        sums = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=sums[1:])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

    def stop_words(self) -> Ints:
        """How many different stop words each document holds, case-sensitive."""
        hashes = self.spans.hash(self.bounds[:-1], self.bounds[1:])
        found = np.zeros(len(self.count), np.int64)
        for word in STOP_WORDS:
            letters = np.array([ord(c) for c in word], np.uint32)
            wanted = Spans(letters).hash(np.array([0]), np.array([len(word)]))[0]
            found += self.total(hashes == wanted) > 0
        return found


def _peel(solid: npt.NDArray[np.bool_], core: npt.NDArray[np.bool_]) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Starts, ends and symbol flags of words: each run of ``solid`` cut before its first and after its last ``core``."""
    edges = np.flatnonzero(np.diff(solid, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    inner = np.flatnonzero(core)
    low, high = np.searchsorted(inner, starts), np.searchsorted(inner, ends)
    some = high > low
    padded = np.append(inner, 0)
    first = np.where(some, padded[low], ends)
    last = np.where(some, padded[high - 1] + 1, ends)
    word_starts = np.stack([starts, first, last], axis=1).ravel()
    word_ends = np.stack([first, last, ends], axis=1).ravel()
    symbol = np.tile([True, False, True], len(starts))
    real = word_ends > word_starts
    return word_starts[real], word_ends[real], symbol[real]


def _classes(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Bits SPACE, PUNCTUATION and LETTER of every code point, from Python's own Unicode tables."""
    ascii_table = np.array([_class(chr(code)) for code in range(128)], np.uint8)
    out = ascii_table[np.minimum(codes, 127)]
    wide = np.flatnonzero(codes >= 128)
    if len(wide):
        known, which = np.unique(codes[wide], return_inverse=True)
        out[wide] = np.array([_class(chr(code)) for code in known.tolist()], np.uint8)[which]
    return out


def _class(character: str) -> int:
    bits = SPACE if character.isspace() else 0
    if unicodedata.category(character)[0] in "PS":
        bits |= PUNCTUATION
    return bits | (LETTER if character.isalpha() else 0)


def _lines(text: str) -> tuple[float, ...]:
    """'#' and ellipses; shares of bulleted, of ellipsis-ended, of duplicate lines and paragraphs; duplicate characters."""
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    line_share, line_characters = _duplicates(LINES.split(text))
    paragraph_share, paragraph_characters = _duplicates(PARAGRAPHS.split(text.strip()))
    count = max(len(lines), 1)
    hashes, ellipses = text.count("#"), text.count("...") + text.count("…")
    shares = (bullets / count, trailing / count, line_share, paragraph_share)
    return (hashes, ellipses, *shares, line_characters, paragraph_characters)


def _duplicates(pieces: list[str]) -> tuple[float, int]:
    """Share of ``pieces`` that were there before, and their characters (first occurrences not counted)."""
    first = set(pieces)
    characters = sum(map(len, pieces)) - sum(map(len, first))
    return (len(pieces) - len(first)) / len(pieces), characters


def _share(part: npt.NDArray[np.number], whole: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    out = np.zeros(len(part))
    np.divide(part, whole, out=out, where=np.asarray(whole) > 0)
    return out
