"""What-if: replay the dependency graph with some times changed, and read off how long the window would have taken.

Every node of the graph happens when the last of its causes allows it (Kelley and Walker's critical-path method). With
nothing changed each node falls where it was measured, exactly, because slack edges never need more than was measured.
A change makes some edges shorter::

    measured     host [op)[launch)[op)[launch)          kernels  [ a )      [ b )
    no gap       host [op)[op)                          kernels  [ a )[ b )

A shorter edge never makes anything later, so no such change predicts a loss. Long runs of nodes with one cause are
contracted by pointer doubling; only nodes with several causes (kernels, waits) are visited one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.errors import UserError, nearest
from ridgeline.profiling.analyses import critical_path
from ridgeline.profiling.analyses.graph import Match, build
from ridgeline.profiling.analyses.graph_base import Edge, Edges, Graph, Nodes
from ridgeline.profiling.classify import COLLECTIVE_OP, find_phases, launches
from ridgeline.profiling.intervals import Times, contains
from ridgeline.profiling.nesting import nest
from ridgeline.profiling.table import Kind, Mask, TraceTable

CHANGES = {
    "no-launch-gap": "launch calls, launch delays and gaps between kernels of a stream take no time",
    "free-communication": "collectives take no time on any rank",
    "no-data-wait": "the data phase of the loop takes no time",
    "no-sync": "the host never waits for the device",
    "kernel:REGEX=FACTOR": "device work of these names takes FACTOR of its time",
    "operator:REGEX=FACTOR": "these operators, what they call and what they launch take FACTOR of their time",
}
COLUMNS: dict[str, str] = {
    "change": "text: what was changed",
    "measured_ns": "ns: length of the window",
    "replayed_ns": "ns: the same from the graph without a change; always equal to measured_ns",
    "predicted_ns": "ns: length of the window with the change",
    "gain_ns": "ns: measured_ns - predicted_ns",
    "gain_share": "ratio: gain_ns / measured_ns",
    "changed_ns": "ns: time that the change took from events and delays, on the path or not; of no-sync the length of the "
    "calls that waited",
}
_SCHEMA = {name: pl.Float64 if name == "gain_share" else pl.Int64 for name in COLUMNS} | {"change": pl.String}
_NEVER = -(2**61)
_NAMED = re.compile(r"(kernel|operator):(.+)=([^=]+)$", re.DOTALL)


class Step(NamedTuple):
    """All edges of a graph, binding ones first; arrays are ``[edges]``."""

    src: Nodes
    dst: Nodes
    need: Times
    kind: NDArray[np.int8]
    row: Nodes
    owner: NDArray[np.int32]

    def of(self, edges: Nodes) -> Step:
        """Some of the edges."""
        return Step(
            self.src[edges],
            self.dst[edges],
            self.need[edges],
            self.kind[edges],
            self.row[edges],
            self.owner[edges],
        )


@dataclass(frozen=True)
class Change:
    """A parsed change: its text, what it is, and for the named ones the pattern and the factor."""

    text: str
    what: str
    pattern: re.Pattern[str] | None = None
    factor: float = 0.0


def parse_change(text: str) -> Change:
    """Read a change as in ``CHANGES``.

    Raises:
        UserError: not a change, not a pattern, or a factor outside [0, 1].
    """
    plain = [name for name in CHANGES if ":" not in name]
    if text in plain:
        return Change(text, text)
    found = _NAMED.match(text)
    if found is None:
        raise UserError(f"change '{text}': not one of the known changes{nearest(text, CHANGES)}")
    try:
        pattern, factor = re.compile(found[2]), float(found[3])
    except re.error as error:
        raise UserError(f"change '{text}': '{found[2]}' is not a regular expression ({error})") from None
    except ValueError:
        raise UserError(f"change '{text}': the factor '{found[3]}' is not a number (0.5 = twice as fast)") from None
    if not 0 <= factor <= 1:
        raise UserError(f"change '{text}': the factor {found[3]} is not between 0 and 1 (0.5 = twice as fast)")
    return Change(text, found[1], pattern, factor)


def what_if(table: TraceTable, change: str | Sequence[str], window: tuple[int, int] | None = None) -> pl.DataFrame:
    """Predicted length of ``window`` (default: the whole capture) under each change alone; columns as in ``COLUMNS``.

    One row per change. Empty when the trace has no event to replay. A step's window is as long as the host took for it:
    where the host only runs ahead of the device, ask for several steps or the whole capture.

    Raises:
        UserError: a change that cannot be read, or a pattern that no event of the trace fits.
    """
    changes = [parse_change(one) for one in ([change] if isinstance(change, str) else change)]
    if critical_path.why_empty(table) is not None:
        return pl.DataFrame(schema=_SCHEMA)
    return _predict(build(table, window), changes)


def what_if_across(
    tables: Mapping[int, TraceTable],
    change: str | Sequence[str],
    matches: Sequence[Match] | None = None,
    offsets: Mapping[int, int] | None = None,
) -> pl.DataFrame:
    """Like :func:`what_if` for several ranks joined at their collectives; the change applies to every rank."""
    changes = [parse_change(one) for one in ([change] if isinstance(change, str) else change)]
    used = {rank: table for rank, table in tables.items() if critical_path.why_empty(table) is None}
    if not used:
        return pl.DataFrame(schema=_SCHEMA)
    return _predict(critical_path.graph_across(used, matches, offsets), changes)


def _predict(graph: Graph, changes: list[Change]) -> pl.DataFrame:
    edges = all_edges(graph)
    replayed, blocked = replay(edges), _lengths(graph, edges)
    rows = []
    for change in changes:
        need = changed_needs(graph, edges, change)
        predicted = replay(edges._replace(need=need))
        removed = np.where(need == _NEVER, blocked, edges.need - need)[: graph.back.size - 1]
        gain = graph.span_ns - predicted
        share = gain / graph.span_ns if graph.span_ns else 0.0
        rows.append((change.text, graph.span_ns, replayed, predicted, gain, share, int(removed.sum())))
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _lengths(graph: Graph, edges: Step) -> Times:
    """How long the event of each edge lasts, 0 without one. ``[edges]`` ns"""
    out = np.zeros(edges.row.size, np.int64)
    for owner, table in enumerate(graph.tables):
        mine = np.flatnonzero((edges.owner == owner) & (edges.row >= 0))
        out[mine] = table.duration[edges.row[mine]]
    return out


def all_edges(graph: Graph) -> Step:
    """Binding and slack edges together; a binding edge needs the time between its nodes."""
    dst = np.arange(1, graph.back.size)
    src = graph.back[1:]
    slack: Edges = graph.slack
    return Step(
        np.concatenate((src, slack.src)),
        np.concatenate((dst, slack.dst)),
        np.concatenate((graph.time[dst] - graph.time[src], slack.least)),
        np.concatenate((graph.kind[1:], slack.kind)),
        np.concatenate((graph.label[1:], slack.row)),
        np.concatenate((graph.owner[1:], graph.owner[slack.dst])),
    )


def replay(edges: Step) -> int:
    """The longest path from node 0 to the last node, in ns."""
    last = int(edges.dst.max())
    joint = np.bincount(edges.dst, minlength=last + 1) > 1
    joint[[0, last]] = True
    anchor, far = _contract(edges, joint, last + 1)
    into = np.flatnonzero(joint[edges.dst])
    into = into[np.argsort(edges.dst[into], kind="stable")]
    place = np.cumsum(joint) - 1
    src, dst = place[anchor[edges.src[into]]], place[edges.dst[into]]
    need = edges.need[into] + far[edges.src[into]]
    at = [0] + [_NEVER] * int(place[-1])
    for one, other, weight in zip(src.tolist(), dst.tolist(), need.tolist(), strict=True):
        moment = at[one] + weight
        if moment > at[other]:
            at[other] = moment
    return at[-1]


def _contract(edges: Step, joint: Mask, size: int) -> tuple[Nodes, Times]:
    """For every node the nearest joint before it along single causes (itself if it is one), and the time between."""
    anchor, far = np.arange(size), np.zeros(size, np.int64)
    single = ~joint[edges.dst]
    anchor[edges.dst[single]], far[edges.dst[single]] = edges.src[single], edges.need[single]
    while not joint[anchor].all():
        far = far + far[anchor]
        anchor = anchor[anchor]
    return anchor, far


def changed_needs(graph: Graph, edges: Step, change: Change) -> Times:
    """What every edge needs under a change. ``[edges]`` ns

    Raises:
        UserError: the change names events and no event fits.
    """
    need = edges.need.copy()
    fitted = False
    for owner, table in enumerate(graph.tables):
        mine = np.flatnonzero(edges.owner == owner)
        part = edges.of(mine)
        chosen, fits = _RULES[change.what](table, part, graph.time, change)
        fitted |= fits
        need[mine[chosen]] = _NEVER if change.what == "no-sync" else np.rint(part.need[chosen] * change.factor)
    if not fitted and change.pattern is not None:
        names = {table.names[code] for table in graph.tables for code in np.unique(table.name).tolist()}
        closest = nearest(change.pattern.pattern, names) if len(names) < 5_000 else ""
        close = closest if "did you mean" in closest else ""
        raise UserError(f"change '{change.text}': no {change.what} of the trace fits '{change.pattern.pattern}'{close}")
    return need


_Rule = Callable[[TraceTable, Step, Times, Change], tuple[Mask, bool]]


def _of_row(rows: Mask, edges: Step) -> Mask:
    """Edges whose event is among ``rows``. ``[edges]``"""
    return rows[edges.row] & (edges.row >= 0)


def _no_launch_gap(table: TraceTable, edges: Step, time: Times, change: Change) -> tuple[Mask, bool]:
    launched = launches(table)
    calls = np.zeros(len(table), np.bool_)
    calls[launched[launched >= 0]] = True
    chosen = np.isin(edges.kind, (Edge.LAUNCH, Edge.GAP)) | (_of_row(calls, edges) & (edges.kind == Edge.RUNTIME))
    return chosen, bool(chosen.any())


def _free_communication(table: TraceTable, edges: Step, time: Times, change: Change) -> tuple[Mask, bool]:
    rows = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & table.named(COLLECTIVE_OP.match)
    rows[critical_path.collective_rows(table)] = True
    waits = np.isin(edges.kind, (Edge.COLLECTIVE, Edge.SYNC, Edge.HANDOVER))
    chosen = _of_row(rows, edges) & waits
    return chosen, bool(chosen.any())


def _no_data_wait(table: TraceTable, edges: Step, time: Times, change: Change) -> tuple[Mask, bool]:
    data = find_phases(table).ranges["data"]
    host = np.isin(edges.kind, (Edge.OPERATOR, Edge.RUNTIME, Edge.PYTHON, Edge.HOST_GAP))
    chosen = host & contains(data, time[edges.src]) & (edges.row >= 0)
    return chosen, bool(chosen.any())


def _no_sync(table: TraceTable, edges: Step, time: Times, change: Change) -> tuple[Mask, bool]:
    calls = table.is_kind(Kind.RUNTIME)
    chosen = (edges.kind == Edge.SYNC) & _of_row(calls, edges)
    return chosen, bool(chosen.any())


_SPANS = (Edge.KERNEL, Edge.COPY, Edge.COLLECTIVE)


def _kernel(table: TraceTable, edges: Step, time: Times, change: Change) -> tuple[Mask, bool]:
    assert change.pattern is not None
    rows = table.device_rows & table.named(change.pattern.search)
    return _of_row(rows, edges) & np.isin(edges.kind, _SPANS), bool(rows.any())


def _operator(table: TraceTable, edges: Step, time: Times, change: Change) -> tuple[Mask, bool]:
    assert change.pattern is not None
    host = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION, Kind.RUNTIME, Kind.PYTHON)
    rows = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & table.named(change.pattern.search)
    inside = _with_descendants(table, host, rows)
    launched = launches(table)
    inside |= table.device_rows & (launched >= 0) & inside[launched]
    work = (Edge.OPERATOR, Edge.RUNTIME, Edge.PYTHON, Edge.HOST_GAP, *_SPANS)
    return _of_row(inside, edges) & np.isin(edges.kind, work), bool(rows.any())


def _with_descendants(table: TraceTable, chosen: Mask, rows: Mask) -> Mask:
    """``rows`` and every chosen row inside one of them. ``[rows]``"""
    nesting = nest(table, chosen)
    inside = rows & chosen
    for depth in range(1, int(nesting.depth.max(initial=0)) + 1):
        at = np.flatnonzero(nesting.depth == depth)
        inside[at] |= inside[nesting.parent[at]]
    return inside


_RULES: dict[str, _Rule] = {
    "no-launch-gap": _no_launch_gap,
    "free-communication": _free_communication,
    "no-data-wait": _no_data_wait,
    "no-sync": _no_sync,
    "kernel": _kernel,
    "operator": _operator,
}
