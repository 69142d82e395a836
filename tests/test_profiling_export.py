"""Export: strict JSON, slices of every track nest, nothing is lost on the way, and the file appears whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.critical_path import critical_path
from ridgeline.profiling.analyses.idle import idle_gaps
from ridgeline.profiling.analyses.matching import match_collectives
from ridgeline.profiling.analyses.overlays import COLUMNS, waiting_and_transfer
from ridgeline.profiling.export import CRITICAL_PATH, annotate, lanes, to_frame, to_parquet
from ridgeline.profiling.load import load_table
from test_profiling_critical_path import QUEUED, event, table_of, two_ranks

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def strict(path):
    """The file's JSON; a NaN, a wrong escape, bytes that are not UTF-8 or a repeated key fail."""

    def once(pairs):
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"repeated keys among {keys}"
        return dict(pairs)

    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "strict")
    return json.loads(text, parse_constant=pytest.fail, parse_float=nanoseconds, object_pairs_hook=once)


def nanoseconds(text):
    """Decimal microseconds as whole ns (other numbers of a trace are not looked at)."""
    whole, _, part = text.partition(".")
    return int(whole + (part + "000")[:3]) if whole.lstrip("-").isdigit() and part.isdigit() else 0


def check_nesting(events):
    """On no track does a slice end inside another one that began before it. Returns the number of slices."""
    tracks = defaultdict(list)
    for one in events:
        if one["ph"] == "X":
            assert one["ts"] >= 0 and one["dur"] >= 0
            tracks[one["pid"], one["tid"]].append((one["ts"], -(one["ts"] + one["dur"])))
    for track in tracks.values():
        stack = []
        for start, end in ((begun, -ended) for begun, ended in sorted(track)):
            while stack and stack[-1] <= start:
                stack.pop()
            assert not stack or end <= stack[-1]
            stack.append(end)
    return sum(map(len, tracks.values()))


def named(events, what):
    return {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == what}


def test_the_critical_path_is_a_track_with_arrows(tmp_path):
    table = table_of(QUEUED)
    out = annotate(table, tmp_path / "out.json")
    events = strict(out)["traceEvents"]
    assert check_nesting(events) == len(table) + 7
    threads = named(events, "thread_name")
    ours = [one for one in events if one["ph"] == "X" and threads[one["pid"], one["tid"]] == CRITICAL_PATH]
    assert [(one["name"], one["ts"], one["dur"]) for one in ours][:3] == [
        ("aten::x", 0, 20_000),
        ("a", 20_000, 20_000),
        ("a", 40_000, 50_000),
    ]
    assert ours[1]["args"]["type"] == "launch delay"
    processes = named(events, "process_name")
    assert {processes[one["pid"], 0] for one in ours} == {"Ridgeline"}
    arrows = defaultdict(dict)
    for one in events:
        if one["ph"] in "sf" and one["cat"] == "critical path":
            arrows[one["id"]][one["ph"]] = (threads[one["pid"], one["tid"]], one["ts"])
    # From the host to kernel a (at its start), and from kernel b (before its end) to the synchronisation.
    assert list(arrows.values()) == [
        {"s": ("1", 40_000), "f": ("7", 40_000)},
        {"s": ("7", 194_999), "f": ("1", 195_000)},
    ]


def test_python_frames_are_kept_and_do_not_cut_the_path(tmp_path):
    frames = [event(f"f.py({at}): f", at, 10, cat="python_function") for at in (0, 20, 40)]
    source = tmp_path / "in.json"
    source.write_text(json.dumps({"traceEvents": [*frames, *QUEUED]}))
    events = strict(annotate(source, tmp_path / "out.json"))["traceEvents"]
    check_nesting(events)
    assert sum(one.get("cat") == "python_function" for one in events) == 3
    path = [one for one in events if one.get("cat") == "ridgeline"]
    assert len(path) == 7 and sum(one["ph"] == "s" and one["cat"] == "critical path" for one in events) == 2
    table = load_table(source, stacks=True)
    assert [table.names[table.name[one["args"]["row"]]] for one in path] == [one["name"] for one in path]


