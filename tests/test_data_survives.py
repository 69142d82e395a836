"""Kills, full disks, lost files and two builders at once: nothing is lost, doubled or left looking complete."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from ridgeline.data import Dataset, assemble, build, disk
from ridgeline.data.pool import Workers
from ridgeline.data.workspace import Workspace
from ridgeline.errors import JobError, UserError
from test_data_build import contents, jsonl, section, text


def start(config, cwd, *extra):
    command = [sys.executable, "-m", "ridgeline", "data", "build", str(config), *extra]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process, condition, limit=60):
    """kill -9 as soon as ``condition`` holds; returns the children it had."""
    deadline = time.monotonic() + limit
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended before it was killed: {process.communicate()[1]}")
        assert time.monotonic() < deadline
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()  # not communicate(): a worker that lived on would hold the pipes open
    process.stdout.close()
    process.stderr.close()
    return children


def inodes(folder, pattern):
    return {path.name: path.stat().st_ino for path in folder.glob(pattern)}


def test_kill_9_twice_then_resume_is_byte_equal_and_redoes_no_finished_shard(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [text(i, 300) for i in range(200)] + [text(3, 300)])
    config = tmp_path / "job.toml"
    options = f'name = "test"\nsources = ["{source}"]\nshard_documents = 5\npath = "out"\n[data.tokenizer]\nvocab_size = 500\n'
    config.write_text(f"[data]\nworkers = 2\n{options}")
    work = tmp_path / "out" / ".build"

    first = start(config, tmp_path)
    orphans = kill_when(first, lambda: len(inodes(work, "read-*")) >= 4)
    read_before = inodes(work, "read-*")
    assert 4 <= len(read_before) < 41 and not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"build is not finished"):
        Dataset.open(tmp_path / "out")

    second = start(config, tmp_path)
    orphans += kill_when(second, lambda: len(inodes(work, "tokens-*")) >= 4)
    read_after, tokens_before = inodes(work, "read-*"), inodes(work, "tokens-*")
    assert len(read_after) == 41 and read_before.items() <= read_after.items()
    assert len(tokens_before) < 41

    third = start(config, tmp_path, "--json")
    document = json.loads(third.communicate(timeout=60)[0])
    assert document["resumed_shards"] >= len(tokens_before) and not document["reused"] and document["kept"] == 200
    settings = section(tmp_path, [source], shard_documents=5, path=str(tmp_path / "whole"))
    build(settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    _, alive = psutil.wait_procs(orphans, timeout=10)
    for orphan in alive:
        orphan.kill()
    assert orphans and not alive, "workers outlived the build that was killed"


def test_shards_of_another_configuration_are_never_mixed_in(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(40)])
    settings = section(tmp_path, [source], shard_documents=4)
    with stopped_after(monkeypatch, 6):
        build(settings)
    for change, words in [
        ({"shard_documents": 5}, "data.shard_documents was 4 and is now 5"),
        ({"text_key": "body"}, "data.text_key was 'text' and is now 'body'"),
    ]:
        with pytest.raises(UserError, match="unfinished build of another configuration") as error:
            build(settings.model_copy(update=change))
        assert words in str(error.value) and "--rebuild" in str(error.value)
    build(settings.model_copy(update={"shard_documents": 5}), rebuild=True)
    build(settings.model_copy(update={"shard_documents": 5, "path": str(tmp_path / "fresh")}))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


class Stop(BaseException):
    """Ends a build the way a kill does: nothing catches it."""


@contextmanager
def stopped_after(monkeypatch, writes, error=None):
    """Let ``writes`` files be made durable, then stop (or let the disk answer with ``error``)."""
    count = 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count > writes:
            raise error or Stop

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", fsync)
        with pytest.raises(type(error) if error and not isinstance(error, OSError) else (Stop, JobError)) as caught:
            yield lambda: caught
    assert count == writes + 1


def test_stopped_at_every_single_write_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(12)] + ["short"])
    build(section(tmp_path, [source], shard_documents=4, path=str(tmp_path / "whole")))
    expected, stop = contents(tmp_path / "whole"), 0
    while True:
        settings = section(tmp_path, [source], shard_documents=4, path=str(tmp_path / f"out-{stop}"))
        folder = tmp_path / f"out-{stop}"
        full = OSError(errno.ENOSPC, "No space left on device") if stop % 2 else None
        try:
            with stopped_after(monkeypatch, stop, full):
                build(settings)
        except pytest.fail.Exception:  # it ended before the stop: every write has had its turn
            break
        if (folder / "manifest.json").exists():  # the very last sync
            assert Dataset.open(folder).manifest
        assert not list(tmp_path.rglob(".*.tmp"))
        build(settings)
        assert contents(folder) == expected, stop
        stop += 1
    assert stop > 20


def test_a_rebuild_that_fails_leaves_the_old_dataset(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(12)])
    settings = section(tmp_path, [source])
    build(settings)
    before = contents(tmp_path / "out")
    with stopped_after(monkeypatch, 8, OSError(errno.ENOSPC, "No space left on device")):
        build(settings.model_copy(update={"seed": 3}), rebuild=True)
    after = contents_without_work(tmp_path / "out")
    assert after == before
    Dataset.open(tmp_path / "out").verify()


@pytest.mark.parametrize("moved", [0, 4, 8, 9])
def test_a_rebuild_cut_off_between_its_renames_never_passes_for_a_dataset(tmp_path, monkeypatch, moved):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(12)])
    settings = section(tmp_path, [source])
    build(settings)
    changed, count = settings.model_copy(update={"seed": 3}), 0

    def replace(origin, target):
        nonlocal count
        if count == moved:
            raise Stop
        count += 1
        os.replace(origin, target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(assemble, "os", SimpleNamespace(replace=replace))
        build(changed, rebuild=True)
    with pytest.raises(UserError, match="build is not finished"):
        Dataset.open(tmp_path / "out")
    build(changed)
    build(changed.model_copy(update={"path": str(tmp_path / "fresh")}))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def contents_without_work(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".build"}


# --- full disks


@contextmanager
def small_disk(folder, size):
    """A tmpfs of ``size`` bytes; skips where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip() or 'not permitted'}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small tmpfs needs root on Linux")
