"""Verdict statistics: medians, the A/A floor, and when a difference may be called one.

Everything is deterministic: the bootstrap draws from a fixed generator, so the same samples always give the
same verdict.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """B against A. ``ratio`` = median(B) / median(A); the interval is a 95 % bootstrap of that ratio.

    ``floor`` is the relative difference that two halves of the *same* side show (A/A); a verdict other than
    ``"no difference"`` needs the interval to exclude 1 and the ratio to leave the floor.
    """

    median_a: float
    median_b: float
    ratio: float
    low: float
    high: float
    floor: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_samples(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare two series of positive samples taken in one session, interleaved.

    Raises:
        ValueError: a side is empty or holds a value that is not positive.
    """
    if not a or not b or min(a) <= 0 or min(b) <= 0:
        raise ValueError("both sides need samples, all of them positive")
    ratio = median(b) / median(a)
    low, high = _bootstrap(a, b)
    floor = max(aa_floor(a), aa_floor(b))
    outside = (low > 1 or high < 1) and abs(ratio - 1) > floor
    enough = len(a) >= 3 and len(b) >= 3
    verdict = ("higher" if ratio > 1 else "lower") if outside and enough else "no difference"
    return Comparison(median(a), median(b), ratio, low, high, floor, verdict if enough else "too few samples")


def aa_floor(samples: Sequence[float]) -> float:
    """Relative difference of the medians of the even and the odd samples: what no change at all looks like.

    With fewer than four samples the whole spread, (max - min) / median, is the honest floor.
    """
    middle = median(samples)
    if len(samples) < 4:
        return (max(samples) - min(samples)) / middle
    return abs(median(samples[::2]) - median(samples[1::2])) / middle


def _bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    draw = random.Random(0)
    ratios = sorted(median(draw.choices(b, k=len(b))) / median(draw.choices(a, k=len(a))) for _ in range(RESAMPLES))
    return ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1]
