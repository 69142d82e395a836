"""The page of a compilation in a real browser: 2,000 graph nodes, clicked, searched, folded, by mouse and by keyboard."""

from __future__ import annotations

import json

import pytest

from devtools import CHROMIUM, Browser
from ridgeline.compiler.view.levels import build
from ridgeline.compiler.view.records import Frame, Graph, Loops, Node, Part
from ridgeline.compiler.view.roofline import Device
from ridgeline.report.compile_page import write_compile_page

READY = "window.__ridgeline && __ridgeline.ready"
PANES = ("python", "torch", "aten", "loops", "fused", "code")
NODES, BLOCK = 2000, 8  # nodes of a graph; how many share a kernel
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


def crowd(file):
    """A view of 2,000 nodes: node i is line i of the file, ATen node i, half of loop i // 2, an eighth of a kernel."""
    file.write_text("def f(x):\n" + "".join(f"    x = step_{i}(x)  # <b>&\n" for i in range(NODES)))

    def graph(prefix, parents):
        nodes = {f"{prefix}{i}": Node(f"{prefix}{i}", [(str(file), i + 2, "f")], parents(i)) for i in range(NODES)}
        return Graph([(f"    {name}: f32[4] = step()", name) for name in nodes], nodes)

    def loops(name, ids, members):
        origins, lines = [f"a{i}" for i in ids], [f"{name}: for p0: 4 -> x", "    load = ops.load('x', p0)"]
        known = name != "kernel_3"
        return Loops(
            name,
            "pointwise",
            lines,
            origins,
            [f"buf{ids[-1]}"],
            members,
            1000 + ids[0],
            4000 if known else None,
            "fp32",
        )

    before = [loops(f"op{i // 2}", [i, i + 1], [f"op{i // 2}"]) for i in range(0, NODES, 2)]
    blocks = [list(range(i, i + BLOCK)) for i in range(0, NODES, BLOCK)]
    after = [loops(f"kernel_{at}", ids, [f"op{i // 2}" for i in ids[::2]]) for at, ids in enumerate(blocks)]
    code = "".join(
        f"k_{at} = async_compile.cpp_pybinding([], r'''\nvoid k_{at}() {{}}\n''')\n" for at in range(len(blocks))
    )
    code += "".join(
        f"    # [Provenance debug handles] k_{at}:1\n    k_{at}(buf{ids[-1]})\n" for at, ids in enumerate(blocks)
    )
    aten = graph("a", lambda i: [f"t{i}"])
    frame = Frame(graph("t", lambda i: []), [Part("inference", aten, before, after, code)])
    return build("crowd <&>", [frame], Device("a device", "a datasheet", {"fp32": 1e12}, 1e11))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile"), 1600, 1000) as one:
        yield one


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return crowd(tmp_path_factory.mktemp("source") / "many.py")


@pytest.fixture
def page(browser, view, tmp_path):
    browser.errors.clear()
    browser.requests.clear()
    browser.size(1600, 1000)
    browser.open(write_compile_page(view.to_dict(), tmp_path / "v.html"), READY)
    yield browser
    assert browser.errors == [] and browser.run("__ridgeline.errors") == []
    assert [url for url in browser.requests if not url.startswith(("file:", "about:"))] == []


def show(page, name, line):
    """Scroll a pane so that a line is in sight and drawn."""
    page.run(f"__ridgeline.app.panes.find(p => p.name === {json.dumps(name)}).toLine({line})")
    page.wait(f"document.querySelector('#pane-{name} .row[data-line=\"{line}\"]') !== null")


def click_line(page, name, line):
    show(page, name, line)
    x, y = page.run(
        f"(() => {{ const b = document.querySelector('#pane-{name} .row[data-line=\"{line}\"]').getBoundingClientRect();"
        "return [b.x + 60, b.y + b.height / 2]; })()"
    )
    page.click(x, y)


