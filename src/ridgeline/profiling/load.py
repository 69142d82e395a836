"""Read a profiler trace: ``.json`` or ``.json.gz``, object or bare list, any schema generation, into a table.

msgspec decodes only the fields that every analysis needs and leaves times and arguments as raw text.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.errors import UserError
from ridgeline.profiling.decimal_time import microseconds_to_ns
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.table import (
    ANNOTATION_NAMES,
    DEVICE_KINDS,
    Kind,
    Links,
    Mark,
    TraceMeta,
    TraceTable,
    kind_of,
)

TRACE_SUFFIXES = (".json", ".json.gz")
_RANK_IN_NAME = re.compile(r"rank[_-]?(\d+)", re.IGNORECASE)


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    name: Any = ""
    cat: str | None = None
    pid: Any = None
    tid: Any = None
    ts: msgspec.Raw = msgspec.Raw(b"0")
    dur: msgspec.Raw = msgspec.Raw(b"0")
    args: msgspec.Raw = msgspec.Raw(b"")
    id: Any = None


class _File(msgspec.Struct):
    traceEvents: list[_Event] | None = None
    baseTimeNanoseconds: Any = 0
    distributedInfo: Any = None
    host_name: Any = None
    ridgeline: Any = None
    ridgeline_recorded: Any = None


def find_traces(where: str | Path | Sequence[str | Path]) -> list[Path]:
    """The trace files of a file, a folder of ranks (not searched below), or a list of files, by name.

    Raises:
        UserError: nothing there, or no trace in the folder.
    """
    if isinstance(where, (list, tuple)):
        return [path for one in where for path in find_traces(one)]
    path = Path(str(where))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"trace {path}: no such file or folder")
    found = sorted(file for file in path.iterdir() if file.name.endswith(TRACE_SUFFIXES) and file.is_file())
    if not found:
        raise UserError(f"trace folder {path}: holds no .json or .json.gz file")
    return found


def load_table(path: str | Path, stacks: bool = False) -> TraceTable:
    """One rank's trace as a table. Python-stack events are left out unless ``stacks``.

    Raises:
        UserError: unreadable, truncated, or not a trace; one line that says which.
    """
    return parse_table(_read(Path(path)), str(path), stacks)


def parse_table(data: bytes, source: str, stacks: bool = False) -> TraceTable:
    """The table of a trace's (uncompressed) text; ``source`` names it in errors and gives the rank if nothing else does.

    Raises:
        UserError: truncated, or not a trace.
    """
    try:
        file, repairs = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"trace {source}: not a whole profiler trace ({error}, of {len(data)} bytes)") from None
    if file.traceEvents is None:
        raise UserError(f"trace {source}: not a profiler trace (JSON without 'traceEvents')")
    try:
        return _table(source, file, repairs, len(data), stacks, bare=_is_list(data))
    except (ValueError, TypeError) as error:
        raise UserError(f"trace {source}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"trace {path}: the gzip stream is cut off or damaged ({error})") from None
    except OSError as error:
        raise UserError(f"trace {path}: cannot be read ({error.strerror or error})") from None


def _decode(data: bytes) -> tuple[_File, tuple[str, ...]]:
    """Decode, and when that fails once more after the known defects of writers are repaired; says which."""
    try:
        return _parse(data), ()
    except (msgspec.DecodeError, UnicodeDecodeError) as first:
        repaired, repairs = repair(data)
        if not repairs:
            raise first
        return _parse(repaired), repairs


def _parse(data: bytes) -> _File:
    if _is_list(data):
        return _File(traceEvents=msgspec.json.decode(data, type=list[_Event]))
    return msgspec.json.decode(data, type=_File)


def _is_list(data: bytes) -> bool:
    return re.match(rb"\s*\[", data) is not None


def repair(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Make text of real writers' defects JSON: bytes that are not UTF-8, control characters in strings, NaN and Inf."""
    steps: dict[str, Callable[[bytes], bytes]] = {
        "bytes that are not UTF-8 replaced": lambda raw: raw.decode("utf-8", "replace").encode(),
        "control characters in strings replaced": lambda raw: raw.translate(_CONTROL_TO_SPACE),
        "NaN and Infinity read as null": lambda raw: _NOT_FINITE.sub(rb"\1null", raw),
    }
    done = []
    for what, step in steps.items():
        after = step(data)
        # Line feeds and tabs between tokens are lawful: only a change of length or of other bytes is a repair.
        if after.split() != data.split() if what.startswith("control") else after != data:
            done.append(what)
        data = after
    return data, tuple(done)


