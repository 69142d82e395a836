"""The page of a trace: what it packs, what it says, and that a browser draws it, zooms, finds and answers clicks."""

from __future__ import annotations

import base64
import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools import CHROMIUM, Browser
from ridgeline.errors import UserError
from ridgeline.profiling.analyses.temporal import temporal_breakdown
from ridgeline.profiling.load import load_table
from ridgeline.profiling.table import Kind, TraceMeta, TraceTable
from ridgeline.report.trace import blocks, plots
from ridgeline.report.trace.pack import MAX_ROWS, ROLES, SEGMENT, pack, separate, varint
from ridgeline.report.trace.path import on_path
from ridgeline.report.trace.tree import frames
from ridgeline.report.trace_page import write_trace_report
from test_report import Balance

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
READY = "window.__ridgeline && __ridgeline.ready"


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
            {"from_rank": 1, "to_rank": 0, "waited_ns": 9_000_000},
            {"from_rank": 0, "to_rank": 1, "waited_ns": 1_000_000},
        ],
        "calltree": [
            {"path": ["step"], "inclusive_ns": 1000, "exclusive_ns": 100, "count": 1},
            {"path": ["step", "aten::mm"], "inclusive_ns": 600, "exclusive_ns": 600, "count": 3},
            {"path": ["step", "aten::add"], "inclusive_ns": 300, "exclusive_ns": 300, "count": 2},
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
        "void k24&lt;T&gt;",
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
    two = frames([{**row, "rank": rank} for row in everything()["calltree"] for rank in (0, 1)])
    assert [f[5] for f in two if f[0] == 1] == ["rank 0", "rank 1"] and two[0][2] == 2000


def test_a_path_without_its_ancestors_is_as_long_as_what_is_below():
    out = frames([{"path": ["a", "b", "c"], "inclusive_ns": 7}])
    assert [(f[5], f[2], f[6]) for f in out] == [("all", 7, -1), ("a", 7, 0), ("b", 7, 1), ("c", 7, 2)]


def test_thinning_memory_keeps_the_peak_and_both_ends():
    rng = np.random.default_rng(0)
    held = rng.integers(0, 1000, (2, 20_000))
    moments, stack = plots._thin(np.arange(20_000), held, 100)
    assert moments.size <= 102 and moments[0] == 0 and moments[-1] == 19_999
    assert stack.sum(axis=0).max() == held.sum(axis=0).max()


def test_the_roof_meets_its_slope_at_the_ridge():
    svg = plots.roofline(everything()["roofline"]["operators"], everything()["roofline"]["ceilings"]).body
    path = re.search(r'd="M([\d. L]+)" fill="none" stroke="#1b2430"', svg)[1]
    (x0, y0), (x1, y1), (_, y2) = [tuple(map(float, point.split())) for point in path.split("L")]
    decade_x = (1180 - 84 - 20) / 2  # intensities 40 and 200: the axis is 10 .. 1000, two decades
    assert x1 == pytest.approx(84 + decade_x * np.log10(4), abs=0.1)  # ridge = 4e11 / 1e10 = 40 FLOP/byte
    assert y1 == y2 and x0 < x1 and y0 > y1


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def page(browser, tmp_path):
    """A page of two ranks with every section, open and free of errors at the end."""
    browser.errors.clear()
    browser.requests.clear()
    target = write_trace_report([small(0), small(1)], tmp_path / "t.html", "Two ranks", everything())
    browser.size(1240, 900)
    browser.open(target, READY)
    yield browser
    assert browser.errors == [] and browser.run("__ridgeline.errors") == []
    assert [url for url in browser.requests if not url.startswith(("file:", "about:"))] == []


def middle(browser, name):
    """Where the first event of this name is in the window, the timeline scrolled into view."""
    browser.run("document.getElementById('timeline').scrollIntoView()")
    return browser.run(
        f"""(() => {{
        const d = __ridgeline.data, code = d.names.indexOf({json.dumps(name)}), i = d.name.indexOf(code);
        const at = __ridgeline.place(i), box = document.getElementById('timeline-canvas').getBoundingClientRect();
        return [box.x + at.x + at.width / 2, box.y + at.y + at.height / 2]; }})()"""
    )


def details(browser):
    return browser.run("document.getElementById('timeline-details').innerText")


@needs_browser
def test_a_click_on_an_event_shows_what_it_is_and_a_click_on_its_partner_goes_there(page):
    assert page.run("__ridgeline.count") == 13  # six events of two ranks and a segment of the path
    page.click(*middle(page, "sgemm_128"))
    text = details(page)
    assert text.startswith("sgemm_128") and "250 µs" in text and "320,000 ns" in text
    assert "device 0 stream 7" in text and "cudaLaunchKernel" in text and "compute kernel" in text
    assert "120 µs from the call's end to the start" in text  # 320 - (150 + 50)
    assert "aten::mm" in text  # around the call
    page.click_on("#timeline-details [data-event]")
    assert details(page).startswith("cudaLaunchKernel") and "launches" in details(page)
    page.click(*middle(page, "aten::mm"))
    assert details(page).startswith("aten::mm") and "on the critical path" in details(page)


@needs_browser
def test_a_hostile_name_is_text_everywhere(page):
    page.click(*middle(page, "<script>alert(1)</script> & co"))
    assert details(page).startswith("<script>alert(1)</script> & co")
    page.run("__ridgeline.timeline.hover([...Object.values(__ridgeline.place(__ridgeline.timeline.painter.selected))])")
    assert page.run("document.querySelectorAll('#timeline-details script').length") == 0


@needs_browser
def test_zoom_and_pan_by_buttons_wheel_keys_and_drag_change_the_ruler(page):
    whole, labels = page.run("__ridgeline.view()"), page.run("__ridgeline.ruler()")
    assert whole == [0, 1_000_000] and labels[0] == "0 µs"

    def wide():
        low, high = page.run("new Promise(done => requestAnimationFrame(() => done(__ridgeline.view())))")
        return high - low

    page.click_on("[data-act=zoom-in]")
    assert wide() == pytest.approx(500_000)
    assert page.run("__ridgeline.ruler()") != labels and "500 µs" in page.run(
        "document.getElementById('timeline-range').innerText"
    )
    x, y = middle(page, "aten::mm")
    page.click(x, y)
    held = page.run("__ridgeline.timeline.painter.time(600)")
    page.mouse(
        "mouseWheel",
        600 + page.run("document.getElementById('timeline-canvas').getBoundingClientRect().x"),
        y,
        deltaX=0,
        deltaY=-200,
    )
    page.wait("__ridgeline.view()[1] - __ridgeline.view()[0] < 400000")
    assert page.run("__ridgeline.timeline.painter.time(600)") == pytest.approx(held, abs=1)  # the pointer's time stays
    before = page.run("__ridgeline.view()")
    page.mouse("mousePressed", 700, y, button="left", clickCount=1)
    page.mouse("mouseMoved", 600, y, button="left", buttons=1)
    page.mouse("mouseReleased", 600, y, button="left", clickCount=1)
    after, scale = page.run("__ridgeline.view()"), page.run("__ridgeline.timeline.painter.scale")
    assert after[0] - before[0] == pytest.approx(100 / scale, rel=0.01)
    page.run("document.getElementById('timeline-canvas').focus()")
    for key, factor in (("w", 0.7), ("s", 1 / 0.7)):
        now = wide()
        page.key(key)
        assert wide() == pytest.approx(now * factor)
    low = page.run("__ridgeline.view()[0]")
    page.key("a")
    assert page.run("__ridgeline.view()[0]") < low
    page.key("f")
    assert page.run("__ridgeline.view()") == whole


@needs_browser
def test_a_wheel_over_an_untouched_timeline_scrolls_the_page(page):
    page.run("document.activeElement.blur(), window.scrollTo(0, 0)")
    x, y = middle(page, "sgemm_128")
    before = page.run("window.scrollY")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=120)
    page.wait(f"window.scrollY !== {before}")
    assert page.run("__ridgeline.view()") == [0, 1_000_000]


