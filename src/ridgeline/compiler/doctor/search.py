"""Which of the candidates are kept: runs of one program, unchanged and with fixes, until that is known.

::

    unchanged program        counts, eager and float64 results of captured calls
    each candidate           breaks, recompiles or silent events fall?  errors within twice eager's?  else out
    alone, interleaved       before, fix 1, fix 2, ... | reversed | ...        faster than before, beyond the floor?
    together, interleaved    before, all, all without u for each u that gains nothing alone: slower without it?
    as a group, interleaved  before, those kept so far, those and the small ones: faster with the group?
    the kept ones            proven and timed as one program, which is what the user gets

A break that is gone may gain nothing while another one remains, so that a fix is judged in company too. Times are whole
runs, from the first call of a compiled function to the program's end, from a warm cache; the floor is what runs of the
same program differ by in this session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.bench.ab import Session, interleave
from ridgeline.compiler.doctor.candidates import Candidate, combined
from ridgeline.compiler.doctor.model import Observation
from ridgeline.compiler.doctor.settings import Setting
from ridgeline.compiler.doctor.workers import Outcome, Workers
from ridgeline.errors import JobError
from ridgeline.profiling.improve.proof import Gain, judge

BEFORE, ALL = "before", "all"
FAILED = "failed when it was timed"
COUNTED = ("breaks", "recompiles", "silent events")


@dataclass
class Try:
    """A candidate on its way: its proof run, its gain, and why it is not kept."""

    candidate: Candidate
    outcome: Outcome | None = None
    gain: Gain | None = None
    why: str = ""
    kept: bool = False
    group: str = ""


@dataclass(frozen=True)
class Program:
    """The user's program with some fixes, as observed and proven."""

    setting: Setting
    sources: dict[str, str]
    outcome: Outcome


