"""Events of the compiler, in the process it runs in, made an :class:`Observation`.

::

    with Observer() as observer:
        compiled(x)
    observation = observer.observation()
"""

from __future__ import annotations

import inspect
import re
import time
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ridgeline.compiler.doctor import precision
from ridgeline.compiler.doctor.assemble import assemble
from ridgeline.compiler.doctor.breaks import parse_break
from ridgeline.compiler.doctor.clock import Clock
from ridgeline.compiler.doctor.guards import Failure, differing, parse_failure, parse_guards
from ridgeline.compiler.doctor.model import Observation
from ridgeline.compiler.doctor.raw import EntryInfo, Raw, SeenBreak, SeenGraph, SeenRecompile
from ridgeline.compiler.doctor.timing import Interleave, step_timing
from ridgeline.compiler.internals.observe import Hooks, counts, current_compile_id, keep_metrics, metrics
from ridgeline.compiler.internals.settings import suppresses_errors

_COUNTED = ("inductor", "aot_autograd")


class Observer:
    """Watches every ``torch.compile`` of this process, from ``__enter__`` to ``__exit__``.

    ``trace`` listens to the structured trace, which costs compile time and no run time; without it breaks and guards
    are not known. ``measure`` calls functions in eager now and then after the warm-up, to time them (see :mod:`.timing`).
    """

    def __init__(self, *, trace: bool = True, measure: bool = False) -> None:
        self.interleave = Interleave() if measure else None
        self._clock = Clock(self.interleave.choose if self.interleave else None)
        self._hooks = Hooks(self, trace)
        self._raw = Raw()
        self._skips = 0
        self._began = 0.0

    def __enter__(self) -> Observer:
        self._before = counts(*_COUNTED)
        keep_metrics()
        self._began = time.perf_counter()
        self._hooks.install()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.remove()
        self._finish()

    def observation(self) -> Observation:
        """What was seen so far."""
        self._finish()
        made = assemble(self._raw)
        made.torch = torch.__version__
        made.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        if self.interleave is not None:
            made.timing = step_timing(self._raw.clock_entries, self.interleave.leader)
        return made

    @property
    def entries(self) -> int:
        """Functions the program has compiled, called or not."""
        return len(self._raw.entries)

    def guard_texts(self) -> dict[str, list[str]]:
        """Guards of every compilation, without addresses: the same on every rank that compiled the same."""
        return {compile_id: one.texts for compile_id, one in self._raw.guards.items()}

    def _finish(self) -> None:
        raw = self._raw
        if not self._hooks.trace:
            raw.metrics = [{"compile_id": one.get("compile_id") or "", **_known(one)} for one in metrics()]
        raw.clock_graphs, raw.clock_entries = self._clock.graphs(), self._clock.entries()
        raw.compile_seconds = self._clock.compile_seconds
        raw.wall_seconds = time.perf_counter() - self._began
        after = counts(*_COUNTED)
        changed = {name: number - self._before.get(name, 0) for name, number in after.items()}
        raw.caches = {name: number for name, number in changed.items() if number and "cache" in name}
        raw.suppressed = suppresses_errors()

    # What the hooks call, in the thread that compiles.

    def on_trace(self, name: str, compile_id: str, attempt: int, metadata: dict[str, Any], payload: str) -> None:
        """Breaks, guards and metrics."""
        if name == "dynamo_graph_break_reason":
            thread = self._clock.thread()
            entry = thread.step.key if thread.inside and thread.step else -1
            after = thread.last.key if thread.inside else ""
            self._raw.breaks.append(SeenBreak(parse_break(payload), compile_id, after, entry))
        elif name == "dynamo_cpp_guards_str":
            self._raw.guards[compile_id] = parse_guards(payload)
        elif name in ("compilation_metrics", "bwd_compilation_metrics"):
            self._raw.metrics.append({"compile_id": compile_id, **_known(metadata)})

    def on_warning(self, logger: str, message: str) -> None:
        """Of all warnings only one says what no other event does: why CUDA graphs are not used."""
        if "skipping cudagraphs due to" in message and self._raw.graphs:
            self._raw.graphs[-1].cudagraph_reason = message.splitlines()[0][:300]
        elif "skipping cudagraphs due to" in message:
            self._raw.graphs.append(SeenGraph(current_compile_id(), "", 1, message.splitlines()[0][:300]))

    def on_recompile(self, compile_id: str, code: types.CodeType, names: dict[str, Any], reasons: list[str]) -> None:
        """The values are read now: the frame is gone afterwards."""
        failures = [self._failure(reason, names) for reason in reasons]
        seen = SeenRecompile(compile_id, code.co_name, code.co_filename, code.co_firstlineno, failures)
        self._raw.recompiles.append(seen)

    def _failure(self, reason: str, names: dict[str, Any]) -> Failure:
        failure = _with_state(parse_failure(reason, names))
        guards = self._raw.guards.get(failure.compile_id)
        return replace(failure, differing=differing(guards.texts, names)) if guards else failure

    def on_graph_copy(self, backend: str, graph: Any) -> Any:
        """Only of graphs whose precision is checked."""
        self._skips = counts("inductor").get("inductor.cudagraph_skips", 0)
        return precision.copy_graph(graph) if precision.worth_checking(backend) else None

    def on_graph(self, compile_id: str, backend: str, graph: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A clock on the graph, and at its first call a look at its precision."""
        skips = counts("inductor").get("inductor.cudagraph_skips", 0) - self._skips
        seen = SeenGraph(compile_id, backend, skips)
        self._raw.graphs.append(seen)
        if graph is not None:

            def tell(error: float, error_eager: float) -> None:
                seen.error, seen.error_eager = error, error_eager

            compiled = precision.check_first_call(graph, compiled, tell)
        return self._clock.graph(compile_id, compiled)

    def on_fallback(self, compile_id: str, backend: str, error: str) -> None:
        """Noted with the compiled function it happened in."""
        thread = self._clock.thread()
        entry = thread.step.key if thread.step else -1
        self._raw.fallbacks.append((compile_id, backend, error, entry))

    def on_entry(self, function: Callable[..., Any], compiled: Callable[..., Any], backend: str) -> Callable[..., Any]:
        """A clock on the compiled function."""
        key = len(self._raw.entries)
        self._raw.entries[key] = _describe(function, backend)
        return self._clock.entry(key, function, compiled)

    def on_compile(self, began: bool) -> None:
        """The time in the compiler."""
        self._clock.compiling(began)


_METRICS = re.findall(
    r"\w+",
    "co_name co_filename co_firstlineno entire_frame_compile_time_s backend_compile_time_s inductor_compile_time_s "
    "code_gen_time_s dynamo_time_before_restart_s backward_cumulative_compile_time_us graph_op_count guard_count "
    "guard_latency_us fail_type fail_reason fail_user_frame_filename fail_user_frame_lineno is_forward duration_us "
    "inductor_fx_local_cache_hit_count inductor_fx_local_cache_miss_count "
    "aotautograd_local_cache_hit_count aotautograd_local_cache_miss_count",
)


def _known(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata.get(name) for name in _METRICS}


def _with_state(failure: Failure) -> Failure:
    """The new value of a global state that is a switch; the old one was the other."""
    readers: dict[str, Callable[[], bool]] = {
        "grad_mode": torch.is_grad_enabled,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    }
    if failure.what == "global state" and failure.source in readers:
        now = readers[failure.source]()
        return replace(failure, old=str(not now), new=str(now))
    return failure


def _describe(function: Callable[..., Any], backend: str) -> EntryInfo:
    """Name and place as the user wrote them: of a module its class, whose forward is meant."""
    owner = getattr(function, "__self__", None)
    if owner is None and isinstance(wrapped := getattr(function, "__wrapped__", None), torch.nn.Module):
        owner = wrapped  # a container of torch.nn: Dynamo puts a frame of its own around it
    target: Any = function
    name = getattr(function, "__qualname__", type(function).__name__)
    if isinstance(owner, torch.nn.Module):
        target, name = type(owner).forward, type(owner).__name__
    target = inspect.unwrap(target) if callable(target) else target
    code = getattr(target, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code is not None else ("", 0)
    return EntryInfo(name, file, line, backend)