@needs_browser
def test_pinching_zooms(page):
    x, y = middle(page, "ProfilerStep#3")
    page.send("Emulation.setTouchEmulationEnabled", enabled=True)
    for kind, apart in (("touchStart", 50), ("touchMove", 80), ("touchMove", 100)):
        points = [{"x": x - apart, "y": y, "id": 1}, {"x": x + apart, "y": y, "id": 2}]
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.send("Emulation.setTouchEmulationEnabled", enabled=False)
    low, high = page.run("__ridgeline.view()")
    assert high - low == pytest.approx(500_000, rel=0.02)


@needs_browser
def test_the_keyboard_alone_reaches_events(page):
    page.run("document.getElementById('timeline-canvas').focus()")
    page.key("ArrowRight")
    assert details(page).startswith("operator: aten::mm")
    page.key("ArrowDown")
    page.key("ArrowDown")
    assert details(page).startswith("aten::mm")
    page.key("ArrowRight")
    assert details(page).startswith("<script>")
    page.key("Escape")
    assert "Choose an event" in details(page)
    page.key("/")
    assert page.run("document.activeElement.id") == "timeline-search"


@needs_browser
def test_a_finding_shows_its_time_in_the_timeline(page):
    page.click_on("[data-low]")
    assert page.run("__ridgeline.view()") == pytest.approx([180_000, 420_000])
    assert page.run("document.activeElement.id") == "timeline-canvas"


