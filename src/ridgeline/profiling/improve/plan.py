"""``improve``: one baseline with a profile, then each finding's knob proven on top of what was kept before.

::

    baseline + trace -> findings -> knob 1: A B B A -> kept -> knob 2: (A + 1) against (A + 1 + 2) -> ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.errors import JobError, UserError, nearest
from ridgeline.profiling.breakdown import analyze
from ridgeline.profiling.improve import knobs as known
from ridgeline.profiling.improve.evidence import Baseline
from ridgeline.profiling.improve.finding import Finding
from ridgeline.profiling.improve.findings import of_own_job, of_user_job
from ridgeline.profiling.improve.knobs import Knob
from ridgeline.profiling.improve.proof import Gain, SameResult, compare_losses, judge, order
from ridgeline.profiling.improve.scores import score
from ridgeline.profiling.improve.serving import Load, Served, ServeJob, rules
from ridgeline.profiling.improve.serving.outputs import compare_outputs
from ridgeline.profiling.improve.targets import Target, resolve
from ridgeline.profiling.improve.trial import Job, OwnJob, Plan, Trial, fitting
from ridgeline.runs import Run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of the answer: a finding, and what became of its knob. ``memory`` is the peak in bytes, before and after."""

    finding: Finding
    tried: bool
    kept: bool
    why: str
    gain: Gain | None = None
    result: SameResult | None = None
    memory: tuple[int, int] | None = None

    @property
    def as_predicted(self) -> bool | None:
        """Whether the measured gain lies in the predicted interval; None where nothing was measured or predicted."""
        low, high = self.finding.predicted
        return low <= self.gain.gain_seconds <= high if self.gain is not None and high > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        measured = {"gain": self.gain.to_dict() if self.gain else None, "as_predicted": self.as_predicted}
        losses = None
        if self.result is not None:
            figures = {"difference": self.result.difference, "allowed": self.result.allowed}
            finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
            losses = {**finite, "why": self.result.why}
        state = {"tried": self.tried, "kept": self.kept, "why": self.why, "peak_memory_bytes": self.memory}
        return {**self.finding.to_dict(), **measured, "losses": losses, **state}


