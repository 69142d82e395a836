"""What the page of a trace packs: every event once, in rows that do not overlap, with what belongs to it."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.profiling.table import Kind
from ridgeline.report.trace.encode import varint
from ridgeline.report.trace.pack import MAX_ROWS, ROLES, SEGMENT, pack, separate
from ridgeline.report.trace.path import on_path
from ridgeline.report.trace_page import write_trace_report
from trace_pages import decode, make_table, small, unpack


@given(st.lists(st.integers(0, 2**62)))
@settings(max_examples=60, deadline=None)
def test_varints_keep_every_value(values):
    assert decode(varint(np.array(values, np.int64))) == values


times = st.tuples(st.integers(0, 60), st.integers(0, 25))


@given(st.lists(times, min_size=1, max_size=40), st.integers(0, 10**15))
@settings(max_examples=120, deadline=None)
def test_every_event_is_packed_once_exactly_and_no_row_overlaps(spans, base):
    events = [(f"op{i % 4}", Kind.CPU_OP, ("1", str(i % 2)), base + a, d, -1) for i, (a, d) in enumerate(spans)]
    rows = unpack(pack([make_table(events)]))
    origin = base + min(a for a, _ in spans)
    expected = sorted((name, start - origin, start - origin + length) for name, _, _, start, length, _ in events)
    assert sorted(row[3:6] for row in rows) == expected
    for lane in {row[:3] for row in rows}:
        mine = [row for row in rows if row[:3] == lane]
        assert all(b[4] >= a[5] for a, b in itertools.pairwise(mine))


def test_nested_calls_keep_their_depth_and_partial_overlaps_move_down():
    start, end = np.array([0, 1, 2, 5, 8]), np.array([10, 4, 3, 9, 12])
    assert separate(start, end, np.array([0, 1, 2, 1, 1])).tolist() == [0, 1, 2, 1, 2]


def test_endless_overlap_ends_in_the_last_row():
    n = MAX_ROWS + 40
    depth = separate(np.arange(n), np.arange(n) + 10 * n, np.zeros(n, np.int64))
    assert depth.max() == MAX_ROWS - 1 and depth.tolist() == sorted(depth.tolist())


def test_lanes_roles_steps_and_the_launch_partner():
    packed = pack([small()])
    rows = {row[3]: row for row in unpack(packed)}
    assert [lane["label"] for lane in packed.header["ranks"][0]["lanes"]] == [
        "main thread 1",
        "device 0 stream 7",
        "device 0 stream 9",
    ]
    role = {name: ROLES[row[6]] for name, row in rows.items()}
    assert role["aten::mm"] == "operator" and role["cudaLaunchKernel"] == "launch or runtime call"
    assert role["sgemm_128"] == "compute kernel" and role["ncclDevKernel_AllReduce"] == "collective"
    ordered = unpack(packed)
    assert ordered[rows["sgemm_128"][7]][3] == "cudaLaunchKernel"
    assert rows["ncclDevKernel_AllReduce"][7] == -1 == rows["aten::mm"][7]
    assert packed.header["ranks"][0]["steps"] == [["ProfilerStep#3", 0, 1_000_000]]


def test_ranks_share_a_clock_unless_their_captures_do_not_overlap():
    near = pack([small(0), small(1, base=10**18 + 500_000)])
    assert {row[0]: row[4] for row in unpack(near) if row[3] == "ProfilerStep#3"} == {"rank 0": 0, "rank 1": 500_000}
    assert near.notes == [] and near.header["span"] == 1_500_000
    far = pack([small(0), small(1, base=10**18 + 10**12)])
    assert {row[4] for row in unpack(far) if row[3] == "ProfilerStep#3"} == {0}
    assert "own start" in far.notes[0] and far.header["span"] == 1_000_000


def test_an_event_on_the_critical_path_bears_its_name_and_overlaps_it():
    table = make_table([("a", Kind.CPU_OP, ("1", "1"), at, 10, -1) for at in (0, 20, 40)])
    path = [{"name": "a", "start_ns": 22, "end_ns": 25}, {"name": "b", "start_ns": 0, "end_ns": 50}]
    assert on_path(table, path).tolist() == [False, True, False]
    assert on_path(table, [{"name": "a", "start_ns": 10, "end_ns": 20}]).tolist() == [False] * 3
    exact = [
        {"row": 2, "name": "a", "start_ns": 41, "end_ns": 44},
        {"row": 0, "name": "a", "start_ns": 10, "end_ns": 20},
    ]
    assert on_path(table, exact).tolist() == [False, False, True]  # the second ends before its event: a delay
    assert not on_path(table, [{"row": -1, "name": "(no event)", "start_ns": 0, "end_ns": 50}]).any()


def test_the_critical_path_is_a_lane_of_its_own_that_shifts_no_partner():
    at = 10**18
    path = [
        {"type": "launch delay", "name": "sgemm_128", "row": 4, "start_ns": at + 200_000, "end_ns": at + 320_000},
        {"type": "kernel", "name": "sgemm_128", "row": 4, "start_ns": at + 320_000, "end_ns": at + 570_000},
        {"type": "kernel", "name": "nothing", "row": 4, "start_ns": at + 570_000, "end_ns": at + 570_000},
    ]
    table = small()
    path[0]["row"] = path[1]["row"] = int(np.flatnonzero(table.named("sgemm_128".__eq__))[0])
    packed, plain = pack([table], path), unpack(pack([table]))
    rows = unpack(packed)
    assert packed.shown == packed.total == len(table) == len(rows) - 2
    assert [row[1:6] for row in rows[:2]] == [
        ("critical path", 0, "launch delay: sgemm_128", 200_000, 320_000),
        ("critical path", 0, "kernel: sgemm_128", 320_000, 570_000),
    ]
    assert [ROLES[row[6] ^ SEGMENT] for row in rows[:2]] == ["gap or delay", "compute kernel"]
    assert [row[3] for row in rows if row[6] & 128] == ["sgemm_128"]
    assert [(*row[:6], row.partner + 2 if row.partner >= 0 else -1) for row in plain] == [
        (*row[:6], row.partner) for row in rows[2:]
    ]


def test_too_many_events_leave_out_the_shortest_and_the_page_says_so(tmp_path):
    table = make_table([("op", Kind.CPU_OP, ("1", "1"), 100 * at, at % 10, -1) for at in range(100)])
    packed = pack([table], limit=35)
    kept = [row[5] - row[4] for row in unpack(packed)]
    assert len(kept) == packed.shown == 30 and min(kept) == packed.cut_ns == 7
    text = write_trace_report([table], tmp_path / "t.html", "t", {}, limit=35).read_text()
    assert "70 events shorter than 7e-09 s" in text or "70 events shorter than 0.007 µs" in text
