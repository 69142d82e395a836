"""``ridgeline doctor`` on real programs in real processes: what it finds, what it leaves, and one line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

TRAINING = """
import sys
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(16, 64)
        self.down = torch.nn.Linear(64, 16)

    def forward(self, x):
        hidden = self.up(x)
        if hidden.mean() > 100:
            hidden = hidden * 2
        return self.down(hidden.relu())


def main():
    print("arguments", sys.argv[1:], __name__)
    torch.manual_seed(0)
    net = Net()
    model = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(40):
        x = torch.randn(6 if step == 5 else 8, 16)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
"""
CLEAN = """
import torch

compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", dynamic=False)
for _ in range(4):
    compiled(torch.ones(8))
"""
LOOP = """
def step(x):
    for _ in range(2):
        torch._dynamo.graph_break()
        x = x + 1
    return x
"""
Doctor = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Run ``ridgeline doctor`` in ``tmp_path``; ``env`` replaces variables."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return call(tmp_path, *arguments, env=env)

    return run


def call(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The verb in ``folder``; the interpreter's own folder comes first on PATH, for torchrun."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", "ridgeline", "doctor", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line a failure is; progress lines are not it."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("ridgeline: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A training script with a branch on a tensor and one odd batch, diagnosed once."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.py").write_text(TRAINING)
    result = call(folder, "--json", "--no-fix", "train.py", "--lr", "1e-3")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def found(answer: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one for one in answer["findings"] if one["kind"] == kind]


FIXABLE = """
import torch


@torch.compile(backend="eager")
def step(x):
    return x * x.sum().item()


for _ in range(8):
    step(torch.ones(4))
"""


def test_a_fix_is_tried_and_told_and_the_script_stays_as_it_is(tmp_path: Path, doctor: Doctor) -> None:
    """``.item()`` has a setting; whether it is faster here is a matter of the machine, so only its proof is asserted."""
    (tmp_path / "fixable.py").write_text(FIXABLE)
    result = doctor("--json", "--no-timing", "fixable.py")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    (one,) = found(answer, "graph_break")
    tried = {trial["fix"]: trial for trial in one["trials"]}
    trial = tried["capture_scalar_outputs=True"]
    assert (trial["breaks_before"], trial["breaks_after"]) == (1, 0) and trial["error"] is not None
    assert isinstance(one["kept"], bool) and one["fix"] in tried and one["why"]
    assert (answer["after"] is not None) == any(two["kept"] for two in one["trials"])
    assert (tmp_path / "fixable.py").read_text() == FIXABLE


def test_json_has_the_fields_that_were_promised(trained: tuple[Path, dict[str, Any]]) -> None:
    """Findings with kind, place, seconds and the fields of a fix, null as none was tried; before with the counts."""
    folder, answer = trained
    promised = {"kind", "file", "line", "lost_seconds", "fix", "kept", "why", "error", "gain"}
    assert all(promised <= set(one) for one in answer["findings"])
    assert answer["before"]["breaks"] == 1 and answer["before"]["steps"] == 40
    losses = [one["lost_seconds"] for one in answer["findings"]]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0
    assert sum(losses[:1]) <= answer["before"]["wall_seconds"]


def test_a_break_is_found_at_its_line_with_calls_and_seconds(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = trained
    (one,) = found(answer, "graph_break")
    line = TRAINING.splitlines().index("        if hidden.mean() > 100:") + 1
    assert (one["file"], one["line"]) == (str(folder / "train.py"), line)
    assert one["code"] == "if hidden.mean() > 100:" and one["function"] == "forward"
    assert one["detail"]["gb"] == "GB0170" and one["calls"] == 40 and one["lost_seconds"] > 0


def test_a_recompilation_tells_source_old_and_new(trained: tuple[Path, dict[str, Any]]) -> None:
    """The batch of 6 at step 5 is the one change; the resumed half of forward follows it."""
    folder, answer = trained
    (one,) = found(answer, "recompile")
    assert one["function"] == "forward" and one["detail"]["source"] == "x.size()[0]"
    assert (one["detail"]["old"], one["detail"]["new"]) == ("8", "6") and one["count"] == 2
    assert one["lost_seconds"] == pytest.approx(one["detail"]["compile_seconds"])
    assert {frame["function"] for frame in answer["frames"]} == {"forward"}


def test_eager_and_compiled_are_timed_in_turn(trained: tuple[Path, dict[str, Any]]) -> None:
    """Starting costs at least what the compiler took in the first run, less what the step itself takes."""
    _, answer = trained
    timing = answer["before"]["timing"]
    assert timing["samples"] >= 4 and timing["eager_seconds"] > 0 and timing["compiled_seconds"] > 0
    assert timing["cold_seconds"] > 0.5 * answer["before"]["compile_seconds"] > 0
    assert timing["warm_seconds"] > 0


def test_the_run_folder_holds_the_report_and_what_the_program_printed(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = trained
    run = folder / "runs" / answer["run"]
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    stored = json.loads((run / "artifacts" / "doctor.json").read_text())
    assert stored["findings"] == answer["findings"]
    log = (run / "artifacts" / "runs" / "observed" / "log.txt").read_text()
    assert "arguments ['--lr', '1e-3'] __main__" in log
    assert not (run / "artifacts" / "runs" / "cache").exists()


def test_a_program_with_nothing_to_fix_says_so(tmp_path: Path, doctor: Doctor) -> None:
    (tmp_path / "clean.py").write_text(CLEAN)
    result = doctor("--check", "clean.py")
    assert result.returncode == 0 and "Nothing to fix" in result.stdout


def test_check_fails_beyond_the_budget(tmp_path: Path, doctor: Doctor) -> None:
    """One break, in a loop, so that the function is given up too: a silent event that has a budget of its own."""
    broken = CLEAN.replace("lambda x: x.sin() + 1", "step").replace("import torch\n", "import torch\n" + LOOP)
    (tmp_path / "broken.py").write_text(broken)
    result = doctor("--check", "--breaks", "1", "broken.py")
    assert result.returncode == 1 and one_line(result).endswith("over budget: 1 fallbacks, 0 allowed")


REGIONAL = """
import torch


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).relu()


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def main():
    model = Stack()
    for _ in range(6):
        model(torch.ones(2, 8))