@dataclass(frozen=True)
class Improvement:
    """The answer. Seconds are per step, or per pass over the ``load`` of a server; ``notes`` are what runs that count
    all the same did besides."""

    run: Run
    before_seconds: float
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    load: Load | None = None

    @property
    def kept(self) -> list[Row]:
        """What helped."""
        return [row for row in self.rows if row.kept]

    @property
    def speedup(self) -> float:
        """Product of the kept knobs' ratios, each measured interleaved."""
        out = 1.0
        for row in self.kept:
            assert row.gain is not None
            out *= row.gain.before_seconds / row.gain.after_seconds
        return out

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second of the unchanged server over a whole pass, prefill included; None for a training job."""
        return None if self.load is None else self.load.streams * self.load.new_tokens / self.before_seconds

    def to_dict(self) -> dict[str, Any]:
        """What ``improve.json`` and ``--json`` hold."""
        permanent = [row.finding.knob.permanent for row in self.kept if row.finding.knob]
        head: dict[str, Any] = {"run": self.run.id, "step_seconds": self.before_seconds, "speedup": self.speedup}
        if self.load is not None:
            head |= {"load": asdict(self.load), "tokens_per_second": self.tokens_per_second}
        findings = [row.to_dict() for row in self.rows]
        return {**head, "findings": findings, "permanent": permanent, "notes": self.notes}


def improve(
    target: Sequence[str] | Served,
    *,
    load: Load | None = None,
    plan: Plan | None = None,
    rounds: int = 2,
    top: int = 3,
    knob: str | None = None,
    runs_root: str | Path | None = None,
    say: Say = lambda line: None,
) -> Improvement:
    """Profile a job, try the knobs of its largest findings, keep what is proven to help.

    Args:
        target: ``[CONFIG.toml, section.key=value, ...]``, ``[RUN_ID, ...]``, a command and its arguments, or a served model.
        load: what a served model is held under; None is the recorded one of a run, else :class:`Load`'s own.
        plan: steps per run and the time limit of one.
        rounds: times A B B A per knob.
        top: how many findings with a knob are tried.
        knob: try this one only, whether a finding asks for it or not.
        say: told one line before every run.

    Raises:
        UserError: no such configuration, run, program or knob.
        JobError: the unchanged job failed, hung, or has too few steps.
    """
    plan = plan or Plan()
    if rounds < 1 or plan.timed < 2 or plan.warmup < 1:
        raise UserError("improve: at least 1 round, 2 steps and 1 warm-up step")
    aim = resolve(target, load, runs_root)
    named = _knobs(aim)
    if knob is not None and knob not in named:
        raise UserError(f"--knob {knob}: no such knob{nearest(knob, list(named))}")
    settings = {**aim.settings(), "warmup": plan.warmup, "steps": plan.timed, "rounds": rounds, "knob": knob}
    with Run.create("improve", aim.name, config=settings, parents=aim.parents, root=runs_root) as run:
        job = aim.job(run.path / "artifacts" / "trials", plan)
        say(f"baseline of {job.name}, with a profile")
        base = _baseline(job)
        findings = _findings(job, base)
        chosen = _chosen(findings, knob, top, named)
        rows = _try_all(job, base, findings if knob is None else chosen, chosen, rounds, say)
        answer = Improvement(run, base.step_seconds, rows, job.notes, job.load if isinstance(job, ServeJob) else None)
        _write(run, answer)
    return answer


def _write(run: Run, answer: Improvement) -> None:
    document = answer.to_dict()
    run.save_json("improve.json", document)
    kept = [row.finding.knob.name for row in answer.kept if row.finding.knob]
    scored = [one for row in document["findings"] if (one := score(row)) is not None]
    figures = {"predictions": len(scored), "predictions_inside": sum(one.inside for one in scored)}
    speed = {"step_seconds": answer.before_seconds, "speedup": answer.speedup}
    run.summarize(**speed, kept=kept, findings=len(answer.rows), **figures)


def _findings(job: Job, base: Trial) -> list[Finding]:
    if isinstance(job, ServeJob):
        return rules.of_served(base, job.served, job.load)
    return own_findings(job, base) if isinstance(job, OwnJob) else of_user_job(Baseline(base))


def _knobs(aim: Target) -> dict[str, Knob | None]:
    """The knobs that can be asked for by name; None where only a finding gives one its value."""
    if aim.served is not None:
        return dict(rules.by_name(aim.served, aim.load or Load()))
    return dict.fromkeys(name for name, _ in known.OWN.values()) if aim.own else dict(known.BY_NAME)


def _baseline(job: Job) -> Trial:
    try:
        return job.run((), job.plan, profile=True)
    except JobError as error:
        raise JobError(f"{job.name}, unchanged: {error}") from None


def own_findings(job: OwnJob, base: Trial) -> list[Finding]:
    """Of our own configuration: the profile's rules with our overrides as knobs."""
    assert base.traces is not None
    config = job.job.model_dump(mode="json")
    return of_own_job(analyze(base.traces), base.step_seconds, config, str(base.traces))


def _chosen(findings: list[Finding], knob: str | None, top: int, named: Mapping[str, Knob | None]) -> list[Finding]:
    """The findings whose knobs are tried: the top ones, or those of the knob that was asked for."""
    if knob is None:
        return [one for one in findings if one.knob is not None][:top]
    asked = [one for one in findings if one.knob is not None and one.knob.name == knob]
    if asked:
        return asked
    blind = named[knob]
    if blind is None:
        raise UserError(f"--knob {knob}: no finding of this job asks for it; set its key in the configuration instead")
    text = "asked for with --knob; no finding speaks for it"
    return [Finding(knob, text, 0.0, (0.0, 0.0), "nothing is predicted", blind, blind.permanent)]


