"""What ``improve`` decides, without any job: floors, losses, plans, knobs, processes, the hooks' small functions."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import JobError, UserError
from ridgeline.profiling.improve import BY_NAME, Knob, Plan, compare_losses, improve, judge
from ridgeline.profiling.improve import knobs as known
from ridgeline.profiling.improve.finding import Finding
from ridgeline.profiling.improve.plan import _try_all, prove, same_order
from ridgeline.profiling.improve.process import last_words, run
from ridgeline.profiling.improve.proof import distance, order
from ridgeline.profiling.improve.trial import INJECTION, Trial, fitting, step_seconds

SAME = known.workers(2)
PRECISION = known.autocast()
BASE = Trial(1.0, [2.0, 1.0])
SECONDS = st.floats(0.001, 10.0)


def test_a_gain_must_exceed_the_floor_of_its_own_session() -> None:
    """By hand: spread 0.4 with two runs a side is a floor of 1.2; with four runs it is 0.4; 2 % is the least."""
    proven = judge([10.2, 10.6], [5.1, 5.3])
    assert proven.gain_seconds == pytest.approx(5.2) and proven.floor_seconds == pytest.approx(1.2) and proven.proven
    assert not judge([10.2, 10.6], [9.3, 9.5]).proven  # 1.0 < 1.2
    four = judge([10.0, 10.4, 10.1, 10.2], [9.4, 9.5, 9.4, 9.5])
    assert four.floor_seconds == pytest.approx(0.4) and four.proven
    assert not judge([1.0, 1.0], [0.99, 0.99]).proven  # a quiet machine, but 1 % only
    assert not judge([5.1, 5.3], [10.2, 10.6]).proven  # slower
    assert order(2) == "ABBAABBA"


@given(st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(SECONDS, min_size=2 * n, max_size=2 * n)] * 2)))
@settings(max_examples=150, deadline=None)
def test_no_gain_is_ever_claimed_below_the_floor(sides: tuple[list[float], list[float]]) -> None:
    """Whatever the samples: proven needs more than the floor, and half a side's spread is never above the floor."""
    a, b = sides
    gain = judge(a, b)
    assert gain.floor_seconds >= 0.5 * max(max(a) - min(a), max(b) - min(b)) - 1e-12
    assert not gain.proven or gain.gain_seconds > gain.floor_seconds
    assert not (judge(a, b).proven and judge(b, a).proven)


@pytest.mark.parametrize("runs", [2, 4, 6])
def test_noise_alone_is_hardly_ever_called_a_gain(runs: int) -> None:
    """A against A, 400 sessions of normal noise of 10 %: at most 4 % are called a gain, and a halved step always is."""
    draw = random.Random(runs)
    sides = [[[draw.gauss(1, 0.1) for _ in range(runs)] for _ in "AB"] for _ in range(400)]
    assert sum(judge(a, b).proven for a, b in sides) <= 16
    quiet = [[[draw.gauss(middle, 0.02) for _ in range(runs)] for middle in (1.0, 0.5)] for _ in range(50)]
    assert all(judge(a, b).proven for a, b in quiet)


def test_losses_must_stay_the_same() -> None:
    """1e-5 for a schedule, 1e-4 for another order of arithmetic, twice the unchanged job's own noise, NaN with NaN."""
    a = [2.0, 1.0]
    assert compare_losses([a, a], [2.0, 1.00001], SAME).same
    assert not compare_losses([a, a], [2.0, 1.001], SAME).same
    assert compare_losses([a, a], [2.0, 1.0001], known.fused()).same
    assert compare_losses([a, [2.0, 1.001]], [2.0, 1.0019], SAME).same  # unchanged runs differ by 0.0005 of 2
    assert not compare_losses([a, [2.0, 1.001]], [2.0, 1.003], SAME).same
    assert distance([math.nan, 1.0], [math.nan, 1.0]) == 0 and distance([1.0], [math.nan]) == math.inf
    assert "no loss" in compare_losses([[]], [], SAME).why
    assert "no loss" in compare_losses([[0.0]], [0.0], SAME).why


def test_a_precision_knob_is_held_against_the_noise_between_seeds() -> None:
    """Seeds differ by 0.1 of 2: 0.2 is allowed. A job whose seed does nothing has no noise to hide in."""
    a = [2.0, 1.0]
    assert compare_losses([a], [2.0, 1.19], PRECISION, other_seed=[2.0, 1.1]).same
    assert not compare_losses([a], [2.0, 1.21], PRECISION, other_seed=[2.0, 1.1]).same
    assert "another seed does not change" in compare_losses([a], a, PRECISION, other_seed=a).why


