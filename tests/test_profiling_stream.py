"""Large traces: decoded piece by piece with chosen arguments only, they give the table that a small one gives."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import ridgeline.profiling.chunks as chunks
import ridgeline.profiling.intervals as intervals
import ridgeline.profiling.load as load
import ridgeline.profiling.nesting as nesting
import ridgeline.profiling.table as tables
from ridgeline.profiling.analyses import calltree, collectives, counters, idle, kernels, temporal
from ridgeline.profiling.analyses.launches import launch_calls
from ridgeline.profiling.breakdown import break_down
from ridgeline.profiling.classify import launches
from ridgeline.profiling.load import load_table, load_tables, parse_table
from ridgeline.profiling.table import Kind, TraceTable
from test_profiling_fuzz import WHOLE
from test_profiling_synthetic import event, text
from trace_tiles import read, tiles

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
NCCL = TRACES / "hta/nccl_parser_config/nccl_data.json.gz"
COLUMNS = ("kind", "name", "thread", "start", "end", "correlation", "device", "stream")
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def same(a: TraceTable, b: TraceTable) -> None:
    """Equal in every column, name, thread and arrow."""
    assert (a.names, a.threads) == (b.names, b.threads)
    for column in COLUMNS:
        assert np.array_equal(getattr(a, column), getattr(b, column)), column
    for one, other in zip(vars(a.links).values(), vars(b.links).values(), strict=True):
        assert np.array_equal(one, other)


@needs_traces
def test_a_streamed_table_is_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three copies of a real trace of two ranks' first, from a file, with the threshold met half way through it."""
    raw = b"".join(tiles(read(NCCL), 3))
    (tmp_path / "rank0.json.zst").write_bytes(zstandard.ZstdCompressor(1).compress(raw))
    whole = parse_table(raw, "rank0.json")
    monkeypatch.setattr(load, "STREAM_BYTES", len(raw) // 2)
    streamed = load_table(tmp_path / "rank0.json.zst")
    assert (whole.meta.streamed, streamed.meta.streamed) == (False, True)
    same(whole, streamed)
    kept = [row for row in range(len(whole)) if streamed.args[row]]
    assert all(bytes(streamed.args[row]) == bytes(whole.args[row]) for row in kept)
    collective = [row for row in range(len(whole)) if b'"Collective name"' in whole.args[row]]
    copies = np.flatnonzero(whole.is_kind(Kind.MEMCPY, Kind.MEMSET)).tolist()
    assert collective and copies and set(collective) | set(copies) <= set(kept)
    assert len(kept) < len(whole) / 10
    assert not streamed.marks and streamed.meta.skipped["i:"] == len(whole.marks)
    assert break_down(streamed).steps == break_down(whole).steps


@needs_traces
def test_copies_of_a_trace_do_not_mix() -> None:
    """The tiling itself: n copies have n times the rows, launches and arrows, and n times the busy time."""
    raw = read(NCCL)
    one, three = parse_table(raw, "a.json"), parse_table(b"".join(tiles(raw, 3)), "a.json")
    assert len(three) == 3 * len(one) and len(three.links) == 3 * len(one.links) == 3 * 543
    assert (launches(three) >= 0).sum() == 3 * (launches(one) >= 0).sum()
    a, b = break_down(one).device_span, break_down(three).device_span
    assert a is not None and b is not None
    assert b.busy_ns == 3 * a.busy_ns


@pytest.mark.parametrize("document", WHOLE, ids=["object", "list", "indented"])
@pytest.mark.parametrize("size", [1, 7, 64, 300, 10_000])
def test_any_cut_gives_the_same_table(document: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a byte, of half an event, of many: one-line files, lists and indented files alike."""
    whole = parse_table(document, "a.json")
    monkeypatch.setattr(chunks, "CHUNK", size)
    monkeypatch.setattr(load, "CHUNK", size)
    cut = parse_table(document, "a.json")
    same(whole, cut)
    assert [bytes(one) for one in cut.args] == [bytes(one) for one in whole.args]
    assert (cut.marks, cut.meta) == (whole.marks, whole.meta)


TRICKY = st.lists(st.sampled_from(["},{", '"}, {"', "]", "}]", "\\", '],"x":[', "é", "plain"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(TRICKY, st.integers(1, 400))
def test_boundaries_in_strings_and_arguments_are_no_boundaries(names: list[str], size: int) -> None:
    """Names and nested arguments that look like the end of an event, or of all, cut anywhere."""
    made = [event(name, "cpu_op", at, 1, shapes=[{"a": [1]}, {"b": name}]) for at, name in enumerate(names)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", size)
        patch.setattr(load, "CHUNK", size)
        table = parse_table(text(made, 3, 8, traceName=[{"x": 1}, {"y": 2}]), "a.json")
    assert [table.names[code] for code in table.name.tolist()] == names
    assert (table.meta.rank, table.meta.repairs) == (3, ())
    assert [json.loads(bytes(one)) for one in table.args] == [one["args"] for one in made]


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    """Over all files together, in bytes of the files as they are on disk, never backwards."""
    for rank in range(3):
        (tmp_path / f"rank{rank}.json.gz").write_bytes(gzip.compress(WHOLE[0] + b" " * 10**6))
    seen: list[tuple[int, int]] = []
    load_tables(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert seen == sorted(seen) and seen[-1] == (total, total) and len(seen) >= 3


def test_an_interrupted_load_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle: the interrupt comes through, and no file has been made."""
    (tmp_path / "rank0.json").write_bytes(WHOLE[0] * 3)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_tables(tmp_path, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["rank0.json"]


def test_memory_is_bounded_by_rows_and_not_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events with long arguments, streamed: the table keeps 37 bytes a row and none of the text."""
    made = [event("aten::mm", "cpu_op", at, 1, shapes="x" * 2000) for at in range(2000)]
    monkeypatch.setattr(load, "STREAM_BYTES", 1 << 20)
    table = parse_table(text(made), "a.json")
    assert table.meta.streamed and not any(table.args[row] for row in range(len(table)))
    assert sum(getattr(table, column).nbytes for column in COLUMNS) == 37 * len(table)


@needs_traces
def test_analyses_take_few_bytes_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six copies of the densest trace, streamed, with pieces small enough for their number not to matter: what each
    analysis takes at most beside the table, and what all of them leave behind. A trace of 5 GB has 14 million such
    events, for which 1.5 GB must do: 56 bytes each are the table and its arguments."""
    raw = b"".join(tiles(read(NCCL), 6))
    monkeypatch.setattr(load, "STREAM_BYTES", len(raw) // 2)
    for module, name in ((intervals, "_BLOCK"), (tables, "_BLOCK"), (nesting, "_TREES"), (calltree, "_AT_ONCE")):
        monkeypatch.setattr(module, name, 1 << 12)
    monkeypatch.setattr(idle, "_AT_ONCE", 1 << 10)
    table = parse_table(raw, "rank0.json")
    tracemalloc.start()
    try:
        peaks = {
            analysis.__name__: _peak(analysis, table) / len(table)
            for analysis in (
                temporal.temporal_breakdown,
                kernels.kernel_breakdown,
                launch_calls,
                idle.idle_by_cause,
                collectives.collectives,
                counters.queue_summary,
                calltree.call_tree,
                break_down,
            )
        }
        kept = tracemalloc.get_traced_memory()[0] / len(table)
    finally:
        tracemalloc.stop()
    assert max(peaks.values()) < 34, peaks
    assert kept < 25


def _peak(analysis: Callable[[TraceTable], object], table: TraceTable) -> int:
    """Bytes that it took at most beyond what was there."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    analysis(table)
    return tracemalloc.get_traced_memory()[1] - before
