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
from collections.abc import Iterable, Sequence
from typing import Any

from ridgeline.compiler.doctor.breaks import code_line, original_name, resumed_line
from ridgeline.compiler.doctor.guards import cause
from ridgeline.compiler.doctor.model import Finding, Frame, Observation, ranked
from ridgeline.compiler.doctor.precision import lowered
from ridgeline.compiler.doctor.raw import EntryInfo, Raw, SeenBreak, SeenRecompile

LIMIT = "recompile limit exceeded"
SOFT = ("Unsupported", "UserError", "SkipFrame", "ObservedException")
GUARDS_SHARE, GUARDS_SHARE_OF_RUN, LEAST_CALLS = 0.1, 0.005, 8
"""Guards are a finding from this share of a compiled function's own time, and this share of the whole run."""
PHASES = ("dynamo", "aot", "inductor", "codegen", "backend")


def assemble(raw: Raw) -> Observation:
    """The observation, findings ranked; timing and environment are the caller's."""
    frames = [
        _frame(metric, raw) for metric in raw.metrics if metric.get("co_name") or metric.get("is_forward") is False
    ]
    _name_backwards(frames)
    findings = [
        *_breaks(raw),
        *_recompiles(raw, frames),
        *_limits(raw),
        *_failures(raw),
        *_fallbacks(raw),
        *_precision(raw),
        *_cudagraphs(raw),
        *_guard_costs(raw, frames),
    ]
    leader = next((cell for cell in raw.clock_entries), None)
    starts = [start for start, _ in leader.steps] if leader else []
    return Observation(
        findings=ranked(findings),
        graphs=len(raw.graphs),
        breaks=sum(one.kind == "graph_break" for one in findings),
        recompiles=len(_distinct(raw.recompiles)),
        compile_seconds=raw.compile_seconds,
        frames=frames,
        phases={name: sum(one.phases.get(name, 0.0) for one in frames) for name in PHASES},
        caches=raw.caches,
        entries=_entries(raw),
        steps=leader.calls if leader else 0,
        wall_seconds=raw.wall_seconds,
        first_step_seconds=(starts[1] - starts[0]) / 1e9 if len(starts) > 1 else 0.0,
        step_seconds=_steady_step(leader.steps) if leader else 0.0,
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


# Frames


def _frame(metric: dict[str, Any], raw: Raw) -> Frame:
    name, compile_id = metric.get("co_name") or "", metric["compile_id"]
    forward = metric.get("is_forward") is not False
    cell = raw.clock_graphs.get(compile_id)
    guards = raw.guards.get(compile_id) if forward else None
    return Frame(
        compile_id=compile_id,
        function=original_name(name),
        file=metric.get("co_filename") or "",
        line=int(metric.get("co_firstlineno") or 0),
        resumed=resumed_line(name) is not None,
        forward=forward,
        seconds=_seconds(metric),
        phases=_phases(metric),
        operators=int(metric.get("graph_op_count") or 0),
        guards=int(metric.get("guard_count") or 0),
        guard_microseconds=float(metric.get("guard_latency_us") or 0),
        calls=cell.calls if cell and forward else 0,
        run_seconds=cell.ns / 1e9 if cell and forward else 0.0,
        failure=_first_line(metric.get("fail_reason")),
        guard_sources=guards.sources if guards else [],
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


# Breaks


def _breaks(raw: Raw) -> list[Finding]:
    """One finding per place and code: resumed parts and recompilations of a function meet the same break again."""
    places: dict[tuple[str, int, str], list[SeenBreak]] = defaultdict(list)
    for seen in raw.breaks:
        places[seen.found.file, seen.found.line, seen.found.code].append(seen)
    ended = _gap_owners(raw)
    restarts = _restart_seconds(raw)
    return [_break(raw, group, ended, restarts) for group in places.values()]


def _gap_key(raw: Raw, seen: SeenBreak) -> tuple[int, str]:
    """Whose following gap the break is in: its own frame's graph, else the last one that ran before it."""
    if seen.compile_id in raw.clock_graphs:
        return (-1, seen.compile_id)
    return (-1, seen.after) if seen.after else (seen.entry, "")


def _gap_owners(raw: Raw) -> dict[tuple[int, str], int]:
    """How many breaks share a gap."""
    owners: dict[tuple[int, str], set[tuple[str, int]]] = defaultdict(set)
    for seen in raw.breaks:
        owners[_gap_key(raw, seen)].add((seen.found.file, seen.found.line))
    return {key: len(places) for key, places in owners.items()}


def _restart_seconds(raw: Raw) -> dict[str, float]:
    """Tracing thrown away, by compile id, per break of that compilation."""
    breaks: dict[str, int] = defaultdict(int)
    for seen in raw.breaks:
        breaks[seen.compile_id] += 1
    return {
        metric["compile_id"]: float(metric.get("dynamo_time_before_restart_s") or 0.0) / breaks[metric["compile_id"]]
        for metric in raw.metrics
        if breaks.get(metric["compile_id"])
    }


def _break(raw: Raw, group: list[SeenBreak], owners: dict[tuple[int, str], int], restarts: dict[str, float]) -> Finding:
    first = group[0].found
    gap, calls = 0.0, defaultdict[str, int](int)
    for key, compile_id in {_gap_key(raw, seen): seen.compile_id for seen in group}.items():
        seen_calls, seconds = _gap(raw, *key)
        gap += seconds / owners[key]
        calls[compile_id.split("/")[0]] += seen_calls  # callers of the function that broke met the same break
    skipped = any(seen.found.skipped for seen in group)
    reason = first.title if not first.explanation else f"{first.title}: {first.explanation}"
    if skipped:
        reason += f" ({first.because or 'cannot resume'}: the whole function runs in eager)"
    tracing = sum(restarts.get(seen.compile_id, 0.0) for seen in group)
    return Finding(
        "graph_break",
        first.file,
        first.line,
        code_line(first.file, first.line),
        reason,
        first.function,
        count=len(group),
        calls=max(calls.values()),
        lost_seconds=gap + tracing,
        detail={
            "gb": first.code,
            "hints": first.hints,
            "stack": first.stack,
            "skipped": skipped,
            "because": first.because,
            "run_seconds": gap,
            "compile_seconds": tracing,
        },
    )


def _gap(raw: Raw, entry: int, graph: str) -> tuple[int, float]:
    """Calls and seconds of a gap: after a graph, or of an entry before its first graph. Calls count the ones that
    compiled too, whose time is left out."""
    if graph:
        cell = raw.clock_graphs.get(graph)
        return (cell.calls, cell.after_ns / 1e9) if cell else (0, 0.0)
    cells = [cell for cell in raw.clock_entries if cell.key == entry]
    return sum(cell.calls - cell.eager_calls for cell in cells), sum(cell.before.after_ns for cell in cells) / 1e9


# Recompilations, and what follows from too many


def _distinct(seen: Iterable[SeenRecompile]) -> list[SeenRecompile]:
    """One per compile id: a compilation that dynamo restarts tells its reasons once, but a limit hit tells them too."""
    return list({(one.compile_id, one.file, one.line): one for one in seen}.values())


def _recompiles(raw: Raw, frames: list[Frame]) -> list[Finding]:
    """One finding per function and source of the value that failed its guard.

    The resumed parts of a broken function recompile after it for the same change, which they may know as a temporary:
    they belong to the finding of the function.
    """
    limits = {metric["compile_id"] for metric in raw.metrics if _is_limit(metric)}
    groups: dict[tuple[str, ...], list[SeenRecompile]] = defaultdict(list)
    changes: dict[tuple[str, ...], tuple[str, ...]] = {}
    for seen in _distinct(raw.recompiles):
        if not seen.failures or seen.compile_id in limits:
            continue
        blamed = cause(seen.failures)
        key = (seen.file, str(seen.line), blamed.source)
        change = (seen.file, original_name(seen.function), blamed.what, blamed.old, blamed.new)
        if resumed_line(seen.function) is not None:
            key = changes.get(change, key)
        changes[change] = key
        groups[key].append(seen)
    return [_recompile(raw, frames, group) for group in groups.values()]


def _recompile(raw: Raw, frames: list[Frame], group: list[SeenRecompile]) -> Finding:
    ids = {one.compile_id for one in group}
    blamed = [cause(one.failures) for one in group]
    first = blamed[0]
    file, line, code = _guard_place(raw, group[0])
    lost = sum(one.seconds for one in frames if one.compile_id in ids)
    function = original_name(group[0].function)
    return Finding(
        "recompile",
        file,
        line,
        code,
        _change(first.what, first.source, first.old, blamed[-1].new, len(group)),
        function,
        count=len(group),
        calls=sum(cell.calls for key in ids if (cell := raw.clock_graphs.get(key))),
        lost_seconds=lost,
        detail={
            "guard": first.guard,
            "source": first.source,
            "what": first.what,
            "old": first.old,
            "new": first.new,
            "values": [[one.old, one.new] for one in blamed[:16]],
            "compile_seconds": lost,
            "compile_ids": sorted(ids),
            "reasons": [failure.guard for one in group for failure in one.failures][:32],
        },
    )


def _change(what: str, source: str, old: str, new: str, times: int) -> str:
    if what == "global state":
        return f"{source} changed: {old} to {new}" if old != "?" else f"{source} changed"
    if what == "backend":
        return "the function is compiled again with another backend object each time"
    again = f", {times} times" if times > 1 else ""
    return (
        f"{what} of {source} changed: {old} to {new}{again}" if what != "value" else f"{source}: {old} to {new}{again}"
    )


def _guard_place(raw: Raw, seen: SeenRecompile) -> tuple[str, int, str]:
    """Where the value is first used: from the failure's own stack, else from the guards of the cached compilation."""
    blamed = cause(seen.failures)
    if blamed.file:
        return blamed.file, blamed.line, code_line(blamed.file, blamed.line)
    guards = raw.guards.get(blamed.compile_id)
    base = blamed.source.split(".size()")[0].split(".stride()")[0]
    if guards and base in guards.places:
        code, line = guards.places[base]
        if code == code_line(seen.file, line):
            return seen.file, line, code
    return seen.file, seen.line, code_line(seen.file, seen.line)


def _is_limit(metric: dict[str, Any]) -> bool:
    return LIMIT in str(metric.get("fail_reason") or "") or metric.get("fail_type") == "FailOnRecompileLimitHit"


def _limits(raw: Raw) -> list[Finding]:
    """The record of a limit hit names no function: its recompilation reasons, told just before, do."""
    reasons = {seen.compile_id: seen for seen in raw.recompiles}
    found = {}
    for metric in raw.metrics:
        seen = reasons.get(metric["compile_id"])
        if not _is_limit(metric) or seen is None or not seen.failures:
            continue
        blamed = cause(seen.failures)
        file, line, code = _guard_place(raw, seen)
        calls, seconds = _eager_part(raw, seen)
        found[seen.file, seen.line] = Finding(
            "recompile_limit",
            file,
            line,
            code,
            f"compiled {len(seen.failures)} times, which is the limit: other values of {blamed.source} now run in eager",
            original_name(seen.function),
            calls=calls,
            lost_seconds=seconds,
            detail={"limit": len(seen.failures), "guard": blamed.guard, "source": blamed.source, "new": blamed.new},
        )
    return list(found.values())


def _eager_part(raw: Raw, seen: SeenRecompile) -> tuple[int, float]:
    """Calls without a graph of the compiled function this one belongs to: by its place, else of all of them."""
    keys = {key for key, one in raw.entries.items() if (one.file, one.line) == (seen.file, seen.line)}
    cells = [cell for cell in raw.clock_entries if not keys or cell.key in keys]
    return sum(cell.graphless_calls for cell in cells), sum(cell.graphless_ns for cell in cells) / 1e9


# Failures and fallbacks


def _failures(raw: Raw) -> list[Finding]:
    """Compilations that raised: swallowed by ``suppress_errors``, or seen by the program."""
    out = []
    for metric in raw.metrics:
        kind = str(metric.get("fail_type") or "")
        if not kind or kind in SOFT or _is_limit(metric):
            continue
        file = metric.get("fail_user_frame_filename") or metric.get("co_filename") or ""
        line = int(metric.get("fail_user_frame_lineno") or metric.get("co_firstlineno") or 0)
        reason = _lines(metric.get("fail_reason"), 2)
        entry = _entry_of(raw, metric)
        out.append(
            Finding(
                "backend_fallback" if raw.suppressed else "compile_failed",
                file,
                line,
                code_line(file, line),
                f"{kind}: {reason}" + (" (suppress_errors: the function runs in eager)" if raw.suppressed else ""),
                original_name(metric.get("co_name") or ""),
                calls=sum(cell.graphless_calls for cell in entry),
                lost_seconds=sum(cell.graphless_ns for cell in entry) / 1e9 if raw.suppressed else 0.0,
                detail={"backend": _failed_backend(reason), "error": reason},
            )
        )
    return out


def _entry_of(raw: Raw, metric: dict[str, Any]) -> list[Any]:
    place = (metric.get("co_filename"), metric.get("co_firstlineno"))
    keys = {key for key, one in raw.entries.items() if (one.file, one.line) == place}
    return [cell for cell in raw.clock_entries if cell.key in keys]


def _failed_backend(reason: str) -> str:
    return reason.split("'")[1] if reason.startswith("backend='") else ""


def _fallbacks(raw: Raw) -> list[Finding]:
    """Backends that swallowed an exception of their own, or gave the graph back as it was. Once per backend and error."""
    groups: dict[tuple[str, str], list[tuple[str, str, str, int]]] = defaultdict(list)
    for one in raw.fallbacks:
        groups[one[1], one[2]].append(one)
    out = []
    for (backend, error), group in groups.items():
        info = raw.entries.get(group[0][3], EntryInfo("", "", 0, backend))
        cells = [raw.clock_graphs[one[0]] for one in group if one[0] in raw.clock_graphs]
        what = f"swallowed {error}: Inductor runs in its place" if error else "gave the graph back: it runs in eager"
        out.append(
            Finding(
                "backend_fallback",
                info.file,
                info.line,
                code_line(info.file, info.line),
                f"backend '{backend}' {what}",
                info.name,
                count=len(group),
                calls=sum(cell.calls for cell in cells),
                lost_seconds=sum(cell.ns for cell in cells) / 1e9,
                detail={"backend": backend, "error": error},
            )
        )
    return out


def _graph_place(raw: Raw, compile_id: str) -> tuple[str, int, str]:
    for metric in raw.metrics:
        if metric["compile_id"] == compile_id and metric.get("co_name"):
            return metric["co_filename"], int(metric["co_firstlineno"] or 0), original_name(metric["co_name"])
    return "", 0, ""


def _precision(raw: Raw) -> list[Finding]:
    out = {}
    for graph in raw.graphs:
        if graph.error is None or graph.error_eager is None or not lowered(graph.error, graph.error_eager):
            continue
        file, line, function = _graph_place(raw, graph.compile_id)
        times = f"{graph.error / graph.error_eager:.0f} times eager's" if graph.error_eager else "eager is exact"
        cell = raw.clock_graphs.get(graph.compile_id)
        out[graph.backend, file, line] = Finding(
            "precision_lowered",
            file,
            line,
            code_line(file, line),
            f"backend '{graph.backend}' is {graph.error:.1e} from float64, {times}",
            function,
            calls=cell.calls if cell else 0,
            detail={"backend": graph.backend, "error": graph.error, "error_eager": graph.error_eager},
        )
    return list(out.values())


def _cudagraphs(raw: Raw) -> list[Finding]:
    """Without a message the reason is the device: torch tells reasons of graphs on CUDA alone."""
    out: dict[tuple[str, int, str], Finding] = {}
    for graph in raw.graphs:
        if not graph.cudagraph_skips and not graph.cudagraph_reason:
            continue
        file, line, function = _graph_place(raw, graph.compile_id)
        reason = (
            graph.cudagraph_reason.removeprefix("skipping cudagraphs due to ") or "the graph is not on a CUDA device"
        )
        cell = raw.clock_graphs.get(graph.compile_id)
        calls = cell.calls if cell else 0
        code = code_line(file, line)
        out[file, line, reason] = Finding("cudagraphs_skipped", file, line, code, reason, function, calls=calls)
    return list(out.values())


def _guard_costs(raw: Raw, frames: list[Frame]) -> list[Finding]:
    """From the call of a compiled function to its first graph: mostly guards, which are checked whether or not anything
    changed. Not of a function whose first part has no graph: its time before the first one is the break's."""
    broken = {one.entry for one in raw.breaks if not one.after and one.compile_id not in raw.clock_graphs}
    out = []
    for key, info in raw.entries.items():
        cells = [cell for cell in raw.clock_entries if cell.key == key]
        calls = sum(cell.before.after_calls - cell.graphless_calls for cell in cells)
        cost = sum(cell.before.after_ns - cell.graphless_ns for cell in cells) / 1e9
        frame = next((one for one in frames if (one.file, one.line) == (info.file, info.line) and one.forward), None)
        if key in broken or frame is None or calls < LEAST_CALLS or cost < GUARDS_SHARE_OF_RUN * raw.wall_seconds:
            continue
        spent = sum(one.run_seconds for one in frames if one.compile_id in _graphs_of(raw, frames, info))
        share = cost / (spent + cost)
        if share >= GUARDS_SHARE:
            out.append(_guard_cost(info, frame, calls, cost, share))
    return out


def _graphs_of(raw: Raw, frames: list[Frame], info: EntryInfo) -> set[str]:
    return {one.compile_id for one in frames if (one.file, one.line) == (info.file, info.line)}


def _guard_cost(info: EntryInfo, frame: Frame, calls: int, cost: float, share: float) -> Finding:
    each = cost / calls * 1e6
    return Finding(
        "guard_cost",
        info.file,
        info.line,
        code_line(info.file, info.line),
        f"{frame.guards} guards and entering take {each:.0f} us of every call, {share:.0%} of it",
        info.name,
        calls=calls,
        lost_seconds=cost,
        detail={"guards": frame.guards, "microseconds": each, "sources": frame.guard_sources, "share": share},
    )


def _first_line(text: Any) -> str:
    return _lines(text, 1)


def _lines(text: Any, count: int) -> str:
    return " ".join(line.strip() for line in str(text or "").strip().splitlines()[:count])[:300]
