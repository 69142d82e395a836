"""Do two engines give the same greedy answers? Where two answers part, how close were the two tokens::

    A   the river is wide and  deep     log-probability of 'deep' -1.201
    B   the river is wide and  long     A's own of 'long'         -1.209: a gap of 0.008, a tie in bf16

Another order of arithmetic moves a logit by a unit in its last place, so that ties may fall either way, also between two
unchanged servers with other batches. A gap larger than that is another result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.profiling.improve.proof import SameResult

TIE = {"fp32": 1e-3, "fp16": 2**-6, "bf16": 2**-3}
"""Nats: the spacing of numbers from 16 to 32, where logits lie, in that precision (fp32: sums of thousands of terms)."""


@dataclass(frozen=True)
class Outputs:
    """Greedy answers to the load: ``tokens`` ``[requests][steps]``, and ``best`` ``[requests][steps]``, the likeliest
    tokens at each step with their log-probabilities. ``dtype`` is of the weights."""

    tokens: list[list[int]]
    best: list[list[dict[int, float]]]
    dtype: str


def gaps(a: Outputs, b: Outputs) -> list[float]:
    """For each answer of B that parts from A's, how much likelier A held its own token there (nats); infinite where
    B's was not among A's likeliest, or the lengths differ."""
    found = []
    for mine, best, theirs in zip(a.tokens, a.best, b.tokens, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), None)
        if at is not None:
            found.append(abs(best[at][mine[at]] - best[at].get(theirs[at], -math.inf)))
        elif len(mine) != len(theirs):
            found.append(math.inf)
    return found


def compare_outputs(a: Sequence[Outputs], b: Outputs) -> SameResult:
    """B's answers against those of the unchanged runs ``a``: equal, or parted at ties of the coarser precision only."""
    parted = gaps(a[0], b)
    count = len(b.tokens)
    if not parted:
        return SameResult(True, 0.0, 0.0, f"all {count} greedy answers are equal")
    allowed, worst = max(TIE[a[0].dtype], TIE[b.dtype]), max(parted)
    same = worst <= allowed
    what = "at ties" if same else f"where the tokens were {worst:.2g} nats apart, a tie is {allowed:.2g}"
    return SameResult(same, worst, allowed, f"{len(parted)} of {count} greedy answers part {what}")
