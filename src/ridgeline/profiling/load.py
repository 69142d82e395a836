"""Read profiler traces into tables: any schema generation, any size, one file or many, one rank or several in a file.

::

    blocks of text -> events, a chunk at a time -> columns -> sorted table -> (one table per rank)
    sources.py        chunks.py                    gather.py  here             ranks.py

Small and large files take the same way. Past :data:`STREAM_BYTES` of text only the arguments of collectives, copies
and counters are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.errors import UserError
from ridgeline.profiling.chunks import CHUNK, Chunks, Header, NotATrace, repair
from ridgeline.profiling.codes import text_codes
from ridgeline.profiling.decimal_time import BELIEVABLE
from ridgeline.profiling.gather import Columns
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.ranks import name_devices, split_ranks
from ridgeline.profiling.sources import TRACE_SUFFIXES, Progress, Reader, find_traces
from ridgeline.profiling.table import Kind, Links, Mask, TraceMeta, TraceTable, look_up

__all__ = [
    "STREAM_BYTES",
    "TRACE_SUFFIXES",
    "Progress",
    "find_traces",
    "load_table",
    "load_tables",
    "parse_table",
    "repair",
]

STREAM_BYTES = 512 << 20
"""Raw text beyond which a trace is streamed: chosen arguments only, no marks."""
_RANK_IN_NAME = re.compile(r"rank[_-]?(\d{1,9})", re.IGNORECASE)


def load_tables(
    where: str | Path | Sequence[str | Path], *, stacks: bool = False, progress: Progress | None = None
) -> list[TraceTable]:
    """The tables of a file, a folder of ranks, a glob or a list of these; a file of several ranks gives one each.

    ``progress(done_bytes, total_bytes)`` is called as the files (as they are on disk) are read.

    Raises:
        UserError: nothing there, unreadable, or not a trace; one line that says which.
    """
    paths = find_traces(where)
    sizes = [Reader(path).size for path in paths]
    tables: list[TraceTable] = []
    for at, path in enumerate(paths):
        reader = Reader(path, progress, sum(sizes[:at]), sum(sizes))
        tables += split_ranks(*_read(reader, stacks))
    return tables


def load_table(path: str | Path, stacks: bool = False) -> TraceTable:
    """One file as one table, whatever ranks it holds. Python-stack events are left out unless ``stacks``.

    Raises:
        UserError: unreadable, or not a trace; one line that says which.
    """
    return _read(Reader(Path(path)), stacks)[0]


def parse_table(data: bytes, source: str, stacks: bool = False) -> TraceTable:
    """The table of a trace's (uncompressed) text; ``source`` names it in errors and gives the rank if nothing else does.

    Raises:
        UserError: not a trace, or no event of it can be had.
    """
    blocks = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    return _gather(blocks, source, stacks, len(data))[0]


def _read(reader: Reader, stacks: bool) -> tuple[TraceTable, Columns]:
    try:
        table, columns = _gather(reader.blocks(), str(reader.path), stacks, reader.raw_size())
    except UserError as error:
        raise UserError("; ".join([str(error), *reader.notes])) from None
    if reader.notes:
        table = replace(table, meta=replace(table.meta, repairs=(*reader.notes, *table.meta.repairs)))
    return table, columns


def _gather(blocks: Iterable[bytes], source: str, stacks: bool, size: int) -> tuple[TraceTable, Columns]:
    """The table, and the columns it came from (what they know of threads and processes)."""
    chunks, columns = Chunks(blocks), Columns(stacks)
    if size > STREAM_BYTES:
        columns.stream()
    try:
        for events in chunks:
            columns.add(events)
            if chunks.raw_bytes > STREAM_BYTES:
                columns.stream()
    except NotATrace as error:
        raise UserError(f"trace {source}: {error}") from None
    header = chunks.header()
    return _table(source, columns, header, chunks), columns


def _table(source: str, columns: Columns, header: Header, chunks: Chunks) -> TraceTable:
    """Sort the columns, drop duplicates, and say what was done. One column at a time: a large trace fits but once."""
    notes = list(chunks.repairs)
    base = _base(header, notes)
    name_place, names = text_codes(columns.names, str)
    thread_place, threads = text_codes(columns.threads, lambda one: (str(one[0]), str(one[1])))
    marks = columns.marks(base)
    name = look_up(name_place, columns.take("name", np.int32))
    thread = look_up(thread_place, columns.take("thread", np.int32))
    start = columns.take("start", np.int64)
    start += base
    end = columns.take("length", np.int64)
    end += start
    if columns.unreadable:
        notes.append(f"{columns.unreadable} events without a readable time left out")
        if not start.size and not marks:
            raise UserError(f"trace {source}: not a time in any of its {columns.unreadable} events")
    order = _order(start, end, thread, name)
    start, end = start[order], end[order]
    name, thread = name[order], thread[order]
    kind = columns.take("kind", np.int8)[order]
    kind[(kind == Kind.CPU_OP) & look_up(columns.annotation_names(names), name)] = Kind.ANNOTATION
    number = np.int32 if columns.streaming else np.int64
    correlation = columns.take("correlation", number)[order]
    device, stream = columns.take("device", np.int32)[order], columns.take("stream", number)[order]
    args = columns.take_args(order)
    skipped = columns.skipped()
    links = _links(columns.arrows(), thread_place, _with_rows(thread, len(threads)), base, skipped)
    meta = _meta(source, header, chunks, skipped, columns.streaming)
    table = TraceTable(
        meta, names, threads, kind, name, thread, start, end, args, correlation, device, stream, links, marks
    )
    table, said = name_devices(_without_duplicates(table, notes), columns.labels)
    return replace(table, meta=replace(meta, repairs=(*notes, *said)))


def _order(start: Times, end: Times, thread: NDArray[np.int32], name: NDArray[np.int32]) -> NDArray[np.intp]:
    """Rows by (start, longer first, thread, name). Few starts are equal, so only those are compared further."""
    order = np.argsort(start, kind="stable")
    ordered = start[order]
    same = ordered[1:] == ordered[:-1]
    tied = np.flatnonzero(np.concatenate((same, [False])) | np.concatenate(([False], same))) if start.size else order
    if tied.size:
        rows = order[tied]
        order[tied] = rows[np.lexsort((name[rows], thread[rows], -end[rows], start[rows]))]
    return order


def _with_rows(thread: NDArray[np.int32], count: int) -> Mask:
    """Which threads have a row. ``[threads]``"""
    return np.bincount(thread, minlength=count).astype(np.bool_)


def _without_duplicates(table: TraceTable, notes: list[str]) -> TraceTable:
    """Leave out rows that say the same as the row before them in everything, arguments included (a file merged with
    itself). Rows without arguments are never called duplicates: short calls of one name may share a microsecond."""
    columns = (table.start, table.end, table.thread, table.name, table.correlation)
    same = np.ones(max(len(table) - 1, 0), np.bool_)
    for column in columns:
        same &= column[1:] == column[:-1]
    args = table.args
    twice = [row + 1 for row in np.flatnonzero(same).tolist() if args[row] and bytes(args[row]) == bytes(args[row + 1])]
    if not twice:
        return table
    notes.append(f"{len(twice)} duplicated events left out")
    keep = np.ones(len(table), np.bool_)
    keep[twice] = False
    return table.select(np.flatnonzero(keep))


def _links(
    arrows: NDArray[np.int64], place: NDArray[np.int32], timed: Mask, base: int, skipped: dict[str, int]
) -> Links:
    """Pair the two ends of each arrow by id; an end on a thread without any timed event leads nowhere."""
    begins, ids, _, _ = arrows
    thread = place[arrows[2]] if place.size else arrows[2]
    usable = timed[thread] if timed.size else np.zeros(thread.size, np.bool_)
    first = np.full(int(ids.max(initial=-1)) + 1, -1, np.int64)
    source, target = np.flatnonzero(begins), np.flatnonzero(1 - begins)
    first[ids[source]] = source
    origin = first[ids[target]]
    whole = (origin >= 0) & usable[target] & usable[origin]
    origin, target = origin[whole], target[whole]
    moments = arrows[3] + base
    order = np.lexsort((moments[target], thread[target], thread[origin], moments[origin]))
    origin, target = origin[order], target[order]
    if arrows.shape[1] > 2 * target.size:
        skipped["unpaired:fwdbwd"] = arrows.shape[1] - 2 * int(target.size)
    codes = thread.astype(np.int32)
    return Links(codes[origin], moments[origin], codes[target], moments[target])


def _meta(source: str, header: Header, chunks: Chunks, skipped: dict[str, int], streamed: bool) -> TraceMeta:
    info = header.distributedInfo if isinstance(header.distributedInfo, dict) else {}
    ours = _ours(header)
    in_name = _RANK_IN_NAME.search(Path(source).name)
    return TraceMeta(
        source=source,
        rank=_first_int(info.get("rank"), ours.get("rank"), in_name.group(1) if in_name else None),
        world=_first_int(info.get("world_size"), ours.get("world")),
        host=header.host_name if isinstance(header.host_name, str) else None,
        backend=info.get("backend") if isinstance(info.get("backend"), str) else None,
        schema="list" if chunks.bare else "object",
        ridgeline=ours,
        skipped=skipped,
        raw_bytes=chunks.raw_bytes,
        streamed=streamed,
    )


def _ours(header: Header) -> dict[str, Any]:
    """The block of our own capture, if the file has one."""
    block = header.ridgeline
    try:
        block = json.loads(block) if isinstance(block, str) else block
    except (ValueError, RecursionError):
        block = None
    ours = dict(block) if isinstance(block, dict) else {}
    if type(header.ridgeline_recorded) is int:
        ours["recorded"] = header.ridgeline_recorded
    return ours


def _base(header: Header, notes: list[str]) -> int:
    """``baseTimeNanoseconds``, which times of torch 2.4 and later are relative to."""
    base = _first_int(header.baseTimeNanoseconds) or 0
    if base <= BELIEVABLE:
        return base
    notes.append("baseTimeNanoseconds is beyond belief and was read as 0")
    return 0


def _first_int(*candidates: Any) -> int | None:
    for value in candidates:
        if type(value) in (int, str) and (text := str(value)[:40]).isascii() and text.isdigit():
            return int(text)
    return None