_CONTROL_TO_SPACE = bytes(32 if code < 32 else code for code in range(256))
_NOT_FINITE = re.compile(rb"([:,\[]\s*)[-+]?(?:nan|inf(?:inity)?)\b(?=\s*[,\]}])", re.IGNORECASE)


def _table(source: str, file: _File, repairs: tuple[str, ...], size: int, stacks: bool, bare: bool) -> TraceTable:
    events, arrows, marks, skipped = _sorted_out(file.traceEvents or [], stacks)
    category, categories = _codes([e.cat for e in events])
    kind = np.array([kind_of(one) for one in categories], np.int8)[category]
    name, names = _sorted_codes([e.name for e in events], str)
    thread, threads = _sorted_codes([(e.pid, e.tid) for e in events], lambda one: (str(one[0]), str(one[1])))
    base = _integer(file.baseTimeNanoseconds)
    start = microseconds_to_ns([e.ts for e in events]) + base
    end = start + microseconds_to_ns([e.dur for e in events])
    ranges = np.fromiter((bool(ANNOTATION_NAMES.match(one)) for one in names), np.bool_, len(names))
    if len(names):
        kind[(kind == Kind.CPU_OP) & ranges[name]] = Kind.ANNOTATION
    order = np.lexsort((name, thread, -end, start))
    links = _links(arrows, threads, base)
    if len(arrows) > 2 * len(links):
        skipped["unpaired:fwdbwd"] = len(arrows) - 2 * len(links)
    meta = _meta(source, file, skipped, repairs, size, bare)
    args = [events[row].args for row in order.tolist()]
    columns = (kind[order], name[order], thread[order], start[order], end[order])
    return TraceTable(
        meta,
        names,
        threads,
        *columns,
        args,
        *_launch_columns(columns[0], args),
        links=links,
        marks=_marks(marks, base),
    )


def _sorted_out(events: list[_Event], stacks: bool) -> tuple[list[_Event], list[_Event], list[_Event], dict[str, int]]:
    """(complete events, forward-backward arrows, instants and counters, how many of every other sort were left out)."""
    kept: list[_Event] = []
    arrows: list[_Event] = []
    marks: list[_Event] = []
    other: Counter[str] = Counter()
    for event in events:
        if event.ph == "X" and event.cat != "Trace" and (stacks or event.cat != "python_function"):
            kept.append(event)
        elif event.cat == "fwdbwd":
            arrows.append(event)
        elif event.ph in ("i", "I", "C"):
            marks.append(event)
        else:
            other[f"{event.ph}:{event.cat or ''}"] += 1
    return kept, arrows, marks, dict(sorted(other.items()))


class _LaunchArguments(msgspec.Struct, gc=False):
    correlation: Any = None
    device: Any = None
    stream: Any = None


_LAUNCH_KINDS = (Kind.RUNTIME, *DEVICE_KINDS)


def _launch_columns(kind: NDArray[np.int8], args: list[Any]) -> tuple[Times, NDArray[np.int32], Times]:
    """Correlation, device and stream of the rows that have them, -1 elsewhere. Each ``[rows]``."""
    correlation, stream = np.full(kind.size, -1, np.int64), np.full(kind.size, -1, np.int64)
    device = np.full(kind.size, -1, np.int32)
    read = msgspec.json.Decoder(_LaunchArguments).decode
    for row in np.flatnonzero(np.isin(kind, _LAUNCH_KINDS)).tolist():
        if not args[row]:
            continue
        found = read(args[row])
        correlation[row] = _id(found.correlation, 2**63)
        if kind[row] != Kind.RUNTIME:
            device[row], stream[row] = _id(found.device, 2**31), _id(found.stream, 2**63)
    return correlation, device, stream


