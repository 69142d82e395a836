"""Interleaved measurement: several contenders in one session, in alternating order, each run apart.

The order of every second round is reversed (A B C, C B A, ...), so that a machine that slows down or speeds up
during the session treats all contenders alike. The A/A floor is the relative difference of the medians of
one contender's even and odd rounds: what no change at all looks like in this session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ridgeline.runs.stats import Comparison, aa_floor, compare_samples

Contender = Callable[[], Mapping[str, float]]


@dataclass
class Session:
    """Samples of every contender: ``samples[name][figure]`` is a list with one value per round."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, figures: Mapping[str, float]) -> None:
        """Keep the figures of one round."""
        for key, value in figures.items():
            self.samples.setdefault(name, {}).setdefault(key, []).append(float(value))

    def median(self, name: str, figure: str) -> float:
        """Median over rounds.

        Raises:
            KeyError: the contender failed or has no such figure.
        """
        return median(self.samples[name][figure])

    def floor(self, name: str, figure: str) -> float:
        """The contender's own A/A floor, relative."""
        return aa_floor(self.samples[name][figure])

    def compare(self, a: str, b: str, figure: str) -> Comparison:
        """``b`` against ``a``."""
        return compare_samples(self.samples[a][figure], self.samples[b][figure])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def interleave(
    contenders: Mapping[str, Contender], rounds: int, on_result: Callable[[int, str, Any], None] | None = None
) -> Session:
    """Run every contender ``rounds`` times in alternating order.

    A contender that raises is recorded under ``failures`` with its message and left out of later rounds: a
    missing rung is a gap with a reason, never a zero.
    """
    session = Session()
    names = list(contenders)
    for round_ in range(rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            if name in session.failures:
                continue
            try:
                figures: Any = contenders[name]()
            except Exception as error:
                session.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                figures = session.failures[name]
            else:
                session.add(name, figures)
            if on_result is not None:
                on_result(round_, name, figures)
    return session
