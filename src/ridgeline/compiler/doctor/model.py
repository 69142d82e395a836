"""What the doctor knows: findings, the observation they come from, and trials of fixes. Plain data, no torch.

Everything here survives ``to_dict`` -> JSON -> ``from_dict``: observations cross a process border.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS: dict[str, str] = {
    "graph_break": "the graph ends here and a second one begins: Python runs in between",
    "recompile": "a guard failed: the same code was compiled again",
    "recompile_limit": "compiled too often: from here on the function runs in eager, silently",
    "backend_fallback": "the backend failed or handed the graph back: it runs in eager or under another backend",
    "precision_lowered": "the backend computes in a lower precision than the program asked for",
    "cudagraphs_skipped": "CUDA graphs were asked for and not used",
    "guard_cost": "checking the guards takes a good part of every call",
    "compile_failed": "the compiler raised and the program saw the error",
    "cache_miss": "a second start compiled again what the first one had compiled",
    "not_paid_back": "compiling took longer than all steps of this run have gained",
    "slower_than_eager": "the compiled function is slower than the same function in eager",
    "rank_divergence": "ranks compiled different things: the others wait for the one that compiles",
}
"""Kinds of findings and what each means, one line."""


class _Record:
    """A dataclass that turns to plain data and back, ignoring keys it does not know."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        """The record that ``to_dict`` was taken of."""
        names = {one.name for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in data.items() if key in names})


@dataclass
class Finding(_Record):
    """One trouble at one place.

    ``count`` is how often the compiler met it, ``calls`` how often the running program did. ``lost_seconds`` is over
    the whole run. Keys of ``detail`` by kind:

    - graph_break: ``gb`` (code such as ``GB0124``, or ""), ``hints`` (list), ``stack`` (list of ``file:line in f``),
      ``skipped`` (the whole function runs in eager), ``run_seconds`` and ``compile_seconds`` (what is lost where)
    - recompile: ``guard``, ``source`` (``L['x'].size()[0]``), ``old``, ``new``, ``compile_seconds``, ``reasons`` (all)
    - recompile_limit: ``limit``, ``guard``; backend_fallback: ``backend``, ``error``
    - precision_lowered: ``backend``, ``error``, ``error_eager`` (both relative, against float64)
    - guard_cost: ``guards``, ``microseconds``, ``sources`` (list); rank_divergence: ``rank``, ``guard``
    """

    kind: str
    file: str = ""
    line: int = 0
    code: str = ""
    reason: str = ""
    function: str = ""
    count: int = 1
    calls: int = 0
    lost_seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """``file:line``, or "" when it has no place."""
        return f"{self.file}:{self.line}" if self.file else ""

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Same trouble, same place: what two observations of one program are matched by."""
        return (self.kind, self.file, self.line, str(self.detail.get("source") or self.detail.get("gb") or ""))


@dataclass
class Frame(_Record):
    """One compilation of one function; resumed parts carry the name of the function they belong to.

    Seconds of ``phases``: ``dynamo`` (tracing and guards), ``aot`` (autograd, functionalisation), ``inductor``
    (lowering and scheduling), ``codegen`` (writing and building kernels), ``backend`` (another backend's own).
    """

    compile_id: str
    function: str
    file: str
    line: int
    resumed: bool = False
    forward: bool = True
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    operators: int = 0
    guards: int = 0
    guard_microseconds: float = 0.0
    calls: int = 0
    run_seconds: float = 0.0
    failure: str = ""
    guard_sources: list[str] = field(default_factory=list)
    cache: dict[str, int] = field(default_factory=dict)


@dataclass
class Timing(_Record):
    """Eager against compiled, in one process, interleaved. Medians per step, seconds.

    ``floor_seconds`` is what two halves of the same side differ by (A against A); a gain below it is no gain.
    ``break_even_step`` is the first step by which compiling has paid for itself after a cold start, None if never.
    """

    eager_seconds: float
    compiled_seconds: float
    floor_seconds: float
    samples: int
    cold_seconds: float = 0.0
    warm_seconds: float | None = None
    break_even_step: int | None = None
    break_even_warm_step: int | None = None

    @property
    def gain_seconds(self) -> float:
        """Seconds a step is shorter than in eager."""
        return self.eager_seconds - self.compiled_seconds


