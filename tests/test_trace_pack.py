"""What the page of a trace packs: every event once, in rows that do not overlap, with what belongs to it."""

from __future__ import annotations

import base64
import itertools
import json
import re
import zlib
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.profiling.table import Kind
from ridgeline.report.trace import arguments, arrows
from ridgeline.report.trace.encode import varint
from ridgeline.report.trace.pack import MAX_ROWS, ROLES, SEGMENT, pack, separate
from ridgeline.report.trace.path import on_path
from ridgeline.report.trace_page import write_trace_report
from trace_pages import decode, make_table, small, unpack

HOST, GPU = ("1", "1"), ("0", "7")


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


def test_python_frames_have_a_lane_of_their_own_below_the_threads_operators():
    frames = [(f"f{at}", Kind.PYTHON, HOST, at, 100 - 2 * at, -1) for at in range(5)]
    ops = [("aten::mm", Kind.CPU_OP, HOST, 10, 20, -1), ("launch", Kind.RUNTIME, HOST, 12, 3, 1)]
    table = make_table([*frames, *ops, ("k", Kind.KERNEL, GPU, 20, 5, 1), ("r", Kind.GPU_ANNOTATION, GPU, 19, 9, -1)])
    packed = pack([table])
    assert [(row.lane, row.depth, row.name) for row in unpack(packed)] == [
        ("thread 1", 0, "aten::mm"),
        ("thread 1", 1, "launch"),
        *[("thread 1 Python", at, f"f{at}") for at in range(5)],
        ("device 0 stream 7 ranges", 0, "r"),
        ("device 0 stream 7", 0, "k"),
    ]
    lanes = packed.header["ranks"][0]["lanes"]
    assert [lane["part"] for lane in lanes] == ["", "python", "ranges", ""]
    assert lanes[0]["thread"] == lanes[1]["thread"] != lanes[2]["thread"] == lanes[3]["thread"]


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


# ---- arguments and arrows


def called(*arguments, length=10):
    """One operator each, with these arguments."""
    return make_table([("op", Kind.CPU_OP, HOST, 100 * at, length, -1, one) for at, one in enumerate(arguments)])


def test_events_that_differ_in_the_profilers_ids_alone_share_one_set_of_arguments():
    grids = [{"External id": at, "grid": [8, 1, 1], "correlation": 7, "Ev Idx": at, "none": ""} for at in range(50)]
    packed = pack([called(*grids, {"Sequence number": 3}, {"stack": 'a "External id": 5, b', "External id": 1})])
    rows = unpack(packed)
    assert [row.arguments for row in rows] == [{"grid": [8, 1, 1]}] * 50 + [None, {"stack": 'a "External id": 5, b'}]
    assert packed.notes == []
    assert len(json.loads(zlib.decompress(base64.b64decode(packed.texts)))["sets"]) == 2


keys = st.sampled_from([*arguments.IDS[:3], "a", "b c", '"', "é"])
plain = st.text('0",:{}a', max_size=5) | st.integers(-9, 99) | st.floats(-9, 9) | st.none()
nested = st.recursive(
    plain, lambda one: st.lists(one, max_size=3) | st.dictionaries(keys, one, max_size=2), max_leaves=4
)


