"""The page of a trace in a real browser: drawn, zoomed, searched and clicked, with 500,000 events and with real traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from devtools import CHROMIUM, Browser
from ridgeline.profiling.analyses.temporal import temporal_breakdown
from ridgeline.profiling.load import load_table
from ridgeline.report.trace_page import write_trace_report
from trace_pages import crowd, everything, small

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
READY = "window.__ridgeline && __ridgeline.ready"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
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


def test_a_hostile_name_is_text_everywhere(page):
    page.click(*middle(page, "<script>alert(1)</script> & co"))
    assert details(page).startswith("<script>alert(1)</script> & co")
    page.run("__ridgeline.timeline.hover([...Object.values(__ridgeline.place(__ridgeline.timeline.painter.selected))])")
    assert page.run("document.querySelectorAll('#timeline-details script').length") == 0


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


def test_a_wheel_over_an_untouched_timeline_scrolls_the_page(page):
    page.run("document.activeElement.blur(), window.scrollTo(0, 0)")
    x, y = middle(page, "sgemm_128")
    before = page.run("window.scrollY")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=120)
    page.wait(f"window.scrollY !== {before}")
    assert page.run("__ridgeline.view()") == [0, 1_000_000]


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


def test_a_finding_shows_its_time_in_the_timeline(page):
    page.click_on("[data-low]")
    assert page.run("__ridgeline.view()") == pytest.approx([180_000, 420_000])
    assert page.run("document.activeElement.id") == "timeline-canvas"


def test_search_counts_marks_and_walks(page):
    page.click_on("#timeline-search")
    page.type("KERNEL")
    assert page.run("document.getElementById('timeline-count').innerText") == "4 events, 700 µs"
    page.key("Enter")
    assert page.run("document.getElementById('timeline-count').innerText") == "1 of 4 events"
    first = details(page).splitlines()[0]
    for _ in range(4):
        page.key("Enter")
    assert details(page).splitlines()[0] == first and first == "cudaLaunchKernel"
    assert page.run("__ridgeline.timeline.search('aten::mm')") == 2  # a segment of the path is no event
    page.run("__ridgeline.timeline.search('no such thing')")
    assert page.run("document.getElementById('timeline-count').innerText") == "0 events"


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


def test_a_frame_of_the_call_tree_fills_the_width_when_chosen(page):
    width = "document.querySelector('#flame [data-at=\"2\"]').getBoundingClientRect().width"
    whole = page.run("document.getElementById('flame').clientWidth")
    assert page.run(width) == pytest.approx(0.6 * whole, abs=2)
    page.click_on("#flame [data-at='2']")
    assert page.run(width) == pytest.approx(whole, abs=2)
    assert "600 ns inclusive (60.0 %)" in page.run("document.getElementById('flame-note').innerText")
    page.key("Escape")
    assert page.run(width) == pytest.approx(0.6 * whole, abs=2)


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


def test_a_browser_without_decompression_reads_the_same_events(browser, tmp_path):
    target = write_trace_report([crowd(30_000)], tmp_path / "t.html", "t", {})
    sums = "[__ridgeline.inflatedBy, __ridgeline.count, __ridgeline.data.end.reduce((a, b) => a + b, 0), __ridgeline.data.partner.reduce((a, b) => a + b, 0)]"
    browser.open(target, READY)
    native = browser.run(sums)
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    browser.open(target, "window.__ridgeline && __ridgeline.inflatedBy === 'script' && __ridgeline.ready")
    assert native[0] == "DecompressionStream" and browser.run(sums) == ["script", *native[1:]]
    browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


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
