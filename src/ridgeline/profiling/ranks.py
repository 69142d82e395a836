"""What the names of processes say: which rank a row of a merged file belongs to, and which rows ran on an NPU.

Nothing in the format says that a file holds several ranks, so the evidence is what the mergers leave, best first:

* a rank in the process id itself: ``[TP01-DP00] 83`` (SGLang's merger), ``rank 1: 83``;
* a rank in the name of the process: ``RANK 1 - GPU`` (TraceLens' fusion), ``Rank 1``;
* a ``rank`` next to a ``pid_raw`` in the arguments of its events (TraceLens without names).

A file is split only when two ranks or more are found this way.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.gather import Columns
from ridgeline.profiling.table import Kind, TraceTable

_RANK = re.compile(r"\brank[\s_:#-]*(\d{1,7})\b", re.IGNORECASE)
_PARALLEL = re.compile(r"\[((?:(?:TP|DP|PP|EP|CP)-?\d+-?)+)\]")
_NPU = "Ascend Hardware"


class _Fused(msgspec.Struct, gc=False):
    rank: Any = None
    pid_raw: Any = None


class _Task(msgspec.Struct, gc=False):
    type: Any = msgspec.field(default=None, name="Task Type")
    stream: Any = msgspec.field(default=None, name="Physic Stream Id")


def split_ranks(table: TraceTable, columns: Columns) -> list[TraceTable]:
    """One table per rank of a merged file, by rank; ``[table]`` itself if it holds only one.

    Rows of processes without a rank are in no part; each part says how many there are.
    """
    found = process_ranks(table, columns)
    ranks = sorted(set(found.values()))
    if len(ranks) < 2:
        return [table]
    of_thread = np.array([found.get(pid, -1) for pid, _ in table.threads], np.int64)
    of_row = of_thread[table.thread]
    note = f"a merged file of {len(ranks)} ranks, split by what its processes are called"
    left = int((of_row < 0).sum())
    if left:
        note += f"; {left} events of processes without a rank left out"
    return [_part(table, of_thread, of_row, found, rank, note) for rank in ranks]


def process_ranks(table: TraceTable, columns: Columns) -> dict[str, int]:
    """Process id (as text) -> rank, of the processes that name one."""
    pids = dict.fromkeys(pid for pid, _ in table.threads)
    prefixes = {pid: found.group(1) for pid in pids if (found := _PARALLEL.search(pid))}
    if prefixes:
        place = {prefix: at for at, prefix in enumerate(sorted(set(prefixes.values())))}
        return {pid: place[prefix] for pid, prefix in prefixes.items()}
    ranks: dict[str, int] = {}
    for code, (pid, _) in enumerate(columns.threads):
        text = str(pid)
        said = _RANK.search(text) or _RANK.search(columns.labels.get(text, ""))
        rank = int(said.group(1)) if said else _fused_rank(columns.first_args.get(code, b""))
        if rank is not None and text in pids:
            ranks.setdefault(text, rank)
    return ranks


def _fused_rank(args: bytes) -> int | None:
    try:
        said = msgspec.json.decode(args, type=_Fused)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return said.rank if type(said.rank) is int and 0 <= said.rank < 10**7 and said.pid_raw is not None else None


def _part(
    table: TraceTable,
    of_thread: NDArray[np.int64],
    of_row: NDArray[np.int64],
    found: dict[str, int],
    rank: int,
    note: str,
) -> TraceTable:
    rows = table.select(np.flatnonzero(of_row == rank))
    links = table.links
    ours = (of_thread[links.from_thread] == rank) & (of_thread[links.to_thread] == rank)
    kept = replace(
        links,
        from_thread=links.from_thread[ours],
        from_time=links.from_time[ours],
        to_thread=links.to_thread[ours],
        to_time=links.to_time[ours],
    )
    marks = tuple(mark for mark in table.marks if found.get(mark.thread[0]) == rank)
    meta = replace(table.meta, rank=rank, repairs=(note, *table.meta.repairs))
    return replace(rows, meta=meta, links=kept, marks=marks)


def name_devices(table: TraceTable, labels: dict[str, str]) -> tuple[TraceTable, list[str]]:
    """Give rows of an Ascend NPU (no category; a process called ``Ascend Hardware``) their kind and stream, and say
    which device rows remain of unknown kind."""
    npu = {pid for pid, label in labels.items() if _NPU in label}
    on_npu = np.array([pid in npu for pid, _ in table.threads], np.bool_)
    rows = (
        np.flatnonzero((table.kind == Kind.OTHER) & on_npu[table.thread])
        if npu and on_npu.any()
        else np.empty(0, np.intp)
    )
    if rows.size:
        kind, stream = table.kind.copy(), table.stream.copy()
        for row, task in zip(rows.tolist(), table.decode(rows, _Task), strict=True):
            kind[row] = _npu_kind(str(task.type) if task else "")
            if task and type(task.stream) is int and 0 <= task.stream < 2**31:
                stream[row] = task.stream
        table = replace(table, kind=kind, stream=stream)
    unknown = int((table.kind == Kind.DEVICE_OTHER).sum())
    note = f"{unknown} device events of a kind we do not know are kept as such"
    return table, [note] if unknown else []


def _npu_kind(task: str) -> Kind:
    """AI_CORE, AI_VECTOR_CORE, MIX_AIC and AI_CPU compute; SDMA and MEMCPY_ASYNC copy; the rest waits or is unknown."""
    if task.startswith(("AI_", "MIX_AI", "AICPU", "KERNEL_AI")):
        return Kind.KERNEL
    return Kind.MEMCPY if "MEMCPY" in task or task in ("SDMA", "PCIE_DMA") else Kind.DEVICE_OTHER
