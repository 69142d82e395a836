"""What a finding is, and which are worth naming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ridgeline.profiling.improve.evidence import Baseline
from ridgeline.profiling.improve.knobs import Knob

WORTH_NAMING = 0.03
"""A finding of less than this share of the step is left out."""


SMALL_SECONDS = 50e-6
"""Operators shorter than this on average cost mostly their own dispatch."""


@dataclass(frozen=True)
class Finding:
    """``seconds`` per step stand behind it; ``predicted`` is what the knob (or the edit) saves of them, [low, high]."""

    name: str
    text: str
    seconds: float
    predicted: tuple[float, float]
    how: str
    knob: Knob | None
    advice: str
    rank: int = 0
    where: str = ""
    trace: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "text": self.text,
            "seconds_per_step": self.seconds,
            "predicted_seconds": list(self.predicted),
            "how": self.how,
            "knob": self.knob.to_dict() if self.knob else None,
            "advice": self.advice,
            "evidence": {"trace": self.trace, "rank": self.rank, "where": self.where},
        }


def ranked(found: list[Finding], step: float) -> list[Finding]:
    """Those that may save a share of the ``step`` worth naming, most first."""
    worth = [one for one in found if one.predicted[1] >= WORTH_NAMING * step]
    return sorted(worth, key=lambda one: -one.predicted[1])


def make(
    base: Baseline,
    name: str,
    text: str,
    seconds: float,
    interval: tuple[float, float],
    how: str,
    knob: Knob | None,
    advice: str,
    where: str = "",
    rank: int = 0,
) -> Finding:
    """A finding of a user's job, its prediction cut to the step."""
    low, high = (min(max(one, 0.0), base.step_seconds) for one in interval)
    trace = str(base.traces / f"rank{rank}.json.gz")
    return Finding(name, text, seconds, (low, high), how, knob, advice, rank, where, trace)


def cores_per_rank(base: Baseline) -> int:
    """Cores of the machine for each of its ranks."""
    return max(1, int(base.facts["cores"]) // max(1, int(base.facts["local_world"])))
