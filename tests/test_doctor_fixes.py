"""The doctor's fixes: each setting by graph or compile count, the proof against float64, trials in worker processes."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.compiler.doctor import fixes
from ridgeline.compiler.doctor.candidates import Candidate, combined, propose
from ridgeline.compiler.doctor.model import Finding, Observation, Target
from ridgeline.compiler.doctor.proof import NotComparable, Result, Snapshot, compare, distance
from ridgeline.compiler.doctor.search import Search, Try, refusal
from ridgeline.compiler.doctor.settings import REGIONAL, applied, check, knobs_for, merged, repeated_blocks
from ridgeline.compiler.doctor.target import resolve_target
from ridgeline.compiler.doctor.workers import Outcome, Workers, supported
from ridgeline.errors import UserError


class Graphs:
    """A backend that counts and runs in eager."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def graphs(function: Any, calls: list[Any], setting: dict[str, Any] | None = None, **options: Any) -> int:
    """How many graphs are compiled over the calls."""
    torch._dynamo.reset()
    backend = Graphs()
    with applied(setting or {}):
        compiled = torch.compile(function, backend=backend, **options)
        for call in calls:
            compiled(call)
    return backend.count


def item(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def selected(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0] * 2


def printing(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    print("between")
    return y + 1


def warning(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    warnings.warn("between", stacklevel=1)
    return y + 1


def logged(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    logging.info("between")
    return y + 1


def callee(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


def caller(x: torch.Tensor) -> torch.Tensor:
    return callee(x * 2) + 1


def summed(x: torch.Tensor) -> torch.Tensor:
    return x.sum() * 2


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return x * self.steps


X = torch.linspace(-1, 2, 8)
SETTINGS: dict[str, tuple[Any, list[Any], dict[str, Any], int, int]] = {
    ".item()": (item, [X], {"dynamo.capture_scalar_outputs": True}, 2, 1),
    "mask": (selected, [X], {"dynamo.capture_dynamic_output_shape_ops": True}, 2, 1),
    "print": (printing, [X], {"dynamo.reorderable_logging_functions": ["builtins.print"]}, 2, 1),
    "warn": (warning, [X], {"dynamo.reorderable_logging_functions": ["warnings.warn"]}, 2, 1),
    "log": (logged, [X], {"dynamo.reorderable_logging_functions": ["logging.info"]}, 2, 1),
    "callee": (caller, [X], {"dynamo.nested_graph_breaks": True}, 4, 2),
    "size": (summed, [torch.ones(n) for n in (4, 5, 6)], {"compiler.dynamic_sources": "L['x']"}, 2, 1),
    "size 1 first": (summed, [torch.ones(n) for n in (1, 5, 6)], {"compiler.unbacked_sources": "L['x']"}, 2, 1),
    "counter": (Counting, [X] * 5, {"dynamo.allow_unspec_int_on_nn_module": True}, 5, 2),
    "limit": (Counting, [X] * 12, {"dynamo.recompile_limit": 64}, 8, 12),
    "rnn": (lambda: torch.nn.GRU(4, 4), [torch.ones(3, 2, 4)], {"dynamo.allow_rnn": True}, 0, 1),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_each_setting_changes_the_number_of_graphs(case: str) -> None:
    target, calls, setting, before, after = SETTINGS[case]
    make = (lambda: target()) if not hasattr(target, "__code__") or target.__name__ == "<lambda>" else (lambda: target)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert graphs(make(), calls) == before
        assert graphs(make(), calls, setting) == after


def test_dynamic_does_not_help_a_size_that_was_one() -> None:
    calls = [torch.ones(n) for n in (1, 5, 6)]
    assert graphs(summed, calls, {"compiler.dynamic_sources": "L['x']"}) == graphs(summed, calls, dynamic=True) == 2


def test_unbacked_size_in_a_branch_is_a_hard_error() -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 3 else x

    with pytest.raises(Exception, match=r"(?i)data-dependent"):
        graphs(branch, [torch.ones(5)], {"compiler.unbacked_sources": "L['x']"}, fullgraph=True)
    assert graphs(branch, [torch.ones(5)], {"compiler.dynamic_sources": "L['x']"}, fullgraph=True) == 1


def test_reordered_print_appears_after_the_graph_has_run() -> None:
    order: list[str] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            order.append("graph")
            return graph.forward(*given)

        return run

    torch._dynamo.reset()
    with (
        applied({"dynamo.reorderable_logging_functions": ["builtins.print"]}),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        torch.compile(printing, backend=backend)(X)
    assert order == ["graph"] and out.getvalue() == "between\n"  # before the setting: graph, text, graph


def test_regional_compiles_one_block_for_all_layers() -> None:
    class Block(torch.nn.Module):  # a class of the user's own: dynamo compiles none of torch.nn's by itself
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.linear(x))

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Stack(), torch.randn(3, 2, 8, requires_grad=True)
    expected, keys = model(x), list(model.state_dict())
    torch._dynamo.reset()
    backend = Graphs()
    with applied({REGIONAL: True}):
        made: Any = torch.compile(model, backend=backend)
        plain = torch.compile(summed, backend="eager")
    assert made is model and list(made.state_dict()) == keys and repeated_blocks(model) == list(model.layers)
    torch.testing.assert_close(made(x), expected)
    assert backend.count == 1 and plain(X) == summed(X)
    assert repeated_blocks(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dynamo.capture_scalar_output": True}, "capture_scalar_outputs"),
        ({"dynamo.capture_scalar_outputs": "yes"}, "is a bool"),
        ({"inductor.max_autotune": True}, r"not dynamo\.NAME"),
        ({"dynamo.reorderable_logging_functions": ["no.such"]}, "is no function"),
        ({"dynamo._is_default": 1}, "no option"),
    ],
)
def test_settings_that_this_torch_has_not_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(setting)


def test_settings_are_put_back_and_merge() -> None:
    before = torch._dynamo.config.capture_scalar_outputs
    with pytest.raises(ZeroDivisionError), applied({"dynamo.capture_scalar_outputs": not before}):
        assert torch._dynamo.config.capture_scalar_outputs is not before
        _ = 1 / 0
    assert torch._dynamo.config.capture_scalar_outputs is before
    one = {
        "dynamo.reorderable_logging_functions": ["a.b"],
        "compiler.dynamic_sources": "L['x']",
        "dynamo.recompile_limit": 16,
    }
    two = {"dynamo.reorderable_logging_functions": ["a.b", "c.d"], "compiler.dynamic_sources": "L['y'], L['x']"}
    assert merged([one, two, {"dynamo.recompile_limit": 64}]) == {
        "dynamo.reorderable_logging_functions": ["a.b", "c.d"],
        "compiler.dynamic_sources": "L['x'], L['y']",
        "dynamo.recompile_limit": 64,
    }


def recompile(what: str, source: str, old: str, new: str) -> Finding:
    return Finding("recompile", detail={"what": what, "source": source, "old": old, "new": new})


@pytest.mark.parametrize(
    ("finding", "expected"),
    [
        (recompile("size", "x.size()[0]", "4", "5"), ["compiler.dynamic_sources"]),
        (recompile("size", "x.size()[0]", "1", "5"), ["compiler.unbacked_sources", "compiler.dynamic_sources"]),
        (
            recompile("value", "self.seen", "1", "2"),
            ["dynamo.allow_unspec_int_on_nn_module", "compiler.dynamic_sources"],
        ),
        (recompile("stride", "x.stride()[0]", "4", "1"), []),
        (recompile("length", "len(parts)", "2", "3"), []),
        (recompile("global state", "grad_mode", "True", "False"), []),
        (Finding("graph_break", detail={"gb": "GB0124"}), ["dynamo.capture_scalar_outputs"]),
        (Finding("graph_break", code="print(x)", detail={}), ["dynamo.reorderable_logging_functions"]),
        (Finding("guard_cost"), []),
    ],
)
def test_what_is_tried_on_a_finding(finding: Finding, expected: list[str]) -> None:
    assert [next(iter(knob.setting)) for knob in knobs_for(finding)] == expected


# Proof


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.linear = torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)
        self.scale = torch.ones(4)  # neither parameter nor buffer

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
        noise = torch.rand_like(x)
        h = self.drop(self.linear(self.norm(x.float()))) * self.scale + noise
        return {"out": h.masked_fill(mask, 0.0), "size": len(x)}


def test_float64_reference_agrees_with_float32_up_to_its_rounding_also_with_random_numbers() -> None:
    model = Small()
    x, mask = torch.randn(6, 4, requires_grad=True), torch.rand(6, 4) > 0.5
    before = copy.deepcopy(model.state_dict())
    snapshot = Snapshot(model.__call__, (x,), {"mask": mask})
    eager, exact, again = snapshot.run(), snapshot.run(double=True), snapshot.run()
    assert exact.outputs[0].dtype == torch.float64 and eager.outputs[0].dtype == torch.float32
    assert compare(again, eager, exact).passed and torch.equal(again.outputs[0], eager.outputs[0])
    verdict = compare(eager, eager, exact)
    assert 0 < verdict.error < 1e-5 and len(eager.gradients) == 5 and len(eager.state) == 3
    assert eager.others == ["6"]
    for name, value in model.state_dict().items():  # the model itself was not touched
        assert torch.equal(value, before[name])
    assert x.grad is None and model.linear.weight.dtype == torch.float32


def test_proof_follows_globals_and_closures_of_a_function() -> None:
    model = torch.nn.Linear(3, 3)
    factor = torch.tensor(2.0, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return helper(x, model) * factor

    snapshot = Snapshot(step, (torch.ones(2, 3),), {})
    exact = snapshot.run(double=True)
    assert exact.outputs[0].dtype == torch.float64 and len(exact.gradients) == 3
    assert model.weight.grad is None and factor.dtype == torch.float32


def helper(x: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(x)
    return out


def test_a_model_that_cannot_be_copied_is_proven_through_its_state() -> None:
    model = Small().eval()
    model.lock = threading.Lock()
    snapshot = Snapshot(model.__call__, (torch.randn(5, 4),), {"mask": torch.zeros(5, 4, dtype=torch.bool)})
    assert "cannot be copied" in snapshot.note and "state" in snapshot.note
    with torch.no_grad():
        model.linear.weight.zero_()  # what the program did afterwards does not matter
    eager, exact = snapshot.run(), snapshot.run(double=True)
    assert compare(eager, eager, exact).error < 1e-5 and eager.outputs[0].abs().sum() > 0


def test_what_cannot_be_copied_at_all_says_so() -> None:
    lock = threading.Lock()
    with pytest.raises(NotComparable, match="cannot be copied"):
        Snapshot(summed, (lock,), {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r.outputs[0].mul_(1 + 1e-4), "outputs are"),
        (lambda r: r.gradients[0].add_(1e-3), "gradients are"),
        (lambda r: r.outputs.__setitem__(0, r.outputs[0].double()), "instead of"),
        (lambda r: r.outputs.pop(), "lacks"),
        (lambda r: r.others.append("1"), "no tensor"),
        (lambda r: r.outputs[0].view(-1).__setitem__(0, float("nan")), "outputs are inf"),
        (lambda r: r.state.__setitem__(7, torch.ones(1)), "lacks"),
    ],
)
def test_every_kind_of_difference_fails_the_proof(change: Callable[[Result], Any], why: str) -> None:
    model = torch.nn.Linear(4, 4)
    snapshot = Snapshot(model.__call__, (torch.randn(3, 4),), {})
    eager, exact, new = snapshot.run(), snapshot.run(double=True), snapshot.run()
    change(new)
    verdict = compare(new, eager, exact)
    assert not verdict.passed and why in verdict.why


def test_distance_is_relative_and_knows_infinities() -> None:
    one = torch.tensor([3.0, 4.0])
    assert distance(one * 1.5, one) == pytest.approx(0.5)
    assert distance(torch.tensor([float("inf")]), torch.tensor([float("inf")])) == 0.0
    assert distance(torch.tensor([float("inf")]), torch.tensor([1.0])) == float("inf")
    assert distance(torch.zeros(2), torch.zeros(2)) == 0.0 and distance(torch.ones(2), torch.zeros(2)) == float("inf")


# Trials

PROGRAM = """
import sys
import torch
import layers

torch.manual_seed(1)
model = layers.Layer()
compiled = torch.compile(model, backend="aot_eager")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(6):
    loss = compiled(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("done", sys.argv[1:])
"""
LAYERS = """
import torch


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        h = self.linear(x)
        top = h.abs().max().item()
        h = h / (top + 1.0)
        if h.mean() > 0:  # a comment
            h = torch.tanh(h)
        return h
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("program")
    (made / "train.py").write_text(PROGRAM)
    (made / "layers.py").write_text(LAYERS)
    return made


def target_of(folder: Path, *arguments: str) -> Target:
    command = (sys.executable, "train.py", *arguments)
    return Target(command, folder, "train", folder / "train.py")


def found(folder: Path) -> list[Finding]:
    """What the doctor tells of the program, by hand: lines of layers.py."""
    lines = LAYERS.splitlines()
    file = str(folder / "layers.py")

    def finding(start: str, gb: str, seconds: float) -> Finding:
        line = next(at for at, text in enumerate(lines, 1) if text.strip().startswith(start))
        return Finding("graph_break", file, line, lines[line - 1].strip(), lost_seconds=seconds, detail={"gb": gb})

    return [finding("top =", "GB0124", 1.0), finding("if h.mean", "GB0170", 0.5), Finding("guard_cost", file, 9)]


def test_trials_count_prove_and_substitute_without_touching_the_files(folder: Path, tmp_path: Path) -> None:
    candidates, reasons = propose(target_of(folder), found(folder))
    assert [(one.fix, one.kind) for one in candidates] == [
        ("capture_scalar_outputs=True", "setting"),
        (".item() kept as a tensor, line 12", "source"),
        ("if tensor to torch.where, line 14", "source"),
    ]
    assert reasons == {2: "no fix is known that can be tried from outside"}
    setting, sources, left_out = combined([candidates[0], candidates[2]])
    wrong = LAYERS.replace("torch.tanh(h)", "torch.tanh(h) * 1.0001")
    with Workers(target_of(folder, "--lr"), tmp_path / "w", timeout=200) as workers:
        before = workers.run(prove=True)
        together = workers.run(setting, sources, prove=True)
        damaged = workers.run({}, {str(folder / "layers.py"): wrong}, prove=True)
        broken = workers.run({}, {str(folder / "layers.py"): LAYERS.replace("self.linear(x)", "self.nothing(x)")})
        timed = workers.run(setting, sources, timed=True)
    assert before.failure == "" and before.proof["why"] == "" and before.proof["calls"] == 4
    assert (before.observation.breaks, together.observation.breaks) == (2, 0) and not left_out
    assert together.proof["why"] == "" and together.proof["error"] <= 2 * together.proof["error_eager"] + 2**-23
    assert refusal(before, together) == "" and timed.seconds > 0
    assert "outputs are" in damaged.proof["why"] and refusal(before, damaged).startswith("nothing falls")
    assert "nothing" in broken.failure and refusal(before, broken).startswith("the program fails with it")
    assert (tmp_path / "w" / "trial000" / "log.txt").read_text().endswith("done ['--lr']\n")
    assert (folder / "layers.py").read_text() == LAYERS


def test_a_fix_is_refused_when_nothing_falls_or_nothing_is_proven() -> None:
    before = Outcome(Observation(breaks=2, recompiles=1), proof={"why": ""})
    same = Outcome(Observation(breaks=2, recompiles=1), proof={"why": ""})
    better = Outcome(Observation(breaks=1, recompiles=1), proof={"why": ""})
    wrong = Outcome(Observation(breaks=1, recompiles=1), proof={"why": "gradients are 1 from float64"})
    assert refusal(before, same) == "nothing falls: still 2 breaks, 1 recompiles"
    assert refusal(before, better) == "" and "gradients" in refusal(before, wrong)
    assert "cannot be proven" in refusal(Outcome(before.observation, proof={"why": "no copy"}), better)


def test_rewrites_of_one_file_go_together_from_the_last_line_up(folder: Path) -> None:
    candidates, _ = propose(target_of(folder), found(folder))
    _, sources, left_out = combined([candidates[1], candidates[2]])
    (text,) = sources.values()
    assert not left_out and "detach()" in text and "torch.where(h.mean() > 0, torch.tanh(h), h)" in text
    assert "max().item()" not in text


def test_apply_edits_once_and_keeps_a_backup_that_takes_it_back(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_bytes(LAYERS.replace("\n", "\r\n").encode())
    (tmp_path / "layers.py").chmod(0o640)
    before = (tmp_path / "layers.py").read_bytes()
    trials = fixes.Trials()
    trials.sources = {str(tmp_path / "layers.py"): before.decode().replace("tanh", "sin")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert fixes.apply(trials, tmp_path / "backup.diff") == [tmp_path / "layers.py"]
        assert b"torch.sin(h)\r\n" in (tmp_path / "layers.py").read_bytes()
        assert (tmp_path / "layers.py").stat().st_mode & 0o777 == 0o640
        with pytest.raises(UserError, match="never overwritten"):
            fixes.apply(trials, tmp_path / "backup.diff")
        subprocess.run(["patch", "-R", "-p1", "--binary", "-i", "backup.diff"], check=True, cwd=tmp_path)
    assert (tmp_path / "layers.py").read_bytes() == before
    assert fixes.apply(fixes.Trials(), tmp_path / "none.diff") == [] and not (tmp_path / "none.diff").exists()


def test_fixes_are_not_tried_under_launchers_nor_without_candidates(folder: Path, tmp_path: Path) -> None:
    launched = Target(("torchrun", "train.py"), folder, "train", folder / "train.py", distributed=True)
    trials = fixes.try_fixes(launched, Observation(findings=found(folder)))
    assert "launcher" in trials.note and all(not one.kept and "launcher" in one.why for one in trials)
    assert supported(target_of(folder)) == ""
    nothing = fixes.try_fixes(target_of(folder), Observation(findings=[recompile("stride", "x", "1", "2")]))
    assert [one.why for one in nothing] == ["the layout decides the graph: make the input contiguous where it is made"]


def test_files_of_installed_packages_are_not_rewritten(folder: Path) -> None:
    line = Finding("graph_break", torch.nn.__file__, 1, "import x")
    _, reasons = propose(target_of(folder), [line])
    assert "not the user's own file" in reasons[0]


SLOW_PROGRAM = """
import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        for layer in self.layers:
            x = torch.tanh(layer(x)) / self.seen
        return x


model = torch.compile(Model(), backend="aot_eager")
for _ in range(8):
    model(torch.randn(4, 8)).sum().backward()
"""


def test_a_fix_that_saves_most_of_the_run_is_kept_and_proven(tmp_path: Path) -> None:
    """Eight compilations become two: a gain of more than half of the run, far beyond any floor."""
    (tmp_path / "train.py").write_text(SLOW_PROGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        target = resolve_target(["train.py"])
    finding = Finding("recompile", str(tmp_path / "train.py"), 14, lost_seconds=1.0)
    finding.detail = {"what": "value", "source": "self.seen", "old": "1", "new": "2"}
    said: list[str] = []
    trials = fixes.try_fixes(target, Observation(findings=[finding]), progress=said.append, folder=tmp_path / "trials")
    kept = [one for one in trials if one.kept]
    assert len(kept) == 1 and kept[0].recompiles_before == 7 and kept[0].recompiles_after <= 1, trials
    assert kept[0].error is not None and kept[0].gain_seconds is not None and kept[0].gain_seconds > 0
    assert trials.after is not None and trials.after.recompiles <= 1 and trials.setting == kept[0].setting
    assert any("timed run" in line for line in said) and trials.diff == ""


def test_candidates_that_are_equal_share_their_findings(folder: Path) -> None:
    first, second = found(folder)[:1] * 2
    candidates, _ = propose(target_of(folder), [first, Finding(**{**second.to_dict(), "line": 12})])
    shared = next(one for one in candidates if one.kind == "setting")
    assert isinstance(shared, Candidate) and len(shared.findings) == 2 and shared.predicted_seconds == 2.0


FORKING = """
import os, threading, time
import torch
compiled = torch.compile(lambda x: x + 1, backend="eager")
compiled(torch.ones(2))
threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
if os.fork():
    print("parent", flush=True)
"""
ENDLESS = """
import time
import torch
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
while True:
    time.sleep(0.1)
"""


def test_programs_that_fork_use_threads_hang_or_fail(tmp_path: Path) -> None:
    for name, text in {"forking": FORKING, "endless": ENDLESS, "early": "raise SystemExit(4)"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    target = Target((sys.executable, "forking.py"), tmp_path, "forking", tmp_path / "forking.py")
    with Workers(target, tmp_path / "w", timeout=100) as workers:
        forking = workers.run()
        workers.target = Target((sys.executable, "early.py"), tmp_path, "early", tmp_path / "early.py")
        early = workers.run(prove=True)
        workers.target = Target((sys.executable, "endless.py"), tmp_path, "endless", tmp_path / "endless.py")
        workers.timeout = 3
        endless = workers.run()
    assert forking.failure == "" and forking.observation.graphs == 1
    assert "parent\nthread\n" in (tmp_path / "w" / "trial000" / "log.txt").read_text()
    assert early.failure == "exit code 4" and endless.failure == "still running after 3 s"


class Scripted(Workers):
    """Workers whose runs take as long as a table says: by the settings that are on, without a process."""

    def __init__(self, folder: Path, gains: dict[str, float]) -> None:
        super().__init__(target_of(folder), folder, timeout=1)
        self.gains, self.runs = gains, 0

    def run(self, settings: Any = None, sources: Any = None, *, prove: bool = False, timed: bool = False) -> Outcome:
        self.runs += 1
        seconds = 10.0 - sum(self.gains[name] for name in settings or ()) + (0.01 if self.runs % 2 else 0.0)
        breaks = 5 - len(settings or ())
        return Outcome(
            Observation(breaks=breaks), seconds, proof={"why": "", "calls": 1, "error": 0.0, "error_eager": 0.0}
        )


def searched(folder: Path, gains: dict[str, float]) -> Search:
    tries = [Try(Candidate(name, [Finding("graph_break", name)], setting={name: True})) for name in gains]
    search = Search(Scripted(folder, gains), tries, lambda line: None, 3)
    search.run()
    return search


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ({"a": 2.0, "b": 0.0}, {"a"}),
        ({"a": 2.0, "b": 1.0}, {"a", "b"}),
        ({"a": 0.15, "b": 0.15}, {"a", "b"}),  # 0.2 s is 2 % of the run: each is too small, both are not
        ({"a": 2.0, "b": 0.12, "c": 0.1}, {"a", "b", "c"}),
        ({"a": 2.0, "b": -1.0}, {"a"}),
        ({"a": 0.0, "b": 0.05}, set()),
        ({"a": -1.0}, set()),
        ({"a": 3.0}, {"a"}),
    ],
)
def test_what_is_kept_of_fixes_whose_gains_are_known(tmp_path: Path, gains: dict[str, float], kept: set[str]) -> None:
    search = searched(tmp_path, gains)
    assert {one.candidate.fix for one in search.tries if one.kept} == kept
    assert set(search.kept.setting if search.kept else ()) == kept
    if kept:
        assert search.gain is not None
        assert search.gain.gain_seconds == pytest.approx(sum(gains[name] for name in kept), abs=0.05)
    assert all(one.kept or one.why for one in search.tries)
