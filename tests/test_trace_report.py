"""The page of a trace: what it packs and what it says. What a browser makes of it is in the file beside this one."""

from __future__ import annotations

import base64
import itertools
import re
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.table import Kind, TraceMeta, TraceTable
from ridgeline.report.trace import blocks, plots
from ridgeline.report.trace.pack import MAX_ROWS, ROLES, SEGMENT, pack, separate, varint
from ridgeline.report.trace.path import on_path
from ridgeline.report.trace.tree import frames
from ridgeline.report.trace_page import write_trace_report
from test_report import Balance


def make_table(events, rank=0, source="made.json"):
    """A table from (name, kind, thread, start, duration, correlation) rows; device rows have stream = thread's tid."""
    events = sorted(events, key=lambda e: (e[3], -e[4], e[2], e[0]))
    names = tuple(dict.fromkeys(e[0] for e in events))
    threads = tuple(dict.fromkeys(e[2] for e in events))
    start = np.array([e[3] for e in events], np.int64)
    device = np.array([e[1] in (Kind.KERNEL, Kind.MEMCPY, Kind.MEMSET) for e in events], np.bool_)
    stream = np.array([int(e[2][1]) for e in events], np.int64)
    return TraceTable(
        meta=TraceMeta(source=source, rank=rank),
        names=names,
        threads=threads,
        kind=np.array([e[1] for e in events], np.int8),
        name=np.array([names.index(e[0]) for e in events], np.int32),
        thread=np.array([threads.index(e[2]) for e in events], np.int32),
        start=start,
        end=start + np.array([e[4] for e in events], np.int64),
        args=[b""] * len(events),
        correlation=np.array([e[5] for e in events], np.int64),
        device=np.where(device, 0, -1).astype(np.int32),
        stream=np.where(device, stream, -1),
    )


def small(rank=0, base=10**18, odd="<script>alert(1)</script> & co"):
    """A step with an operator that launches a kernel, a collective beside it, and a name that is also HTML."""
    host, gpu = ("1", "1"), ("0", "7")
    return make_table(
        [
            ("ProfilerStep#3", Kind.ANNOTATION, host, base, 1_000_000, -1),
            ("aten::mm", Kind.CPU_OP, host, base + 100_000, 200_000, -1),
            ("cudaLaunchKernel", Kind.RUNTIME, host, base + 150_000, 50_000, 11),
            (odd, Kind.CPU_OP, host, base + 400_000, 100_000, -1),
            ("sgemm_128", Kind.KERNEL, gpu, base + 320_000, 250_000, 11),
            ("ncclDevKernel_AllReduce", Kind.KERNEL, ("0", "9"), base + 500_000, 300_000, -1),
        ],
        rank,
    )