def test_slices_that_overlap_get_lanes_of_their_own(tmp_path):
    table = table_of([event("a", 0, 10), event("b", 5, 10), event("c", 6, 2), event("d", 15, 1)])
    events = strict(annotate(table, tmp_path / "out.json"))["traceEvents"]
    threads = named(events, "thread_name")
    at = {one["name"]: threads[one["pid"], one["tid"]] for one in events if one.get("cat") == "cpu_op"}
    assert at == {"a": "1", "b": "1 (overlap 1)", "c": "1", "d": "1"}
    check_nesting(events)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=20))
def test_lanes_nest_and_are_few(spans):
    ordered = sorted((start, -(start + length)) for start, length in spans)
    start, end = [one for one, _ in ordered], [-other for _, other in ordered]
    found = lanes(start, end)
    events = [
        {"ph": "X", "ts": a, "dur": b - a, "pid": 0, "tid": lane} for a, b, lane in zip(start, end, found, strict=True)
    ]
    assert check_nesting(events) == len(spans)
    overlap = any(a < c < b < d for a, b in zip(start, end, strict=True) for c, d in zip(start, end, strict=True))
    assert overlap or set(found) <= {0}, "what nests already stays on its track"


def test_strange_names_stay_what_they_were(tmp_path):
    strange = 'quote " back \\ line \n tab \t nul \x01 é 漢 😀 </script>'
    table = table_of([event(strange, 0, 10, note=strange), event("x", 3, 2, tid="main thread", pid="Spans")])
    out = annotate(table, tmp_path / "out.json", {strange: pl.DataFrame({"start_ns": [1_000], "end_ns": [2_001]})})
    events = strict(out)["traceEvents"]
    (one,) = [one for one in events if one.get("cat") == "cpu_op" and one["dur"] == 10_000]
    assert one["name"] == one["args"]["note"] == strange
    assert strange in named(events, "thread_name").values()
    assert {"Spans", "main thread"} <= {*named(events, "process_name").values(), *named(events, "thread_name").values()}
    assert all(isinstance(one[key], int) for one in events for key in ("pid", "tid"))
    (added,) = [one for one in events if one.get("cat") == "ridgeline" and "type" not in one["args"]]
    assert added["name"] == strange
    assert (added["ts"], added["dur"]) == (1_000, 1_001)


def test_tracks_take_what_analyses_call_their_columns(tmp_path):
    gaps = pl.DataFrame({"start_ns": [5_000, 8_000], "idle_ns": [4_000, 4_000], "cause": ["host wait", "python"]})
    events = strict(annotate(table_of(QUEUED), tmp_path / "a.json", {"idle": gaps}))["traceEvents"]
    check_nesting(events)
    threads = named(events, "thread_name")
    found = {one["name"]: threads[one["pid"], one["tid"]] for one in events if one["name"] in ("host wait", "python")}
    assert found == {"host wait": "idle", "python": "idle (overlap 1)"}
    with pytest.raises(UserError, match="track 'idle': the table has no start_ns and end_ns, but cause"):
        annotate(table_of(QUEUED), tmp_path / "b.json", {"idle": gaps.select("cause")})
    assert not (tmp_path / "b.json").exists()


def test_of_several_ranks_only_the_tables_own_rank_is_drawn(tmp_path):
    table = table_of(QUEUED, rank=1)
    path = critical_path(table)
    both = pl.concat([path.with_columns(pl.lit(rank, pl.Int64).alias("rank")) for rank in (0, 1)])
    events = strict(annotate(table, tmp_path / "out.json", path=both))["traceEvents"]
    assert sum(one.get("cat") == "ridgeline" for one in events) == len(path)


