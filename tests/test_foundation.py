"""Configuration, run folders, comparison statistics and the program's front door."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.config import JobConfig, load_config, parse_config
from ridgeline.errors import UserError
from ridgeline.runs import Run, aa_floor, compare_runs, compare_samples, list_runs


def cli(*args, **kwargs):
    return subprocess.run([sys.executable, "-m", "ridgeline", *args], capture_output=True, text=True, **kwargs)


# --- configuration


def test_defaults_are_valid_and_round_trip():
    job = JobConfig()
    assert parse_config(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    "raw, overrides, words",
    [
        ({"optimizer": {"leaning_rate": 1}}, [], ["optimizer.leaning_rate", "did you mean", "optimizer.learning_rate"]),
        ({}, ["optimizer.leaning_rate=1"], ["optimizer.leaning_rate", "learning_rate"]),
        ({"trian": {}}, [], ["trian", "train"]),
        ({"data": {"filters": {"min_word": 1}}}, [], ["data.filters.min_word", "min_words"]),
        ({}, ["train.steps=many"], ["train.steps", "many"]),
        ({}, ["train.steps"], ["section.key=value"]),
        ({"train": 3}, [], ["train", "table"]),
        ({"train": {"global_batch_size": 6, "micro_batch_size": 4}}, [], ["global_batch_size 6", "4"]),
        ({"data": {"split": [0.5, 0.4, 0.2]}}, [], ["split", "sum"]),
        ({"model": {"heads": 7}}, [], ["hidden", "7"]),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(raw, overrides, words):
    with pytest.raises(UserError) as error:
        parse_config(raw, overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_win_and_keep_their_types(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text("[train]\nsteps = 5\n[optimizer]\nlearning_rate = 0.1\n")
    job = load_config(file, ["train.steps=7", "train.dtype=fp32", "data.sources=['a','b']", "train.compile=false"])
    assert (job.train.steps, job.train.dtype, job.data.sources) == (7, "fp32", ["a", "b"])
    assert job.train.compile is False and job.optimizer.learning_rate == 0.1


def test_missing_and_broken_files_are_user_errors(tmp_path):
    (tmp_path / "bad.toml").write_text("[train\n")
    for name, word in (("none.toml", "no such file"), ("bad.toml", "bad.toml"), (".", "folder")):
        with pytest.raises(UserError, match=word):
            load_config(tmp_path / name)


# --- runs


def test_a_run_is_found_by_id_prefix_and_latest(tmp_path):
    run = Run.create("train", "my job!", config={"a": 1}, root=tmp_path)
    run.summarize(loss=1.0)
    run.summarize(speed=2.0)
    run.finish()
    for reference in (run.id, run.id[:-2], "latest", "latest:train", run.path):
        assert Run.open(reference, tmp_path).summary == {"loss": 1.0, "speed": 2.0}
    with pytest.raises(UserError, match="not found"):
        Run.open("nothing", tmp_path)
    with pytest.raises(UserError, match="no such run"):
        Run.open("latest:serve", tmp_path)


def test_an_exception_marks_the_run_failed(tmp_path):
    with pytest.raises(RuntimeError), Run.create("x", root=tmp_path) as run:
        raise RuntimeError("boom")
    assert Run.open(run.path).info["status"] == "failed" and "boom" in Run.open(run.path).info["error"]


def test_non_finite_metrics_are_valid_json_and_not_lost(tmp_path):
    run = Run.create("x", root=tmp_path)
    run.log(step=1, loss=float("nan"))
    line = run.metrics()[0]
    assert line["loss"] is None and line["loss_nonfinite"] == "nan"


def test_metrics_survive_kill_9_and_a_torn_line_is_dropped(tmp_path):
    code = (
        "import sys, time; from ridgeline.runs import Run\n"
        "run = Run.create('x', root=sys.argv[1]); print(run.path, flush=True)\n"
        "for i in range(10**6): run.log(step=i); time.sleep(0.001)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        path = process.stdout.readline().strip()
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    run = Run.open(path)
    steps = [line["step"] for line in run.metrics()]
    assert len(steps) > 3 and steps == list(range(len(steps)))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 99')
    run.log(step=len(steps))
    assert [line["step"] for line in run.metrics()] == [*steps, len(steps)]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    run = Run.create("x", root=tmp_path)
    run.save_json("a.json", {"old": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        run.save_json("a.json", {"new": 2})
    assert run.load_json("a.json") == {"old": 1}
    assert not list(run.path.glob(".*tmp"))


# --- comparison


def _train_run(root, config, seconds):
    run = Run.create("train", config=config, root=root)
    for step, value in enumerate(seconds):
        run.log(step=step, step_seconds=value)
    run.summarize(tokens_per_second=1 / statistics.median(seconds), final_loss=2.0, peak_memory_bytes=10)
    run.finish()
    return run


def test_a_single_factor_is_attributed_and_two_are_not(tmp_path):
    draw = random.Random(1)
    slow = [draw.uniform(0.99, 1.01) for _ in range(20)]
    fast = [0.5 * value for value in slow]
    a = _train_run(tmp_path, {"train": {"compile": False, "seed": 0}}, slow)
    b = _train_run(tmp_path, {"train": {"compile": True, "seed": 0}}, fast)
    c = _train_run(tmp_path, {"train": {"compile": True, "seed": 1}}, fast)
    one = compare_runs(a, b)
    assert [row.key for row in one.differences] == ["train.compile"]
    assert one.steps.verdict == "lower" and one.steps.ratio == pytest.approx(0.5, rel=0.02)
    assert "only train.compile differs" in one.attribution
    two = compare_runs(a, c)
    assert "no change is attributed" in two.attribution
    assert [figure.group for figure in one.figures] == ["speed", "memory", "quality"]


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=20), st.floats(0.1, 10))
def test_comparison_is_scale_free_and_the_same_samples_never_differ(samples, scale):
    same = compare_samples(samples, list(samples))
    assert same.verdict == "no difference" and same.ratio == 1 and same.low <= 1 <= same.high
    scaled = compare_samples([scale * value for value in samples], [scale * value for value in samples])
    assert scaled.floor == pytest.approx(same.floor, rel=1e-6, abs=1e-9)


def test_interval_covers_the_true_ratio_about_as_often_as_it_says():
    draw = random.Random(7)
    hits = 0
    for _ in range(100):
        a = [draw.gauss(10, 1) for _ in range(15)]
        b = [1.2 * draw.gauss(10, 1) for _ in range(15)]
        result = compare_samples(a, b)
        hits += result.low <= 1.2 <= result.high
    assert 88 <= hits <= 100


def test_floor_of_a_noisy_series_blocks_a_verdict():
    noisy = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    assert aa_floor(noisy) > 0.5
    assert compare_samples(noisy, [value * 1.2 for value in noisy]).verdict == "no difference"


# --- the program


def test_help_is_fast_and_imports_no_room():
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        result = cli("--help")
        best = min(best, time.perf_counter() - start)
    assert result.returncode == 0 and "train" in result.stdout
    assert best < 0.4
    code = "import sys, ridgeline.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_a_reader_that_has_gone_is_no_traceback():
    """``ridgeline --help | true``"""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "ridgeline", "--help"], stdout=writer, stderr=subprocess.PIPE
    ) as child:
        os.close(writer)
        _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (1, b"")


def test_import_is_fast():
    code = "import time; t = time.perf_counter(); import ridgeline; print(time.perf_counter() - t)"
    best = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) for _ in range(3)
    )
    assert best < 0.2


def test_a_wrong_verb_exits_2_with_the_nearest():
    result = cli("trian")
    assert result.returncode == 2 and "did you mean 'train'" in result.stderr and result.stdout == ""


def test_every_verb_of_the_table_has_its_file_and_help_without_torch():
    from ridgeline.cli.main import VERBS

    for name in VERBS:
        code = (
            f"import sys, ridgeline.cli.main as m\ntry: m.main(['{name}', '--help'])\nexcept SystemExit as e: assert not e.code\n"
            "assert 'torch' not in sys.modules, 'torch imported'"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, f"{name}: {result.stderr[-500:]}"


def test_runs_verbs_print_json_and_tables(tmp_path):
    a = _train_run(tmp_path, {"train": {"seed": 0}}, [1.0] * 8)
    b = _train_run(tmp_path, {"train": {"seed": 1}}, [1.1] * 8)
    listed = cli("runs", "list", "--runs", str(tmp_path), "--json")
    assert [row["id"] for row in json.loads(listed.stdout)] == sorted([a.id, b.id], key=lambda i: [a.id, b.id].index(i))
    assert json.loads(cli("runs", "show", a.id, "--runs", str(tmp_path), "--json").stdout)["config"] == a.config
    compared = json.loads(cli("runs", "compare", a.id, b.id, "--runs", str(tmp_path), "--json").stdout)
    assert compared["differences"][0]["key"] == "train.seed"
    assert list_runs(tmp_path, "serve") == []
    missing = cli("runs", "show", "nope", "--runs", str(tmp_path))
    assert missing.returncode == 2 and len(missing.stderr.strip().splitlines()) == 1
