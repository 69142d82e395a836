"""Building the dependency graph of one rank, and joining those of several at their collectives.

Across ranks a collective ends nowhere before its last arrival::

    rank 0   [ op ) [ all_reduce ~~~~~ waiting ~~~~~|= transfer =)
                                                    |
    rank 1   [ op ......................... ) [ all_reduce ======)      the end on rank 0 is bound to rank 1's start

What nodes and edges mean stands in :mod:`ridgeline.profiling.analyses.graph_base`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ridgeline.profiling.analyses import graph_device, graph_host
from ridgeline.profiling.analyses.graph_base import Builder, Edge, Edges, Graph, Nodes, whole
from ridgeline.profiling.table import TraceTable

Match = Mapping[int, int]
"""One collective: rank -> table row of its transfer (a kernel, or a ``gloo:`` range)."""


def build(table: TraceTable, window: tuple[int, int] | None = None) -> Graph:
    """The dependency graph of one rank inside ``window`` (ns; default: everything). Events are clipped to it."""
    return _built(table, window).graph()


def _built(table: TraceTable, window: tuple[int, int] | None) -> Builder:
    low, high = whole(table) if window is None else window
    made = Builder(table, low, max(low, high))
    graph_host.chains(made)
    graph_device.streams(made)
    graph_device.synchronisation(made)
    graph_host.waits_for_helpers(made)
    _finish(made)
    return made


def _finish(made: Builder) -> None:
    """Bind the window's end to what ended last: device work before the host, which may only be running ahead."""
    sink = made.time.size - 1
    table = made.table
    last = [int(nodes.max()) for nodes in _closing(made)]
    if not last:
        made.bind(np.array([sink]), np.array([0]), Edge.OUTSIDE, np.array([-1]))
        return
    on_device = [bool(table.device_rows[made.row[node]]) for node in last]
    best = max(range(len(last)), key=lambda at: (made.time[last[at]], on_device[at]))
    others = np.array([node for at, node in enumerate(last) if at != best], np.intp)
    made.bind(np.array([sink]), np.array([last[best]]), Edge.HOST_GAP, np.array([-1]))
    none = np.full(others.size, -1, np.intp)
    made.loosen(others, np.full(others.size, sink), np.zeros(others.size, np.int64), Edge.HOST_GAP, none)


def _closing(made: Builder) -> list[Nodes]:
    """Nodes of each driving thread, and end nodes of each stream; only time lines that have any."""
    rows = made.row[1:-1]
    nodes = np.arange(1, rows.size + 1)
    thread = made.table.thread[rows]
    device = made.table.device_rows[rows]
    groups = [nodes[(thread == one) & ~device] for one in made.driving]
    ends = device & made.is_end[1:-1]
    groups += [nodes[ends & (thread == one)] for one in np.unique(thread[ends]).tolist()]
    return [group for group in groups if group.size]


def build_across(
    tables: Mapping[int, TraceTable], matches: Sequence[Match], offsets: Mapping[int, int] | None = None
) -> Graph:
    """One graph of several ranks, joined at ``matches``. ``offsets[rank]`` (ns) is how far a rank's clock is ahead.

    Owners number the ranks in ascending order. Times are on the clock whose offset is 0.
    """
    ranks = sorted(tables)
    built = [_built(tables[rank], None) for rank in ranks]
    shift = [(offsets or {}).get(rank, 0) for rank in ranks]
    graph, new = _join(built, shift)
    places = {rank: at for at, rank in enumerate(ranks)}
    slack = [graph.slack]
    for match in matches:
        slack += _meet(graph, built, new, {places[rank]: row for rank, row in match.items() if rank in places})
    return Graph(
        graph.tables, graph.owner, graph.row, graph.time, graph.back, graph.kind, graph.label, Edges.join(slack)
    )


def _join(built: list[Builder], shift: list[int]) -> tuple[Graph, list[Nodes]]:
    """(the graphs side by side with one start and one end, per graph the new number of each node)."""
    sizes = [one.time.size - 1 for one in built]
    owner = np.repeat(np.arange(len(built)), sizes).astype(np.int32)
    time = np.concatenate([one.time[1:] - ahead for one, ahead in zip(built, shift, strict=True)])
    local = np.concatenate([np.arange(size) for size in sizes])
    order = np.lexsort((local, owner, time))
    place = np.empty(order.size, np.intp)
    place[order] = np.arange(1, order.size + 1)
    new = [np.concatenate(([0], part)) for part in np.split(place, np.cumsum(sizes)[:-1])]
    low = min(one.low - ahead for one, ahead in zip(built, shift, strict=True))

    def column(name: str, first: int, last: int) -> Nodes:
        inner = np.concatenate([getattr(one, name)[1:] for one in built])[order]
        return np.concatenate(([first], inner, [last])).astype(inner.dtype)

    back = np.concatenate([numbers[one.back[1:]] for one, numbers in zip(built, new, strict=True)])[order]
    ends = np.array([numbers[-1] for numbers in new], np.intp)
    sink = order.size + 1
    slack = [_renumbered(one.graph().slack, numbers) for one, numbers in zip(built, new, strict=True)]
    others = np.delete(ends, ends.argmax())
    none = np.zeros(others.size, np.int64)
    slack.append(Edges(others, np.full(others.size, sink), none, none.astype(np.int8) + Edge.OUTSIDE, none - 1))
    graph = Graph(
        tables=tuple(one.table for one in built),
        owner=np.concatenate(([0], owner[order], [owner[order][-1]])).astype(np.int32),
        row=column("row", -1, -1),
        time=np.concatenate(([low], time[order], [time.max()])),
        back=np.concatenate(([0], back, [ends.max()])).astype(np.intp),
        kind=column("kind", Edge.OUTSIDE, Edge.OUTSIDE).astype(np.int8),
        label=column("label", -1, -1),
        slack=Edges.join(slack),
    )
    return graph, new


def _renumbered(slack: Edges, numbers: Nodes) -> Edges:
    return Edges(numbers[slack.src], numbers[slack.dst], slack.least, slack.kind, slack.row)


def _meet(graph: Graph, built: list[Builder], new: list[Nodes], rows: dict[int, int]) -> list[Edges]:
    """Bind the ends of one collective to the last arrival where that came after their own; the slack edges it leaves.

    ``rows[owner]`` is the collective's row there. Its transfer is the shortest over the ranks.
    """
    starts = {at: int(new[at][built[at].start_node[row]]) for at, row in rows.items() if built[at].start_node[row] >= 0}
    if len(starts) < 2:
        return []
    ends = {at: int(new[at][built[at].end_node[rows[at]]]) for at in starts}
    transfer = min(int(graph.time[ends[at]] - graph.time[starts[at]]) for at in starts)
    arrivals = sorted(starts.values())[-2:]  # whoever is not among the last two can hardly become the last
    slack = []
    for at, end in ends.items():
        own, late = starts[at], arrivals[-1]
        binds = graph.back[end] == own and own < late < end
        if binds:
            graph.back[end], graph.kind[end], graph.label[end] = late, Edge.COLLECTIVE, rows[at]
        for cause in {own, *arrivals} - {int(graph.back[end])}:
            if cause < end:
                slack.append((cause, end, min(transfer, int(graph.time[end] - graph.time[cause])), rows[at]))
    columns = np.array(slack, np.int64).reshape(-1, 4)
    kinds = np.full(len(columns), Edge.COLLECTIVE, np.int8)
    return [Edges(columns[:, 0], columns[:, 1], columns[:, 2], kinds, columns[:, 3])]
