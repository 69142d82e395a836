"""From a trace to what to try: findings in seconds per step, each with its evidence, one knob and an interval of gain.

Three kinds of evidence are put on one scale, the seconds of a step that would be saved:

- the split of the step (:mod:`ridgeline.profiling.verdict`), whose rules know the knobs of a whole job;
- patterns in the operators (:mod:`ridgeline.profiling.analyses.antipatterns`), which name a line of the program;
- waiting across ranks (:mod:`ridgeline.profiling.analyses.ranks`), which names a rank and what it ran meanwhile.

The interval is from what is sure to what is possible: a rule that says *at most* starts at nothing, any other is a
proportion of a measured time and is given half of itself on either side. ``improve`` measures the knob and scores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.profiling.breakdown import break_down, combine
from ridgeline.profiling.results import StepBreakdown
from ridgeline.profiling.trace import Trace
from ridgeline.profiling.trust import Defect
from ridgeline.profiling.verdict import SENTENCE, WHAT, verdict

LEAST_SHARE = 0.01
"""A finding that costs less than this share of the step is not worth a line."""


@dataclass(frozen=True)
class Cause:
    """One finding. ``seconds`` is what it costs and ``gain_seconds`` the interval that its knob should save, both ``per``
    step (or of the capture); ``unsafe`` names the defects of the capture that make it doubtful."""

    kind: str
    title: str
    seconds: float
    gain_seconds: tuple[float, float]
    per: str
    knob: str | None
    evidence: str
    rank: int | None = None
    where: str | None = None
    start_ns: int | None = None
    end_ns: int | None = None
    unsafe: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "gain_seconds": list(self.gain_seconds), "unsafe": list(self.unsafe)}


def explain(trace: Trace, lacking: Sequence[Defect] = (), step: int | None = None) -> list[Cause]:
    """All findings, the most expensive gain first. ``lacking`` as from :func:`ridgeline.profiling.trust.defects`."""
    breakdown = combine([break_down(table, fallback_rank=rank) for rank, table in trace.tables.items()])
    found = [*_from_split(breakdown), *_from_patterns(trace, breakdown, step), *_from_ranks(trace, breakdown, step)]
    worth = [one for one in found if one.seconds >= LEAST_SHARE * breakdown.step_seconds]
    doubted = [_doubt(one, lacking) for one in worth]
    return sorted(doubted, key=lambda one: (-one.gain_seconds[1], -one.seconds, one.title))


def _from_split(breakdown: StepBreakdown) -> Iterator[Cause]:
    """The rules on how the step's time divides."""
    judged, parts = verdict(breakdown), breakdown.parts_seconds()
    per = _per(breakdown)
    for one in judged.findings:
        if one.part == "straggler":  # told by rank, with what it did, below
            continue
        interval = (0.0, one.gain_seconds) if one.at_most else (0.5 * one.gain_seconds, 1.5 * one.gain_seconds)
        title = f"{WHAT[one.part]}"
        yield Cause(one.part, title, parts.get(one.part, one.gain_seconds), interval, per, one.knob, one.how)
    if not judged.findings:
        bound = judged.bound_by if judged.bound_by in parts else "compute"
        yield Cause(bound, SENTENCE[judged.bound_by], parts[bound], (0.0, 0.0), per, None, judged.evidence)


def _from_patterns(trace: Trace, breakdown: StepBreakdown, step: int | None) -> Iterator[Cause]:
    """Anti-patterns of every rank; the cost of a capture is spread over its steps."""
    per = _per(breakdown)
    for row in trace.anti_patterns(step=step).iter_rows(named=True):
        steps = 1 if step is not None else max(len(_of(breakdown, row["rank"]).steps), 1)
        seconds = row["cost_ns"] / 1e9 / steps
        evidence = f"{row['count']} times in rank {row['rank']}, {row['cost']}" + (
            f", {row['where']}" if row["where"] else ""
        )
        where, at = row["where"], (row["start_ns"], row["end_ns"])
        gain = (0.0, seconds)
        yield Cause(row["finding"], row["finding"], seconds, gain, per, row["knob"], evidence, row["rank"], where, *at)


def _from_ranks(trace: Trace, breakdown: StepBreakdown, step: int | None) -> Iterator[Cause]:
    """Ranks that made others wait."""
    steps = 1 if step is not None else max(min(len(rank.steps) for rank in breakdown.ranks), 1)
    for row in trace.stragglers(step=step).iter_rows(named=True):
        seconds = row["caused_wait_ns"] / 1e9 / steps
        title = f"rank {row['rank']} arrives last at collectives"
        evidence = f"{row['count']} of {row['matched']} collectives (most of it at {row['op']}) waited for rank {row['rank']}; "
        evidence += f"before them, what the others did not do: {row['operator']}"
        yield Cause("straggler", title, seconds, (0.0, seconds), _per(breakdown), None, evidence, row["rank"])


def _of(breakdown: StepBreakdown, rank: int) -> Any:
    return next(one for one in breakdown.ranks if one.rank == rank)


def _per(breakdown: StepBreakdown) -> str:
    return "per step" if breakdown.ranks[0].window == "step" else "of the capture"


_TOUCHES = {
    "idle": ("idle", "host", "data"),
    "compute": ("compute", "optimizer"),
    "stragglers": ("straggler", "communication"),
    "per-step means": ("compute", "communication", "data", "optimizer", "host", "idle"),
}


def _doubt(cause: Cause, lacking: Sequence[Defect]) -> Cause:
    """Mark what a defect of the capture touches, of this rank or of all."""
    reasons = tuple(
        dict.fromkeys(
            one.kind
            for one in lacking
            if one.rank is None or cause.rank is None or one.rank == cause.rank
            if any(cause.kind in _TOUCHES.get(figure, (figure,)) for figure in one.unsafe)
        )
    )
    return Cause(**{**_fields(cause), "unsafe": reasons})


def _fields(cause: Cause) -> dict[str, Any]:
    return {name: getattr(cause, name) for name in cause.__dataclass_fields__}
