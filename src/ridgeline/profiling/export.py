"""Write a trace for Perfetto or chrome://tracing with our findings as tracks of their own, or as Parquet.

Perfetto drops a slice that overlaps another on its track without lying inside it. Real traces hold such slices, so a
track is written as several lanes when it must be, and every lane nests::

    stream 7      [ kernel a )                    stream 7              [ kernel a )
                     [ kernel b )        ->       stream 7 (overlap 1)     [ kernel b )

Times are written in microseconds with three decimals from ``baseTimeNanoseconds``, so that no nanosecond is lost.
Files are written under another name first and renamed when whole.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import polars as pl

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.critical_path import critical_path
from ridgeline.profiling.classify import launches
from ridgeline.profiling.load import load_table
from ridgeline.profiling.output import Replacing, check_output
from ridgeline.profiling.table import Kind, TraceTable

CRITICAL_PATH = "critical path"
_CATEGORY = {
    Kind.CPU_OP: "cpu_op",
    Kind.ANNOTATION: "user_annotation",
    Kind.PYTHON: "python_function",
    Kind.RUNTIME: "cuda_runtime",
    Kind.KERNEL: "kernel",
    Kind.MEMCPY: "gpu_memcpy",
    Kind.MEMSET: "gpu_memset",
    Kind.DEVICE_OTHER: "gpu_other",
    Kind.GPU_ANNOTATION: "gpu_user_annotation",
    Kind.SYNC: "cuda_sync",
    Kind.COUNTER_RANGE: "cuda_profiler_range",
    Kind.OTHER: "other",
}
_PLAIN = frozenset({"start_ns", "end_ns", "name"})
Event = dict[str, Any]


def annotate(
    source: str | Path | TraceTable,
    out: str | Path,
    tracks: Mapping[str, pl.DataFrame] | None = None,
    path: pl.DataFrame | None = None,
) -> Path:
    """Write ``source`` as Chrome JSON with added tracks, gzipped when ``out`` ends in ``.gz``; returns ``out``.

    Args:
        source: a trace file (Python frames are kept), or a table.
        out: the file to write; replaced when it exists.
        tracks: name -> frame with ``start_ns`` and ``end_ns`` (or ``idle_ns``, ``duration_ns`` instead) and ``name`` (or
            ``cause``); other columns become arguments. For instance idle gaps or collectives.
        path: segments as from ``critical_path`` (default: those of the table), drawn with arrows between the tracks
            that it visits. Of frames with a ``rank`` column the rows of the table's rank are drawn.

    Raises:
        UserError: the source cannot be read, ``out`` is the source or no file, or a frame lacks its times.
    """
    target = Path(out)
    check_output("export", target, [source.meta.source if isinstance(source, TraceTable) else source])
    if not isinstance(source, TraceTable):
        source = load_table(source, stacks=True)
    segments = _path_of(source) if path is None else _of_rank(path, source)
    findings = {CRITICAL_PATH: segments, **(tracks or {})}
    spans = {name: _spans(name, _of_rank(frame, source)) for name, frame in findings.items()}
    _write(target, _text(source, spans, segments))
    return target


def to_parquet(table: TraceTable | pl.DataFrame, path: str | Path) -> Path:
    """Write a table (its columns, names spelled out, arguments as JSON text) or a result frame as Parquet."""
    target = Path(path)
    frame = to_frame(table) if isinstance(table, TraceTable) else table
    with Replacing(target) as partial:
        frame.write_parquet(partial.path)
    return target


def to_frame(table: TraceTable) -> pl.DataFrame:
    """The trace's rows as a frame: kind, name, pid, tid, start_ns, end_ns, correlation, device, stream, args."""
    names, threads = np.array(table.names, object), np.array([*table.threads, ("", "")], object)
    kinds = np.array([kind.name.lower() for kind in Kind], object)
    return pl.DataFrame(
        {
            "kind": pl.Series(kinds[table.kind].tolist(), dtype=pl.String),
            "name": pl.Series(names[table.name].tolist() if len(table) else [], dtype=pl.String),
            "pid": pl.Series(threads[table.thread, 0].tolist(), dtype=pl.String),
            "tid": pl.Series(threads[table.thread, 1].tolist(), dtype=pl.String),
            "start_ns": table.start,
            "end_ns": table.end,
            "correlation": table.correlation,
            "device": table.device,
            "stream": table.stream,
            "args": pl.Series([bytes(one).decode("utf-8", "replace") for one in table.args], dtype=pl.String),
        }
    )


