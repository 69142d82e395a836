"""The page of a trace in a real browser: drawn, zoomed, searched, measured and clicked. Large and real traces are in
the file beside this one."""

from __future__ import annotations

import json

import pytest

from devtools import CHROMIUM, Browser
from ridgeline.profiling.table import Kind
from ridgeline.report.trace_page import write_trace_report
from trace_pages import everything, make_table, small

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


def test_an_operators_inputs_are_a_table_and_other_arguments_a_list(page):
    page.click(*middle(page, "aten::mm"))
    cells = "[...document.querySelectorAll('#timeline-details tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    assert page.run(cells) == [
        ["0", "float", "[64, 32]", "", ""],
        ["1", "c10::BFloat16", "[32, 8]", "", "strides [1, 32]"],
        ["2", "Scalar", "", "<2>", ""],
    ]
    assert "External id" not in details(page) and "150 µs its own" in details(page)  # 200 less the call's 50
    page.click(*middle(page, "sgemm_128"))
    given = "Object.fromEntries([...document.querySelectorAll('.args > div')].map(d => [...d.children].map(c => c.innerText)))"
    assert page.run(given) == {
        "stream": "7",
        "grid": "8 × 2 × 1",
        "shared memory": "4,096 4 KiB",
        "est. achieved occupancy %": "25",
    }
    assert "correlation\n11" in details(page)
    page.click(*middle(page, "ncclDevKernel_AllReduce"))
    assert "Arguments" not in details(page)


def test_arrows_lead_from_launch_to_kernel_forward_to_backward_and_to_who_waited(page):
    arrows = "__ridgeline.timeline.painter.arrows.map(a => [a.kind, ...[a.from, a.to].map(i => __ridgeline.data.names[__ridgeline.data.name[i]])])"
    odd = "<script>alert(1)</script> & co"
    page.click(*middle(page, "aten::mm"))
    assert page.run(arrows) == [["backward", "aten::mm", odd]] and "backward" in details(page)
    before = pixels(page)
    page.click_on("#timeline-details [data-event]")
    assert details(page).startswith(odd) and "forward" in details(page) and "m.py(3): <f>\nm.py(9): g" in details(page)
    page.key("Escape")
    assert "#23845b" in before and "#23845b" not in pixels(page)  # the arrow's colour, of no event here
    page.click(*middle(page, "cudaLaunchKernel"))
    assert page.run(arrows) == [["launch", "cudaLaunchKernel", "sgemm_128"]]
    page.click(*middle(page, "ncclDevKernel_AllReduce"))
    assert page.run(arrows) == [["wait", "ncclDevKernel_AllReduce", "ncclDevKernel_AllReduce"]]
    assert "waited for the last rank, 200 µs" in details(page) and "rank 1" in details(page)
    page.click_on("#timeline-details [data-event]")
    assert "held up" in details(page)


def pixels(page):
    """The colours of the timeline as #rrggbb, drawn anew."""
    return page.run(
        """(() => { __ridgeline.drawNow();
        const c = document.getElementById('timeline-canvas'), seen = new Set();
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        for (let k = 0; k < d.length; k += 4) seen.add((d[k] << 16) + (d[k + 1] << 8) + d[k + 2]);
        return [...seen].map(n => '#' + n.toString(16).padStart(6, '0')); })()"""
    )


def drag(page, start, end, **more):
    page.mouse("mousePressed", *start, button="left", clickCount=1, **more)
    page.mouse("mouseMoved", *end, button="left", buttons=1, **more)
    page.mouse("mouseReleased", *end, button="left", clickCount=1, **more)


def spot(page, name, time):
    """Where a moment of the first event of this name is in the window."""
    left = page.run("document.getElementById('timeline-canvas').getBoundingClientRect().x")
    y = middle(page, name)[1]
    return page.run(f"__ridgeline.timeline.painter.x({time})") + left, y


def measured(page):
    rows = "[...document.querySelectorAll('#timeline-details tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    return page.run(rows)


def test_a_drag_on_the_ruler_measures_all_lanes_and_with_shift_the_lanes_it_crosses(page):
    (low, y), (high, _) = spot(page, "aten::mm", 200_000), spot(page, "aten::mm", 400_000)
    top = page.run("document.getElementById('timeline-canvas').getBoundingClientRect().y") + 10
    drag(page, (low, top), (high, top))
    span = page.run("__ridgeline.timeline.painter.span")
    scale = page.run("__ridgeline.timeline.painter.scale")
    assert [span["low"], span["high"]] == pytest.approx([200_000, 400_000], abs=2 / scale)
    # To be exact, not to the pixel: of one rank the step, mm's second half, its kernel's first 80 us.
    page.run(
        "Object.assign(__ridgeline.timeline.painter.span, {low: 200000, high: 400000}), __ridgeline.timeline.tellSpan()"
    )
    host, kernels, *others = measured(page)
    assert host == ["rank 0, main thread 1", "2", "200 µs", "100.0 %"]
    assert kernels == ["rank 0, device 0 stream 7", "1", "80 µs", "40.0 %"]
    names = {name: rest for name, *rest in others if not name.startswith("rank")}
    assert names["aten::mm"] == ["2", "200 µs", "200 µs", "100 µs"]
    assert names["ProfilerStep#3"] == ["2", "400 µs", "200 µs", "200 µs"]  # its own: while mm does not run
    assert details(page).startswith("200 µs measured") and "6 events" in details(page)
    drag(page, (low, y), (high, y + 2), modifiers=8)
    assert measured(page)[0][:2] == ["rank 0, main thread 1", "2"]
    assert {name for name, *_ in measured(page)} == {"rank 0, main thread 1", "aten::mm", "ProfilerStep#3"}
    assert page.run("__ridgeline.view()") == [0, 1_000_000]  # a measuring drag does not move


