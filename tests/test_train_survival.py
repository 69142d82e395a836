"""Training as real processes: two ranks, kills, signals, damaged checkpoints, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ridgeline.errors import JobError
from ridgeline.runs import Run
from ridgeline.train import checkpoint, train
from train_tools import (
    corpus,
    finish,
    losses,
    only_run,
    pretend_ceilings,
    start,
    steps_done,
    tiny,
    toml,
    wait_until,
    weights,
)

LONG = {"train__steps": 120, "train__checkpoint_every": 20, "train__eval_every": 50}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpus")
    pretend_ceilings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIDGELINE_CACHE", str(folder))
        yield corpus(folder)


@pytest.fixture(scope="module")
def uninterrupted(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """120 steps on one process."""
    return train(tiny(data, **LONG), runs_root=tmp_path_factory.mktemp("uninterrupted"))


def test_kill_loses_at_most_the_steps_since_the_checkpoint(
    data: dict[str, Any], uninterrupted: Run, tmp_path: Path
) -> None:
    """kill -9 between checkpoints, resume: the same curve and the same weights, bit for bit, each step once."""
    config = toml(tiny(data, **LONG), tmp_path / "job.toml")
    process = start([config], tmp_path / "runs")
    wait_until(lambda: steps_done(tmp_path / "runs") >= 47, process)
    process.kill()
    finish(process)
    killed = only_run(tmp_path / "runs")
    assert killed.info["status"] == "running"
    found = checkpoint.find(killed.path / "checkpoints")
    assert found is not None and found.step >= 40 and found.step > max(losses(killed)) - 20 - 1
    said: list[str] = []
    resumed = train(tiny(data, **LONG), resume=killed.id, runs_root=tmp_path / "runs", say=said.append)
    assert said == [f"resuming from {found.path.name}"]
    assert resumed.id == killed.id and resumed.info["status"] == "done"
    assert losses(resumed) == losses(uninterrupted) and list(losses(resumed)) == list(range(1, 121))
    assert weights(resumed) == weights(uninterrupted)
    kept = sorted(folder.name for folder in (resumed.path / "checkpoints").iterdir())
    assert kept == ["step-00000100", "step-00000120"]


def test_two_processes_sigterm_and_resume_on_one(data: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    """Two processes see the same batches: the same curve. SIGTERM to the launcher checkpoints; one process goes on."""
    config = toml(tiny(data, **LONG), tmp_path / "job.toml")
    process = start([config, "--procs", "2"], tmp_path / "runs")
    wait_until(lambda: steps_done(tmp_path / "runs") >= 25, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    run = only_run(tmp_path / "runs")
    assert run.info["status"] == "interrupted" and f"--resume {run.id}" in out
    last = max(losses(run))
    found = checkpoint.find(run.path / "checkpoints")
    assert found is not None and found.step == last and found.manifest["world_size"] == 2
    expected = losses(uninterrupted)
    assert all(losses(run)[step] == pytest.approx(expected[step], rel=1e-5) for step in range(1, 6))
    resumed = train(tiny(data, **LONG), resume=run.id, runs_root=tmp_path / "runs")
    assert list(losses(resumed)) == list(range(1, 121)) and resumed.info["status"] == "done"
    assert losses(resumed)[120] == pytest.approx(expected[120], rel=2e-3)


def test_sigterm_and_resume_on_two(data: dict[str, Any], uninterrupted: Run, tmp_path: Path) -> None:
    """One process, SIGTERM, then two processes through the command line with --json."""
    config = toml(tiny(data, **LONG), tmp_path / "job.toml")
    process = start([config], tmp_path / "runs")
    wait_until(lambda: steps_done(tmp_path / "runs") >= 5, process)
    process.terminate()
    code, out, err = finish(process)
    run = only_run(tmp_path / "runs")
    assert code == 0 and "interrupted at step" in out and run.info["status"] == "interrupted", err
    code, out, err = finish(start(["--resume", run.id, "--procs", "2", "--json"], tmp_path / "runs"))
    assert code == 0, err
    import json

    document = json.loads(out)
    assert document["run"] == run.id and document["status"] == "done" and document["summary"]["processes"] == 2
    resumed = only_run(tmp_path / "runs")
    assert list(losses(resumed)) == list(range(1, 121))
    assert losses(resumed)[120] == pytest.approx(losses(uninterrupted)[120], rel=2e-3)


def test_bf16_on_two_processes_under_an_outer_torchrun(data: dict[str, Any], tmp_path: Path) -> None:
    """torchrun's processes are used as they are; the curve is the one-process curve within bf16's rounding."""
    job = tiny(data, train__dtype="bf16")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ridgeline"]
    code, out, err = finish(start([toml(job, tmp_path / "job.toml")], tmp_path / "two", launcher))
    assert code == 0, err
    run = only_run(tmp_path / "two")
    assert run.summary["processes"] == 2 and out.count(f"run {run.id}") == 1
    one = train(job, runs_root=tmp_path / "one")
    assert list(losses(run).values()) == pytest.approx(list(losses(one).values()), rel=5e-3)


def test_death_of_one_rank_ends_the_job(data: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of rank 1: one line that names it, exit code 1, no process left, no hang."""
    config = toml(tiny(data, train__steps=100_000), tmp_path / "job.toml")
    process = start([config, "--procs", "2"], tmp_path / "runs")
    wait_until(lambda: steps_done(tmp_path / "runs") >= 5, process)
    children = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [child for child in children if child.environ().get("RANK") == "1"]
    victim.kill()
    code, _, err = finish(process, seconds=60)
    lines = [line for line in err.splitlines() if line.startswith("ridgeline:")]
    assert code == 1 and len(lines) == 1 and "rank 1 was killed by SIGKILL" in lines[0], err
    assert "Traceback" not in err
    run = only_run(tmp_path / "runs")
    assert run.info["status"] == "failed" and "rank 1" in run.info["error"]
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_refused_input_of_a_worker_is_one_line(data: dict[str, Any], tmp_path: Path) -> None:
    """A validation split shorter than one sample is found by the workers and told as a user's error."""
    config = toml(tiny(data), tmp_path / "job.toml")
    process = start(
        [config, "--procs", "2", "data.split=[1.0, 0.0, 0.0]", f"data.path={tmp_path}/d"], tmp_path / "runs"
    )
    code, _, err = finish(process)
    assert code == 2 and "validation split" in err.splitlines()[-1] and "Traceback" not in err, err
    assert "is not built yet: building it" in err


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "unsealed"])
def test_damaged_checkpoint_falls_back(data: dict[str, Any], uninterrupted: Run, tmp_path: Path, damage: str) -> None:
    import shutil

    run = Run.open(shutil.copytree(uninterrupted.path, tmp_path / uninterrupted.id))
    newest, older = run.path / "checkpoints/step-00000120", run.path / "checkpoints/step-00000100"
    spoil(newest, damage)
    said: list[str] = []
    resumed = train(tiny(data, **LONG), resume=str(run.path), runs_root=tmp_path, say=said.append)
    assert "checkpoint step-00000120: " in said[0] and "using step-00000100 instead" in said[0]
    assert losses(resumed) == losses(uninterrupted) and weights(resumed) == weights(uninterrupted)
    spoil(newest, damage)
    spoil(older, damage)
    with pytest.raises(JobError, match=r"every checkpoint below .* is damaged: step-00000120: .*; step-00000100: "):
        train(tiny(data, **LONG), resume=str(run.path), runs_root=tmp_path)


