"""What the observer heard, before anything is concluded from it. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ridgeline.compiler.doctor.breaks import Break
from ridgeline.compiler.doctor.clock import Cell, EntryCell
from ridgeline.compiler.doctor.guards import Failure, Guards


@dataclass
class SeenBreak:
    """A break as the compiler met it. ``after`` is the graph that ran last before it in the same call, "" if none, and
    ``entry`` the compiled function the program was in, -1 if none."""

    found: Break
    compile_id: str
    after: str
    entry: int


@dataclass
class SeenRecompile:
    """Failed guards of one recompilation, newest cached compilation first."""

    compile_id: str
    function: str
    file: str
    line: int
    failures: list[Failure]


@dataclass
class SeenGraph:
    """A graph that a backend compiled."""

    compile_id: str
    backend: str
    cudagraph_skips: int = 0
    cudagraph_reason: str = ""
    error: float | None = None
    error_eager: float | None = None


@dataclass
class EntryInfo:
    """A compiled function, by the number its clock has."""

    name: str
    file: str
    line: int
    backend: str


@dataclass
class Raw:
    """All of it. ``fallbacks`` are (compile id, backend, error, entry); ``metrics`` dynamo's records as they come."""

    breaks: list[SeenBreak] = field(default_factory=list)
    recompiles: list[SeenRecompile] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    guards: dict[str, Guards] = field(default_factory=dict)
    graphs: list[SeenGraph] = field(default_factory=list)
    fallbacks: list[tuple[str, str, str, int]] = field(default_factory=list)
    entries: dict[int, EntryInfo] = field(default_factory=dict)
    clock_graphs: dict[str, Cell] = field(default_factory=dict)
    clock_entries: list[EntryCell] = field(default_factory=list)
    caches: dict[str, int] = field(default_factory=dict)
    compile_seconds: float = 0.0
    wall_seconds: float = 0.0
    suppressed: bool = False
