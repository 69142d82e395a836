"""Where in the program an event happened: the user's Python line when stacks were loaded, else the operators around it.

::

    python  train.py(40): step   [---------------------------------)
    python    torch/nn/linear.py   [-----------------)                library frames are passed over
    op          aten::linear         [------------)
    op            aten::addmm          [------)      where: train.py(40): step;  path: aten::linear > aten::addmm
"""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.classify import STEP
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.nesting import Nesting, nest, operators
from ridgeline.profiling.table import Kind, TraceTable

PYTHON_FRAME = re.compile(r"(?P<file>.+?\.py)\((?P<line>\d+)\): (?P<function>.*)$")
_LIBRARY = re.compile(
    r"(^|/)(torch|torchvision|site-packages|dist-packages|lib/python3[.\d]*|importlib|contextlib|threading|runpy)(/|\.py)|^<"
)
_DEPTH = 4


def is_user_frame(name: str) -> bool:
    """Whether a Python row's name is a line of a file outside torch, the packages and the standard library."""
    found = PYTHON_FRAME.match(name)
    return bool(found) and not _LIBRARY.search(found["file"])  # type: ignore[index]


class Places:
    """Names places of one table; the frames are nested once, when first asked for."""

    def __init__(self, table: TraceTable, ops: Nesting | None = None) -> None:
        self.table = table
        self._ops = ops

    @cached_property
    def ops(self) -> Nesting:
        """Operators and named ranges."""
        return self._ops or operators(self.table)

    @cached_property
    def _frames(self) -> Nesting | None:
        python = self.table.is_kind(Kind.PYTHON)
        return nest(self.table, python) if python.any() else None

    @cached_property
    def _user(self) -> NDArray[np.bool_]:
        return self.table.named(is_user_frame)

    def frames(self, thread: NDArray[np.int32], moment: Times) -> NDArray[np.intp]:
        """Rows of the innermost user frame open on ``thread[i]`` at ``moment[i]``, or -1. ``[len(moment)]``"""
        if self._frames is None:
            return np.full(moment.size, -1, np.intp)
        at = self._frames.innermost(thread, moment)
        climbing = (at >= 0) & ~self._user[at]
        while climbing.any():
            at[climbing] = self._frames.parent[at[climbing]]
            climbing = (at >= 0) & ~self._user[at]
        return at

    def path(self, row: int) -> str:
        """Names of the operators and ranges around ``row`` and its own, outermost first, steps left out."""
        names: list[str] = []
        while row >= 0:
            name = self.table.names[self.table.name[row]]
            if not STEP.match(name):
                names.append(name)
            row = int(self.ops.parent[row])
        names.reverse()
        return " > ".join(names if len(names) <= _DEPTH else [names[0], "..", *names[-_DEPTH + 2 :]])

    def of_rows(self, rows: NDArray[np.intp]) -> list[str]:
        """For each host row: ``file.py(line): function``, else the path of operators around it. ``[rows]``"""
        found = self.frames(self.table.thread[rows], self.table.start[rows])
        text, cached = [], dict[tuple[int, int], str]()
        for row, frame in zip(rows.tolist(), found.tolist(), strict=True):
            # Siblings of one name share a path: the parent and the name say it.
            key = (int(self.ops.parent[row]), int(self.table.name[row])) if frame < 0 else (-2, frame)
            if key not in cached:
                cached[key] = self.path(row) if frame < 0 else self.table.names[self.table.name[frame]]
            text.append(cached[key])
        return text