def spoil(folder: Path, damage: str) -> None:
    (shard,) = folder.glob("*.safetensors")
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 10)
    elif damage == "missing":
        shard.unlink()
    elif damage == "unsealed":
        (folder / "complete").unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1.5 MB; a checkpoint of the tiny job takes 0.4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_leaves_the_previous_checkpoint(data: dict[str, Any], uninterrupted: Run, small_disk: Path) -> None:
    """No room for the second checkpoint: a failed job that says so, nothing half-written, the first intact."""
    job = tiny(data, **{**LONG, "train__keep_checkpoints": 9})
    with pytest.raises(JobError, match=r"checkpoint of step \d+ was not written to .*disk full.*step-\d+ is intact"):
        train(job, runs_root=small_disk)
    run = only_run(small_disk)
    assert run.info["status"] == "failed" and "disk full" in run.info["error"]
    assert not list((run.path / "checkpoints").glob(".*"))
    found = checkpoint.find(run.path / "checkpoints")
    assert found is not None and not found.damaged
    for folder in sorted((run.path / "checkpoints").iterdir())[:-1]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = train(tiny(data, **{**LONG, "train__keep_checkpoints": 1}), resume=run.id, runs_root=small_disk)
    assert weights(resumed) == weights(uninterrupted)


def test_demo_on_two_processes_shares_its_micro_batch(tmp_path: Path) -> None:
    """The batch of 8 rows of examples/demo.toml becomes 4 for each of two processes; what can not be shared is refused."""
    example = Path(__file__).parents[1] / "examples/demo.toml"
    overrides = ["model.hidden=60", "data.sources=[]", f"data.path={tmp_path}/none"]
    code, _, err = finish(start([example, "--procs", "2", *overrides], tmp_path))
    assert code == 2 and "train.micro_batch_size 8 -> 4: the share of each of 2 processes" in err, err
    code, _, err = finish(start([example, "--procs", "3"], tmp_path))
    assert code == 2 and "not a multiple of micro_batch_size x procs" in err and len(err.splitlines()) == 1


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples/demo.toml"
    code, _, err = finish(start([example, "optimizer.leaning_rate=1"], tmp_path))
    assert code == 2 and "did you mean 'optimizer.learning_rate'?" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