def test_runs_with_workers_are_timed_over_whole_bursts() -> None:
    """Four workers: eight batches wait before the clock starts, and four arrive at a time."""
    plan = fitting(Plan(warmup=5, timed=10), [known.workers(4)], step_seconds=1.0)
    assert (plan.warmup, plan.timed, plan.burst) == (13, 12, 4)
    assert fitting(Plan(5, 10), [known.fused()], 1.0) == Plan(5, 10)
    assert fitting(Plan(5, 10), [], 0.01).timed == 50  # half a second of it
    assert fitting(Plan(5, 10), [], 0.0001).timed == 100  # ten times at most
    bursts = [0.0, 0.0, 2.0, 2.0, 4.0, 4.0, 6.0]  # two batches at once, every 2 s
    assert step_seconds(bursts, burst=2) == 1.0
    assert step_seconds([0, 1, 2, 12, 13]) == 1.0  # one hiccup does not count
    assert step_seconds([0, 1, 2, 12, 13], asynchronous=True) == 13 / 4  # where single steps mean nothing, all does


def test_sample_order_is_compared_as_far_as_both_drew() -> None:
    """Workers draw ahead; another order is seen."""
    assert same_order([[[1, 2, 3]]], [[[1, 2, 3, 4, 5]]])
    assert not same_order([[[1, 2, 3]]], [[[1, 3, 2, 4, 5]]])


def test_knobs_merge_and_none_changes_the_batch() -> None:
    """The later knob wins within a hook; a larger global batch is no knob."""
    both = known.merged([known.workers(2), known.pin_memory(), known.threads(3)])
    assert both["loader"]["num_workers"] == 2 and both["loader"]["pin_memory"] and both["threads"] == 3
    assert known.override("train.global_batch_size=16") is None
    micro = known.override("train.micro_batch_size=4")
    assert micro is not None and micro.overrides == ("train.micro_batch_size=4",) and micro.result == "reordered"
    assert all("batch_size" not in json.dumps(knob.inject) for knob in BY_NAME.values())


class Pretended:
    """A job of known times and losses: ``faster[knob name]`` divides the step, ``losses`` may differ, ``broken`` fails."""

    name, plan = "pretended", Plan(timed=5)
    notes: list[str] = []

    def __init__(
        self, faster: dict[str, float], losses: dict[str, list[float]] | None = None, broken: str = ""
    ) -> None:
        self.faster, self.losses, self.broken = faster, losses or {}, broken
        self.seen: list[list[str]] = []
        self.draw = random.Random(0)

    def run(self, knobs: Sequence[Knob], plan: Plan, profile: bool = False, seed_offset: int = 0) -> Trial:
        names = [knob.name for knob in knobs]
        self.seen.append(names)
        if self.broken in names:
            raise JobError("failed: ValueError: not here")
        seconds = self.draw.gauss(1.0, 0.005) / math.prod(self.faster.get(name, 1.0) for name in names)
        changed = [self.losses[name] for name in names if name in self.losses]
        return Trial(seconds, changed[0] if changed else [2.0, 1.0 + 0.1 * seed_offset])


def finding(knob: Knob, gain: float = 0.5) -> Finding:
    """A finding that asks for ``knob``."""
    return Finding(knob.name, "text", gain, (0.0, gain), "how", knob, knob.permanent)


def quiet(line: str) -> None:
    """Say nothing."""


def test_the_order_of_runs_and_what_is_kept_builds_up() -> None:
    """A B B A; the second knob is tried on top of the first, which was kept; the useless one is not."""
    job = Pretended({"workers": 2.0})
    chosen = [finding(known.workers(2)), finding(known.fused()), finding(known.threads(1))]
    rows = _try_all(job, BASE, chosen, chosen, 1, quiet)
    assert job.seen[:4] == [[], ["workers"], ["workers"], []]
    assert job.seen[4:8] == [["workers"], ["workers", "fused"], ["workers", "fused"], ["workers"]]
    assert job.seen[9] == ["workers", "threads"]
    assert [row.kept for row in rows] == [True, False, False]
    assert rows[0].gain is not None and rows[0].gain.gain_seconds == pytest.approx(0.5, abs=0.05)
    assert "no gain beyond the noise floor" in rows[1].why


def test_a_faster_job_that_computes_something_else_is_not_kept() -> None:
    """Ten times faster, another loss: refused after the first pair, with the reason."""
    job = Pretended({"workers": 10.0}, {"workers": [2.0, 1.5]})
    row = prove(job, BASE, finding(known.workers(2)), [], 2, quiet)
    assert not row.kept and row.why.startswith("changed the result") and len(job.seen) == 2
    broken = prove(Pretended({}, broken="fused"), BASE, finding(known.fused()), [], 1, quiet)
    assert not broken.kept and broken.why == "failed: ValueError: not here"


def test_a_job_whose_own_runs_differ_is_given_that_much() -> None:
    """Unchanged runs are 0.01 apart, so a loss 0.015 away is no change of the result, and one 0.05 away is."""
    for loss, kept in ((1.015, True), (1.05, False)):
        job = Pretended({"workers": 2.0}, {"workers": [2.0, loss]})
        row = prove(job, Trial(1.0, [2.0, 1.01]), finding(known.workers(2)), [], 1, quiet)
        assert row.kept is kept
        assert row.result is not None and "unchanged runs differ by" in row.result.why