def other(argument="none"):
    print("argument", argument)
    main()
"""


def test_what_a_program_does_not_compile_is_compiled_by_path(tmp_path: Path, doctor: Doctor) -> None:
    """Three blocks of one class, found when their parent is first called. By callable, not by script."""
    (tmp_path / "stack.py").write_text(REGIONAL)
    arguments = (
        "--json",
        "--no-fix",
        "--no-timing",
        "--compile",
        "model.layers.*",
        "--backend",
        "eager",
        "stack:other",
        "7",
    )
    result = doctor(*arguments)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [(one["name"], one["calls"]) for one in answer["entries"]] == [("Block", 6)] * 3
    assert answer["before"]["graphs"] == 2  # blocks share their code; the first one's input needs no gradient


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile", "modle", "--backend", "eager", "stack:main"], "--compile modle: not found in main (did you mean 'model'?)"),
        (["stack:mian"], "stack has no 'mian' (did you mean 'main'?)"),
        (["nothing_here:main"], "no module named 'nothing_here'"),
        (["stakc.py"], "stakc.py: no such script (did you mean 'stack.py'?)"),
        (["--compile", "a b", "stack.py"], "--compile a b: not a dotted path"),
        (["no-such-program-at-all"], "no program on PATH"),
    ],
)  # fmt: skip
def test_a_target_that_is_not_there(tmp_path: Path, doctor: Doctor, arguments: list[str], message: str) -> None:
    (tmp_path / "stack.py").write_text(REGIONAL)
    result = doctor(*arguments)
    assert result.returncode == 2 and message in one_line(result)


BAD = {
    "fails": ("import torch\nraise ValueError('the third shard is missing')", 1, "ValueError: the third shard"),
    "exits": ("import torch, sys\nsys.exit(3)", 1, "ended with exit code 3"),
    "kills itself": ("import torch, os\nos.kill(os.getpid(), 9)", 1, "killed by signal 9 (SIGKILL)"),
    "never compiles": ("import torch\ntorch.ones(3).sin()", 2, "never calls torch.compile"),
    "never calls": ("import torch\ntorch.compile(lambda x: x, backend='eager')", 2, "but never what it returned"),
    "no torch": ("print('hello')", 2, "never imported torch"),
    "hangs": ("import time\ntime.sleep(60)", 1, "still running after 2 s (--timeout)"),
    "backend fails": (
        "import torch\n"
        "def broken(graph, inputs): raise KeyError('no rule for sin')\n"
        "torch.compile(lambda x: x.sin(), backend=broken)(torch.ones(3))",
        1,
        "failed while compiling at",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_program_that_ends_badly_is_one_line(tmp_path: Path, doctor: Doctor, name: str) -> None:
    source, code, message = BAD[name]
    (tmp_path / "program.py").write_text(source)
    result = doctor("--no-timing", "--timeout", "2" if name == "hangs" else "120", "program.py")
    assert result.returncode == code and message in one_line(result)
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


CROWDED = """
import os, sys, threading
import torch


