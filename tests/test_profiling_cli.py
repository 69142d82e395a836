"""The verb: traces of anyone's, our runs and configurations, and its errors."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ridgeline.errors import JobError, UserError
from ridgeline.profiling import profile_target, record
from ridgeline.runs import Run
from test_profiling_synthetic import CPU_STEP, text

TINY = """
[data]
name = "tiny"
sources = ["corpus.jsonl"]
split = [0.8, 0.1, 0.1]
filters = {enabled = false}
tokenizer = {vocab_size = 300}
[model]
layers = 1
hidden = 32
heads = 2
context_length = 32
[train]
steps = 4
seq_len = 32
global_batch_size = 4
micro_batch_size = 2
compile = false
"""


def ridgeline(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does."""
    command = [sys.executable, "-m", "ridgeline", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "RIDGELINE_RUNS": str(cwd / "runs"), **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=240)


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder and the hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_help_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    """No torch, no numpy for a help text; no torch for reading a trace."""
    for module, heavy in (
        ("ridgeline.cli.profile", ("torch", "numpy")),
        ("ridgeline.profiling", ("torch", "pydantic")),
    ):
        code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    begun = time.perf_counter()
    shown = ridgeline("profile", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--stack" in shown.stdout
    assert time.perf_counter() - begun < 4  # 0.4 s on a quiet machine


def test_a_foreign_folder_is_read_and_left_alone(tmp_path: Path) -> None:
    """Two ranks' files: JSON holds both, the text names the parts, and no run is made."""
    traces = tmp_path / "traces"
    traces.mkdir()
    for rank in (0, 1):
        (traces / f"rank{rank}.json.gz").write_bytes(gzip.compress(text(CPU_STEP, rank, 2)))
    before = digest(tmp_path)
    shown = ridgeline("profile", "traces", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["run"] is None and sorted(document["ranks"]) == ["0", "1"]
    assert sum(document["parts"].values()) == pytest.approx(document["step_seconds"]) == 0.01
    plain = ridgeline("profile", "traces", cwd=tmp_path)
    assert plain.returncode == 0
    for word in ("communication (exposed)", "host overhead", "rank 1", "bounds the step", "evidence"):
        assert word in plain.stdout
    matched = ridgeline("profile", "traces/rank*.json.gz", "--json", cwd=tmp_path)
    assert matched.returncode == 0, matched.stderr
    assert json.loads(matched.stdout) == document
    assert digest(tmp_path) == before


def test_wrong_input_is_exit_code_two_and_one_line(tmp_path: Path) -> None:
    """Other JSON, no such run, an override of what is only read, a wrong number."""
    (tmp_path / "whole.json").write_bytes(text(CPU_STEP))
    (tmp_path / "other.json").write_text("{}")
    for target, message in {
        "other.json": "without 'traceEvents'",
        "no-such-run": "not found",
        "absent.toml": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            profile_target(str(tmp_path / target) if "." in target else target, runs_root=tmp_path / "runs")
    with pytest.raises(UserError, match="only read"):
        profile_target(str(tmp_path / "whole.json"), ["train.steps=3"])
    shown = ridgeline("profile", "other.json", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("ridgeline: trace other.json") and shown.stderr.count("\n") == 1


def test_a_cut_trace_is_read_to_the_cut_and_says_so(tmp_path: Path) -> None:
    """Its whole events are profiled; the repair opens the remarks."""
    (tmp_path / "cut.json").write_bytes(text(CPU_STEP)[:-40])
    shown = ridgeline("profile", "cut.json", cwd=tmp_path)
    assert shown.returncode == 0 and "cut off after" in shown.stdout


def test_runs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """A data run has no step."""
    with Run.create("data", root=tmp_path) as run:
        pass
    with pytest.raises(UserError, match="kind data"):
        profile_target(run.id, runs_root=tmp_path)


def test_a_run_profiled_in_place_keeps_its_own_step_time(tmp_path: Path) -> None:
    """``train --profile``: the traced seconds go beside the untraced median, never over it."""
    with Run.create("train", root=tmp_path, config={"train": {"compile": True}}) as run:
        run.artifact("traces/rank0.json.gz").write_bytes(gzip.compress(text(CPU_STEP)))
        run.summarize(step_seconds=0.5)
    result = record(run)
    assert run.summary["step_seconds"] == 0.5
    assert run.summary["profiled_step_seconds"] == pytest.approx(0.01)
    assert set(run.summary["parts"]) == {"compute", "communication", "data", "optimizer", "host", "idle"}
    assert run.summary["verdict"] == result.verdict.line
    empty = Run.create("profile", root=tmp_path)
    with pytest.raises(JobError, match="holds no trace"):
        record(empty)


@pytest.mark.slow
def test_profile_a_run_then_a_configuration_on_two_ranks(tmp_path: Path) -> None:
    """The trained run is continued without changing a byte of it; two gloo ranks leave two traces and real collectives."""
    (tmp_path / "tiny.toml").write_text(TINY)
    texts = (f"the {i} quick foxes jump over {i * 7} lazy dogs " * 20 for i in range(80))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    trained = ridgeline("train", "tiny.toml", "--json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    name = json.loads(trained.stdout)["run"]
    before = digest(tmp_path / "runs" / name)
    shown = ridgeline("profile", name, "--steps", "2", "--wait", "3", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert digest(tmp_path / "runs" / name) == before
    document = json.loads(shown.stdout)
    run = Run.open(document["run"], tmp_path / "runs")
    assert (run.kind, run.info["parents"], run.info["status"]) == ("profile", [name], "done")
    assert [step["step"] for step in document["ranks"]["0"]["steps"]] == [4, 5]
    assert [line["step"] for line in run.metrics()] == [5, 6, 7, 8, 9, 10]  # it went on from step 4
    summary = run.summary
    assert sum(summary["parts"].values()) == pytest.approx(summary["step_seconds"])
    assert summary["verdict"] == document["verdict"]["line"] and summary["bound_by"] == document["verdict"]["bound_by"]
    assert (run.load_json("breakdown.json") or {})["ranks"]["0"]["parts"]["compute"] > 0
    assert document["ranks"]["0"]["evidence"]["backward"] == "ridgeline.backward ranges"

    again = ridgeline("profile", run.id, cwd=tmp_path)
    assert again.returncode == 0 and summary["verdict"][:40] in again.stdout

    options = ("--procs", "2", "--wait", "2", "--steps", "2", "--flow", "--json")
    pair = ridgeline("profile", "tiny.toml", *options, cwd=tmp_path)
    assert pair.returncode == 0, pair.stderr
    both = json.loads(pair.stdout)
    assert both["world"] == 2 and both["missing_ranks"] == []
    assert both["matched_collectives"] > 0
    assert any(key.startswith("gloo:all_gather@forward") for key in both["exposed_seconds_by_collective"])
    assert all(rank["parts"]["communication"] > 0 for rank in both["ranks"].values())

    read = ridgeline("trace", "flow", both["run"], "--json", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    flow = json.loads(read.stdout)
    assert flow["why_not_all"] is None and {row["rank"] for row in flow["tensors"]} == {0, 1}
    assert {"parameter", "optimizer_state", "gradient", "activation"} <= {row["role"] for row in flow["summary"]}