def test_precision_is_kept_within_seed_noise_only() -> None:
    """The other seed's loss is 0.1 away: 0.15 is kept, 0.25 is not."""
    for loss, kept in ((1.15, True), (1.25, False)):
        job = Pretended({"autocast": 2.0}, {"autocast": [2.0, loss]})
        assert prove(job, BASE, finding(known.autocast()), [], 1, quiet).kept is kept


def test_a_hanging_job_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """The grandchild has a session of its own, as launchers give their workers."""
    script = 'setsid sleep 60 & echo $! > "$1"; wait'  # a shell starts at once, also on a busy machine
    with pytest.raises(JobError, match="still running after 2 s"):
        run(["sh", "-c", script, "job", str(tmp_path / "pid")], os.environ, tmp_path / "log", 2.0)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_reason_of_a_failure_is_the_first_exception(tmp_path: Path) -> None:
    """Ranks that lost their peer and the launcher print errors of their own afterwards."""
    log = tmp_path / "log"
    log.write_text(
        "step 1\nTraceback (most recent call last):\n  File 'a'\n[rank1]: ValueError: the cause\n"
        "Traceback (most recent call last):\nConnectionError: lost peer\n=====\n"
    )
    assert last_words(log) == "ValueError: the cause"
    log.write_text("Killed\n\n")
    assert last_words(log) == "Killed"


def test_the_shadowed_sitecustomize_still_runs(tmp_path: Path) -> None:
    """Ours is first on the path, runs the other, and takes itself off the path; without a spec it does nothing more."""
    (tmp_path / "sitecustomize.py").write_text("print('the other one')\n")
    code = "import sys; print([p for p in sys.path if 'injection' in p], 'ridgeline_injection' in sys.modules)"
    path = os.pathsep.join([str(INJECTION), str(tmp_path)])
    shown = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert shown.stdout.splitlines() == ["the other one", "[] False"]


def test_a_loader_is_changed_only_where_that_is_safe() -> None:
    """More workers would repeat an iterable dataset; prefetching needs workers; existing workers are never cut."""
    from ridgeline.profiling.improve.injection.hooks import change_loader

    change = known.workers(2).inject["loader"]
    given: dict[str, object] = {"dataset": [], "num_workers": 0}
    assert change_loader(given, change, iterable=False)
    assert (given["num_workers"], given["prefetch_factor"], given["persistent_workers"]) == (2, 2, True)
    stream: dict[str, object] = {"dataset": []}
    assert not change_loader(stream, change, iterable=True) and stream == {"dataset": []}
    many: dict[str, object] = {"dataset": [], "num_workers": 5}
    change_loader(many, change, iterable=False)
    assert many["num_workers"] == 5


def test_wrong_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """No such knob, program or configuration; no run of the job is left behind by them."""
    with pytest.raises(UserError, match="did you mean 'workers'"):
        improve(["python", "train.py"], knob="worker", runs_root=tmp_path)
    with pytest.raises(UserError, match="no such file"):
        improve(["absent.toml"], runs_root=tmp_path)
    with pytest.raises(UserError, match="cannot start 'no-such-program'"):
        improve(["no-such-program"], runs_root=tmp_path)
    with pytest.raises(UserError, match="at least 1 round"):
        improve(["x.py"], rounds=0, runs_root=tmp_path)


def test_habits_of_the_trace_become_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two traced steps with 6 ms of a habit in sum are 3 ms per step, halved because tracing doubled the step; a habit
    that has a rule of its own is left to it."""
    import polars as pl

    from ridgeline.profiling.improve import habits as module

    names = ["for-loop indexing", "fp32 matmul without TF32", "item in the loop"]
    frame = pl.DataFrame({"finding": names, "cost_ns": [6_000_000, 2_000_000, 9], "where": ["a.py(3): f"] * 3})
    monkeypatch.setattr(module, "anti_patterns", lambda table: frame.with_columns(knob=pl.lit("unbind")))
    monkeypatch.setattr(module, "step_rows", lambda table: [0, 1])
    base = SimpleNamespace(table=None, scale=0.5)
    found = list(module.habits(base))  # type: ignore[arg-type]
    assert [(name, knob and knob.name) for name, _, _, _, knob in found] == [(names[0], None), (names[1], "tf32")]
    assert found[0][1] == pytest.approx(0.0015) and found[0][2:4] == ("a.py(3): f", "unbind")


def test_help_and_the_parent_need_no_torch() -> None:
    """The verb's help imports neither torch nor numpy; the parent process never imports torch."""
    for module, heavy in (("ridgeline.cli.improve", ("torch", "numpy")), ("ridgeline.profiling.improve", ("torch",))):
        code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0, module
