"""Graph breaks: one finding per place, with the time the program spends between the two graphs."""

from __future__ import annotations

import sysconfig
from collections import defaultdict

from ridgeline.compiler.doctor.breaks import Break, code_line
from ridgeline.compiler.doctor.model import Finding
from ridgeline.compiler.doctor.raw import Raw, SeenBreak

STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def break_findings(raw: Raw) -> list[Finding]:
    """One finding per place and code: resumed parts and recompilations of a function meet the same break again."""
    places: dict[tuple[str, int, str], list[SeenBreak]] = defaultdict(list)
    for seen in raw.breaks:
        places[seen.found.file, seen.found.line, seen.found.code].append(seen)
    ended = _gap_owners(raw)
    restarts = _restart_seconds(raw)
    return [_break(raw, group, ended, restarts) for group in places.values()]


def _gap_keys(raw: Raw, seen: SeenBreak) -> set[tuple[int, str]]:
    """Whose following gap the break is in: its own graph's; without one that of the graph that ran last before it, in
    all its compilations; without any the entry's, before its first graph."""
    if seen.compile_id in raw.clock_graphs:
        return {(-1, seen.compile_id)}
    if not seen.after:
        return {(seen.entry, "")}
    return {(-1, one) for one in raw.clock_graphs if one.split("/")[0] == seen.after.split("/")[0]}


def _gap_owners(raw: Raw) -> dict[tuple[int, str], int]:
    """How many breaks share a gap."""
    owners: dict[tuple[int, str], set[tuple[str, int]]] = defaultdict(set)
    for seen in raw.breaks:
        for key in _gap_keys(raw, seen):
            owners[key].add((seen.found.file, seen.found.line))
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
    for key, compile_id in {key: seen.compile_id for seen in group for key in _gap_keys(raw, seen)}.items():
        seen_calls, seconds = _gap(raw, *key)
        gap += seconds / owners[key]
        calls[compile_id.split("/")[0]] += seen_calls  # callers of the function that broke met the same break
    skipped = any(seen.found.skipped for seen in group)
    reason = first.title if not first.explanation else f"{first.title}: {first.explanation}"
    if skipped:
        reason += f" ({first.because or 'cannot resume'}: the whole function runs in eager)"
    tracing = sum(restarts.get(seen.compile_id, 0.0) for seen in group)
    file, line, function = _users_place(first)
    if file != first.file:
        reason += f" (inside {first.function}, {first.file}:{first.line})"
    return Finding(
        "graph_break",
        file,
        line,
        code_line(file, line),
        reason,
        function,
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


def _users_place(found: Break) -> tuple[str, int, str]:
    """File, line and function of the break; of one in Python's own library the line that called it."""
    if _in_library(found.file):
        for frame in reversed(found.stack):
            place, _, function = frame.rpartition(" in ")
            file, _, line = place.rpartition(":")
            if not _in_library(file) and "/compiler/doctor/" not in file and line.isdigit():
                return file, int(line), function
    return found.file, found.line, found.function


def _in_library(file: str) -> bool:
    return file.startswith(STANDARD_LIBRARY) and "/site-packages/" not in file


def _gap(raw: Raw, entry: int, graph: str) -> tuple[int, float]:
    """Calls and seconds of a gap: after a graph, or of an entry before its first graph. Calls count the ones that
    compiled too, whose time is left out."""
    if graph:
        cell = raw.clock_graphs.get(graph)
        return (cell.calls, cell.after_ns / 1e9) if cell else (0, 0.0)
    cells = [cell for cell in raw.clock_entries if cell.key == entry]
    return sum(cell.calls - cell.eager_calls for cell in cells), sum(cell.before.after_ns for cell in cells) / 1e9