def test_collectives_are_drawn_as_waiting_and_transfer(tmp_path):
    """Rank 0 arrives at 100 us, rank 1 at 600; all ends at 620. The shorter transfer is rank 1's, 18 us."""
    tables = two_ranks(late=500)
    slices = waiting_and_transfer(match_collectives(tables))
    assert slices.columns == list(COLUMNS["waiting_and_transfer"])
    got = [(r["rank"], r["name"].split(":")[0], r["start_ns"], r["end_ns"]) for r in slices.iter_rows(named=True)]
    assert got == [
        (0, "waiting", 100_000, 602_000),
        (0, "transfer", 602_000, 620_000),
        (1, "waiting", 600_000, 602_000),
        (1, "transfer", 602_000, 620_000),
    ]
    assert slices["caused_by_rank"].to_list() == [1] * 4
    events = strict(annotate(tables[1], tmp_path / "out.json", {"collectives": slices}))["traceEvents"]
    check_nesting(events)
    assert sum(str(one["name"]).startswith(("waiting", "transfer")) for one in events) == 2


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path):
    out = annotate(table_of(QUEUED), tmp_path / "out.json")
    before = out.read_bytes()
    bad = pl.DataFrame(
        {"start_ns": [0], "end_ns": [1], "name": ["x"], "odd": [object()]}, schema_overrides={"odd": pl.Object}
    )
    with pytest.raises(TypeError):
        annotate(table_of(QUEUED), out, {"bad": bad})
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match="is the trace itself"):
        annotate(out, out)
    with pytest.raises(UserError, match="no folder"):
        annotate(table_of(QUEUED), tmp_path / "none" / "out.json")


def test_gzip_by_suffix_is_the_same_every_time(tmp_path):
    one, other = (annotate(table_of(QUEUED), tmp_path / name) for name in ("a.json.gz", "b.json.gz"))
    assert one.read_bytes()[:2] == b"\x1f\x8b" and one.read_bytes() == other.read_bytes()
    assert gzip.decompress(one.read_bytes()) == annotate(table_of(QUEUED), tmp_path / "c.json").read_bytes()


def test_parquet_holds_every_row(tmp_path):
    table = table_of(QUEUED)
    frame = pl.read_parquet(to_parquet(table, tmp_path / "t.parquet"))
    assert frame.equals(to_frame(table)) and len(frame) == len(table)
    assert frame["name"][0] == "aten::x" and frame["kind"][0] == "cpu_op" and frame["end_ns"][0] == 100_000
    path = critical_path(table)
    assert pl.read_parquet(to_parquet(path, tmp_path / "p.parquet")).equals(path)
    assert to_frame(table_of([])).is_empty()


@needs_traces
@pytest.mark.parametrize(
    "name",
    [
        "gloo/gloo_straggler_rank1.json.gz",
        "hta/critical_path/alexnet/benchmark_result_2869224_1695835535_trace.json.gz",
        "hta/nccl_parser_config/nccl_data.json.gz",
        "saf/amg_example_trace.json.gz",  # six slices overlap others of their stream
        "tracelens/mi300/resnet_act_checkpoint.json.gz",
    ],
)
def test_recorded_traces_open_and_lose_nothing(tmp_path, name):
    """Read back by our own loader, every row is there with its times, name and arguments."""
    table = load_table(TRACES / name)
    out = annotate(table, tmp_path / "out.json.gz", {"idle": idle_gaps(table, 50)})
    events = strict(out)["traceEvents"]
    again = load_table(out)
    ours = again.named(lambda one: True) & np.array([b'"row"' in bytes(args) for args in again.args])
    assert check_nesting(events) >= len(table) + int(ours.sum()) > len(table)
    original = to_frame(table).drop("pid", "tid").sort("start_ns", "end_ns", "name", "args")
    pids = {pid for pid, _ in table.threads if pid.lstrip("-").isdigit()}
    back = to_frame(again).filter(pl.col("pid").is_in(pids)).drop("pid", "tid")
    assert back.sort("start_ns", "end_ns", "name", "args").equals(original)
    assert len(again.links) == len(table.links)
