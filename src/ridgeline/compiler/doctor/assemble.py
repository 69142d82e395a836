"""From what was heard to findings with seconds. Pure functions over :class:`Raw`.

What ``lost_seconds`` means, always over the whole run and never more than was measured:

- a break: time between the graph that ended there and the next one, compiling left out, and the tracing thrown away
  when dynamo restarted because of it;
- a recompile: the seconds of that compilation, its backward included;
- the limit, a fallback, a skipped function: the seconds of the calls that ran without any graph. How much of it a
  compiled function would save is not known here: this is the most there is to win.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ridgeline.compiler.doctor.breaks import original_name, resumed_line
from ridgeline.compiler.doctor.broken import break_findings
from ridgeline.compiler.doctor.model import Frame, Observation, ranked
from ridgeline.compiler.doctor.raw import Raw
from ridgeline.compiler.doctor.recompiled import distinct, guard_findings, limit_findings, recompile_findings
from ridgeline.compiler.doctor.silent import (
    cudagraph_findings,
    failure_findings,
    fallback_findings,
    lines,
    precision_findings,
)
from ridgeline.compiler.doctor.timing import start_seconds

CACHE_COUNTS = {
    "graph_hits": "inductor_fx_local_cache_hit_count",
    "graph_misses": "inductor_fx_local_cache_miss_count",
    "autograd_hits": "aotautograd_local_cache_hit_count",
    "autograd_misses": "aotautograd_local_cache_miss_count",
}
PHASES = ("dynamo", "aot", "inductor", "codegen", "backend")
DYNAMOS_OWN_FRAME = "torch/_dynamo/external_utils.py"
"""The file of the frame that Dynamo puts around a function it would otherwise skip, such as a container of torch.nn."""


def assemble(raw: Raw) -> Observation:
    """The observation, findings ranked; timing and environment are the caller's."""
    frames = [
        _frame(metric, raw) for metric in raw.metrics if metric.get("co_name") or metric.get("is_forward") is False
    ]
    _name_backwards(frames)
    findings = [
        *break_findings(raw),
        *recompile_findings(raw, frames),
        *limit_findings(raw),
        *failure_findings(raw),
        *fallback_findings(raw),
        *precision_findings(raw),
        *cudagraph_findings(raw),
        *guard_findings(raw, frames),
    ]
    leader = next((cell for cell in raw.clock_entries), None)
    starts = [start for start, _ in leader.steps] if leader else []
    steady = _steady_step(leader.steps) if leader else 0.0
    return Observation(
        findings=ranked(findings),
        graphs=len(raw.graphs),
        breaks=sum(one.kind == "graph_break" for one in findings),
        recompiles=len(distinct(raw.recompiles)),
        compile_seconds=raw.compile_seconds,
        frames=frames,
        phases={name: sum(one.phases.get(name, 0.0) for one in frames) for name in PHASES},
        caches=raw.caches,
        entries=_entries(raw),
        steps=leader.calls if leader else 0,
        wall_seconds=raw.wall_seconds,
        first_step_seconds=(starts[1] - starts[0]) / 1e9 if len(starts) > 1 else 0.0,
        start_seconds=start_seconds(leader.steps, steady) if leader else 0.0,
        step_seconds=steady,
    )


def _steady_step(steps: Sequence[tuple[int, int]]) -> float:
    """Median seconds from one call to the next, without those that compiled."""
    spans = sorted(b[0] - a[0] for a, b in itertools.pairwise(steps) if a[1] == 0)
    return spans[len(spans) // 2] / 1e9 if spans else 0.0


def _entries(raw: Raw) -> list[dict[str, Any]]:
    calls: dict[int, int] = defaultdict(int)
    for cell in raw.clock_entries:
        calls[cell.key] += cell.calls
    return [
        {"name": one.name, "file": one.file, "line": one.line, "backend": one.backend, "calls": calls[key]}
        for key, one in raw.entries.items()
        if calls[key]
    ]


def _frame(metric: dict[str, Any], raw: Raw) -> Frame:
    name, compile_id = metric.get("co_name") or "", metric["compile_id"]
    file, line = metric.get("co_filename") or "", int(metric.get("co_firstlineno") or 0)
    if file.endswith(DYNAMOS_OWN_FRAME) and len(raw.entries) == 1:
        (entry,) = raw.entries.values()
        name, file, line = entry.name, entry.file, entry.line
    forward = metric.get("is_forward") is not False
    cell = raw.clock_graphs.get(compile_id)
    guards = raw.guards.get(compile_id) if forward else None
    return Frame(
        compile_id=compile_id,
        function=original_name(name),
        file=file,
        line=line,
        resumed=resumed_line(name) is not None,
        forward=forward,
        seconds=_seconds(metric),
        phases=_phases(metric),
        operators=int(metric.get("graph_op_count") or 0),
        guards=int(metric.get("guard_count") or 0),
        guard_microseconds=float(metric.get("guard_latency_us") or 0),
        calls=cell.calls if cell and forward else 0,
        run_seconds=cell.ns / 1e9 if cell and forward else 0.0,
        failure=lines(metric.get("fail_reason"), 1),
        guard_sources=guards.sources if guards else [],
        cache={name: int(metric[key]) for name, key in CACHE_COUNTS.items() if metric.get(key)},
    )


def _seconds(metric: dict[str, Any]) -> float:
    if metric.get("is_forward") is False:
        return float(metric.get("backward_cumulative_compile_time_us") or metric.get("duration_us") or 0) / 1e6
    return float(metric.get("entire_frame_compile_time_s") or 0.0)


def _phases(metric: dict[str, Any]) -> dict[str, float]:
    """Nested clocks made disjoint: the whole frame holds the backend, which holds Inductor, which holds codegen."""
    whole, inductor = _seconds(metric), float(metric.get("inductor_compile_time_s") or 0.0)
    codegen = min(float(metric.get("code_gen_time_s") or 0.0), inductor)
    forward = metric.get("is_forward") is not False
    backend = float(metric.get("backend_compile_time_s") or 0.0) if forward else whole
    rest = max(backend - inductor, 0.0)
    return {
        "dynamo": max(whole - backend, 0.0),
        "aot" if inductor else "backend": rest,
        "inductor": inductor - codegen,
        "codegen": codegen,
    }


def _name_backwards(frames: list[Frame]) -> None:
    """A backward has its forward's compile id and no name of its own."""
    forward = {one.compile_id: one for one in frames if one.forward and one.function}
    for one in frames:
        if not one.forward and one.compile_id in forward:
            match = forward[one.compile_id]
            one.function, one.file, one.line = match.function, match.file, match.line
