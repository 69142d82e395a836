"""What events were called with, small enough for a page: equal sets of arguments are written once.

Numbers that differ from event to event and say nothing to a reader (the profiler's own ids) are cut out of the raw
JSON before sets are compared, so that a thousand launches of one kernel share one set::

    {"External id": 7, "grid": [8, 1, 1]}   \\
    {"External id": 9, "grid": [8, 1, 1]}   /   {"grid": [8, 1, 1]}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.table import TraceTable

MOST_BYTES = 4_000_000
"""Text of all sets together; over that the sets that account for the least time are left out."""
MOST_CHARACTERS = 1_500
"""Of one value; the rest of it is left out."""
IDS = (
    "External id",
    "Ev Idx",
    "Record function id",
    "Profiler Event Index",
    "Python id",
    "Python parent id",
    "Python module id",
    "Python thread",
    "Sequence number",
    "Fwd thread id",
    "Trace name",
    "Trace iteration",
    "correlation",
    "cbid",
    "context",
    "queued",
)
"""Not shown: numbers of the profiler's own, what the lane says already, and the correlation, which the page has."""
_ID = rb'"(?:' + b"|".join(name.encode() for name in IDS) + rb')"\s*:\s*(?:-?\d+|"(?:-?\d+)?"|null)(?=\s*[,}])'
# With the comma before it where it ends an object, else with the comma after it. A key in a text has escaped quotes.
_IDS = re.compile(rb"(?:,\s*" + _ID + rb")+(?=\s*\})|" + _ID + rb"\s*(?:,\s*|(?=\}))")


@dataclass(frozen=True)
class Arguments:
    """``codes[i]`` (one array per rank, ``[events]``) is 0 for an event without arguments, else ``1 +`` its position in
    ``sets``, each a JSON object as text. ``note`` says what was left out, empty when nothing was."""

    codes: list[NDArray[np.int64]]
    sets: list[str]
    note: str


def gather(tables: Sequence[TraceTable], rows: Sequence[NDArray[np.intp]], most: int = MOST_BYTES) -> Arguments:
    """The arguments of these rows of each table (of row -1 none), at most ``most`` bytes of text."""
    seen: dict[bytes, int] = {b"": 0}
    raw = [_raw_codes(table, chosen, seen) for table, chosen in zip(tables, rows, strict=True)]
    texts = [_clean(one) for one in seen]
    distinct = {text: at for at, text in enumerate(dict.fromkeys(["", *(text for text, _ in texts)]))}
    merged = np.array([distinct[text] for text, _ in texts], np.int64)
    codes = [merged[one] for one in raw]
    kept, left = _within(list(distinct), codes, tables, rows, most)
    cut = sum(int(np.isin(one, _cut_codes(texts, merged)).sum()) for one in codes)
    place = np.cumsum(kept) - 1
    place[~kept] = 0
    final = [text for text, keep in zip(distinct, kept.tolist(), strict=True) if keep]
    return Arguments([place[one] for one in codes], final[1:], _note(left, cut, tables))


def _raw_codes(table: TraceTable, rows: NDArray[np.intp], seen: dict[bytes, int]) -> NDArray[np.int64]:
    """A code per row; ``seen`` grows by the raw sets that are new."""
    args, strip = table.args, _IDS.sub
    out = [seen.setdefault(strip(b"", bytes(args[row])), len(seen)) if row >= 0 else 0 for row in rows.tolist()]
    return np.array(out, np.int64)


def _clean(raw: bytes) -> tuple[str, bool]:
    """(a set as compact JSON without empty values, whether a long value was cut); no text for no arguments."""
    if not raw:
        return "", False
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", False
    if not isinstance(found, dict):
        return "", False
    short = {name: _short(value) for name, value in found.items() if value not in (None, "", [], {})}
    text = msgspec.json.encode(short).decode() if short else ""
    return text, any(short[name] is not found[name] for name in short)


def _short(value: Any) -> Any:
    """The value, or the beginning of its text when that is long."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return value if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


def _cut_codes(texts: Sequence[tuple[str, bool]], merged: NDArray[np.int64]) -> NDArray[np.int64]:
    return merged[np.array([cut for _, cut in texts], np.bool_)]


def _within(
    texts: Sequence[str],
    codes: Sequence[NDArray[np.int64]],
    tables: Sequence[TraceTable],
    rows: Sequence[NDArray[np.intp]],
    most: int,
) -> tuple[NDArray[np.bool_], int]:
    """(which sets fit, those of most time first; how many events lose theirs). The empty set is always kept."""
    size = np.array([len(text.encode()) for text in texts], np.int64)
    kept = np.ones(size.size, np.bool_)
    if int(size.sum()) <= most:
        return kept, 0
    time, count = np.zeros(size.size), np.zeros(size.size, np.int64)
    for one, table, chosen in zip(codes, tables, rows, strict=True):
        time += np.bincount(one, np.maximum(table.duration[chosen], 0), size.size)
        count += np.bincount(one, minlength=size.size)
    time[0] = np.inf
    order = np.argsort(-time, kind="stable")
    kept[order] = np.cumsum(size[order]) <= most
    return kept, int(count[~kept].sum())


def _note(left: int, cut: int, tables: Sequence[TraceTable]) -> str:
    parts = []
    if any(table.meta.streamed for table in tables):
        parts.append("The trace was too large to keep every argument: those of collectives and copies are here.")
    if left:
        parts.append(f"The arguments of {left:,} events are left out, to keep the page small.")
    if cut:
        parts.append(f"Values longer than {MOST_CHARACTERS:,} characters are cut ({cut:,} events).")
    return " ".join(parts)