@torch.compile(backend="eager", dynamic=False)
def step(x):
    return x.sin() + 1


step(torch.ones(4))
for _ in range(60):
    print("x" * 100_000)
child = os.fork()
if child == 0:
    step(torch.ones(4))
    os._exit(0)
os.waitpid(child, 0)
workers = [threading.Thread(target=lambda: [step(torch.ones(4)) for _ in range(10)]) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
os._exit(0)
"""


def test_a_program_that_forks_threads_prints_megabytes_and_leaves_by_os_exit(tmp_path: Path, doctor: Doctor) -> None:
    """One call, thirty from threads; the child's call is the child's. Nothing of 6 MB reaches our own output."""
    (tmp_path / "crowded.py").write_text(CROWDED)
    result = doctor("--json", "--no-fix", "--no-timing", "crowded.py")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [(one["name"], one["calls"]) for one in answer["entries"]] == [("step", 31)]
    assert answer["before"]["breaks"] == 0 and len(result.stdout) + len(result.stderr) < 100_000


def test_no_cpp_compiler_is_said(tmp_path: Path, doctor: Doctor) -> None:
    (tmp_path / "program.py").write_text("import torch\ntorch.compile(lambda x: x.sin() + 1)(torch.ones(64))\n")
    result = doctor("--no-timing", "program.py", env={"CXX": str(tmp_path / "no-such-compiler")})
    assert result.returncode == 1 and "no C++ compiler" in one_line(result)


def test_a_torch_we_have_not_read_is_refused(tmp_path: Path, doctor: Doctor) -> None:
    """Another torch on the program's path: the message names the releases, before any hook is put in."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '9.1.0'\n")
    (tmp_path / "program.py").write_text("import torch\n")
    result = doctor("--no-timing", "program.py")
    assert result.returncode == 2 and "needs torch 2.11 to 2.13, this is 9.1.0" in one_line(result)


def test_a_cache_folder_that_cannot_be_written_is_refused(tmp_path: Path, doctor: Doctor) -> None:
    (tmp_path / "clean.py").write_text(CLEAN)
    (tmp_path / "file").write_text("")
    result = doctor("clean.py", env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")})
    assert result.returncode == 2 and "is a file, not a folder" in one_line(result)
    assert not (tmp_path / "runs").exists()


RANKS = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()


@torch.compile(backend="eager", dynamic=False)
def step(x):
    return x * 2


for number in range(6):
    total = step(torch.ones(6 if rank == 1 and number == 3 else 8)).sum()
    dist.all_reduce(total)
dist.destroy_process_group()
"""


def test_the_rank_and_guard_that_others_wait_for_are_named(tmp_path: Path, doctor: Doctor) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    result = doctor("--json", "--no-fix", "--no-timing", "--", "torchrun", "--nproc-per-node", "2", "ranks.py")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    (one,) = found(answer, "rank_divergence")
    assert one["detail"]["rank"] == 1 and "expected 8, actual 6" in one["detail"]["guard"]
    assert one["detail"]["compile_ids"] == {"0": ["0/0"], "1": ["0/0", "0/1"]} and one["lost_seconds"] > 0
    assert one["file"] == str(tmp_path / "ranks.py")
