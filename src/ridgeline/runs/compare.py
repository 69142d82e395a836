"""Two runs side by side: what differs in the configuration first, then what it did.

A change of a figure is attributed only when a single factor differs; otherwise the factors are listed and
no cause is named (the confounded comparisons of the field's teaching material are why).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.runs.run import Run
from ridgeline.runs.stats import Comparison, compare_samples

# Figures by what they speak of; a figure of summary.json is matched by the first substring that fits.
GROUPS = {
    "speed": ("per_second", "seconds", "mfu", "mbu", "ttft", "itl", "e2e"),
    "memory": ("bytes",),
    "quality": ("loss", "score", "perplexity", "accuracy"),
}
# Where a run puts its figures and its files is not a factor.
NOT_FACTORS = ("data.path", "data.name", "data.workers", "model.init")


@dataclass(frozen=True)
class Difference:
    """A factor with its two values; ``where`` is config, environment or device."""

    where: str
    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Figure:
    """A headline figure of both runs."""

    group: str
    key: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        """b / a, None when a is zero."""
        return self.b / self.a if self.a else None


@dataclass(frozen=True)
class RunComparison:
    """All of it; ``attribution`` is the sentence to print."""

    a: str
    b: str
    differences: list[Difference]
    figures: list[Figure]
    steps: Comparison | None
    attribution: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        out = asdict(self)
        out["figures"] = [{**asdict(figure), "ratio": figure.ratio} for figure in self.figures]
        return out


def compare_runs(a: Run, b: Run) -> RunComparison:
    """Compare two runs of any kind; figures and per-step samples are compared where both have them."""
    differences = factor_differences(a, b)
    steps = _steps(a, b)
    return RunComparison(
        a.id, b.id, differences, shared_figures(a.summary, b.summary), steps, attribute(differences, steps, a, b)
    )


def factor_differences(a: Run, b: Run) -> list[Difference]:
    """Configuration first, then device, then software."""
    rows = [Difference("config", k, x, y) for k, x, y in _changed(a.config, b.config) if k not in NOT_FACTORS]
    ceilings_a, ceilings_b = (run.load_json("ceilings.json") or {} for run in (a, b))
    if ceilings_a.get("device") != ceilings_b.get("device"):
        rows.append(Difference("device", "device", ceilings_a.get("device"), ceilings_b.get("device")))
    environment_a, environment_b = (run.load_json("environment.json") or {} for run in (a, b))
    return rows + [Difference("environment", k, x, y) for k, x, y in _changed(environment_a, environment_b)]


def shared_figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Figure]:
    """Numbers that both summaries hold, grouped: speed, memory, quality, other."""
    figures = []
    for key in a:
        x, y = _number(a[key]), _number(b.get(key))
        if x is not None and y is not None:
            figures.append(Figure(_group(key), key, x, y))
    order = [*GROUPS, "other"]
    return sorted(figures, key=lambda figure: order.index(figure.group))


def attribute(differences: list[Difference], steps: Comparison | None, a: Run, b: Run) -> str:
    """One sentence: the single factor and what it did, or why no cause is named."""
    if a.kind != b.kind:
        return f"not comparable: {a.id} is a {a.kind} run, {b.id} a {b.kind} run"
    if len(differences) > 1:
        names = ", ".join(difference.key for difference in differences[:6])
        more = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
        return f"{len(differences)} factors differ ({names}{more}): no change is attributed; change one at a time"
    if steps is None:
        effect = "no per-step samples to judge"
    elif steps.verdict in ("higher", "lower"):
        effect = f"step time {steps.verdict} by {abs(steps.ratio - 1):.1%} [{steps.low:.3f}, {steps.high:.3f}]"
        effect += ", from two separate sessions: confirm interleaved before you rely on it"
    else:
        effect = f"step time: {steps.verdict} beyond the noise (ratio {steps.ratio:.3f}, A/A floor {steps.floor:.1%})"
    if not differences:
        return f"no factor differs; {effect}: this is what the noise alone does"
    only = differences[0]
    return f"only {only.key} differs ({only.a} -> {only.b}); {effect}"


def _steps(a: Run, b: Run) -> Comparison | None:
    series = [steady_steps(run.metrics()) for run in (a, b)]
    return compare_samples(*series) if all(len(samples) >= 3 for samples in series) else None


def steady_steps(metrics: list[dict[str, Any]]) -> list[float]:
    """Seconds per step without the first two, which carry compilation and allocation."""
    seconds = [line["step_seconds"] for line in metrics if line.get("step_seconds")]
    return seconds[2:] if len(seconds) > 4 else []


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    flat_a, flat_b = dict(_flatten(a)), dict(_flatten(b))
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    return [(key, flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        rows.extend(_flatten(item, f"{name}.") if isinstance(item, Mapping) else [(name, item)])
    return rows


def _group(key: str) -> str:
    for group, parts in GROUPS.items():
        if any(part in key for part in parts):
            return group
    return "other"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
