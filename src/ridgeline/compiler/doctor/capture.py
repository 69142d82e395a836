"""What a trial keeps of a running program: the observation, the first call's time, and calls to be repeated for proof."""

from __future__ import annotations

import functools
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ridgeline.compiler.doctor.observe import Observer
from ridgeline.compiler.doctor.proof import (
    MOST_BYTES,
    NotComparable,
    Result,
    Snapshot,
    compare,
    inner_function,
    with_globals,
)
from ridgeline.compiler.internals.observe import skip_frame

CALLS = (0, 1, 2, 5)
"""Calls of each compiled function that are repeated: the first ones, and one after the warm-up."""
MOST_ENTRIES = 4
GRAPH = "_graph"
"""How the outlining rewrite ends the name of what it compiles."""


@dataclass
class _Entry:
    """A compiled function: what it was made of, the options of torch.compile, and its snapshots by call."""

    function: Callable[..., Any]
    options: dict[str, Any] | None
    compiled: Any = None
    calls: int = 0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


class Capture(Observer):
    """An observer that also takes snapshots. ``keep`` is a dict, empty for the first :data:`CALLS`; None takes none."""

    def __init__(self, keep: dict[str, Any] | None, *, trace: bool) -> None:
        super().__init__(trace=trace, measure=False)
        self.first_call = 0.0
        self._keep = keep is not None
        self._caught: dict[str, _Entry] = {}
        self._named: Counter[str] = Counter()
        self._given: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Capture:
        super().__enter__()
        self._compile = torch.compile
        torch.compile = self._noting
        return self

    def __exit__(self, *error: Any) -> None:
        torch.compile = self._compile
        super().__exit__(*error)

    def _noting(self, model: Any = None, **given: Any) -> Any:
        """``torch.compile`` that leaves its options where :meth:`on_entry` finds them."""
        if model is None:
            return lambda one: self._noting(one, **given)
        self._given.append(given)
        try:
            return self._compile(model, **given)
        finally:
            self._given.pop()

    def on_entry(self, function: Callable[..., Any], compiled: Callable[..., Any], backend: str) -> Callable[..., Any]:
        """A clock (the observer's), and before some calls a snapshot."""
        timed = super().on_entry(function, compiled, backend)
        entry = self._catch(function, dict(self._given[-1]) if self._given else None)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._on_call(entry, args, kwargs)
            return timed(*args, **kwargs)

        functools.update_wrapper(call, timed)
        skip_frame(timed)
        entry.compiled = call
        return call

    def on_region(self, model: torch.nn.Module, options: dict[str, Any]) -> None:
        """Only the model's blocks are compiled: its own call is what the proof repeats."""
        entry = self._catch(model.__call__, options)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self._on_call(entry, args, kwargs), with_kwargs=True
        )

    def _catch(self, function: Callable[..., Any], options: dict[str, Any] | None) -> _Entry:
        owner = getattr(function, "__self__", None)
        plain = inner_function(function)
        name = (
            type(owner).__name__ if isinstance(owner, torch.nn.Module) else getattr(plain, "__qualname__", "function")
        )
        name = name.strip("_").removesuffix(GRAPH)  # the outlining rewrite names its graph so
        self._named[name] += 1
        entry = _Entry(function, options)
        self._caught[f"{name}#{self._named[name]}"] = entry
        return entry

    def _on_call(self, entry: _Entry, args: Any, kwargs: Any) -> None:
        if not self.first_call:
            self.first_call = time.perf_counter()
        at, entry.calls = entry.calls, entry.calls + 1
        if not self._keep or at not in CALLS or torch.compiler.is_compiling():
            return
        if sum(bool(one.snapshots) for one in self._caught.values()) >= MOST_ENTRIES and not entry.snapshots:
            return
        began = time.perf_counter()
        try:
            snapshot = Snapshot(entry.function, args, kwargs)
            size = sum(one.numel() * one.element_size() for one in snapshot.tensors)
            if self._bytes + size > MOST_BYTES:
                raise NotComparable(f"more than {MOST_BYTES >> 30} GiB of snapshots")
            self._bytes += size
            entry.snapshots[at] = snapshot
        except NotComparable as error:
            entry.failures[at] = str(error)
        self.first_call += time.perf_counter() - began

    def prove(self, reference: str | None, save: str | None) -> dict[str, Any]:
        """Repeat the kept calls: without ``reference`` in eager and float64, written to ``save``; else compiled, and
        compared with what ``reference`` holds. Keys: ``calls`` compared, ``error``, ``error_eager``, ``why``, ``notes``.
        """
        notes = {one.note for entry in self._caught.values() for one in entry.snapshots.values() if one.note}
        failures = {
            f"{name}, call {at}: {why}" for name, one in self._caught.items() for at, why in one.failures.items()
        }
        torch.compiler.reset()
        found = self._save(Path(save)) if save else self._compare(Path(reference or ""))
        return {"notes": sorted(notes), "failures": sorted(failures), **found}

    def _save(self, file: Path) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        failures: list[str] = []
        for name, entry in self._caught.items():
            for at, snapshot in entry.snapshots.items():
                tensors = [one.detach().clone() for one in snapshot.tensors]
                try:
                    eager = snapshot.run()
                    exact = snapshot.run(double=True)
                except Exception as error:
                    failures.append(f"{name}, call {at}: no float64 reference: {_line(error)}")
                    continue
                kept[f"{name}@{at}"] = {"tensors": tensors, "eager": eager.plain(), "exact": exact.plain()}
        torch.save(kept, file)
        return {"calls": len(kept), "why": "" if kept else "; ".join(failures) or "no call could be kept"}

    def _compare(self, file: Path) -> dict[str, Any]:
        kept = torch.load(file, weights_only=True)
        worst, worst_eager, calls = 0.0, 0.0, 0
        for name, entry in self._caught.items():
            for at, snapshot in entry.snapshots.items():
                row = kept.get(f"{name}@{at}")
                if row is None:
                    continue
                if entry.options is None:
                    return _unproven(f"{name} is not compiled by torch.compile")
                try:
                    snapshot.load(row["tensors"])
                    new = snapshot.run(wrap=functools.partial(_compiled, entry))
                except NotComparable as error:
                    return _unproven(f"{name}, call {at}: {error}")
                except Exception as error:
                    return _unproven(f"{name}, call {at}: {_line(error)}")
                verdict = compare(new, Result(**row["eager"]), Result(**row["exact"]))
                worst, worst_eager = max(worst, verdict.error), max(worst_eager, verdict.error_eager)
                calls += 1
                if not verdict.passed:
                    why = f"{name}, call {at}: {verdict.why}"
                    return {"calls": calls, "error": verdict.error, "error_eager": verdict.error_eager, "why": why}
        if not calls:
            return _unproven("no call of the unchanged program was met again")
        return {"calls": calls, "error": worst, "error_eager": worst_eager, "why": ""}


def _compiled(entry: _Entry, target: Any) -> Any:
    """``target`` compiled as the program does it; within its wrapper where a rewrite has put one around it."""
    assert entry.options is not None
    made = torch.compile(target, **entry.options)
    scope = getattr(inner_function(entry.function), "__globals__", {})
    name = next((one for one, value in scope.items() if value is entry.compiled and one.endswith(GRAPH)), None)
    around = [one for one in scope.values() if isinstance(one, types.FunctionType) and name in one.__code__.co_names]
    return with_globals(around[0], {**scope, name: made}, around[0].__closure__) if name and around else made


def _unproven(why: str) -> dict[str, Any]:
    return {"calls": 0, "error": None, "error_eager": None, "why": why}


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