def _id(value: Any, limit: int) -> int:
    """A non-negative integer below ``limit`` (ids are written as numbers or as text), or -1."""
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    return value if isinstance(value, int) and 0 <= value < limit else -1


def _links(arrows: list[_Event], threads: tuple[tuple[str, str], ...], base: int) -> Links:
    """Pair the two ends of each arrow by id; an end on a thread without any timed event leads nowhere."""
    codes = {one: at for at, one in enumerate(threads)}
    moments = (microseconds_to_ns([e.ts for e in arrows]) + base).tolist()
    begun: dict[Any, tuple[int, int]] = {}
    pairs: list[tuple[int, int, int, int]] = []
    for event, moment in sorted(zip(arrows, moments, strict=True), key=lambda pair: pair[0].ph != "s"):
        end = (codes.get((str(event.pid), str(event.tid)), -1), moment)
        if event.ph == "s":
            begun[event.id] = end
        elif event.id in begun and end[0] >= 0 and begun[event.id][0] >= 0:
            pairs.append((*begun[event.id], *end))
    columns = np.array(sorted(pairs, key=lambda one: (one[1], one)), np.int64).reshape(-1, 4)
    return Links(columns[:, 0].astype(np.int32), columns[:, 1], columns[:, 2].astype(np.int32), columns[:, 3])


def _marks(events: list[_Event], base: int) -> tuple[Mark, ...]:
    moments = (microseconds_to_ns([e.ts for e in events]) + base).tolist()
    found = [
        Mark(
            event.ph.lower() if event.ph == "I" else event.ph,
            str(event.name),
            (str(event.pid), str(event.tid)),
            at,
            bytes(event.args),
        )
        for event, at in zip(events, moments, strict=True)
    ]
    return tuple(sorted(found, key=lambda one: (one.time_ns, one.name)))


def _codes(values: list[Any]) -> tuple[NDArray[np.intp], list[Any]]:
    """Small integers for hashable values in order of appearance, and the values."""
    distinct = {value: at for at, value in enumerate(dict.fromkeys(values))}
    return np.fromiter(map(distinct.__getitem__, values), np.intp, len(values)), list(distinct)


def _sorted_codes(values: list[Any], text: Callable[[Any], Any]) -> tuple[NDArray[np.int32], tuple[Any, ...]]:
    """Codes in the order of the values' text, so that sorting by code does not depend on the file."""
    codes, distinct = _codes(values)
    texts = [text(value) for value in distinct]
    rank = {one: at for at, one in enumerate(sorted(set(texts)))}
    return np.array([rank[one] for one in texts], np.int32)[codes], tuple(rank)


def _meta(
    source: str, file: _File, skipped: dict[str, int], repairs: tuple[str, ...], size: int, bare: bool
) -> TraceMeta:
    info = file.distributedInfo if isinstance(file.distributedInfo, dict) else {}
    ours = file.ridgeline
    if isinstance(ours, str):
        ours = json.loads(ours)
    ours = dict(ours) if isinstance(ours, dict) else {}
    if isinstance(file.ridgeline_recorded, int):
        ours["recorded"] = file.ridgeline_recorded
    in_name = _RANK_IN_NAME.search(Path(source).name)
    rank = _first_int(info.get("rank"), ours.get("rank"), in_name.group(1) if in_name else None)
    return TraceMeta(
        source=source,
        rank=rank,
        world=_first_int(info.get("world_size"), ours.get("world")),
        host=file.host_name if isinstance(file.host_name, str) else None,
        backend=info.get("backend"),
        schema="list" if bare else "object",
        ridgeline=ours,
        skipped=skipped,
        repairs=repairs,
        raw_bytes=size,
    )


def _first_int(*candidates: Any) -> int | None:
    for value in candidates:
        if isinstance(value, (int, str)) and str(value).isdigit():
            return int(value)
    return None


def _integer(value: Any) -> int:
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdigit()) else 0
