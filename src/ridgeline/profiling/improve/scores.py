"""How good the predictions are: predicted against measured gain, over all runs of ``improve`` recorded here.

A score is of one finding whose knob was measured. Shares are of the step before::

    predicted 20 % .. 40 %, measured 45 %   ->  not inside, off by 5 % of the step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ridgeline.errors import UserError
from ridgeline.runs import list_runs


@dataclass(frozen=True)
class Score:
    """One prediction held against its measurement; ``error`` is the share of the step the gain lies outside by."""

    run: str
    job: str
    finding: str
    knob: str
    low: float
    high: float
    measured: float
    floor: float
    kept: bool

    @property
    def error(self) -> float:
        """0 inside the interval."""
        return max(self.low - self.measured, self.measured - self.high, 0.0)

    @property
    def inside(self) -> bool:
        """Whether the measured gain lies in the predicted interval, give or take what the session could tell apart."""
        return self.error <= self.floor

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "error": self.error, "inside": self.inside}


def score(row: Mapping[str, Any], run: str = "", job: str = "") -> Score | None:
    """The score of one finding of an ``improve.json``, or None where nothing was measured or predicted."""
    gain, (low, high) = row["gain"], row["predicted_seconds"]
    if gain is None or high <= 0:
        return None
    before = gain["before_seconds"]
    measured, floor = gain["gain_seconds"] / before, gain["floor_seconds"] / before
    return Score(run, job, row["name"], row["knob"]["name"], low / before, high / before, measured, floor, row["kept"])


def collect(root: str | Path | None = None) -> list[Score]:
    """Scores of all finished runs of ``improve`` below ``root``, oldest first.

    Raises:
        UserError: there is none.
    """
    found: list[Score] = []
    for run in list_runs(root, "improve"):
        document = run.load_json("improve.json") or {}
        scored = (score(row, run.id, run.info["name"]) for row in document.get("findings", []))
        found += [one for one in scored if one is not None]
    if not found:
        raise UserError("--scores: no run of improve here has a measured knob yet (--runs names the folder)")
    return found


def by_knob(scores: Iterable[Score]) -> list[dict[str, Any]]:
    """Per knob, and of all together last: how many, kept, inside; means of the interval, the gain and the error."""
    groups: dict[str, list[Score]] = {}
    everything = list(scores)
    for one in everything:
        groups.setdefault(one.knob, []).append(one)
    return [_summary(name, group) for name, group in [*sorted(groups.items()), ("all", everything)]]


def _summary(name: str, group: list[Score]) -> dict[str, Any]:
    means = {key: mean(getattr(one, key) for one in group) for key in ("low", "high", "measured", "error")}
    return {
        "knob": name,
        "measured_knobs": len(group),
        "kept": sum(one.kept for one in group),
        "inside": sum(one.inside for one in group),
        **{f"mean_{key}": value for key, value in means.items()},
    }