def _path_of(table: TraceTable) -> pl.DataFrame:
    """The critical path without Python frames, which have tracks of their own and would cut it into crumbs."""
    rows = np.flatnonzero(~table.is_kind(Kind.PYTHON))
    path = critical_path(table.select(rows))
    found = path["row"].to_numpy()
    numbers = np.where(found >= 0, rows[np.maximum(found, 0)], -1) if rows.size else found
    return path.with_columns(pl.Series("row", numbers, pl.Int64))


def _of_rank(frame: pl.DataFrame, table: TraceTable) -> pl.DataFrame:
    """The rows of this table's rank, of a frame over several."""
    if "rank" not in frame.columns or table.meta.rank is None:
        return frame
    return frame.filter(pl.col("rank") == table.meta.rank)


def _spans(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """``frame`` with ``start_ns``, ``end_ns`` and ``name``, whatever its writer calls them."""
    length = next((one for one in ("idle_ns", "duration_ns") if one in frame.columns), None)
    if "end_ns" not in frame.columns and length is not None and "start_ns" in frame.columns:
        frame = frame.with_columns((pl.col("start_ns") + pl.col(length)).alias("end_ns"))
    if not {"start_ns", "end_ns"} <= set(frame.columns):
        raise UserError(f"export, track '{name}': the table has no start_ns and end_ns, but {', '.join(frame.columns)}")
    if "name" not in frame.columns:
        text = pl.col("cause") if "cause" in frame.columns else pl.lit(name)
        frame = frame.with_columns(text.alias("name"))
    return frame.sort(["start_ns", "end_ns"], descending=[False, True])


def lanes(start: list[int], end: list[int]) -> list[int]:
    """The lane of each slice, so that slices of one lane nest or are apart. Slices are sorted by start, longer first;
    each takes the first lane in which it fits."""
    open_ends: list[list[int]] = []
    out = []
    for begun, ended in zip(start, end, strict=True):
        for lane, stack in enumerate(open_ends):
            while stack and stack[-1] <= begun:
                stack.pop()
            if not stack or stack[-1] >= ended:
                stack.append(ended)
                out.append(lane)
                break
        else:
            open_ends.append([ended])
            out.append(len(open_ends) - 1)
    return out


class _Tracks:
    """Process and thread numbers for the file: the trace's own where viewers can tell them apart, new ones elsewhere.

    To Perfetto a number that is no unsigned one of 32 bits is 0, and thread 0 is the thread with its process's number:
    Kineto's negative threads and stream 0 of device 2 would be drawn over others.
    """

    def __init__(self, table: TraceTable) -> None:
        pids = list(dict.fromkeys(pid for pid, _ in table.threads))
        self._taken = {int(one) for pair in table.threads for one in pair if _fits(one, 0)}
        self.names: list[Event] = []
        self.pids = {pid: int(pid) if _fits(pid, 0) else self._new() for pid in pids}
        for text, number in self.pids.items():
            self._name("process_name", number, 0, text)
        self.ours = self.process("Ridgeline")
        self.place = [(self.pids[pid], int(tid) if _fits(tid, 1) else self._new()) for pid, tid in table.threads]
        for (pid, tid), (_, text) in zip(self.place, table.threads, strict=True):
            self._name("thread_name", pid, tid, text)

    def process(self, name: str) -> int:
        """A new process."""
        pid = self._new()
        self._name("process_name", pid, 0, name)
        return pid

    def lane(self, pid: int, name: str) -> int:
        """A new thread of a process."""
        tid = self._new()
        self._name("thread_name", pid, tid, name)
        return tid

    def _new(self) -> int:
        # Numbers of 32 bits at most, as a kernel's own are: viewers read no larger ones.
        number = max([one for one in self._taken if one < 2**30] + [0]) + 1
        self._taken.add(number)
        return number

    def _name(self, what: str, pid: int, tid: int, name: str) -> None:
        self.names.append(
            {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name or "unnamed"}}
        )


def _fits(text: str, least: int) -> bool:
    """Whether a viewer reads this number as it is."""
    return text.isdecimal() and text.isascii() and least <= int(text) < 2**31


