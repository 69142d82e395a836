"""The page of a trace in a real browser, with 500,000 events and with recorded traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from devtools import CHROMIUM, Browser
from ridgeline.profiling.analyses.temporal import temporal_breakdown
from ridgeline.profiling.load import load_table
from ridgeline.report.trace_page import write_trace_report
from trace_pages import crowd

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
READY = "window.__ridgeline && __ridgeline.ready"
PATIENCE = 120.0
"""Seconds for a page to open on a machine that is busy with other things."""
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


def show(browser, target):
    """Opens a page, however long that takes; no error so far."""
    browser.errors.clear()
    browser.size(1240, 900)
    browser.send("Page.navigate", url=target.as_uri())
    browser.wait(f"location.href.startsWith({json.dumps(target.as_uri())}) && Boolean({READY})", PATIENCE)
    return browser


def details(browser):
    return browser.run("document.getElementById('timeline-details').innerText")


def test_a_browser_without_decompression_reads_the_same_events(browser, tmp_path):
    target = write_trace_report([crowd(30_000)], tmp_path / "t.html", "t", {})
    sums = "[__ridgeline.inflatedBy, __ridgeline.count, __ridgeline.data.end.reduce((a, b) => a + b, 0), __ridgeline.data.partner.reduce((a, b) => a + b, 0)]"
    show(browser, target)
    native = browser.run(sums)
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    browser.send("Page.navigate", url="about:blank")
    show(browser, target)
    assert native[0] == "DecompressionStream" and browser.run(sums) == ["script", *native[1:]]
    browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


# Reading a pixel back makes the browser finish painting before the clock stops.
ONE_DRAW = """(() => { const t = performance.now(); __ridgeline.drawNow();
    __ridgeline.timeline.painter.context.getImageData(0, 0, 1, 1); return performance.now() - t; })()"""
RECTANGLES = """(() => { const c = __ridgeline.timeline.painter.context, real = c.fillRect; let n = 0;
    c.fillRect = function (...box) { n++; return real.apply(c, box); };
    __ridgeline.drawNow(); delete c.fillRect; return n; })()"""


def test_half_a_million_events_with_arguments_make_a_small_page_that_draws_what_pixels_can_show(browser, tmp_path):
    table = crowd(500_000)
    target = write_trace_report([table], tmp_path / "t.html", "t", {})
    assert target.stat().st_size < 6_500_000
    show(browser, target)
    assert browser.run("__ridgeline.count") == len(table) == 500_000
    rows = browser.run("__ridgeline.data.rowLane.length")
    span = browser.run("__ridgeline.view()[1]")
    for share in (1, 0.3, 0.1, 0.01, 0.001, 0.0001):
        browser.run(f"__ridgeline.setView({span * 0.4}, {span * (0.4 + 0.6 * share)})")
        # At most a box and a mark per column of a row, whatever the zoom; half a million events would be far more.
        assert browser.run(RECTANGLES) < 1240 * rows + 200 < 20_000
        # 2 to 8 ms on a quiet machine. The best of nine, so that other work on it does not fail the test.
        assert min(browser.run(ONE_DRAW) for _ in range(9)) < 100, share
    found = browser.run("__ridgeline.timeline.search('OP_3')")
    holds = np.array(["op_3" in name for name in table.names])
    assert found == int(holds[table.name].sum()) > 0
    assert browser.errors == []


def test_every_one_of_half_a_million_events_keeps_its_own_arguments(browser, tmp_path):
    table = crowd(500_000)
    show(browser, write_trace_report([table], tmp_path / "t.html", "t", {}))
    sums = """(() => { const d = __ridgeline.data; let grid = 0, none = 0;
        for (let i = 0; i < d.n; i++) { if (d.args[i]) grid += d.sets[d.args[i] - 1].grid[0]; else none++; }
        return [grid, none, d.sets.length]; })()"""
    given = [json.loads(bytes(one))["grid"][0] if one else None for one in table.args]
    grids = [one for one in given if one is not None]
    assert browser.run(sums) == [sum(grids), len(given) - len(grids), len(set(grids))]
    assert browser.errors == []


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
    show(browser, write_trace_report(tables, tmp_path / "t.html", "t", {"summary": summary}))
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