class Search:
    """One search, over one set of workers. After :meth:`run`, ``tries`` are judged, and ``kept`` is the program with all
    kept fixes (None without any) with its ``gain`` over the unchanged one."""

    def __init__(self, workers: Workers, tries: list[Try], progress: Callable[[str], None], rounds: int) -> None:
        self.workers, self.tries, self.progress, self.rounds = workers, tries, progress, rounds
        self.before = Outcome()
        self.kept: Program | None = None
        self.gain: Gain | None = None

    def run(self) -> None:
        """All of it.

        Raises:
            JobError: the unchanged program fails.
        """
        self.progress("unchanged program: counts, eager and float64 results")
        self.before = self.workers.run(prove=True)
        if self.before.failure:
            raise JobError(f"the unchanged program, run again for its fixes: {self.before.failure}")
        for at, one in enumerate(self.tries, 1):
            self.progress(f"fix {at} of {len(self.tries)}: {one.candidate.fix}")
            one.outcome = self.workers.run(one.candidate.setting, one.candidate.sources, prove=True)
            one.why = refusal(self.before, one.outcome)
        chosen = _one_each([one for one in self.tries if not one.why])
        if chosen:
            self._alone(chosen)
            self._together([one for one in chosen if not one.why.startswith(FAILED)])

    def _alone(self, chosen: Sequence[Try]) -> None:
        """Each fix by itself, against the unchanged program."""
        programs = {str(at): (one.candidate.setting, one.candidate.sources) for at, one in enumerate(chosen)}
        session = self._time(programs)
        for at, one in enumerate(chosen):
            if str(at) in session.failures:
                one.why = f"{FAILED}: {session.failures[str(at)]}"
                continue
            one.gain = gain = _gain(session, BEFORE, str(at))
            one.kept = gain.proven
            if not gain.proven:
                one.why = f"{gain.gain_seconds:+.2g} s is no gain beyond the floor of {gain.floor_seconds:.2g} s"

    def _together(self, chosen: list[Try]) -> None:
        """The chosen ones as one program, and each that gained nothing alone in their company."""
        program = self._prove(chosen) if len(chosen) > 1 else None
        if program is not None:
            self._in_company(chosen, program)
        else:
            self._as_group([one for one in chosen if one.kept], [])

    def _in_company(self, chosen: list[Try], program: Program) -> None:
        """Who gained nothing alone may be missed by the others: all of them, with and without it."""
        idle = [one for one in chosen if not one.kept]
        programs = {ALL: (program.setting, program.sources)}
        for at, one in enumerate(idle):
            setting, sources, _ = combined(other.candidate for other in chosen if other is not one)
            programs[f"without {at}"] = (setting, sources)
        session = self._time(programs)
        harmful = []
        for at, one in enumerate(idle):
            name = f"without {at}"
            if name in session.failures or ALL in session.failures:
                continue
            gain = _gain(session, name, ALL)
            if gain.proven:
                one.gain, one.kept, one.why = gain, True, ""
            elif _gain(session, ALL, name).proven:
                harmful.append(one)
        sure = [one for one in chosen if one.kept]
        if sure == chosen and ALL not in session.failures and _gain(session, BEFORE, ALL).proven:
            self.kept, self.gain = program, _gain(session, BEFORE, ALL)
        else:
            self._as_group(sure, [one for one in chosen if not one.kept and one not in harmful])

    def _as_group(self, sure: list[Try], small: list[Try]) -> None:
        """Fixes too small to be seen one by one count as one fix, if they gain together on top of the sure ones."""
        narrow, wide = self._prove(sure), self._prove([*sure, *small]) if small else None
        programs = {
            name: (one.setting, one.sources) for name, one in (("sure", narrow), (ALL, wide)) if one is not None
        }
        session = self._time(programs) if programs else Session()
        if wide is not None and ALL not in session.failures and (not sure or "sure" in session.samples):
            gain = _gain(session, "sure" if sure else BEFORE, ALL)
            if gain.proven:
                for one in small:
                    one.gain, one.kept, one.why = gain, True, ""
                    one.group = f"with {len(small) - 1} others too small to be seen alone" if len(small) > 1 else ""
                self.kept, self.gain = wide, _gain(session, BEFORE, ALL)
                return
        if narrow is not None and "sure" in session.samples and _gain(session, BEFORE, "sure").proven:
            self.kept, self.gain = narrow, _gain(session, BEFORE, "sure")
        elif sure:
            self._best_of(sure, "together they do not hold, or gain nothing beyond the floor")

    def _best_of(self, kept: list[Try], why: str) -> None:
        """Only the one that gains most alone stays."""
        best = max(kept, key=lambda one: one.gain.gain_seconds if one.gain else 0.0)
        for one in kept:
            if one is not best:
                one.kept, one.why = False, f"helps alone, but not with '{best.candidate.fix}': {why}"
        assert best.outcome is not None
        self.kept = Program(best.candidate.setting, best.candidate.sources, best.outcome)
        self.gain = best.gain

    def _prove(self, chosen: Sequence[Try]) -> Program | None:
        """All of them as one program; None when they cannot be, it computes something else, or there are none."""
        if len(chosen) == 1 and chosen[0].outcome is not None:
            return Program(chosen[0].candidate.setting, chosen[0].candidate.sources, chosen[0].outcome)
        if not chosen:
            return None
        setting, sources, left_out = combined(one.candidate for one in chosen)
        if left_out:
            return None
        self.progress(f"{len(chosen)} fixes together")
        outcome = self.workers.run(setting, sources, prove=True)
        return None if refusal(self.before, outcome) else Program(setting, sources, outcome)

    def _time(self, programs: Mapping[str, tuple[Setting, dict[str, str]]]) -> Session:
        """Interleaved runs of the unchanged program and of these.

        Raises:
            JobError: the unchanged one fails.
        """
        contenders = {name: self._timed(*fixes) for name, fixes in {BEFORE: ({}, {}), **programs}.items()}
        runs, done = len(contenders) * self.rounds, 0

        def tell(round_: int, name: str, figures: Any) -> None:
            nonlocal done
            done += 1
            self.progress(f"timed run {done} of {runs}")

        session = interleave(contenders, self.rounds, tell)
        if BEFORE in session.failures:
            raise JobError(f"the unchanged program, run again to be timed: {session.failures[BEFORE]}")
        return session

    def _timed(self, setting: Setting, sources: dict[str, str]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            outcome = self.workers.run(setting, sources, timed=True)
            if outcome.failure or outcome.seconds <= 0:
                raise JobError(outcome.failure or "no compiled function was called")
            return {"seconds": outcome.seconds}

        return run


def _gain(session: Session, slow: str, fast: str) -> Gain:
    return judge(session.samples[slow]["seconds"], session.samples[fast]["seconds"])


def refusal(before: Outcome, after: Outcome) -> str:
    """Why a fix is not kept whatever its time, "" when it may be."""
    if after.failure:
        return f"the program fails with it: {after.failure}"
    old, new = counts(before.observation), counts(after.observation)
    if not any(b < a for a, b in zip(old, new, strict=True)):
        left = ", ".join(f"{number} {name}" for number, name in zip(new, COUNTED, strict=True) if number)
        return f"nothing falls: still {left}"
    if before.proof.get("why"):
        return f"cannot be proven: {before.proof['why']}"
    if after.proof.get("why"):
        return f"not proven: {after.proof['why']}"
    return ""


def counts(observation: Observation) -> tuple[int, int, int]:
    """Breaks, recompiles, silent events."""
    return observation.breaks, observation.recompiles, observation.fallbacks


def _one_each(passed: Sequence[Try]) -> list[Try]:
    """One fix per finding: the one that leaves least; of equal ones a setting, since it edits nothing. The others are
    told so."""
    chosen: list[Try] = []
    cured: set[tuple[Any, ...]] = set()
    for one in sorted(passed, key=_left):
        keys = {finding.key for finding in one.candidate.findings}
        if keys <= cured:
            one.why = "works too, and was not timed: another fix of the same finding leaves as little or less"
        else:
            chosen.append(one)
            cured |= keys
    return chosen


def _left(one: Try) -> tuple[int, bool]:
    assert one.outcome is not None
    return sum(counts(one.outcome.observation)), one.candidate.kind == "source"