def _text(table: TraceTable, spans: Mapping[str, pl.DataFrame], path: pl.DataFrame) -> Iterator[bytes]:
    """The file, piece by piece."""
    base = _base(table, spans)
    tracks = _Tracks(table)
    head = {"schemaVersion": 1, "baseTimeNanoseconds": base, "displayTimeUnit": "ns", "source": table.meta.source}
    if table.meta.rank is not None:
        head["distributedInfo"] = {"rank": table.meta.rank, "world_size": table.meta.world}
    yield json.dumps(head)[:-1].encode() + b', "traceEvents": [\n'
    place = _places(table, tracks)
    parts: list[Iterable[bytes]] = [_slices(table, place, base)]
    for name, frame in spans.items():
        parts.append(_annotations(tracks, name, frame, base))
    parts += [_arrows(table, place, path, base), _links(table, tracks, place, base), _marks(table, tracks, base)]
    first = True
    for part in parts:
        for line in part:
            yield line if first else b",\n" + line
            first = False
    for event in tracks.names:
        yield (b"" if first else b",\n") + json.dumps(event).encode()
        first = False
    yield b"\n]}\n"


def _base(table: TraceTable, spans: Mapping[str, pl.DataFrame]) -> int:
    starts = [int(table.start.min())] if len(table) else []
    starts += [int(frame["start_ns"].min()) for frame in spans.values() if len(frame)]  # type: ignore[arg-type]
    return min(starts, default=0)


def _places(table: TraceTable, tracks: _Tracks) -> list[tuple[int, int]]:
    """(pid, tid) of every row, overlapping ones on lanes of their own."""
    out: list[tuple[int, int]] = [(0, 0)] * len(table)
    ends = np.maximum(table.start, table.end)
    for thread in np.unique(table.thread).tolist():
        rows = np.flatnonzero(table.thread == thread)
        pid, tid = tracks.place[thread]
        tids = [tid]
        for row, lane in zip(rows.tolist(), lanes(table.start[rows].tolist(), ends[rows].tolist()), strict=True):
            while lane >= len(tids):
                tids.append(tracks.lane(pid, f"{table.threads[thread][1]} (overlap {len(tids)})"))
            out[row] = (pid, tids[lane])
    return out