def unpack(packed):
    """What the page's script does, in Python: (rank label, lane label, depth, name, start, end, role, partner) rows."""
    header = packed.header
    data, parts, at = zlib.decompress(base64.b64decode(packed.block)), {}, 0
    for name, size in header["sizes"].items():
        parts[name], at = data[at : at + size], at + size
    assert at == len(data)
    numbers = {name: decode(parts[name]) for name in ("start", "duration", "name", "partner")}
    out, i = [], 0
    for rank in header["ranks"]:
        first = i
        for lane in rank["lanes"]:
            for depth, count in enumerate(lane["rows"]):
                now = 0
                for _ in range(count):
                    now += numbers["start"][i]
                    v = numbers["partner"][i] - 1
                    partner = -1 if v < 0 else i + (-(v + 1) // 2 if v % 2 else v // 2)
                    assert partner < 0 or partner >= first
                    name = header["names"][numbers["name"][i]]
                    end = now + numbers["duration"][i]
                    out.append((rank["label"], lane["label"], depth, name, now, end, parts["role"][i], partner))
                    i += 1
    assert i == header["count"] == len(out)
    return out


def decode(data):
    out, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            out.append(value)
            value = shift = 0
    return out


# ---- packing


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
    assert near.header["note"] == "" and near.header["span"] == 1_500_000
    far = pack([small(0), small(1, base=10**18 + 10**12)])
    assert {row[4] for row in unpack(far) if row[3] == "ProfilerStep#3"} == {0}
    assert "own start" in far.header["note"] and far.header["span"] == 1_000_000


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
    assert [(*row[:6], row[7] + 2 if row[7] >= 0 else -1) for row in plain] == [(*row[:6], row[7]) for row in rows[2:]]


def test_too_many_events_leave_out_the_shortest_and_the_page_says_so(tmp_path):
    table = make_table([("op", Kind.CPU_OP, ("1", "1"), 100 * at, at % 10, -1) for at in range(100)])
    packed = pack([table], limit=35)
    kept = [row[5] - row[4] for row in unpack(packed)]
    assert len(kept) == packed.shown == 30 and min(kept) == packed.cut_ns == 7
    text = write_trace_report([table], tmp_path / "t.html", "t", {}, limit=35).read_text()
    assert "70 events shorter than 7e-09 s" in text or "70 events shorter than 0.007 µs" in text


# ---- the page's text


def everything(ranks=(0, 1)):
    """Every section, with figures that are easy to find again."""
    return {
        "integrity": [
            "3 launches without a device event: <lost>",
            {"rank": 1, "message": "1 of 3 steps is missing", "unsafe": ["per-step means"]},
        ],
        "findings": [
            {
                "rank": 1,
                "title": "large",
                "seconds": 0.02,
                "gain_seconds": [0.0, 0.015],
                "per": "per step",
                "evidence": "late in every step",
                "knob": "pin_memory=True",
                "unsafe": ["idle"],
                "start_ns": 10**18 + 200_000,
                "end_ns": 10**18 + 400_000,
            },
            {"rank": None, "title": "small", "seconds": 0.001, "evidence": "e1", "knob": None},
        ],
        "summary": [
            {
                "rank": rank,
                "device": "gpu",
                "span_ns": 1_000_000,
                "busy_ns": 700_000,
                "idle_ns": 300_000,
                "compute_ns": 400_000,
                "communication_ns": 300_000,
                "exposed_communication_ns": 200_000,
                "memory_ns": 100_000,
                "overlap_fraction": 1 / 3,
                "kernel_count": 1234,
            }
            for rank in ranks
        ],
        "idle": [{"rank": 0, "device": 0, "stream": 7, "cause": "host wait", "idle_ns": 250_000}],
        "kernels": [
            {
                "name": f"void k{i}<T>",
                "count": i + 1,
                "sum_ns": 1000 * i,
                "mean_ns": 500,
                "share": i / 400,
                "role": "compute",
            }
            for i in range(25)
        ],
        "communication": [
            {
                "late_rank": 1,
                "waiting_rank": 0,
                "wait_ns": 6_000_000,
                "name": "all_reduce",
                "operator": "slow_op",
                "count": 2,
            },
            {
                "late_rank": 1,
                "waiting_rank": 0,
                "wait_ns": 3_000_000,
                "name": "broadcast",
                "operator": None,
                "count": 1,
            },
            {"late_rank": 0, "waiting_rank": 1, "wait_ns": 1_000_000},
        ],
        "calltree": [
            {"name": "step", "depth": 0, "inclusive_ns": 1000, "exclusive_ns": 100, "count": 1},
            {"name": "aten::mm", "depth": 1, "inclusive_ns": 600, "exclusive_ns": 600, "count": 3},
            {"name": "aten::add", "depth": 1, "inclusive_ns": 300, "exclusive_ns": 300, "count": 2},
        ],
        "roofline": {
            "operators": [
                {
                    "operator": "aten::mm",
                    "input_dims": "[[64, 64], [64, 64]]",
                    "dtype": "float32",
                    "flops": 2e9,
                    "device_time_ns": 10**7,
                    "flops_per_second": 2e11,
                    "intensity_flops_per_byte": 200.0,
                    "share_of_ceiling": 0.5,
                    "bound": "compute",
                },
                {
                    "operator": "aten::sort",
                    "device_time_ns": 10**7,
                    "flops": None,
                    "flops_per_second": None,
                    "intensity_flops_per_byte": None,
                },
            ],
            "ceilings": {
                "gemm_flops_per_second": {"fp32": 4e11, "fp8": None},
                "read_bytes_per_second": 1e10,
                "source": "measured here",
            },
        },
        "memory": {
            "timeline": [
                {"rank": 0, "device": "cuda 0", "time_ns": at, "allocated_bytes": a + b, "a_bytes": a, "b_c_bytes": b}
                for at, a, b in [(0, 1 << 20, 0), (50, 1 << 20, 1 << 20), (90, 1 << 20, 0)]
            ],
            "peak": [
                {
                    "rank": 0,
                    "category": "a",
                    "operator": "aten::empty",
                    "where": "m.py(3): f",
                    "count": 7,
                    "bytes": 2 << 20,
                    "share": 1.0,
                }
            ],
        },
        "critical_path": [
            {
                "rank": 0,
                "name": "aten::mm",
                "type": "operator",
                "start_ns": 10**18 + 100_000,
                "end_ns": 10**18 + 300_000,
            }
        ],
    }


def test_the_page_is_one_balanced_file_in_a_fixed_order_that_needs_nothing_else(tmp_path):
    text = write_trace_report([small(0), small(1)], tmp_path / "t.html", "A <trace>", everything()).read_text()
    parser = Balance()
    parser.feed(text)
    assert parser.open == [] and parser.outside == []
    assert not re.search(r"https?://|url\(|@import|\bimport\(|XMLHttpRequest|fetch\(", text)
    assert "<script>alert(1)" not in text and "A &lt;trace&gt;" in text and "&lt;lost&gt;" in text
    anchors = "integrity findings breakdown timeline critical-path kernels communication calltree roofline memory"
    assert re.findall(r'<section id="([\w-]+)"', text) == anchors.split()
    assert text.index("<h3>large") < text.index("<h3>small")  # the caller's order
    for words in (
        "k24&lt;T&gt;",
        "saves 0 to 15 ms",
        "Unsafe: per-step means",
        "50.0 % of the time",
        "1,234",
        "9 ms",
        "33.3 %",
        "2 MiB",
        "b c",
        "host wait",
        "measured here",
    ):
        assert words in text


def test_a_missing_section_is_absent_or_says_why(tmp_path):
    text = write_trace_report(
        [small()], tmp_path / "t.html", "t", {"why": {"roofline": "No shapes <here>."}}
    ).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Timeline", "Roofline"]
    assert "No shapes &lt;here&gt;." in text


def test_integrity_says_when_nothing_is_missing_and_findings_when_there_are_none(tmp_path):
    text = write_trace_report([small()], tmp_path / "t.html", "t", {"integrity": [], "findings": []}).read_text()
    assert "Nothing was found missing." in text and "No finding is large enough" in text


def test_no_event_is_an_error_for_the_user(tmp_path):
    with pytest.raises(UserError, match="no timed event"):
        write_trace_report([make_table([])], tmp_path / "t.html", "t", {})
    assert not (tmp_path / "t.html").exists()


def test_the_parts_of_a_bar_sum_to_its_whole():
    body = blocks.breakdown(everything()["summary"][:1], None).body
    bar = body[body.index('class="bar"') : body.index('class="bar under"')]
    assert [float(x) for x in re.findall(r"flex:0 0 ([\d.]+)%", bar)] == [40.0, 20.0, 10.0, 30.0]
    under = body[body.index('class="bar under"') : body.index('<ul class="legend"')]
    assert [float(x) for x in re.findall(r"flex:0 0 ([\d.]+)%", under)] == [30.0, 10.0]


def test_a_frame_lies_in_its_parent_and_siblings_do_not_overlap():
    out = frames(everything()["calltree"])
    assert [(f[0], f[1], f[2], f[5]) for f in out] == [
        (0, 0, 1000, "all"),
        (1, 0, 1000, "step"),
        (2, 0, 600, "aten::mm"),
        (2, 600, 300, "aten::add"),
    ]
    two = frames([{**row, "rank": rank} for rank in (0, 1) for row in everything()["calltree"]])
    assert [f[5] for f in two if f[0] == 1] == ["rank 0", "rank 1"] and two[0][2] == 2000
    assert [f[5] for f in two] == [
        "all",
        *["rank 0", "step", "aten::mm", "aten::add"],
        *["rank 1", "step", "aten::mm", "aten::add"],
    ]


def test_the_same_name_under_two_parents_is_two_frames():
    rows = [("a", 0, 10), ("x", 1, 4), ("b", 0, 8), ("x", 1, 7), ("y", 2, 5)]
    out = frames([{"name": name, "depth": depth, "inclusive_ns": ns} for name, depth, ns in rows])
    assert [(f[5], f[0], f[1], f[2], f[6]) for f in out] == [
        ("all", 0, 0, 18, -1),
        ("a", 1, 0, 10, 0),
        ("x", 2, 0, 4, 1),
        ("b", 1, 10, 8, 0),
        ("x", 2, 10, 7, 3),
        ("y", 3, 10, 5, 4),
    ]


def test_waits_for_a_pair_of_ranks_are_summed():
    body = blocks.communication(everything()["communication"]).body
    cells = re.findall(r"<td style=[^>]*>([^<]*)</td>", body)
    assert cells == ["–", "1 ms", "9 ms", "–"] and "slow_op" in body


def test_thinning_memory_keeps_the_peak_and_both_ends():
    rng = np.random.default_rng(0)
    held = rng.integers(0, 1000, (2, 20_000))
    moments, stack = plots._thin(np.arange(20_000), held, 100)
    assert moments.size <= 102 and moments[0] == 0 and moments[-1] == 19_999
    assert stack.sum(axis=0).max() == held.sum(axis=0).max()


def test_memory_in_bytes_and_on_the_timelines_clock():
    rows = [{"rank": 0, "device": "cpu", "time_ns": 5_000_000 + at, "x_bytes": held} for at, held in ((0, 16), (90, 0))]
    body = plots.memory(rows, [], {0: 1_000_000}).body
    assert ">16 B<" in body and body.count(">4 ms<") == 5  # 5 ms on the rank's clock, whose zero is at 1 ms


def test_the_roof_meets_its_slope_at_the_ridge():
    svg = plots.roofline(everything()["roofline"]["operators"], everything()["roofline"]["ceilings"]).body
    path = re.search(r'd="M([\d. L]+)" fill="none" stroke="#1b2430"', svg)[1]
    (x0, y0), (x1, y1), (_, y2) = [tuple(map(float, point.split())) for point in path.split("L")]
    decade_x = (1180 - 112 - 20) / 2  # intensities 40 and 200: the axis is 10 .. 1000, two decades
    assert x1 == pytest.approx(112 + decade_x * np.log10(4), abs=0.1)  # ridge = 4e11 / 1e10 = 40 FLOP/byte
    assert y1 == y2 and x0 < x1 and y0 > y1
