"""Exports as Perfetto's importer reads them: nothing is dropped or counted as an error, arrows end where they should."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perfetto_import
from ridgeline.profiling.dump import to_perfetto
from ridgeline.profiling.export import annotate
from ridgeline.profiling.table import Kind, Mark
from ridgeline.profiling.trace import Trace
from trace_pages import make_table

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
HOST, GPU = ("41", "41"), ("0", "7")


def check(path):
    """Nothing is dropped, unreadable or drawn on another thread, and both ends of an arrow are the events it is about."""
    found = perfetto_import.load(path)
    assert found.stats == Counter() and found.moved == set()
    for cat, left, entered, begun, ended in found.flows:
        assert left[1] <= begun and entered[1] <= ended < max(entered[2], entered[1] + 1), cat
        if cat == "ac2g":  # the call and what it launched have one number
            assert left[1] == begun and numbers(left) == numbers(entered) and entered[1] == ended
    return found


def numbers(one):
    return one[3]["args"]["correlation"]


@needs_traces
@pytest.mark.parametrize(
    "name",
    [
        "gloo/gloo_straggler_rank*.json.gz",
        "hta/critical_path/alexnet/benchmark_result_2869224_1695835535_trace.json.gz",
        "hta/nccl_parser_config/nccl_data.json.gz",
        "hta/cupti_profiler/benchmark_result_924719_1679055439_trace.json.gz",
        "hta/trace_filter/sampled_rank-*.json.gz",
        "saf/amg_example_trace.json.gz",
        "tracelens/mi300/resnet_act_checkpoint.json.gz",
        "tracelens/h100/gaunernst_bert-small-uncased__1016001.json.gz",
    ],
)
def test_recorded_traces_are_imported_whole(tmp_path, name):
    trace = Trace.load(TRACES / name)
    for path, table in zip(to_perfetto(trace, tmp_path / "out.json.gz"), trace.tables.values(), strict=True):
        found = check(path)
        ours = [event for *_, event in found.slices if event.get("cat") == "ridgeline"]
        slices = [event for *_, event in found.slices if event["ph"] == "X"]
        assert len(slices) - len(ours) == len(table) and ours


def write(folder, events):
    path = folder / "raw.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def x(name, ts, dur, **more):
    return {"ph": "X", "name": name, "cat": "c", "pid": 1, "tid": 1, "ts": ts, "dur": dur, "args": {}, **more}


def test_the_importer_counts_what_perfetto_would(tmp_path):
    """Files with one fault each, so that a clean export says something."""

    def stats(*events):
        return dict(perfetto_import.load(write(tmp_path, events)).stats)

    def end(kind, **more):
        return {"name": "a", "cat": "a", "pid": 1, "tid": 1, "ph": kind, "ts": 5, "id": 1, **more}

    assert stats(x("a", 0, 10), x("b", 5, 10)) == {"slice_drop_overlapping_complete_event": 1}
    assert stats(x("a", 0, 10), x("b", 10, 10), x("c", 10, 10), x("d", 20, 0)) == {}
    assert stats(end("s")) == {"flow_no_enclosing_slice": 1}
    assert stats(x("a", 0, 10), end("f", bp="e")) == {"flow_end_without_start": 1}
    assert stats(x("a", 0, 10), end("s"), end("s")) == {"flow_duplicate_id": 1}
    assert stats(x("a", 0, 10), end("s"), end("f")) == {"flow bound to the next slice": 1}
    assert stats(*(x("a", at, 2000 - 2 * at) for at in range(600))) == {"slice_max_depth_exceeded": 88}
    assert stats({"ph": "C", "name": "a", "pid": 1, "tid": 1, "ts": 1, "args": {"x": "y", "z": 2}}) == {
        "json_parser_failure": 1
    }
    found = perfetto_import.load(write(tmp_path, [x("a", 0, 9, tid=-5), x("b", 0, 9, pid=2, tid=0), x("c", 0, 9)]))
    assert found.moved == {(1, -5), (2, 0)}
    # An arrow leaves the slice that began last, even when that one has ended.
    found = perfetto_import.load(
        write(tmp_path, [x("a", 0, 10), x("b", 1, 2), x("k", 8, 1, tid=2), end("s"), end("f", tid=2, ts=8, bp="e")])
    )
    assert [(left[3]["name"], entered[3]["name"]) for _, left, entered, _, _ in found.flows] == [("b", "k")]


def test_threads_that_viewers_would_mix_up_get_numbers_of_their_own(tmp_path):
    pairs = [("41", "41"), ("41", "-7"), ("41", str(2**40)), ("2", "0"), ("2", "2"), ("0", "0"), ("0", "-1"), ("", "")]
    table = make_table([(f"e{at}", Kind.CPU_OP, pair, at, 100, -1) for at, pair in enumerate(pairs)])
    found = check(annotate(table, tmp_path / "out.json"))
    tracks = {event["name"]: track for track, _, _, event in found.slices if event["cat"] == "cpu_op"}
    assert len(set(tracks.values())) == len(pairs) == len(tracks)
    assert tracks["e0"] == (41, 41) and tracks["e4"] == (2, 2)
    assert [found.thread_names[tracks[f"e{at}"]] for at in (1, 3, 7)] == ["-7", "0", "unnamed"]


def test_a_kernel_that_seems_to_start_before_its_call_has_no_arrow(tmp_path):
    calls = [("cudaLaunchKernel", Kind.RUNTIME, HOST, at, 10, at, {"correlation": at}) for at in (100, 200)]
    kernels = [
        ("k", Kind.KERNEL, GPU, at, 10, number, {"correlation": number}) for at, number in ((95, 100), (205, 200))
    ]
    found = check(annotate(make_table(calls + kernels), tmp_path / "out.json"))
    assert [ended - begun for cat, _, _, begun, ended in found.flows if cat == "ac2g"] == [5]


def test_an_arrow_to_an_operator_in_a_lane_of_its_own_goes_there(tmp_path):
    ops = [("forward", Kind.CPU_OP, HOST, 0, 10, -1), ("a", Kind.CPU_OP, HOST, 20, 10, -1)]
    ops += [("backward", Kind.CPU_OP, HOST, 25, 10, -1)]  # overlaps a
    found = check(annotate(make_table(ops, links=[(HOST, 0, HOST, 25)]), tmp_path / "out.json"))
    ends = [(left[3]["name"], entered[3]["name"]) for cat, left, entered, _, _ in found.flows if cat == "fwdbwd"]
    assert ends == [("forward", "backward")]


def test_counters_and_instants_are_imported_with_their_values(tmp_path):
    marks = (
        Mark("C", "bytes", HOST, 1_005, b'{"cpu":5,"gpu":1.5}'),
        Mark("i", "[memory]", HOST, 1_004, b'{"Bytes":64}'),
    )
    table = replace(make_table([("op", Kind.CPU_OP, HOST, 1_000, 10, -1)]), marks=marks)
    found = check(annotate(table, tmp_path / "out.json"))
    assert found.counters == [("bytes cpu", 5, 5.0), ("bytes gpu", 5, 1.5)]
    (instant,) = [one for one in found.slices if one[3]["ph"] == "i"]
    assert instant[1:3] == (4, 4) and instant[3]["args"] == {"Bytes": 64}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(0, 45), st.integers(0, 20)), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_any_trace_and_any_annotation_is_imported_whole(tmp_path_factory, events, noted):
    """Host calls and kernels that overlap, begin together, have no length; kernels launched by some of the calls."""
    rows = []
    for at, (start, length, what) in enumerate(events):
        if what < 4:
            rows.append((f"op{what}", Kind.CPU_OP, ("41", str(what % 2 + 41)), start, length, -1))
        else:
            begun, number = 30 * start + at, {"correlation": at}  # no two at one moment: an arrow has one end
            rows.append(("cudaLaunchKernel", Kind.RUNTIME, ("41", "43"), begun, length + 1, at, number))
            rows.append(("k", Kind.KERNEL, GPU, begun, 30 * length + 1, at, number))
    table = make_table(rows)
    frame = pl.DataFrame(
        {"start_ns": [start for start, _ in noted], "end_ns": [start + length for start, length in noted]},
        schema={"start_ns": pl.Int64, "end_ns": pl.Int64},
    )
    found = check(annotate(table, tmp_path_factory.mktemp("any") / "out.json", {"notes": frame}))
    counted = Counter(event.get("cat") for *_, event in found.slices if event["ph"] == "X")
    assert sum(counted.values()) - counted["ridgeline"] == len(rows)
    assert counted["ridgeline"] >= len(noted)
