"""Proof: is B faster than A beyond the noise of this very session, and does it still compute the same?

Each run is a process of its own, in the order A B B A, so that a machine that drifts treats both alike. One run gives
one number, its mean seconds per step; the floor is what runs of the *same* setting differ by::

    A  10.2            10.6      spread 0.4; floor = three times it while a side has two runs = 1.2
    B       5.1   5.3            gain = 10.4 - 5.2 = 5.2 > 1.2: proven
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ridgeline.profiling.improve.knobs import TOLERANCE, Knob
from ridgeline.runs.stats import compare_samples

WORTH_KEEPING = 0.02
"""A gain below this share of the step is not kept, however quiet the machine."""
ENOUGH = 6
"""Runs per side from which the project's bootstrap verdict is used instead of the plain spread."""


@dataclass(frozen=True)
class Gain:
    """Seconds per step. ``floor_seconds`` is what no change at all looks like in this session."""

    before_seconds: float
    after_seconds: float
    floor_seconds: float
    proven: bool

    @property
    def gain_seconds(self) -> float:
        """What the knob saves per step; negative when it costs."""
        return self.before_seconds - self.after_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "gain_seconds": self.gain_seconds}


def order(rounds: int) -> str:
    """``ABBA`` for one round, ``ABBAABBA`` for two."""
    return "ABBA" * rounds


def judge(a: Sequence[float], b: Sequence[float]) -> Gain:
    """B's gain over A from one number per run, interleaved, at least two a side.

    The floor is the larger spread (max - min) of a side's runs: three times it with two runs, half of it from
    :data:`ENOUGH` runs on, where the bootstrap interval of the ratio must exclude 1 too. It is never below 2 % of A.
    Of runs that differ by normal noise alone, at most about one session in fifty is called a gain.
    """
    before, after, runs = median(a), median(b), min(len(a), len(b))
    spread = max(max(side) - min(side) for side in (a, b))
    floor = max(spread * (3 if runs < 3 else 1 if runs < ENOUGH else 0.5), WORTH_KEEPING * before)
    proven = before - after > floor
    if runs >= ENOUGH:
        compared = compare_samples(a, b)
        floor = max(floor, compared.floor * before)
        proven = compared.verdict == "lower" and before - after > floor
    return Gain(before, after, floor, proven)


@dataclass(frozen=True)
class SameResult:
    """Whether B computes what A computes; ``difference`` and ``allowed`` are relative to the losses' size."""

    same: bool
    difference: float
    allowed: float
    why: str


def compare_losses(
    a: Sequence[Sequence[float]], b: Sequence[float], knob: Knob, other_seed: Sequence[float] | None = None
) -> SameResult:
    """B's losses per step against A's runs over the same steps.

    Args:
        a: losses ``[runs][steps]`` of the unchanged job; what its own runs differ by is always allowed twice.
        b: losses ``[steps]`` with the knob.
        knob: says what the losses may do.
        other_seed: losses ``[steps]`` of the unchanged job under another seed, for a precision knob.
    """
    if not b or not a[0] or not any(value != 0 for value in a[0]):
        return SameResult(False, math.inf, 0.0, "no loss was seen in backward: the result cannot be checked")
    noise = max((distance(a[0], other) for other in a[1:]), default=0.0)
    difference = distance(a[0], b)
    if knob.result == "precision":
        if other_seed is None:
            return SameResult(True, difference, math.inf, "seeds not compared yet")
        between = distance(a[0], other_seed)
        if between == 0:
            why = "another seed does not change the losses, so there is no noise to hold the precision against"
            return SameResult(False, difference, 0.0, why)
        allowed, what = 2 * between, "twice the noise between two seeds"
    else:
        allowed = max(TOLERANCE[knob.result], 2 * noise)
        what = "twice what unchanged runs differ by" if allowed > TOLERANCE[knob.result] else "the tolerance"
    same = difference <= allowed
    return SameResult(same, difference, allowed, f"losses differ by {difference:.1e}, {what} is {allowed:.1e}")


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference over the common steps, relative to the largest loss; infinite where only one is finite."""
    pairs = list(zip(a, b, strict=False))
    scale = max((abs(x) for x, _ in pairs if math.isfinite(x)), default=0.0) or 1.0
    worst = 0.0
    for x, y in pairs:
        if math.isfinite(x) != math.isfinite(y):
            return math.inf
        if math.isfinite(x):
            worst = max(worst, abs(x - y) / scale)
    return worst