@pytest.mark.parametrize("kilobytes", [16, 120, 220, 320])
def test_a_full_disk_is_one_line_and_more_space_finishes_the_build(tmp_path, kilobytes):
    source = jsonl(tmp_path / "x.jsonl", [text(i, 300) for i in range(120)])
    build(section(tmp_path, [source], shard_documents=20, path=str(tmp_path / "whole")))
    small = tmp_path / "small"
    with small_disk(small, kilobytes << 10):
        settings = section(tmp_path, [source], shard_documents=20, path=str(small / "out"))
        with pytest.raises(JobError, match=rf"disk full while writing {small}/.*MB free in .*run it again") as error:
            build(settings)
        assert "\n" not in str(error.value)
        assert not (small / "out" / "manifest.json").exists()
        assert not list(small.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        build(settings)
        assert contents(small / "out") == contents(tmp_path / "whole")


def test_a_limit_on_file_size_is_a_failed_job_of_one_line(tmp_path):
    """The same as a full disk, for whoever may not mount: the kernel refuses to let any file grow."""
    jsonl(tmp_path / "x.jsonl", [text(i, 300) for i in range(120)])
    config = tmp_path / "job.toml"
    config.write_text('[data]\nsources = ["x.jsonl"]\npath = "out"\n[data.tokenizer]\nvocab_size = 500\n')
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from ridgeline.cli.main import main; main(['data', 'build', 'job.toml'])"
    )
    failed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.startswith(
        "ridgeline: disk full while writing out/.build/read-00000"
    )
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.json").exists() and not list(tmp_path.rglob(".*.tmp"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 60_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    source = jsonl(tmp_path / "x.jsonl", [text(1)])
    with pytest.raises(UserError, match="cannot write"):
        build(section(tmp_path, [source], path=str(tmp_path / "locked" / "out")))


def test_a_file_where_the_dataset_should_be_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*out"):
        build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", [text(1)])]))


# --- damaged work


@pytest.mark.parametrize("damage", ["truncate", "swap", "flip", "remove"])
@pytest.mark.parametrize("kind", ["read", "tokens"])
def test_a_damaged_or_swapped_shard_is_named_and_never_passed_through(tmp_path, monkeypatch, kind, damage):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(15)])
    settings = section(tmp_path, [source], shard_documents=4)
    with stopped_after(monkeypatch, 10 if kind == "read" else 11):
        build(settings)
    work = Workspace(tmp_path / "out")
    path = work.shard(kind, 3)
    assert path.is_file()
    data = bytearray(path.read_bytes())
    if damage == "swap":
        path.write_bytes(work.shard(kind, 1).read_bytes())
    elif damage == "remove":
        path.unlink()
    else:
        data[len(data) // 3] ^= 0xFF
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if kind == "tokens" and damage == "remove":
        build(settings)  # a shard that is not there is made again
        return
    with pytest.raises(JobError, match=rf"{path.name}: .*--rebuild") as error:
        build(settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()
    assert build(settings, rebuild=True).kept == 15


def test_two_builds_of_one_folder_do_not_meet(tmp_path):
    settings = section(tmp_path, [jsonl(tmp_path / "x.jsonl", [text(i) for i in range(9)])])
    other = Workspace(tmp_path / "out")
    other.acquire()
    with pytest.raises(JobError, match="another process is building"):
        build(settings)
    other.release()
    assert build(settings).kept == 9


# --- the pool


def _double(value):
    return value * 2


def _die(value):
    if value == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def test_the_pool_keeps_order_bounds_what_waits_and_reports_a_killed_worker():
    taken = []

    def endless():
        for value in range(10**9):
            taken.append(value)
            yield value

    with Workers(2) as workers:
        results = workers.map(_double, endless())
        assert [next(results) for _ in range(50)] == list(range(0, 100, 2))
        assert len(taken) <= 50 + 6
        results.close()
    with Workers(2) as workers, pytest.raises(JobError, match="worker process died"):
        list(workers.map(_die, range(20)))


def test_one_large_file_keeps_all_workers_busy_and_small_files_share_a_batch(tmp_path):
    from ridgeline.data.reading import _tasks
    from ridgeline.data.sources import resolve

    one = jsonl(tmp_path / "one.jsonl", [text(i, 900) for i in range(400)])
    many = tmp_path / "many"
    many.mkdir()
    for i in range(1000):
        (many / f"{i:04d}.txt").write_text(text(i % 3, 20))
    for sources, low, high in (([one], 4, 8), ([many], 2, 2)):
        settings = section(tmp_path, sources)
        files = resolve(settings.sources).files
        tasks = list(_tasks(settings, files, Workspace(tmp_path / "none"), lambda amount: None))
        assert low <= len(tasks) <= high and sum(len(task.raws) for task in tasks) in (400, 1000)
    assert np.all([task.end is None for task in tasks[:-1]]) and tasks[-1].end is not None