@dataclass
class Observation(_Record):
    """All that one run of a program showed. ``steps`` are calls of the compiled function that leads a step.

    ``notes`` are lines for people: what could not be measured. ``phases`` sum the frames'. ``caches`` counts hits
    and misses by cache. ``start_seconds`` is what steps that compiled took beyond a steady one. ``entries`` are the compiled functions: ``{"name", "file", "line", "backend", "calls"}``.
    """

    findings: list[Finding] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    recompiles: int = 0
    compile_seconds: float = 0.0
    frames: list[Frame] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    caches: dict[str, int] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    wall_seconds: float = 0.0
    first_step_seconds: float = 0.0
    start_seconds: float = 0.0
    step_seconds: float = 0.0
    timing: Timing | None = None
    warm_caches: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rank: int = 0
    world: int = 1
    torch: str = ""
    device: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Observation:
        """The observation that ``to_dict`` was taken of."""
        made: Observation = super().from_dict(data)
        made.findings = [Finding.from_dict(one) for one in data.get("findings", ())]
        made.frames = [Frame.from_dict(one) for one in data.get("frames", ())]
        made.timing = Timing.from_dict(data["timing"]) if data.get("timing") else None
        return made

    @property
    def fallbacks(self) -> int:
        """Silent events: something runs in eager, in another backend or in less precision than was asked for."""
        return sum(one.kind in SILENT or bool(one.detail.get("skipped")) for one in self.findings)

    def summary(self) -> dict[str, Any]:
        """The ``before`` and ``after`` of ``--json``: headline figures alone."""
        timing = self.timing
        return {
            "graphs": self.graphs,
            "breaks": self.breaks,
            "recompiles": self.recompiles,
            "fallbacks": self.fallbacks,
            "compile_seconds": self.compile_seconds,
            "steps": self.steps,
            "wall_seconds": self.wall_seconds,
            "step_seconds": self.step_seconds,
            "first_step_seconds": self.first_step_seconds,
            "start_seconds": self.start_seconds,
            "lost_seconds": sum(one.lost_seconds for one in self.findings),
            "phases": self.phases,
            "caches": self.caches,
            "timing": timing.to_dict() if timing else None,
        }


SILENT = frozenset(("recompile_limit", "backend_fallback", "precision_lowered", "cudagraphs_skipped"))


@dataclass(frozen=True)
class Target(_Record):
    """A program to run: ``command`` is complete (``[python, script, arguments...]``) and starts in ``folder``.

    ``script`` is the user's file when there is one, ``callable`` is ``module:function``. ``compile_paths`` are dotted
    paths of what we compile (``model``, ``model.layers.*``); empty when the program compiles for itself.
    """

    command: tuple[str, ...]
    folder: Path
    name: str = "program"
    script: Path | None = None
    callable: str = ""
    compile_paths: tuple[str, ...] = ()
    distributed: bool = False


@dataclass
class Trial(_Record):
    """A fix that was tried on a finding. ``kind`` is "setting" or "source".

    ``error`` and ``error_eager`` are distances from float64 (outputs and gradients, the larger), ``predicted_seconds``
    and ``gain_seconds`` over the whole run. ``setting`` holds dynamo options by name, ``diff`` a unified diff.
    """

    finding: Finding
    fix: str
    kind: str
    breaks_before: int = 0
    breaks_after: int = 0
    recompiles_before: int = 0
    recompiles_after: int = 0
    error: float | None = None
    error_eager: float | None = None
    predicted_seconds: float | None = None
    gain_seconds: float | None = None
    kept: bool = False
    why: str = ""
    diff: str = ""
    setting: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """The trial that ``to_dict`` was taken of."""
        made: Trial = super().from_dict(data)
        made.finding = Finding.from_dict(data["finding"])
        return made


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """By seconds lost, then by how often it was met; equal ones by place, so that two runs print the same order."""
    return sorted(findings, key=lambda one: (-one.lost_seconds, -one.calls, -one.count, one.kind, one.file, one.line))