def _try_all(job: Job, base: Trial, findings: list[Finding], chosen: list[Finding], rounds: int, say: Say) -> list[Row]:
    rows, kept = [], []  # type: list[Row], list[Knob]
    for finding in findings:
        if finding.knob is None:
            rows.append(Row(finding, tried=False, kept=False, why="no knob from outside: edit the code"))
        elif finding not in chosen:
            rows.append(Row(finding, tried=False, kept=False, why="not among the top findings (--top)"))
        elif any(set(finding.knob.inject) & set(one.inject) == {"compile"} for one in kept):
            rows.append(Row(finding, tried=False, kept=False, why="the model is compiled by a knob kept before"))
        else:
            rows.append(prove(job, base, finding, kept, rounds, say))
            if rows[-1].kept:
                kept.append(finding.knob)
    return rows


def prove(job: Job, base: Trial, finding: Finding, kept: Sequence[Knob], rounds: int, say: Say) -> Row:
    """Interleaved runs with and without the finding's knob, on top of ``kept``; kept only when faster and the same.
    ``base`` is the unchanged job's first run."""
    knob = finding.knob
    assert knob is not None
    sides: dict[str, list[Trial]] = {"A": [], "B": []}
    places, plan = order(rounds), fitting(job.plan, [*kept, knob], base.step_seconds)
    for at, side in enumerate(places, 1):
        what = "unchanged" if side == "A" else knob.setting
        say(f"{knob.name}: run {at} of {len(places)}, {what}")
        try:
            sides[side].append(job.run([*kept, knob] if side == "B" else list(kept), plan))
        except JobError as error:
            return Row(finding, tried=True, kept=False, why=f"{'' if side == 'B' else 'the unchanged job '}{error}")
        unchanged = [*([] if kept else [base]), *sides["A"]]
        if len(unchanged) >= 2 and sides["B"]:  # one run alone does not tell what unchanged runs differ by
            result = check_result(unchanged, sides["B"][-1], knob)
            if not result.same:
                return Row(finding, True, False, f"changed the result: {result.why}", result=result)
    gain = judge(*([one.step_seconds for one in sides[side]] for side in "AB"))
    peak = [max(one.peak_memory_bytes for one in sides[side]) for side in "AB"]
    memory = (peak[0], peak[1])
    if not gain.proven:
        why = f"no gain beyond the noise floor of {gain.floor_seconds:.4f} s"
        return Row(finding, True, False, why, gain, result, memory)
    if knob.result == "precision" and base.outputs is None:
        result = _against_seeds(job, sides, knob, kept, plan, say)
        if not result.same:
            return Row(finding, True, False, f"changed the result: {result.why}", gain, result, memory)
    return Row(finding, True, True, result.why, gain, result, memory)


def _against_seeds(
    job: Job, sides: dict[str, list[Trial]], knob: Knob, kept: Sequence[Knob], plan: Plan, say: Say
) -> SameResult:
    say(f"{knob.name}: unchanged under another seed")
    try:
        other = job.run(list(kept), plan, seed_offset=1)
    except JobError as error:
        return SameResult(False, 0.0, 0.0, f"the run under another seed {error}")
    return compare_losses([one.losses for one in sides["A"]], sides["B"][0].losses, knob, other.losses)


def check_result(a: Sequence[Trial], b: Trial, knob: Knob) -> SameResult:
    """The same batches in the same order, as many backward passes, the same losses; of a server the same answers."""
    first = a[0]
    if b.outputs is not None:
        return compare_outputs([one.outputs for one in a if one.outputs is not None], b.outputs)
    if first.passes[: len(b.passes)] != b.passes[: len(first.passes)]:
        return SameResult(False, 0.0, 0.0, "another number of backward passes per step")
    if not same_order(first.orders, b.orders):
        return SameResult(False, 0.0, 0.0, "the samples came in another order")
    return compare_losses([one.losses for one in a], b.losses, knob)


def same_order(a: list[list[list[int]]], b: list[list[list[int]]]) -> bool:
    """Whether every loader of every rank drew the same batches, as far as both drew (workers draw ahead)."""
    return all(
        x[: len(y)] == y[: len(x)] for mine, other in zip(a, b, strict=False) for x, y in zip(mine, other, strict=False)
    )
