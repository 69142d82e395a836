"""The text of a trace's page. What it packs and what a browser makes of it are in the files beside this one."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ridgeline.errors import UserError
from ridgeline.report.trace import blocks, plots
from ridgeline.report.trace.tree import frames
from ridgeline.report.trace_page import write_trace_report
from test_report import Balance
from trace_pages import everything, make_table, small


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
    decade_x = (1180 - 112 - 24) / 2  # intensities 40 and 200: the axis is 10 .. 1000, two decades
    assert x1 == pytest.approx(112 + decade_x * np.log10(4), abs=0.1)  # ridge = 4e11 / 1e10 = 40 FLOP/byte
    assert y1 == y2 and x0 < x1 and y0 > y1
