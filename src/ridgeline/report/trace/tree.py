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
        """Inclusive time, at least what its children hold: the whole and the ranks have none of their own."""
        self.inclusive = max(self.inclusive, sum(child.settle() for child in self.children.values()))
        return self.inclusive


def frames(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """``[depth, start, inclusive, exclusive, count, name, parent]`` in depth-first order, larger children first.

    ``rows``: ``name``, ``depth``, ``inclusive_ns``, ``exclusive_ns``, ``count``, ``rank``; a parent before its children.
    With several ranks each is a frame of its own. The first frame is the whole; ``parent`` is a position or -1.
    """
    several = len({row.get("rank") for row in rows}) > 1
    root = _Node()
    line: list[_Node] = [root]
    for row in rows:
        top = root.children.setdefault(f"rank {row.get('rank')}", _Node()) if several else root
        line = [top, *line[1 : int(row["depth"]) + 1]]
        node = line[-1].children.setdefault(str(row["name"]), _Node())
        line.append(node)
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
