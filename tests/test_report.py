"""Reports: self-contained, escaped, complete, and opened in a real browser."""

from __future__ import annotations

import html.parser
import math
import re
import shutil
import subprocess

import pytest

from ridgeline.report import write_report
from ridgeline.report.page import esc, number, percent, seconds, si
from ridgeline.report.picture import Stage, draw_line
from ridgeline.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]


def make_run(root, kind, summary=None, files=None, metrics=()):
    run = Run.create(kind, root=root)
    for name, value in (files or {}).items():
        run.save_json(name, value)
    for line in metrics:
        run.log(**line)
    run.summarize(**(summary or {}))
    run.finish()
    return run


@pytest.fixture
def line_of_runs(tmp_path):
    """A demo run with one run of every kind, figures of the shape the verbs leave."""
    gemm = {"fp32": 1.5e11, "bf16": 4.0e11, "int8": 9.0e11}
    env = make_run(
        tmp_path,
        "env",
        files={
            "ceilings.json": {"device": "AMD <EPYC>", "gemm_flops_per_second": gemm, "copy_bytes_per_second": 1.5e10}
        },
    )
    data = make_run(
        tmp_path,
        "data",
        {"documents": 249, "documents_kept": 247, "tokens": 2_900_000, "bytes_per_second": 2e6, "fates": {"kept": 247}},
    )
    plan = make_run(tmp_path, "plan", {"parameters": 13_769_088, "step_seconds": 1.1})
    metrics = [
        {
            "step": s,
            "loss": 9 * math.exp(-s / 40) + 4,
            "data_seconds": 0.001,
            "compute_seconds": 1.2,
            "optimizer_seconds": 0.05,
        }
        for s in range(1, 101)
    ] + [{"step": s, "validation_loss": 9 * math.exp(-s / 40) + 4.2} for s in (50, 100)]
    train = make_run(
        tmp_path,
        "train",
        {"validation_loss": 4.7, "tokens_per_second": 3100.0, "mfu": 0.62, "steps": 100, "seconds": 140.0},
        {"comparison.json": [{"name": "step", "predicted": 1.1, "measured": 1.3, "ratio": 0.85, "unit": "s"}]},
        metrics,
    )
    parts = {"compute": 1.1, "communication_exposed": 0.0, "optimizer": 0.05, "host": 0.03, "idle": 0.01, "data": 0.0}
    profile = make_run(
        tmp_path,
        "profile",
        {"bound_by": "compute", "verdict": "bound by compute", "step_seconds": 1.19, "parts": parts},
        {"breakdown.json": {"ranks": {"0": {"parts": parts}}}},
    )
    generate = make_run(tmp_path, "generate", {"tokens_per_second": 40.0, "mbu": 0.5, "bytes_per_second": 1e10})
    load = make_run(
        tmp_path,
        "load",
        {"tokens_per_second": 160.0, "ttft_p50": 0.09, "itl_p50": 0.04, "errors": 0},
        {"latencies.json": {"ttft": [0.05, 0.09, 0.2], "itl": [0.03, 0.04, 0.05], "e2e": [1.0, 2.0]}},
    )
    runs = [env, data, plan, train, profile, generate, load]
    demo = make_run(
        tmp_path,
        "demo",
        files={
            "stages.json": [
                {
                    "name": run.kind,
                    "command": f"ridgeline {run.kind}",
                    "seconds": 3.0 + 10 * i,
                    "document": {"run": run.id},
                }
                for i, run in enumerate(runs)
            ],
            "samples.json": [{"model": "m", "prompt": "My fellow <b>citizens</b>", "text": "the state & union"}],
            "chat.json": [{"model": "SmolLM2", "role": "assistant", "text": "The capital of France is Paris."}],
        },
    )
    return [demo, *runs]


class Balance(html.parser.HTMLParser):
    """Collects unbalanced tags and references to anything outside the file."""

    VOID = {"meta", "br", "img", "input", "hr", "link", "path", "rect"}

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [value for key, value in attrs if key in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_balanced_file_that_needs_nothing_else(line_of_runs, tmp_path):
    target = tmp_path / "report.html"
    write_report(line_of_runs, target)
    text = target.read_text()
    parser = Balance()
    parser.feed(text)
    assert parser.open == [] and parser.outside == []
    assert "<b>citizens</b>" not in text and "&lt;b&gt;citizens" in text
    for words in ("The line", "Where a step", "Serving under load", "Predicted against measured", "100 steps"):
        assert words in text
    assert all(run.id in text for run in line_of_runs)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_draws_every_plot_without_an_error(line_of_runs, tmp_path):
    target = tmp_path / "report.html"
    write_report(line_of_runs, target)
    probe = (
        "<script>window.addEventListener('error', e => document.title = 'ERROR ' + e.message);"
        "window.addEventListener('load', () => setTimeout(() => {"
        "document.body.dataset.plots = document.querySelectorAll('.plotly-graph-div .main-svg').length;"
        "document.body.dataset.wide = document.documentElement.scrollWidth > window.innerWidth;}, 500));</script>"
    )
    target.write_text(target.read_text().replace("</head>", probe + "</head>"))
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]
    dom = subprocess.run([*command, "--dump-dom", target.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "<title>From raw text" in dom
    assert int(re.search(r'data-plots="(\d+)"', dom)[1]) >= 4
    assert 'data-wide="false"' in dom
    subprocess.run(
        [*command, "--window-size=1200,3000", f"--screenshot={shot}", target.as_uri()], capture_output=True, timeout=120
    )
    assert shot.stat().st_size > 50_000


def test_any_single_run_can_be_reported(line_of_runs, tmp_path):
    for run in line_of_runs[1:]:
        write_report([run], tmp_path / "one.html")
        assert run.id in (tmp_path / "one.html").read_text()


def test_a_run_without_figures_still_makes_a_page(tmp_path):
    for kind in ("env", "data", "plan", "train", "profile", "generate", "load", "other", "demo"):
        run = make_run(tmp_path, kind)
        write_report([run], tmp_path / "empty.html")
        assert run.id in (tmp_path / "empty.html").read_text()


def test_the_picture_shares_one_scale():
    svg = draw_line([Stage("a", "x", "", 30.0), Stage("b", "y", "", 10.0, 0.5, "MFU")])
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="6" rx="3" fill="#d9730d"', svg)]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)
    assert "50 % MFU" in svg


@pytest.mark.parametrize(
    "made, text",
    [
        (number(1234567), "1,234,567"),
        (number(None), "–"),
        (number(0.12345), "0.123"),
        (si(1.74e12, "FLOP/s"), "1.74 TFLOP/s"),
        (si(1024**3, "iB", 1024), "1 GiB"),
        (seconds(0.0021), "2.1 ms"),
        (seconds(61 * 2), "2 min 02 s"),
        (percent(0.1234), "12.3 %"),
        (esc("<a>"), "&lt;a&gt;"),
    ],
)
def test_figures_for_people(made, text):
    assert made == text
