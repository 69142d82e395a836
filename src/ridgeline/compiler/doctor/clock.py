"""Where a compiled call spends its time: in graphs, between them, and in the compiler. Pure Python, about 1 us a call.

::

    entry ----[graph 0/0]-----gap-----[graph 1/0]----gap---- return
         before              after 0/0              after 1/0

The gap after a graph that ended in a break is what the break costs; the gap before the first graph is guards. A gap in
which the compiler ran is left out: compiling is counted elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_now = time.perf_counter_ns
KEPT_STARTS = 200_000
"""Calls per entry and thread whose start is remembered, two machine words each."""


class Cell:
    """A graph, or the part of an entry before its first graph: calls and time of it, and of the gap that follows it."""

    __slots__ = ("after_calls", "after_ns", "calls", "key", "ns")

    def __init__(self, key: str) -> None:
        self.key = key
        self.calls = self.ns = self.after_calls = self.after_ns = 0


class EntryCell:
    """A compiled function as one thread calls it. ``graphless`` calls ran no graph at all: they were eager."""

    __slots__ = ("before", "calls", "eager_calls", "graphless_calls", "graphless_ns", "key", "ns", "steps")

    def __init__(self, key: int) -> None:
        self.key = key
        self.before = Cell("")
        self.calls = self.ns = self.eager_calls = self.graphless_calls = self.graphless_ns = 0
        self.steps: list[tuple[int, int]] = []
        """Start in nanoseconds, and what happened until the next one: 1 = eager by our choice, 2 = compiler ran."""


class ThreadClock:
    """What one thread did."""

    def __init__(self) -> None:
        self.inside = self.eager = False
        self.mark = 0
        self.compiler_ran = False
        self.compile_began = 0
        self.compile_depth = 0
        self.compile_ns = 0
        self.last = Cell("")
        self.graphs: dict[str, Cell] = {}
        self.entries: dict[int, EntryCell] = {}
        self.step: EntryCell | None = None


class Clock:
    """All threads' clocks. ``choose(entry)`` says whether the call that begins shall run in eager (see timing)."""

    def __init__(self, choose: Callable[[int, bool], bool] | None = None) -> None:
        self.threads: list[ThreadClock] = []
        self.choose = choose
        self._local = threading.local()

    def thread(self) -> ThreadClock:
        """The calling thread's own."""
        try:
            return self._local.clock  # type: ignore[no-any-return]
        except AttributeError:
            clock = self._local.clock = ThreadClock()
            self.threads.append(clock)
            return clock

    def graph(self, key: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` with a clock on it."""
        local, thread_of = self._local, self.thread

        def timed(*args: Any) -> Any:
            try:
                thread = local.clock
            except AttributeError:
                thread = thread_of()
            cell = thread.graphs.get(key)
            if cell is None:
                cell = thread.graphs[key] = Cell(key)
            began = _now()
            if thread.inside:
                _gap(thread, began)
            try:
                return compiled(*args)
            finally:
                thread.mark = end = _now()
                thread.last = cell
                cell.calls += 1
                if not thread.compiler_ran:
                    cell.ns += end - began

        return timed

    def entry(self, key: int, eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` with a clock on it; ``eager`` is called in its place when the schedule says so."""
        local, thread_of, clock = self._local, self.thread, self

        def entry(*args: Any, **kwargs: Any) -> Any:
            try:
                thread = local.clock
            except AttributeError:
                thread = thread_of()
            cell = thread.entries.get(key)
            if cell is None:
                cell = thread.entries[key] = EntryCell(key)
            if thread.inside:  # compiled within compiled: the outer call has the clock
                cell.calls += 1
                return (eager if thread.eager else compiled)(*args, **kwargs)
            call, mode = compiled, 0
            if clock.choose is not None and clock.choose(key, _compiled_lately(cell)):
                call, mode = eager, 1
                cell.eager_calls += 1
            thread.inside, thread.eager, thread.compiler_ran, thread.last = True, mode == 1, False, cell.before
            thread.mark = began = _now()
            if len(cell.steps) < KEPT_STARTS:
                cell.steps.append((began, mode))
            thread.step = cell
            try:
                return call(*args, **kwargs)
            finally:
                _leave(thread, cell, began, mode)

        return entry

    def compiling(self, began: bool) -> None:
        """The compiler starts or ends in this thread; it may call itself."""
        thread = self.thread()
        if began:
            thread.compile_depth += 1
            if thread.compile_depth == 1:
                thread.compile_began = _now()
            thread.compiler_ran = True
            return
        thread.compile_depth = max(thread.compile_depth - 1, 0)
        if thread.compile_depth == 0:
            thread.compile_ns += _now() - thread.compile_began
            self._mark_step()

    def _mark_step(self) -> None:
        """A backward graph is compiled in a thread of its own: the step that is open anywhere has compiled."""
        for thread in list(self.threads):
            cell = thread.step
            if cell is not None and cell.steps:
                start, mode = cell.steps[-1]
                cell.steps[-1] = (start, mode | 2)

    def graphs(self) -> dict[str, Cell]:
        """By compile id, summed over threads."""
        return _summed(cell for thread in list(self.threads) for cell in list(thread.graphs.values()))

    def entries(self) -> list[EntryCell]:
        """Per entry and thread, in order of the first call."""
        return [cell for thread in list(self.threads) for cell in list(thread.entries.values())]

    @property
    def compile_seconds(self) -> float:
        """Wall seconds in the compiler, over all threads."""
        return sum(thread.compile_ns for thread in list(self.threads)) / 1e9


def _gap(thread: ThreadClock, now: int) -> None:
    if thread.compiler_ran:
        thread.compiler_ran = False
        return
    thread.last.after_calls += 1
    thread.last.after_ns += now - thread.mark


def _leave(thread: ThreadClock, cell: EntryCell, began: int, mode: int) -> None:
    end = _now()
    graphless = thread.last is cell.before
    compiled = thread.compiler_ran
    if mode == 0:
        _gap(thread, end)
    thread.inside = thread.eager = False
    cell.calls += 1
    cell.ns += end - began
    if mode == 0 and graphless and not compiled:
        cell.graphless_calls += 1
        cell.graphless_ns += end - began


def _compiled_lately(cell: EntryCell) -> bool:
    return bool(cell.steps) and bool(cell.steps[-1][1] & 2)


def _summed(cells: Iterator[Cell]) -> dict[str, Cell]:
    total: dict[str, Cell] = {}
    for cell in cells:
        into = total.setdefault(cell.key, Cell(cell.key))
        into.calls += cell.calls
        into.ns += cell.ns
        into.after_calls += cell.after_calls
        into.after_ns += cell.after_ns
    return total