@needs_browser
def test_search_counts_marks_and_walks(page):
    page.click_on("#timeline-search")
    page.type("KERNEL")
    assert page.run("document.getElementById('timeline-count').innerText") == "4 events"
    page.key("Enter")
    assert page.run("document.getElementById('timeline-count').innerText") == "1 of 4 events"
    first = details(page).splitlines()[0]
    for _ in range(4):
        page.key("Enter")
    assert details(page).splitlines()[0] == first and first == "cudaLaunchKernel"
    page.run("__ridgeline.timeline.search('no such thing')")
    assert page.run("document.getElementById('timeline-count').innerText") == "0 events"


@needs_browser
def test_a_lane_folds_when_its_name_is_clicked(page):
    x, y = middle(page, "ProfilerStep#3")
    left = page.run("document.getElementById('timeline-canvas').getBoundingClientRect().x")
    rows = "__ridgeline.timeline.painter.bands.filter(b => b.lane)[1].height"
    tall = page.run(rows)
    page.click(left + 30, y)
    assert page.run(rows) < tall
    page.click_on("[data-act=fold]")
    page.click_on("[data-act=fold]")
    assert page.run(rows) == tall


@needs_browser
def test_a_frame_of_the_call_tree_fills_the_width_when_chosen(page):
    width = "document.querySelector('#flame [data-at=\"2\"]').getBoundingClientRect().width"
    whole = page.run("document.getElementById('flame').clientWidth")
    assert page.run(width) == pytest.approx(0.6 * whole, abs=2)
    page.click_on("#flame [data-at='2']")
    assert page.run(width) == pytest.approx(whole, abs=2)
    assert "600 ns inclusive (60.0 %)" in page.run("document.getElementById('flame-note').innerText")
    page.key("Escape")
    assert page.run(width) == pytest.approx(0.6 * whole, abs=2)


