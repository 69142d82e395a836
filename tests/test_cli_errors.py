"""What goes wrong at the command line is one line and an exit code: full disks, damage, typing errors, signals."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ridgeline.errors import UserError, nearest, os_reason
from ridgeline.runs import Run, list_runs

# A verb that makes a run and then waits: what the signals of the tests below reach.
WAITING = """
import sys, time
from ridgeline.cli.common import new_app, verb
import ridgeline.cli.main as program
from ridgeline.runs import Run
app = new_app("waits")
@app.command()
@verb
def wait() -> None:
    with Run.create("wait", root=sys.argv[1]) as run:
        print(run.id, flush=True)
        time.sleep(60)
raise SystemExit(program._call(app, "wait", []))
"""


def cli(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ridgeline", *args], capture_output=True, text=True, **kwargs)


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, (done.returncode, done.stderr)
    (line,) = done.stderr.splitlines()
    assert line.startswith("ridgeline: ")
    return line


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create("train", config={"a": 1}, root=tmp_path)
    made.log(step=1, loss=2.0)
    made.summarize(final_loss=2.0)
    made.finish()
    return made


# --- what the system refuses


def test_a_system_error_is_its_path_and_reason() -> None:
    assert os_reason(OSError(errno.ENOSPC, "No space left on device", "a/b")) == "a/b: no space left on the device"
    assert os_reason(PermissionError(errno.EACCES, "Permission denied", "a")) == "a: permission denied"
    assert os_reason(OSError("Odd")) == "odd"


def test_a_failed_create_leaves_nothing_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unlink(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        Run.create("x", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).endswith("run.json")
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OSError) as caught:
        Run.create("x", root=tmp_path)
    assert caught.value.errno == errno.ENOSPC, "the cleanup hides the cause"


def test_a_disk_too_full_to_close_the_run_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match="the cause"), Run.create("x", root=tmp_path):
        monkeypatch.setattr(os, "fsync", full)
        raise RuntimeError("the cause")


def test_a_write_that_the_system_refuses_is_one_line(tmp_path: Path, run: Run) -> None:
    """A limit on the size of files stands for a full disk: ``write`` fails in the same way (EFBIG)."""

    def no_writes() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    line = one_line(cli("runs", "report", run.id, "--runs", str(tmp_path), preexec_fn=no_writes), 1)
    assert "report" in line and line.endswith("file too large")


def test_a_full_standard_output_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ridgeline", "runs", "list", "--runs", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert one_line(done, 1).endswith(": no space left on the device")


@pytest.mark.parametrize("below", ["", "deeper"])
def test_runs_in_a_file_are_the_users_error(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file"):
        Run.create("x", root=file / below)
    assert "file, not a folder" in one_line(cli("runs", "list", "--runs", str(file / below)), 2)


# --- damage


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"\xff\xfe", b"{", b'{"id": 3}', b'{"id":"a","kind":"b","status":"c","created":"d"}']
)
def test_a_damaged_run_is_named_and_hides_no_other(tmp_path: Path, run: Run, content: bytes) -> None:
    broken = tmp_path / "20990101-broken"
    broken.mkdir()
    (broken / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"broken/run\.json: damaged") as caught:
        Run.open(broken)
    assert "\n" not in str(caught.value)
    assert [one.id for one in list_runs(tmp_path)] == [run.id]
    assert Run.open("latest", tmp_path).id == run.id


def test_list_names_the_damaged_at_the_end(tmp_path: Path, run: Run) -> None:
    other = Run.create("plan", root=tmp_path)
    (other.path / "summary.json").write_text("{")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/run.json").write_text("[]")
    done = cli("runs", "list", "--runs", str(tmp_path))
    assert done.returncode == 0 and run.id in done.stdout and other.id in done.stdout
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        str(tmp_path / "bad/run.json"),
        str(other.path / "summary.json"),
    ]


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, run: Run, name: str, content: bytes) -> None:
    (run.path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        _ = run.summary, run.config


def test_show_and_report_of_damage_are_one_line(tmp_path: Path, run: Run) -> None:
    (run.path / "summary.json").write_text("{")
    for verb in ("show", "report"):
        assert "summary.json: damaged" in one_line(cli("runs", verb, run.id, "--runs", str(tmp_path)), 2)


@pytest.mark.parametrize("junk", [b"junk\n", b"3\n", b"\xff\xff\n", b"\x00\x00\n"])
def test_a_damaged_metrics_line_is_named_by_its_number(run: Run, junk: bytes) -> None:
    file = run.path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + junk + b'{"step": 3}\n{"step"')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: damaged"):
        run.metrics()
    shown = cli("runs", "show", str(run.path))
    assert shown.returncode == 0 and "final_loss" in shown.stdout and "line 2: damaged" in shown.stderr


# --- usage


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["models"], ["models", "(valid: import, show)"]),
        (["runs", "lits"], ["no such sub-verb 'lits'", "did you mean 'list'"]),
        (["runs", "list", "--jsn"], ["no such option '--jsn'", "did you mean '--json'"]),
        (["runs", "list", "--zzzzzz"], ["no such option '--zzzzzz'", "`ridgeline runs list --help`"]),
        (["runs", "--zzzzzz"], ["no such option '--zzzzzz'"]),
        (["runs", "list", "-z"], ["no such option '-z'"]),
        (["runs", "list", "--kind"], ["'--kind'", "requires an argument"]),
        (["runs", "show"], ["missing argument"]),
        (["runs", "list", "more"], ["unexpected extra argument", "more"]),
        (["improve", "job.toml", "--steps", "many"], ["'--steps'", "integer"]),
        (["improve", "job.toml", "--steps", "1"], ["'--steps'", "equal to 2"]),
        (["--verson"], ["no such option '--verson'"]),
    ],
)
def test_a_usage_error_is_one_line(arguments: list[str], words: list[str]) -> None:
    done = cli(*arguments)
    line = one_line(done, 2)
    assert done.stdout == ""
    for word in words:
        assert word in line


@pytest.mark.parametrize("arguments", [["runs", "--help"], ["runs", "list", "-h"], ["improve", "--help"]])
def test_help_is_no_error(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.returncode, done.stderr) == (0, "") and "Usage" in done.stdout


def test_nearest_shows_a_few() -> None:
    names = [f"name{number}" for number in range(8)]
    assert nearest("nam1", names) == " (did you mean 'name1'?)"
    assert nearest("qqqqqq", names) == " (valid: name0, name1, name2, name3, name4 and 3 more)"
    assert nearest("qqqqqq", names[:5]) == " (valid: name0, name1, name2, name3, name4)"


def test_an_unknown_run_names_the_newest_few(tmp_path: Path) -> None:
    for number in range(7):
        folder = tmp_path / f"2026010{number}-train"
        folder.mkdir()
        (folder / "run.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        Run.open("zzz", tmp_path)
    newest = ", ".join(f"2026010{number}-train" for number in (6, 5, 4, 3, 2))
    assert f"(newest: {newest}; `ridgeline runs list` shows all)" in str(caught.value)
    with pytest.raises(UserError, match="did you mean '20260104-train'"):
        Run.open("0260104-train", tmp_path)


# --- signals


@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_closes_the_run(tmp_path: Path, number: int, code: int, word: str) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, f"ridgeline: {word}\n")
    assert Run.open(run_id, tmp_path).info["status"] == "interrupted"


def test_a_run_killed_with_9_is_not_running_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run = Run.open(process.stdout.readline().strip(), tmp_path)
        assert run.status == "running"
        process.kill()
        time.sleep(0.2)
        assert run.status == "killed", "a zombie, its parent has not looked yet"
    assert run.status == "killed" and run.info["status"] == "running"
    listed = json.loads(cli("runs", "list", "--runs", str(tmp_path), "--json").stdout)
    assert [row["status"] for row in listed] == ["killed"]
    assert json.loads(cli("runs", "show", str(run.path), "--json").stdout)["status"] == "killed"


def test_only_the_process_itself_keeps_its_run_running(tmp_path: Path) -> None:
    run = Run.create("x", root=tmp_path)
    assert run.status == "running"
    run.info["process_started"] -= 1000  # the number now belongs to a later process
    assert run.status == "killed"
    run.info["host"] = f"not-{platform.node()}"
    assert run.status == "running", "another machine's processes are not ours to judge"
    run.reopen()
    assert run.status == "running"
    run.finish()
    assert run.status == "done"


# --- the list and the command


@pytest.mark.parametrize("columns", ["40", "80"])
def test_ids_are_never_cut(tmp_path: Path, columns: str) -> None:
    made = Run.create("train", "a-name-of-forty-characters-which-is-long", root=tmp_path)
    made.summarize(final_loss=1.234567, validation_loss=2.0, tokens_per_second=123456.0, mfu=0.5, bound_by="memory")
    done = cli("runs", "list", "--runs", str(tmp_path), env={**os.environ, "COLUMNS": columns})
    (row,) = [line for line in done.stdout.splitlines() if made.id in line]
    assert "running" in row or "killed" in row
    assert "bound_by memory" in row, "a pipe gets whole lines"


def test_on_a_narrow_terminal_the_headline_gives_way() -> None:
    import io

    from rich.console import Console

    from ridgeline.cli.runs import _print_list

    out = io.StringIO()
    run_id = "20261121-091502-train-" + "x" * 40 + "-3fa9"
    _print_list(Console(file=out, force_terminal=True, width=80), [[run_id, "interrupted", "1234.5", "loss 2.5 " * 9]])
    text = out.getvalue()
    assert run_id in text and "interrupted" in text and "1234.5" in text and text.count("\n") > 5


def test_the_stored_command_is_what_to_type(tmp_path: Path) -> None:
    code = (
        "import sys; from ridgeline.runs import Run; import ridgeline\n"
        "sys.argv = [ridgeline.__path__[0] + '/__main__.py', 'train', 'x.toml']\n"
        "run = Run.create('x', root=sys.stdin.readline().strip()); print(run.path)\n"
        "sys.argv[1:] = ['train', '--resume', 'x']; run.reopen()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=f"{tmp_path}\n", capture_output=True, text=True)
    info = Run.open(done.stdout.strip()).info
    assert info["command"] == ["ridgeline", "train", "x.toml"]
    assert info["resumes"] == [["ridgeline", "train", "--resume", "x"]]
