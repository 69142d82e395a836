"""The call tree as frames of a flame graph: positions are exact sums of inclusive times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SMALLEST = 0.0005
"""A frame below this share of the whole is narrower than a pixel; it is left out, its time stays in its parent."""


@dataclass
class _Node:
    inclusive: int = 0
    exclusive: int = 0
    count: int = 0
    children: dict[str, _Node] = field(default_factory=dict)

    def settle(self) -> int:
        """Inclusive time, at least what its children hold: a path may be given without its ancestors."""
        self.inclusive = max(self.inclusive, sum(child.settle() for child in self.children.values()))
        return self.inclusive


def frames(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """``[depth, start, inclusive, exclusive, count, name, parent]`` in depth-first order, larger children first.

    ``rows``: ``path`` (list of names, outermost first), ``inclusive_ns``, ``exclusive_ns``, ``count``, ``rank`` (with
    several ranks each is a frame of its own). The first frame is the whole; ``parent`` is a position or -1.
    """
    ranks = {row.get("rank") for row in rows}
    root = _Node()
    for row in rows:
        path = [*([f"rank {row.get('rank')}"] if len(ranks) > 1 else []), *map(str, row["path"])]
        node = root
        for name in path:
            node = node.children.setdefault(name, _Node())
        node.inclusive += int(row["inclusive_ns"])
        node.exclusive += int(row.get("exclusive_ns") or 0)
        node.count += int(row.get("count") or 0)
    root.settle()
    out: list[list[Any]] = []
    waiting = [(root, "all", 0, 0, -1)]
    while waiting:
        node, name, depth, start, parent = waiting.pop()
        here = len(out)
        out.append([depth, start, node.inclusive, node.exclusive, node.count, name, parent])
        below, at = [], start
        for child_name, child in sorted(node.children.items(), key=lambda item: -item[1].inclusive):
            if child.inclusive >= SMALLEST * root.inclusive and child.inclusive:
                below.append((child, child_name, depth + 1, at, here))
            at += child.inclusive
        waiting += reversed(below)
    return out