def test_measuring_by_key_and_by_button(page):
    page.run("document.getElementById('timeline-canvas').focus()")
    page.key("m")
    assert details(page).startswith("1 ms measured") and "12 events" in details(page)
    page.click(*middle(page, "sgemm_128"))
    page.key("m")
    assert details(page).startswith("250 µs measured")
    page.key("Escape")
    assert "Choose an event" in details(page) and page.run("__ridgeline.timeline.painter.span") is None
    page.click_on("[data-act=measure]")
    assert page.run("document.querySelector('[data-act=measure]').getAttribute('aria-pressed')") == "true"
    page.run("document.getElementById('timeline').scrollIntoView()")
    drag(page, spot(page, "aten::mm", 100_000), spot(page, "aten::mm", 300_000))
    assert "measured" in details(page)


def test_the_address_keeps_the_view_the_choice_and_the_search(page):
    page.click(*middle(page, "sgemm_128"))
    page.run("__ridgeline.setView(200000, 600000), __ridgeline.timeline.box.value = 'nccl'")
    page.wait("location.hash.includes('view=200000-600000') && location.hash.includes('find=nccl')")
    chosen = page.run("__ridgeline.timeline.painter.selected")
    assert f"event={chosen}" in page.run("location.hash")
    page.run("window.stays = true, location.reload(), null")
    page.wait("!window.stays && window.__ridgeline && __ridgeline.ready")
    assert page.run("__ridgeline.view()") == [200_000, 600_000] and details(page).startswith("sgemm_128")
    assert page.run("document.getElementById('timeline-count').innerText") == "2 events, 600 µs"
    page.run("location.hash = '#view=100-90000000&event=99999', null")  # out of bounds: held within them
    page.wait("__ridgeline.view()[0] === 0 && __ridgeline.view()[1] === 1000000")
    page.run("location.hash = '#kernels', null")
    page.wait("document.getElementById('kernels').getBoundingClientRect().y < 40")
    assert page.run("__ridgeline.view()") == [0, 1_000_000]


def test_the_tip_shows_the_duration_and_the_shapes(page):
    page.mouse("mouseMoved", *middle(page, "aten::mm"))
    page.wait("!document.getElementById('timeline-tip').hidden")
    assert page.run("document.getElementById('timeline-tip').innerText") == "aten::mm · 200 µs · [64, 32] [32, 8]"


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


def test_python_frames_are_folded_until_one_of_them_is_chosen(browser, tmp_path):
    """The launch lies in an operator and that in five frames; the kernel is called in all of them, outermost first."""
    host, gpu = ("1", "1"), ("0", "7")
    frames = [(f"m.py({at}): f", Kind.PYTHON, host, at, 100 - 2 * at, -1) for at in range(12)]
    ops = [("aten::mm", Kind.CPU_OP, host, 20, 20, -1), ("cudaLaunchKernel", Kind.RUNTIME, host, 22, 3, 1)]
    table = make_table([*frames, *ops, ("sgemm", Kind.KERNEL, gpu, 30, 5, 1)])
    browser.errors.clear()
    browser.open(write_trace_report([table], tmp_path / "t.html", "t", {}), READY)
    assert browser.run("__ridgeline.data.lanes.map(lane => lane.open)") == [True, False, True]
    browser.click(*middle(browser, "sgemm"))
    calls = "[...document.querySelectorAll('#timeline-details .wide')].pop().querySelectorAll('button')"
    names = [f"m.py({at}): f" for at in range(12)] + ["aten::mm"]
    assert browser.run(f"[...{calls}].map(one => one.innerText || one.textContent)") == names
    assert "5 calls further out" in details(browser)
    browser.run(f"{calls}[11].click()")
    assert details(browser).startswith("m.py(11): f") and browser.run("__ridgeline.data.lanes[1].open")
    assert browser.errors == []


def test_a_frame_of_the_call_tree_fills_the_width_when_chosen(page):
    width = "document.querySelector('#flame [data-at=\"2\"]').getBoundingClientRect().width"
    whole = page.run("document.getElementById('flame').clientWidth")
    assert page.run(width) == pytest.approx(0.6 * whole, abs=2)
    page.click_on("#flame [data-at='2']")
    assert page.run(width) == pytest.approx(whole, abs=2)
    assert "600 ns inclusive (60.0 %)" in page.run("document.getElementById('flame-note').innerText")
    page.key("Escape")
    assert page.run(width) == pytest.approx(0.6 * whole, abs=2)


@pytest.mark.parametrize("width", [1240, 800, 600])
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
