"""What happens without a word: failures swallowed, another backend, less precision, CUDA graphs not used."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ridgeline.compiler.doctor.breaks import code_line, original_name
from ridgeline.compiler.doctor.clock import EntryCell
from ridgeline.compiler.doctor.model import Finding
from ridgeline.compiler.doctor.precision import lowered
from ridgeline.compiler.doctor.raw import EntryInfo, Raw
from ridgeline.compiler.doctor.recompiled import is_limit

SOFT = ("Unsupported", "UserError", "SkipFrame", "ObservedException")


def failure_findings(raw: Raw) -> list[Finding]:
    """Compilations that raised: swallowed by ``suppress_errors``, or seen by the program."""
    out = []
    for metric in raw.metrics:
        kind = str(metric.get("fail_type") or "")
        if not kind or kind in SOFT or is_limit(metric):
            continue
        file = metric.get("fail_user_frame_filename") or metric.get("co_filename") or ""
        line = int(metric.get("fail_user_frame_lineno") or metric.get("co_firstlineno") or 0)
        reason = lines(metric.get("fail_reason"), 2)
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


def _entry_of(raw: Raw, metric: dict[str, Any]) -> list[EntryCell]:
    place = (metric.get("co_filename"), metric.get("co_firstlineno"))
    keys = {key for key, one in raw.entries.items() if (one.file, one.line) == place}
    return [cell for cell in raw.clock_entries if cell.key in keys]


def _failed_backend(reason: str) -> str:
    return reason.split("'")[1] if reason.startswith("backend='") else ""


def fallback_findings(raw: Raw) -> list[Finding]:
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


def precision_findings(raw: Raw) -> list[Finding]:
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


def cudagraph_findings(raw: Raw) -> list[Finding]:
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


def lines(text: Any, count: int) -> str:
    """The first lines of a text, as one."""
    return " ".join(line.strip() for line in str(text or "").strip().splitlines()[:count])[:300]