def _micro(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


def _slices(table: TraceTable, place: list[tuple[int, int]], base: int) -> Iterator[bytes]:
    """One line per row of the table, arguments as they were."""
    names = [msgspec.json.encode(name).decode() for name in table.names]
    category = {int(kind): text for kind, text in _CATEGORY.items()}
    kinds, codes = table.kind.tolist(), table.name.tolist()
    starts, lengths = (table.start - base).tolist(), np.maximum(table.duration, 0).tolist()
    for row, (pid, tid) in enumerate(place):
        head = (
            f'{{"ph":"X","cat":"{category[kinds[row]]}","name":{names[codes[row]]},"pid":{pid},"tid":{tid},'
            f'"ts":{_micro(starts[row])},"dur":{_micro(lengths[row])}'
        ).encode()
        args = bytes(table.args[row])
        yield head + (b',"args":' + args + b"}" if args else b"}")


def _annotations(tracks: _Tracks, name: str, frame: pl.DataFrame, base: int) -> Iterator[bytes]:
    """The slices of one of our tracks."""
    frame = frame.filter(pl.col("end_ns") >= pl.col("start_ns"))
    start, end = frame["start_ns"].to_list(), frame["end_ns"].to_list()
    tids = [tracks.lane(tracks.ours, name)]
    extra = [column for column in frame.columns if column not in _PLAIN]
    for lane, row in zip(lanes(start, end), frame.iter_rows(named=True), strict=True):
        while lane >= len(tids):
            tids.append(tracks.lane(tracks.ours, f"{name} (overlap {len(tids)})"))
        event = {
            "ph": "X",
            "cat": "ridgeline",
            "name": str(row["name"]),
            "pid": tracks.ours,
            "tid": tids[lane],
            "ts": msgspec.Raw(_micro(row["start_ns"] - base).encode()),
            "dur": msgspec.Raw(_micro(row["end_ns"] - row["start_ns"]).encode()),
            "args": {column: row[column] for column in extra},
        }
        yield msgspec.json.encode(event)


def _arrows(table: TraceTable, place: list[tuple[int, int]], path: pl.DataFrame, base: int) -> Iterator[bytes]:
    """Flow arrows: along the critical path from track to track, and from launches to kernels."""
    number = 0
    for one, other, moment in _crossings(table, path):
        number += 1
        left = max(int(table.start[one]), min(moment, int(table.end[one]) - 1))
        ends = (one, left), (other, max(moment, left))
        for row, time in ends:
            if time > table.start[row]:  # an arrow ends at the slice that began last: inside of one that is this mark
                yield _instant(CRITICAL_PATH, place[row], time - base)
        yield from _arrow(CRITICAL_PATH, number, *[(place[row], time - base) for row, time in ends])
    launched = launches(table)
    for row in np.flatnonzero(launched >= 0).tolist():
        call = int(launched[row])
        if table.start[call] > table.start[row]:  # the clocks of host and device disagree: nothing to draw
            continue
        number += 1
        sent, begun = int(table.start[call]) - base, int(table.start[row]) - base
        yield from _arrow("ac2g", number, (place[call], sent), (place[row], begun))


def _links(table: TraceTable, tracks: _Tracks, place: list[tuple[int, int]], base: int) -> Iterator[bytes]:
    """Flow arrows from forward to backward operators, those in lanes of their own (see ``_places``) too."""
    codes, starts = table.thread.tolist(), table.start.tolist()
    moved = {(codes[row], starts[row]): at for row, at in enumerate(place) if at != tracks.place[codes[row]]}
    ends = zip(*(column.tolist() for column in table.links.__dict__.values()), strict=True)
    for number, (left, begun, entered, arrived) in enumerate(ends):
        places = (
            (moved.get((left, begun), tracks.place[left]), begun - base),
            (moved.get((entered, arrived), tracks.place[entered]), arrived - base),
        )
        yield from _arrow("fwdbwd", number, *places)


def _marks(table: TraceTable, tracks: _Tracks, base: int) -> Iterator[bytes]:
    """Instants and counters as they were, on the threads that have events."""
    places = dict(zip(table.threads, tracks.place, strict=True))
    for mark in table.marks:
        if mark.time_ns < base or mark.thread not in places:
            continue
        pid, tid = places[mark.thread]
        event: Event = {"ph": mark.phase, "name": mark.name, "pid": pid, "tid": tid}
        event["ts"] = msgspec.Raw(_micro(mark.time_ns - base).encode())
        if mark.phase == "i":
            event["s"] = "t"
        if mark.args:
            event["args"] = msgspec.Raw(mark.args)
        yield msgspec.json.encode(event)


def _crossings(table: TraceTable, path: pl.DataFrame) -> Iterator[tuple[int, int, int]]:
    """(row left, row entered, moment) where the path goes from one track to another."""
    if "row" not in path.columns:
        return
    last = -1
    for row, start in path.select("row", "start_ns").iter_rows():
        if row < 0:
            continue
        if last >= 0 and table.thread[last] != table.thread[row]:
            yield last, row, max(start, int(table.start[row]))
        last = row


def _arrow(
    name: str, number: int, left: tuple[tuple[int, int], int], entered: tuple[tuple[int, int], int]
) -> Iterator[bytes]:
    for phase, ((pid, tid), moment) in (("s", left), ("f", entered)):
        tail = ',"bp":"e"' if phase == "f" else ""
        yield (
            f'{{"ph":"{phase}","cat":"{name}","name":"{name}","id":{number},"pid":{pid},"tid":{tid},'
            f'"ts":{_micro(moment)}{tail}}}'
        ).encode()


def _instant(name: str, place: tuple[int, int], moment: int) -> bytes:
    pid, tid = place
    head = f'{{"ph":"i","s":"t","cat":"{name}","name":"{name}","pid":{pid},"tid":{tid}'
    return f'{head},"ts":{_micro(moment)}}}'.encode()


def _write(target: Path, pieces: Iterable[bytes]) -> None:
    with Replacing(target) as partial:
        if target.suffix == ".gz":
            # No name and no time inside: equal traces give equal files.
            with open(partial.path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, 0) as file:
                _copy(pieces, file)
        else:
            with open(partial.path, "wb") as plain:
                _copy(pieces, plain)


def _copy(pieces: Iterable[bytes], file: IO[bytes] | gzip.GzipFile) -> None:
    held: list[bytes] = []
    for piece in pieces:
        held.append(piece)
        if len(held) == 4096:
            file.write(b"".join(held))
            held.clear()
    file.write(b"".join(held))
