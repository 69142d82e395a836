"""Fixes tried and proven: what ``ridgeline doctor`` does after it has looked, and what of it can be applied.

The rows of the answer are in the order of the findings: one for each fix that was tried, and one with the reason for a
finding that no fix is known for. See :mod:`.search` for when a fix is kept.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ridgeline.compiler.doctor.candidates import propose
from ridgeline.compiler.doctor.model import Finding, Observation, Target, Trial
from ridgeline.compiler.doctor.rewrites import unified_diff
from ridgeline.compiler.doctor.search import Search, Try
from ridgeline.compiler.doctor.settings import Setting
from ridgeline.compiler.doctor.workers import Workers, supported
from ridgeline.errors import UserError
from ridgeline.profiling.improve.proof import Gain

ROUNDS = 3
MOST_CANDIDATES = 16


class Trials(list[Trial]):
    """All trials, and what the kept ones give together: ``setting`` for doctor.toml, ``sources`` (path to new text),
    ``before`` and ``after`` as observed, ``gain`` over the whole run. ``note`` says why nothing was tried."""

    def __init__(self, trials: Sequence[Trial] = (), note: str = "") -> None:
        super().__init__(trials)
        self.setting: Setting = {}
        self.sources: dict[str, str] = {}
        self.before: Observation | None = None
        self.after: Observation | None = None
        self.error: float | None = None
        self.error_eager: float | None = None
        self.gain: Gain | None = None
        self.note = note

    @property
    def diff(self) -> str:
        """Unified diff of all kept rewrites, against the files as they are."""
        return "".join(_diff(path, text) for path, text in sorted(self.sources.items()))


def try_fixes(
    target: Target,
    observation: Observation,
    *,
    progress: Callable[[str], None] = lambda line: None,
    folder: Path | None = None,
    rounds: int = ROUNDS,
    most: int = MOST_CANDIDATES,
    timeout: float = 1800.0,
    backend: str = "inductor",
    preload: Sequence[str] = (),
) -> Trials:
    """Try the candidates of every finding and prove them.

    Args:
        target: a script or ``module:function``; fixes of other commands are not tried, and ``note`` says so.
        observation: what the doctor saw; its findings name the places.
        progress: told one line before each run.
        folder: keeps specifications and logs of the trials; a temporary one by default.
        rounds: times that each candidate is timed, interleaved with the unchanged program; at least 3 for a verdict.
        most: candidates tried, those first whose findings lose most.
        timeout: seconds that one run may take.
        backend: of what ``--compile`` names.
        preload: installed modules that take long to import, loaded once for all trials.

    Raises:
        JobError: the unchanged program fails when it is run again.
    """
    candidates, reasons = propose(target, observation.findings)
    refusal = supported(target)
    if refusal or not candidates:
        return Trials(_untried(observation.findings, reasons, refusal), refusal)
    tries = [Try(one) for one in candidates]
    for late in tries[most:]:
        late.why = f"not tried: {most} other fixes may win more"
    with (
        _folder(folder) as place,
        Workers(target, place, timeout=timeout, preload=preload, backend=backend) as workers,
    ):
        search = Search(workers, tries[:most], progress, rounds)
        search.run()
    answer = Trials(_trials(observation.findings, tries, reasons, search.before.observation))
    answer.before = search.before.observation
    if search.kept is not None:
        answer.after, answer.gain = search.kept.outcome.observation, search.gain
        answer.setting, answer.sources = search.kept.setting, search.kept.sources
        proof = search.kept.outcome.proof
        answer.error, answer.error_eager = proof.get("error"), proof.get("error_eager")
    return answer


@contextlib.contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ridgeline-doctor-") as made:
        yield Path(made)


def _trials(findings: Sequence[Finding], tries: list[Try], reasons: dict[int, str], before: Observation) -> list[Trial]:
    """A row per finding and fix, in the findings' order; a finding without a fix has one with the reason."""
    rows = []
    for at, finding in enumerate(findings):
        if at in reasons:
            rows.append(
                Trial(
                    finding, "", "", before.breaks, before.breaks, before.recompiles, before.recompiles, why=reasons[at]
                )
            )
        rows += [_trial(finding, one, before) for one in tries if any(finding is own for own in one.candidate.findings)]
    return rows


def _trial(finding: Finding, one: Try, before: Observation) -> Trial:
    candidate, after = one.candidate, one.outcome.observation if one.outcome else before
    proof = one.outcome.proof if one.outcome else {}
    why = one.why or "; ".join(filter(None, (f"proven on {proof.get('calls', 0)} calls", one.group)))
    return Trial(
        finding=finding,
        fix=candidate.fix,
        kind=candidate.kind,
        breaks_before=before.breaks,
        breaks_after=after.breaks,
        recompiles_before=before.recompiles,
        recompiles_after=after.recompiles,
        error=proof.get("error"),
        error_eager=proof.get("error_eager"),
        predicted_seconds=candidate.predicted_seconds,
        gain_seconds=one.gain.gain_seconds if one.gain else None,
        kept=one.kept,
        why=f"{why}; {candidate.catch}" if candidate.catch and one.kept else why,
        diff=_diff(str(candidate.path), candidate.text) if candidate.path else "",
        setting=dict(candidate.setting),
    )


def _untried(findings: Sequence[Finding], reasons: dict[int, str], refusal: str) -> list[Trial]:
    return [Trial(one, "", "", why=refusal or reasons.get(at, "")) for at, one in enumerate(findings)]


def _diff(path: str, text: str) -> str:
    try:
        shown = str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        shown = path.lstrip("/")
    return unified_diff(Path(path).read_bytes().decode("utf-8"), text, shown)


def apply(trials: Trials, backup: Path) -> list[Path]:
    """Edit the user's files as the kept rewrites say; the diff goes to ``backup`` first. The files that were edited.

    ``patch -R -p1 < backup`` takes it back.

    Raises:
        UserError: a file has changed since it was read, or the backup exists.
    """
    if not trials.sources:
        return []
    if backup.exists():
        raise UserError(f"{backup} exists: an earlier edit's backup is never overwritten")
    backup.write_bytes(trials.diff.encode("utf-8"))
    for path, text in trials.sources.items():
        temporary = Path(f"{path}.ridgeline.tmp")
        temporary.write_bytes(text.encode("utf-8"))
        os.chmod(temporary, Path(path).stat().st_mode)
        os.replace(temporary, path)
    return [Path(path) for path in trials.sources]