@needs_browser
@pytest.mark.parametrize("width", [1240, 800])
def test_nothing_overflows_and_text_is_readable(page, width):
    page.size(width, 900)
    page.wait(f"document.documentElement.clientWidth <= {width}")
    assert page.run("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth + 1).map(s => s.id)"
    assert page.run(wide) == []
    for one, ink in page.run("SHADES.flatMap(([shades, ink]) => shades.map(one => [one, ink]))"):
        assert contrast(one, ink) >= 4.5, (one, ink)


def contrast(one, other):
    """WCAG 2's ratio of two #rrggbb colours."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_a_browser_without_decompression_reads_the_same_events(browser, tmp_path):
    target = write_trace_report([crowd(30_000)], tmp_path / "t.html", "t", {})
    sums = "[__ridgeline.inflatedBy, __ridgeline.count, __ridgeline.data.end.reduce((a, b) => a + b, 0), __ridgeline.data.partner.reduce((a, b) => a + b, 0)]"
    browser.open(target, READY)
    native = browser.run(sums)
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    browser.open(target, "window.__ridgeline && __ridgeline.inflatedBy === 'script' && __ridgeline.ready")
    assert native[0] == "DecompressionStream" and browser.run(sums) == ["script", *native[1:]]
    browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def crowd(count, rank=0):
    """``count`` events: half kernels on four streams, half operators nested five deep, each kernel launched by one."""
    rng = np.random.default_rng(rank)
    half, calls = count // 2, count // 10
    busy, gap = rng.integers(500, 20_000, half), rng.integers(0, 3_000, half)
    start = np.cumsum(busy + gap) - busy
    outer = np.cumsum(rng.integers(2_000, 120_000, calls))
    inner = np.diff(np.append(outer, outer[-1] + 9_000)) - 100
    starts = np.concatenate([start, *(outer + d * inner // 12 for d in range(5))])
    ends = np.concatenate([start + busy, *(outer + inner - d * inner // 12 for d in range(5))])
    kernel = np.arange(starts.size) < half
    thread = np.where(kernel, 1 + np.arange(starts.size) % 4, 0)
    name = np.where(kernel, rng.integers(0, 20, starts.size), rng.integers(20, 60, starts.size))
    kind = np.where(kernel, Kind.KERNEL, Kind.CPU_OP)
    innermost = np.arange(starts.size) >= starts.size - calls
    kind[innermost] = Kind.RUNTIME
    correlation = np.where(kernel, np.arange(starts.size) % calls, -1)
    correlation[innermost] = np.arange(calls)
    order = np.lexsort((name, thread, -ends, starts))
    return TraceTable(
        meta=TraceMeta(source="crowd.json", rank=rank),
        names=tuple(f"kernel_{i}" for i in range(20)) + tuple(f"aten::op_{i}" for i in range(40)),
        threads=(("1", "1"), *(("0", str(stream)) for stream in (7, 8, 9, 10))),
        kind=kind[order].astype(np.int8),
        name=name[order].astype(np.int32),
        thread=thread[order].astype(np.int32),
        start=starts[order].astype(np.int64),
        end=ends[order].astype(np.int64),
        args=[b""] * starts.size,
        correlation=correlation[order].astype(np.int64),
        device=np.where(kernel, 0, -1)[order].astype(np.int32),
        stream=np.where(kernel, thread + 6, -1)[order].astype(np.int64),
    )


@needs_browser
def test_half_a_million_events_draw_in_under_50_ms_at_every_zoom(browser, tmp_path):
    table = crowd(500_000)
    target = write_trace_report([table], tmp_path / "t.html", "t", {})
    assert target.stat().st_size < 12_000_000
    browser.errors.clear()
    browser.size(1240, 900)
    browser.open(target, READY)
    assert browser.run("__ridgeline.count") == len(table) == 500_000
    # Reading a pixel back makes the browser finish painting before the clock stops.
    once = "(() => { const t = performance.now(); __ridgeline.drawNow(); __ridgeline.timeline.painter.context.getImageData(0, 0, 1, 1); return performance.now() - t; })()"
    span = browser.run("__ridgeline.view()[1]")
    for share in (1, 0.3, 0.1, 0.01, 0.001, 0.0001):
        browser.run(f"__ridgeline.setView({span * 0.4}, {span * (0.4 + 0.6 * share)})")
        took = sorted(browser.run(once) for _ in range(5))
        assert took[2] < 50, (share, took)
    found = browser.run("__ridgeline.timeline.search('OP_3')")
    holds = np.array(["op_3" in name for name in table.names])
    assert found == int(holds[table.name].sum()) > 0
    assert sorted(browser.run(once) for _ in range(5))[2] < 50
    assert browser.errors == []


@needs_browser
@pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
@pytest.mark.parametrize(
    "files",
    [
        ["gloo/gloo_straggler_rank0.json.gz", "gloo/gloo_straggler_rank1.json.gz"],
        ["hta/nccl_parser_config/nccl_data.json.gz"],
    ],
)
def test_real_traces_open_and_every_event_can_be_clicked_and_found(browser, tmp_path, files):
    tables = [load_table(TRACES / name) for name in files]
    summary = [{"rank": at, **temporal_breakdown(table).to_dicts()[0]} for at, table in enumerate(tables)]
    browser.errors.clear()
    browser.size(1240, 900)
    browser.open(write_trace_report(tables, tmp_path / "t.html", "t", {"summary": summary}), READY)
    assert browser.run("__ridgeline.count") == sum(map(len, tables))
    wanted = sum(int(table.named(lambda name: "reduce" in name.lower()).sum()) for table in tables)
    assert browser.run("__ridgeline.timeline.search('reduce')") == wanted > 0
    browser.run("__ridgeline.timeline.search('')")
    browser.run("document.getElementById('timeline').scrollIntoView()")
    longest = browser.run(
        "(() => { const d = __ridgeline.data; let best = 0; for (let i = 0; i < d.n; i++)"
        "if ((d.role[i] & 127) === 6 && d.end[i] - d.start[i] > d.end[best] - d.start[best] || (d.role[best] & 127) !== 6) best = i;"
        "__ridgeline.timeline.reveal(best); return best; })()"
    )
    at = browser.run(f"__ridgeline.place({longest})")
    box = browser.run("(b => [b.x, b.y])(document.getElementById('timeline-canvas').getBoundingClientRect())")
    browser.click(box[0] + at["x"] + at["width"] / 2, box[1] + at["y"] + at["height"] / 2)
    assert details(browser).startswith(browser.run(f"__ridgeline.data.names[__ridgeline.data.name[{longest}]]"))
    assert "collective" in details(browser)
    assert browser.errors == []
