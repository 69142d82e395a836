"""Eager against compiled within one unmodified run: after the warm-up, steps alternate C E E C.

A step reaches from one call of the leading compiled function, the one that is called first, to its next call, so that
backward and optimiser are in it. In an eager step every compiled function calls what it was made of. Both sides live in
one process and see the same machine; the floor is what two halves of the same side differ by.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median

from ridgeline.compiler.doctor.clock import EntryCell
from ridgeline.compiler.doctor.model import Timing
from ridgeline.runs.stats import aa_floor

QUIET_STEPS = 3
"""Steps without compiling before the alternation begins."""
SAMPLES = 48
"""Eager steps at most; afterwards the program runs compiled to its end."""
PATTERN = (False, True, True, False)
EAGER, COMPILED_NOW = 1, 2
LEAST_SAMPLES = 4


class Interleave:
    """Says which calls run in eager. ``leader`` is the entry whose calls begin steps; -1 before the first call."""

    def __init__(self, samples: int = SAMPLES, quiet: int = QUIET_STEPS) -> None:
        self.samples, self.quiet = samples, quiet
        self.leader = -1
        self._calm = 0
        self._step = 0
        self._eager = False
        self._taken = 0
        self._calls: dict[int, int] = {}
        self._usual: dict[int, int] = {}

    def choose(self, entry: int, compiled_lately: bool) -> bool:
        """Whether the call of ``entry`` that begins now runs in eager. ``compiled_lately``: its last step compiled."""
        if self.leader < 0:
            self.leader = entry
        if entry != self.leader:
            return self._follow(entry)
        self._begin_step()
        self._calm = 0 if compiled_lately else self._calm + 1
        if self._calm <= self.quiet or self._taken >= self.samples:
            self._eager = False
            return False
        self._eager = PATTERN[self._step % len(PATTERN)]
        self._step += 1
        self._taken += self._eager
        return self._eager

    def _begin_step(self) -> None:
        """What each other entry was called in the step that ended: the most of any step so far."""
        for entry, calls in self._calls.items():
            self._usual[entry] = max(self._usual.get(entry, 0), calls)
        self._calls.clear()

    def _follow(self, entry: int) -> bool:
        """An entry within the step. More calls than a step has: the leader is called no more, and the step is over."""
        self._calls[entry] = self._calls.get(entry, 0) + 1
        return self._eager and self._calls[entry] <= self._usual.get(entry, 0)


def step_timing(cells: Sequence[EntryCell], leader: int) -> Timing | None:
    """Medians of both sides over the alternating stretch; None with fewer than four samples a side."""
    cell = next((one for one in cells if one.key == leader and one.eager_calls), None)
    if cell is None:
        return None
    marks = [mode & EAGER for _, mode in cell.steps]
    first = marks.index(EAGER)
    last = len(marks) - 1 - marks[::-1].index(EAGER)
    sides: tuple[list[float], list[float]] = ([], [])
    for index in range(max(first - 1, 0), min(last + 2, len(marks) - 1)):
        (start, mode), (end, _) = cell.steps[index : index + 2]
        if not mode & COMPILED_NOW and end > start:
            sides[mode & EAGER].append((end - start) / 1e9)
    compiled, eager = sides
    if min(len(compiled), len(eager)) < LEAST_SAMPLES:
        return None
    floor = max(aa_floor(side) * median(side) for side in sides)
    return Timing(median(eager), median(compiled), floor, min(len(compiled), len(eager)))


def start_seconds(steps: Sequence[tuple[int, int]], steady_seconds: float) -> float:
    """What starting cost: of all steps that compiled, the time beyond a steady one."""
    spans = [(b[0] - a[0]) / 1e9 for a, b in itertools.pairwise(steps) if a[1] & COMPILED_NOW]
    return sum(max(span - steady_seconds, 0.0) for span in spans)


def break_even(start_cost_seconds: float, timing: Timing) -> int | None:
    """The first step by which the gain has paid the start; None when the gain is not above the floor."""
    gain = timing.gain_seconds
    if gain <= timing.floor_seconds or gain <= 0:
        return None
    return max(math.ceil(start_cost_seconds / gain), 1)