@given(st.lists(st.dictionaries(keys, nested, max_size=5), max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_shown_is_what_was_given_without_ids_and_empty_values(given_sets):
    found = [row.arguments or {} for row in unpack(pack([called({"x": 1}, *given_sets)]))][1:]
    for shown, raw in zip(found, given_sets, strict=True):
        assert shown == {key: value for key, value in without_ids(raw).items() if value not in EMPTY}


EMPTY = (None, "", [], {})


def without_ids(value):
    """Every object without the ids that are whole numbers (as text too) or absent."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: one for key, one in value.items() if key not in arguments.IDS or not is_id(one)}
    return {key: without_ids(one) for key, one in kept.items()}


def is_id(value):
    return value in (None, "") or type(value) is int or (isinstance(value, str) and re.fullmatch("-?[0-9]+", value))


def test_long_values_are_cut_and_the_page_says_so():
    packed = pack([called({"ranks": list(range(5000))}, {"ranks": [1]})])
    first, second = (row.arguments for row in unpack(packed))
    assert first["ranks"].endswith("…") and len(first["ranks"]) == arguments.MOST_CHARACTERS + 1
    assert second == {"ranks": [1]} and packed.notes == ["Values longer than 1,500 characters are cut (1 events)."]


def test_over_its_budget_the_page_keeps_the_arguments_of_most_time_and_says_so():
    events = [("op", Kind.CPU_OP, HOST, 100 * at, at + 1, -1, {"text": f"{at:02d}" * 10}) for at in range(20)]
    table = make_table(events)
    used = arguments.gather([table], [np.arange(20)], most=170)  # five sets of 31 bytes, {"text":"…"}
    assert [code > 0 for code in used.codes[0].tolist()] == [False] * 15 + [True] * 5
    assert used.note == "The arguments of 15 events are left out, to keep the page small."


def test_arguments_that_are_no_json_object_are_none():
    table = replace(called({}, {}, {}), args=[b"[1]", b'{"a": "\xff"}', b'{"a": '])
    assert [row.arguments for row in unpack(pack([table]))] == [None] * 3


def test_a_streamed_trace_says_which_arguments_it_kept():
    table = called({"a": 1})
    assert "too large" in pack([replace(table, meta=replace(table.meta, streamed=True))]).notes[0]


def test_a_call_has_its_correlation_and_a_backward_its_forward():
    events = [
        ("aten::mm", Kind.CPU_OP, HOST, 0, 50, -1),
        ("cudaLaunchKernel", Kind.RUNTIME, HOST, 10, 5, 2**40),
        ("MmBackward0", Kind.CPU_OP, ("1", "2"), 100, 50, -1),
        ("cudaLaunchKernel", Kind.RUNTIME, ("1", "2"), 110, 5, 3),
        ("sgemm", Kind.KERNEL, GPU, 20, 60, 2**40),
        ("orphan", Kind.KERNEL, GPU, 90, 5, 77),
    ]
    rows = unpack(pack([make_table(events, links=[(HOST, 0, ("1", "2"), 100)])]))
    assert [row.correlation for row in rows if row.name == "cudaLaunchKernel"] == [2**40, 3]
    assert [row.correlation for row in rows if row.name in ("sgemm", "orphan")] == [-1, 77]  # sgemm's is its call's
    (backward,) = [row for row in rows if row.name == "MmBackward0"]
    assert rows[backward.forward].name == "aten::mm"
    assert sum(row.forward >= 0 for row in rows) == 1


def drawn(packed):
    """The header's arrows with the names of their ends."""
    rows = unpack(packed)
    return [
        (f"{rows[one].rank} {rows[one].name}", f"{rows[other].rank} {rows[other].name}", packed.header["why"][why], ns)
        for one, other, why, ns in packed.header["arrows"]
    ]


def test_the_path_has_an_arrow_where_it_changes_lane():
    table = make_table([("a", Kind.CPU_OP, HOST, 0, 40, -1), ("k", Kind.KERNEL, GPU, 50, 30, -1)])
    path = [("operator", "a", 0, 0, 40), ("launch delay", "k", 1, 40, 50), ("kernel", "k", 1, 50, 80)]
    keys = ("type", "name", "row", "start_ns", "end_ns")
    found = pack([table], [dict(zip(keys, one, strict=True)) for one in path])
    assert drawn(found) == [("rank 0 a", "rank 0 k", "launch delay", 10)]
    two = [{**dict(zip(keys, one, strict=True)), "rank": rank} for one, rank in zip(path, (0, 1, 1), strict=True)]
    assert drawn(pack([table, replace(table, meta=replace(table.meta, rank=1))], two)) == [
        ("rank 0 a", "rank 1 k", "launch delay", 10)
    ]


def test_who_waited_has_an_arrow_from_the_rank_that_came_last_where_that_is_known():
    tables = [
        make_table([("x", Kind.CPU_OP, HOST, 0, 5, -1), ("reduce", Kind.CPU_OP, HOST, at, 100 - at, -1)], rank)
        for rank, at in enumerate((10, 70, 30))
    ]
    rows = [
        {
            "match": 0,
            "rank": rank,
            "start_ns": at,
            "end_ns": 100,
            "waiting_ns": wait,
            "last": wait == 0,
            "complete": True,
        }
        for rank, at, wait in ((0, 10, 60), (1, 70, 0), (2, 30, 40))
    ]
    assert drawn(pack(tables, collectives=rows)) == [
        ("rank 1 reduce", "rank 0 reduce", "waited for the last rank", 60),
        ("rank 1 reduce", "rank 2 reduce", "waited for the last rank", 40),
    ]
    assert drawn(pack(tables, collectives=[{**row, "complete": False} for row in rows])) == []
    assert drawn(pack(tables, collectives=[{**row, "last": False} for row in rows])) == []
    assert drawn(pack(tables, collectives=[{**row, "end_ns": 99} for row in rows])) == []  # no such event


def test_of_too_many_arrows_the_longest_waits_stay():
    found = [((0, 0), (0, at), "w", at) for at in range(1, 9)]
    header, left = arrows.place(found, {0: np.array([0, *range(1, 8), -1])}, most=3)
    assert [arrow[3] for arrow in header["arrows"]] == [5, 6, 7] and left == 4  # the eighth event is not drawn


def test_tables_that_claim_the_same_rank_are_both_packed():
    packed = pack([small(0), called({"a": 1})], [{"type": "kernel", "name": "x", "row": 4, "start_ns": 0, "end_ns": 9}])
    assert packed.shown == 7