def expected(node):
    """Lines that must light up for node 8k: of each pane, and only those."""
    block = node // BLOCK
    definitions = 3 * block
    calls = 3 * (NODES // BLOCK) + 2 * block
    return {
        "python": [node + 1],
        "torch": [2 * node + 1],  # a comment with the Python line stands above every node
        "aten": [2 * node + 1],
        "loops": [2 * (node // 2), 2 * (node // 2) + 1],
        "fused": [2 * block, 2 * block + 1],
        "code": [definitions, definitions + 1, definitions + 2, calls, calls + 1],
    }


@pytest.mark.parametrize("start", ["python", "torch", "aten"])
def test_a_click_lights_up_exactly_the_counterparts_in_every_pane(page, start):
    node = 1200
    click_line(page, start, expected(node)[start][0])
    assert page.run("__ridgeline.lit()") == expected(node)
    for name in PANES:  # and they are in sight, drawn as lit
        page.wait(f"document.querySelectorAll('#pane-{name} .row.lit').length > 0")
        shown = page.run(f"[...document.querySelectorAll('#pane-{name} .row.lit')].map(r => Number(r.dataset.line))")
        assert set(shown) <= set(expected(node)[name])
    assert page.run(f"document.querySelectorAll('#pane-{start} .row.chosen').length") >= 1


def test_a_kernel_lights_up_all_it_computes_and_shows_what_it_costs(page):
    kernel = 7
    click_line(page, "fused", 2 * kernel)
    lit = page.run("__ridgeline.lit()")
    assert lit["python"] == [kernel * BLOCK + i + 1 for i in range(BLOCK)]
    assert len(lit["aten"]) == len(lit["torch"]) == BLOCK and len(lit["loops"]) == BLOCK  # four loops of two lines
    text = page.run("document.getElementById('details').innerText")
    assert text.startswith("k_7") and "1.06 kB" in text and "4.00 kFLOP" in text and "3.79 FLOP/B" in text
    assert "memory" in text and "10.6 ns" in text  # 1056 bytes at 1e11 bytes/s
    assert f"many.py:{kernel * BLOCK + 2}" in text and f"x = step_{kernel * BLOCK}(x) # <b>&" in text
    page.click_on("#details .link")
    assert page.run("__ridgeline.lit()")["python"] == [kernel * BLOCK + 1]
    assert "Runs in one kernel" in page.run("document.getElementById('details').innerText")


def test_the_list_of_kernels_is_ordered_by_time_and_selects(page):
    names = page.run("[...document.querySelectorAll('#kernels b')].map(b => b.textContent)")
    assert names[0] == f"k_{NODES // BLOCK - 1}" and len(names) == NODES // BLOCK  # later ones move more here
    page.click_on("#kernels li:nth-child(5) button")
    assert page.run("document.getElementById('details').innerText").startswith(names[4])
    assert page.run("document.querySelectorAll('#roof circle.on').length") == 1
    assert page.run("document.querySelectorAll('#roof circle').length") == NODES // BLOCK - 1  # one has unknown FLOPs


def test_only_what_is_in_sight_is_drawn_wherever_the_panes_stand(page):
    for place in (0, 0.5, 1):
        page.run(f"document.querySelectorAll('.view').forEach(v => v.scrollTop = {place} * v.scrollHeight)")
        page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        for name, rows in page.run("__ridgeline.rows()").items():
            assert 10 < rows < 100, (name, rows)
    last = page.run("Math.max(...[...document.querySelectorAll('#pane-aten .row')].map(r => Number(r.dataset.line)))")
    assert last == 2 * NODES - 1


def test_search_counts_walks_and_lights(page):
    page.click_on("#search")
    page.type("STEP_1234(")
    assert page.run("document.getElementById('count').innerText") == "3 lines"  # Python, and the comments of two graphs
    page.key("Enter")
    assert page.run("document.getElementById('count').innerText") == "1 of 3"
    assert page.run("__ridgeline.lit().aten") == [2 * 1234 + 1]
    page.wait("document.querySelector('#pane-python .row.found.chosen') !== null")


def test_keys_move_the_choice_and_escape_clears(page):
    click_line(page, "torch", 101)
    page.key("ArrowDown")
    assert page.run("__ridgeline.lit().torch") == [103]
    page.key("ArrowUp")
    assert page.run("__ridgeline.lit().torch") == [101]
    page.key("Escape")
    assert page.run("__ridgeline.lit()") == {name: [] for name in PANES}
    page.key("/")
    assert page.run("document.activeElement.id") == "search"


def test_panes_can_be_put_away_and_one_can_fill_the_page(page):
    wide = "document.getElementById('pane-aten').getBoundingClientRect().width"
    before = page.run(wide)
    page.click_on("#pane-aten h2 button")
    assert page.run("[...document.querySelectorAll('.pane')].filter(p => !p.hidden).length") == 1
    assert page.run(wide) > 2.5 * before
    page.click_on("#pane-aten h2 button")
    assert page.run(wide) == pytest.approx(before)
    page.click_on(".chips [data-pane=loops]")
    assert page.run("document.getElementById('pane-loops').hidden") is True
    page.click_on(".chips [data-pane=loops]")
    assert page.run("document.getElementById('pane-loops').hidden") is False


def test_a_comment_is_the_python_line_it_quotes_and_text_stays_text(page):
    show(page, "aten", 2 * 600)
    assert page.run("document.querySelectorAll('.row b').length") == 0
    click_line(page, "aten", 2 * 600)
    assert page.run("__ridgeline.lit().python") == [601]
    assert page.run("document.querySelector('h1').innerText") == "crowd <&>"


@pytest.mark.parametrize("width", [1600, 1240, 800])
def test_nothing_overflows_sideways(page, width):
    page.size(width, 900)
    page.wait(f"document.documentElement.clientWidth <= {width}")
    assert page.run("document.documentElement.scrollWidth") <= width
