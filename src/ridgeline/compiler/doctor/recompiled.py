"""Guards that failed, that failed too often, and that cost time even when they hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ridgeline.compiler.doctor.breaks import code_line, original_name, resumed_line
from ridgeline.compiler.doctor.guards import cause
from ridgeline.compiler.doctor.model import Finding, Frame
from ridgeline.compiler.doctor.raw import EntryInfo, Raw, SeenRecompile

MOST_VALUES = 5
LIMIT = "recompile limit exceeded"
GUARDS_SHARE, GUARDS_SHARE_OF_RUN, LEAST_CALLS = 0.1, 0.005, 8
"""Guards are a finding from this share of a compiled function's own time, and this share of the whole run."""


def distinct(seen: Iterable[SeenRecompile]) -> list[SeenRecompile]:
    """One per compile id: a compilation that dynamo restarts tells its reasons once, but a limit hit tells them too."""
    return list({(one.compile_id, one.file, one.line): one for one in seen}.values())


def recompile_findings(raw: Raw, frames: list[Frame]) -> list[Finding]:
    """One finding per function and source of the value that failed its guard.

    The resumed parts of a broken function recompile after it for the same change, which they may know as a temporary:
    they belong to the finding of the function.
    """
    limits = {metric["compile_id"] for metric in raw.metrics if is_limit(metric)}
    groups: dict[tuple[str, ...], list[SeenRecompile]] = defaultdict(list)
    changes: dict[tuple[str, ...], tuple[str, ...]] = {}
    for seen in distinct(raw.recompiles):
        if not seen.failures or seen.compile_id in limits:
            continue
        blamed = cause(seen.failures)
        key: tuple[str, ...] = (seen.file, str(seen.line), blamed.source)
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
        _change(first.what, first.source, list(dict.fromkeys((one.old, one.new) for one in blamed))),
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


def _change(what: str, source: str, values: list[tuple[str, str]]) -> str:
    """What changed, and the way its values took."""
    if what == "backend":
        return "the function is compiled again with another backend object each time"
    way = [_round(one) for one in (values[0][0], *(new for _, new in values))]
    told = " to ".join(way) if len(way) <= MOST_VALUES else f"{way[0]} to {way[-1]} by way of {len(way) - 2} others"
    if what in ("global state", "value"):
        return f"{source} changed: {told}".removesuffix(": ? to ?")
    return f"{what} of {source} changed: {told}"


def _round(text: str) -> str:
    """``0.232`` of ``0.23203237354755402``; other texts as they are."""
    return re.sub(r"\d+\.\d{4,}(e[-+]\d+)?", lambda match: f"{float(match.group()):.3g}", text)


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


def is_limit(metric: dict[str, Any]) -> bool:
    return LIMIT in str(metric.get("fail_reason") or "") or metric.get("fail_type") == "FailOnRecompileLimitHit"


def limit_findings(raw: Raw) -> list[Finding]:
    """The record of a limit hit names no function: its recompilation reasons, told just before, do."""
    reasons = {seen.compile_id: seen for seen in raw.recompiles}
    found = {}
    for metric in raw.metrics:
        seen = reasons.get(metric["compile_id"])
        if not is_limit(metric) or seen is None or not seen.failures:
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
            detail={
                "limit": len(seen.failures),
                "guard": blamed.guard,
                "source": blamed.source,
                "what": blamed.what,
                "new": blamed.new,
            },
        )
    return list(found.values())


def _eager_part(raw: Raw, seen: SeenRecompile) -> tuple[int, float]:
    """Calls without a graph of the compiled function this one belongs to: by its place, else of all of them."""
    keys = {key for key, one in raw.entries.items() if (one.file, one.line) == (seen.file, seen.line)}
    cells = [cell for cell in raw.clock_entries if not keys or cell.key in keys]
    return sum(cell.graphless_calls for cell in cells), sum(cell.graphless_ns for cell in cells) / 1e9


def guard_findings(raw: Raw, frames: list[Frame]) -> list[Finding]:
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
