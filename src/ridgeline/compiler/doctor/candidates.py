"""What to try on each finding: settings, rewrites of the user's own files, or the reason why there is nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ridgeline.compiler.doctor.model import Finding, Target
from ridgeline.compiler.doctor.rewrites import Refused, rewrite
from ridgeline.compiler.doctor.settings import BETWEEN, Knob, Setting, knobs_for, merged
from ridgeline.compiler.doctor.workers import python_files

REWRITABLE = ("graph_break", "skipped_frame")
NO_FIX = {
    "length": "how many elements it holds decides the graph: pad it to one length, or stack it to one tensor",
    "stride": "the layout decides the graph: make the input contiguous where it is made",
    "dtype": "the dtype decides the graph: cast the input where it is made",
    "global state": "grad mode, inference mode or autocast differ between calls: one graph each is right",
    "identity": "the object is made anew for each call: make it once, outside",
    "type": "the type differs between calls: pass one type",
    "backend": "torch.compile is called again and again: compile once, outside of the loop",
}


@dataclass
class Candidate:
    """One fix: a setting, or changed lines of one file (``path``, ``lines``). ``findings`` are what it may cure."""

    fix: str
    findings: list[Finding]
    setting: Setting = field(default_factory=dict)
    path: Path | None = None
    text: str = ""
    catch: str = ""

    @property
    def kind(self) -> str:
        """``setting`` or ``source``."""
        return "source" if self.path else "setting"

    @property
    def sources(self) -> dict[str, str]:
        """Path to changed text."""
        return {str(self.path): self.text} if self.path else {}

    @property
    def predicted_seconds(self) -> float:
        """What its findings lose, which is the most it can win."""
        return sum(one.lost_seconds for one in self.findings)


def propose(target: Target, findings: Sequence[Finding]) -> tuple[list[Candidate], dict[int, str]]:
    """Candidates, those that may win most first, and for each finding (by index) without any the reason why."""
    candidates: dict[str, Candidate] = {}
    reasons: dict[int, str] = {}
    for at, finding in enumerate(findings):
        own = [_setting(knob, finding) for knob in knobs_for(finding)]
        refusal = ""
        if finding.kind in REWRITABLE:
            try:
                own.append(_source(target, finding))
            except Refused as reason:
                refusal = str(reason)
        for one in own:
            known = candidates.setdefault(f"{one.setting}{one.path}{one.text}", one)
            if known is not one:
                known.findings.append(finding)
        if not own:
            reasons[at] = _reason(finding, refusal)
    return sorted(candidates.values(), key=lambda one: -one.predicted_seconds), reasons


def _setting(knob: Knob, finding: Finding) -> Candidate:
    return Candidate(knob.text, [finding], setting=dict(knob.setting), catch=knob.catch)


def _source(target: Target, finding: Finding) -> Candidate:
    text, path = read_source(target, finding)
    made = rewrite(text, finding.line)
    return Candidate(f"{made.name}, line {finding.line}", [finding], path=path, text=made.source, catch=made.note)


def read_source(target: Target, finding: Finding) -> tuple[str, Path]:
    """The text of the user's file that a finding lies in, newlines as they are.

    Raises:
        Refused: it is no file of the user's own, or not in UTF-8.
    """
    paths = python_files(target, [finding.file]) if finding.file else []
    if not paths:
        raise Refused(f"{Path(finding.file).name or 'the place'} is not the user's own file")
    try:
        return paths[0].read_bytes().decode("utf-8"), paths[0]
    except UnicodeDecodeError:
        raise Refused(f"{paths[0].name} is not in UTF-8") from None


def _reason(finding: Finding, refusal: str) -> str:
    if finding.kind in ("recompile", "recompile_limit"):
        what = str(finding.detail.get("what", ""))
        if BETWEEN in str(finding.detail.get("source", "")):
            return "the value comes out of a graph break: it goes with the break"
        return NO_FIX.get(what, "no setting makes this value dynamic")
    if refusal:
        return f"no setting, and no rewrite: {refusal}"
    return "no fix is known that can be tried from outside"


def combined(candidates: Iterable[Candidate]) -> tuple[Setting, dict[str, str], list[Candidate]]:
    """All settings and all rewrites together: settings, changed texts by path, and what did not go together.

    Rewrites of one file are made anew from the last line up, so that earlier lines stay where they were.
    """
    chosen = list(candidates)
    setting = merged(one.setting for one in chosen)
    texts: dict[str, str] = {}
    left_out: list[Candidate] = []
    for one in sorted((one for one in chosen if one.path), key=lambda one: (str(one.path), -one.findings[0].line)):
        path, finding = str(one.path), one.findings[0]
        if path not in texts:
            texts[path] = one.text
            continue
        try:
            line = _line_now(texts[path], finding)
            texts[path] = rewrite(texts[path], line).source
        except Refused:
            left_out.append(one)
    return setting, texts, left_out


def _line_now(text: str, finding: Finding) -> int:
    """Where the finding's line is after other edits: the nearest one that reads the same.

    Raises:
        Refused: it is gone.
    """
    same = [at for at, line in enumerate(text.splitlines(), 1) if _squeezed(line) == _squeezed(finding.code)]
    if not same:
        raise Refused("the line is gone after another rewrite")
    return min(same, key=lambda at: abs(at - finding.line))


def _squeezed(line: str) -> str:
    return re.sub(r"\s+", "", line)
