"""One self-contained HTML page of a trace: what the capture lost, what it found, and a timeline to look for yourself.

The order is fixed: integrity, findings, where the time went, the timeline, the critical path, kernels, who waited for
whom, the call tree, the roofline, memory. Nothing is computed here but positions; every figure is another room's. The
page needs no network, no library and no server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError
from ridgeline.profiling.output import check_output
from ridgeline.profiling.table import TraceTable
from ridgeline.report.page import Section, esc, number, render_page, seconds
from ridgeline.report.trace import blocks, plots
from ridgeline.report.trace.pack import MAX_EVENTS, Packed, pack, rank_of
from ridgeline.report.trace.tree import frames
from ridgeline.runs import write_atomic

TITLES = {
    "integrity": "Integrity",
    "findings": "Findings",
    "summary": "Where the time went",
    "timeline": "Timeline",
    "critical_path": "Critical path",
    "kernels": "Kernels",
    "communication": "Who waited for whom",
    "calltree": "Call tree",
    "roofline": "Roofline",
    "memory": "Memory",
}
"""Sections in the order of the page."""
SCRIPTS = (
    "inflate.js",
    "data.js",
    "lookup.js",
    "draw.js",
    "arrows.js",
    "details.js",
    "measure.js",
    "timeline.js",
    "flame.js",
)


def write_trace_report(
    tables: Sequence[TraceTable], out: Path, title: str, sections: Mapping[str, Any], limit: int = MAX_EVENTS
) -> Path:
    """Write the page of ``tables`` (one per rank) to ``out``, atomically; returns ``out``.

    ``sections`` holds plain data. Each may be absent; then the page is without it, or says why in one line when
    ``sections["why"][name]`` is given.

    ============= =====================================================================================================
    integrity     lines, or dicts of rank, message, unsafe; an empty list says that nothing was found missing
    findings      in the order to show: rank, title, seconds, per, evidence, knob; and where known gain_seconds (low,
                  high), unsafe, start_ns and end_ns (a button shows them in the timeline)
    summary       one per rank: rank, device, span_ns, busy_ns, compute_ns, communication_ns, exposed_communication_ns,
                  overlap_fraction, kernel_count
    idle          rank, device, stream (None: all together), cause, idle_ns; shown under the summary
    critical_path rank, start_ns, end_ns, type, name, row (of the rank's table); on the tables' clock
    kernels       rank, name, role, count, sum_ns, mean_ns, share
    communication late_rank, waiting_rank, wait_ns; and where known name, operator, count
    calltree      rank, name, depth, inclusive_ns, exclusive_ns, count; a parent before its children
    roofline      {"operators": [operator, input_dims, dtype, flops, device_time_ns, flops_per_second,
                  intensity_flops_per_byte, share_of_ceiling, bound],
                  "ceilings": {gemm_flops_per_second: by dtype, read_bytes_per_second, source}}
    collectives   match, rank, start_ns, end_ns, waiting_ns, last, complete: arrows in the timeline from the rank that came
                  last to those that waited
    memory        {"timeline": [rank, device, time_ns, and <category>_bytes for each category],
                  "peak": [rank, device, category, operator, where, count, bytes, share]}
    ============= =====================================================================================================

    The rows may hold more keys; an analysis' frame as dicts (``frame.to_dicts()``) serves for every one but
    integrity and findings: those are ``to_dict()`` of each defect and cause.

    At most ``limit`` events are drawn; when there are more, the shortest are left out and the page says which.

    Raises:
        UserError: no table, or none with a timed event.
    """
    check_output("trace report", out, [table.meta.source for table in tables])
    tables = [table for table in tables if len(table)]
    if not tables:
        raise UserError("trace report: no timed event in any of the traces")
    tables = [table for _, table in sorted(enumerate(tables), key=lambda pair: (rank_of(pair[1], pair[0]), pair[0]))]
    packed = pack(tables, sections.get("critical_path") or (), limit, sections.get("collectives") or ())
    built = (_build(name, sections, packed) for name in TITLES)
    present = [section for section in built if section is not None]
    contents = "".join(f'<a href="#{esc(one.anchor)}">{esc(one.title)}</a>' for one in present if one.anchor)
    page = render_page(title, _subtitle(tables, packed), present, [_scripts()])
    page = page.replace("</style>", f"{_asset('style.css')}</style>", 1)
    page = page.replace("</header>", f'<nav class="contents" aria-label="sections">{contents}</nav></header>', 1)
    write_atomic(out, page)
    return out


def _subtitle(tables: Sequence[TraceTable], packed: Packed) -> str:
    names = ", ".join(Path(table.meta.source).name for table in tables[:4])
    more = f" and {len(tables) - 4} more" if len(tables) > 4 else ""
    ranks = f"{len(tables)} ranks" if len(tables) > 1 else "1 rank"
    return esc(f"{ranks}, {number(packed.total)} events over {seconds(packed.header['span'] / 1e9)}; {names}{more}")


def _build(name: str, sections: Mapping[str, Any], packed: Packed) -> Section | None:
    """The section of this name, the sentence why it is missing, or None."""
    if name == "timeline":
        return _timeline(packed)
    given = sections.get(name)
    if isinstance(given, Mapping):  # roofline and memory: empty when their rows are
        given = given if given.get("operators") or given.get("timeline") else None
    if given is None or (not given and name not in ("integrity", "findings")):
        reason = (sections.get("why") or {}).get(name)
        return blocks.absent(TITLES[name], reason) if reason else None
    build: dict[str, Callable[[Any], Section]] = {
        "integrity": blocks.integrity,
        "findings": lambda rows: blocks.findings(rows, packed.origins),
        "summary": lambda rows: blocks.breakdown(rows, sections.get("idle")),
        "critical_path": blocks.critical_path,
        "kernels": lambda rows: blocks.kernels(rows, "Kernels" if packed.on_device else "Operators"),
        "communication": blocks.communication,
        "calltree": _calltree,
        "roofline": lambda found: plots.roofline(found["operators"], found.get("ceilings") or {}),
        "memory": lambda found: plots.memory(found["timeline"], found.get("peak") or (), packed.origins),
    }
    return build[name](given)


def _timeline(packed: Packed) -> Section:
    notes = list(packed.notes)
    if packed.shown < packed.total:
        left = packed.total - packed.shown
        notes.insert(
            0,
            f"{number(left)} events shorter than {seconds(packed.cut_ns / 1e9)} are not drawn and not searched, to keep "
            "the page quick.",
        )
    lead = "Threads above, the device's streams below. Scroll to zoom once the timeline is clicked, drag to move."
    if notes:
        lead += " <strong>" + esc(" ".join(notes)) + "</strong>"
    data = f'<script type="application/json" id="trace-header">{_json(packed.header)}</script>'
    for name, text in (("block", packed.block), ("texts", packed.texts)):
        data += f'<script type="text/plain" id="trace-{name}">{text}</script>'
    return Section("Timeline", lead, _asset("timeline.html") + data, "timeline")


def _calltree(rows: Sequence[Mapping[str, Any]]) -> Section:
    lead = "Width is inclusive time. Choose a frame to make it the whole width, Escape to return; arrow keys move."
    body = '<div id="flame" role="group" aria-label="call tree"></div><p id="flame-note" aria-live="polite"></p>'
    body += f'<script type="application/json" id="flame-data">{_json(frames(rows))}</script>'
    return Section("Call tree", lead, body, "calltree")


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _scripts() -> str:
    return "\n".join(_asset(name) for name in SCRIPTS)


def _asset(name: str) -> str:
    return resources.files("ridgeline.report.trace").joinpath(name).read_text(encoding="utf-8")
