"""What the compiler says of itself while it runs: private hooks of torch 2.11 to 2.13, taken out again at the end.

One :class:`Hooks` passes what it hears to a :class:`Listener`::

    torch.__trace (a logger)        breaks with reasons, guards, compilation metrics     on_trace
    torch._dynamo, torch._inductor  warnings, among them the only word on the limit      on_warning
    recompilation reasons           the failed guards, and the frame they failed in      on_recompile
    OutputGraph.call_user_compiler  each graph, its backend, what the backend returned   on_graph
    compile_fx                      Inductor called while an exception is being handled  on_fallback
    _TorchDynamoContext.__call__    each compiled function the program makes             on_entry
    compilation callbacks           the compiler starts and ends in this thread          on_compile
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ridgeline.compiler.doctor.injection.after import after_import
from ridgeline.compiler.internals import check_version

_VERSION = check_version("the doctor")

from torch._dynamo import convert_frame, eval_frame, output_graph  # noqa: E402
from torch._dynamo.callback import CallbackArgs, callback_handler  # noqa: E402
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit  # noqa: E402
from torch._guards import CompileContext  # noqa: E402

WARNING_LOGGERS = ("torch._dynamo", "torch._inductor", "torch._functorch")
PLAIN_BACKENDS = frozenset(("eager", "eager_noexcept", "eager_debug", "pre_dispatch_eager"))
"""Backends that are meant to hand the graph back as it is."""


class Listener(Protocol):
    """Who is told, in the thread that compiles."""

    def on_trace(self, name: str, compile_id: str, attempt: int, metadata: dict[str, Any], payload: str) -> None:
        """A record of the structured trace; ``compile_id`` is ``frame/compilation``, or ""."""

    def on_warning(self, logger: str, message: str) -> None:
        """A warning or an error of the compiler."""

    def on_recompile(self, compile_id: str, code: types.CodeType, names: dict[str, Any], reasons: list[str]) -> None:
        """Guards failed. ``names`` are the frame's locals, over its globals."""

    def on_graph(self, compile_id: str, backend: str, graph: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A backend has compiled a graph; what is returned is called in the place of ``compiled``."""

    def on_graph_copy(self, backend: str, graph: Any) -> Any:
        """Before the backend, which may change it, gets the graph: what :meth:`on_graph` shall be given of it."""

    def on_fallback(self, compile_id: str, backend: str, error: str) -> None:
        """The backend did not do the work: its exception was swallowed (``error``), or it returned the graph ("")."""

    def on_entry(self, function: Callable[..., Any], compiled: Callable[..., Any], backend: str) -> Callable[..., Any]:
        """The program compiles ``function``; what is returned is what it gets in the place of ``compiled``."""

    def on_compile(self, began: bool) -> None:
        """The compiler starts, or ends, in this thread."""


class Hooks:
    """All hooks together: :meth:`install` and :meth:`remove`, once each.

    ``trace`` adds the handler on ``torch.__trace``, without which there are neither reasons nor guards.
    """

    def __init__(self, listener: Listener, trace: bool = True) -> None:
        self.listener: Listener = _Careful(listener)
        self.trace = trace
        self._undo: list[Callable[[], None]] = []
        self._backend: str | None = None
        self._outer: BaseException | None = None

    def install(self) -> None:
        """Put all in place."""
        if self.trace:
            self._log("torch.__trace", _TraceHandler(self.listener), logging.DEBUG)
        for name in WARNING_LOGGERS:
            self._log(name, _WarningHandler(self.listener), None)
        self._patch(convert_frame, "get_and_maybe_log_recompilation_reasons", self._reasons)
        self._patch(output_graph.OutputGraph, "call_user_compiler", self._user_compiler)
        self._patch(eval_frame._TorchDynamoContext, "__call__", self._context)
        self._patch_inductor()
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._undo.append(lambda: callback_handler.remove_start_callback(self._start))
        self._undo.append(lambda: callback_handler.remove_end_callback(self._end))

    def remove(self) -> None:
        """Take all out, in reverse order; what was there before is there again."""
        while self._undo:
            self._undo.pop()()

    def _log(self, name: str, handler: logging.Handler, level: int | None) -> None:
        logger = logging.getLogger(name)
        before, propagated = logger.level, logger.propagate
        logger.addHandler(handler)
        if level is not None:
            logger.setLevel(level)
            logger.propagate = False  # or the program's own logs would be full of empty lines

        def undo() -> None:
            logger.removeHandler(handler)
            if level is not None:
                logger.setLevel(before)
                logger.propagate = propagated

        self._undo.append(undo)

    def _patch(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._undo.append(lambda: setattr(owner, name, original))

    def _patch_inductor(self) -> None:
        """``compile_fx`` as soon as somebody imports it: importing it for a program that does not would cost seconds, and
        a backend that binds the name when it is imported itself must get ours."""
        name = "torch._inductor.compile_fx"
        self._undo.append(after_import(name, lambda: self._patch(sys.modules[name], "compile_fx", self._compile_fx)))

    def _compile_fx(self, original: Any) -> Any:
        @functools.wraps(original)
        def compile_fx(*args: Any, **kwargs: Any) -> Any:
            error = sys.exc_info()[1]
            if error is not None and self._backend is not None and error is not self._outer:
                self.listener.on_fallback(_compile_id(), self._backend, _one_line(error))
            return original(*args, **kwargs)

        return compile_fx

    def _reasons(self, original: Any) -> Any:
        listener = self.listener

        @functools.wraps(original)
        def get(entries: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
            reasons: list[str] = original(entries, frame, *args, **kwargs)
            if reasons and not kwargs.get("skip_logging"):
                names = {**frame.f_globals, **frame.f_locals}
                listener.on_recompile(_compile_id(), frame.f_code, names, list(reasons))
            return reasons

        return get

    def _user_compiler(self, original: Any) -> Any:
        @functools.wraps(original)
        def call_user_compiler(graph: Any, module: Any, example_inputs: Any) -> Any:
            backend = backend_name(graph.compiler_fn)
            before, self._backend = self._backend, backend
            outer, self._outer = self._outer, sys.exc_info()[1]
            copy = self.listener.on_graph_copy(backend, module)
            try:
                compiled = original(graph, module, example_inputs)
            finally:
                self._backend, self._outer = before, outer
            if _is_the_graph(compiled, module) and backend not in PLAIN_BACKENDS:
                self.listener.on_fallback(_compile_id(), backend, "")
            if getattr(graph, "package", None) is not None:
                return compiled  # it will be written to disk: a wrapper could not be
            return self.listener.on_graph(_compile_id(), backend, copy, compiled)

        return call_user_compiler

    def _context(self, original: Any) -> Any:
        """Each function that ``torch.compile`` returns; modules come by a second time with their ``__call__``."""

        @functools.wraps(original)
        def call(context: Any, function: Any) -> Any:
            compiled = original(context, function)
            if not isinstance(context, eval_frame.OptimizeContext) or not isinstance(compiled, types.FunctionType):
                return compiled
            eager = getattr(compiled, "_torchdynamo_orig_callable", function)
            entry = self.listener.on_entry(eager, compiled, backend_name(context.callback))
            functools.update_wrapper(entry, compiled)
            entry._torchdynamo_wrapper_id = id(entry)  # type: ignore[attr-defined]  # compiling it again finds `function`
            skip_frame(entry)
            return entry

        return call

    def _start(self, args: CallbackArgs) -> None:
        self.listener.on_compile(True)

    def _end(self, args: CallbackArgs) -> None:
        self.listener.on_compile(False)


class _Careful:
    """A listener whose reports cannot end the program that is watched: what fails is said once on stderr."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._said = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._listener, name)
        if name not in ("on_trace", "on_warning", "on_recompile", "on_fallback", "on_graph_copy"):
            return method

        @functools.wraps(method)
        def careful(*args: Any) -> Any:
            try:
                return method(*args)
            except Exception as error:
                if not self._said:
                    print(f"ridgeline doctor: {name} failed: {_one_line(error)}", file=sys.stderr)
                self._said = True
                return None

        return careful


class _TraceHandler(logging.Handler):
    """Structured records. Their payloads are made for us: this is what tracing costs, at compile time alone."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(logging.DEBUG)
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on under its name; an artifact has its name inside."""
        data: dict[str, Any] = getattr(record, "metadata", None) or {}
        name = next((key for key in data if key not in _CONTEXT), "")
        metadata = data.get(name)
        if name == "artifact" and isinstance(metadata, dict):
            name = str(metadata.get("name", ""))
        ids = (data.get("frame_id"), data.get("frame_compile_id"))
        compile_id = f"{ids[0]}/{ids[1]}" if None not in ids else ""
        attempt = int(data.get("attempt") or 0)
        payload = str(getattr(record, "payload", None) or "")
        self.listener.on_trace(name, compile_id, attempt, metadata if isinstance(metadata, dict) else {}, payload)


_CONTEXT = frozenset(
    ("rank", "compiled_autograd_id", "frame_id", "frame_compile_id", "attempt", "stack", "subgraph_name", "has_payload")
)


class _WarningHandler(logging.Handler):
    def __init__(self, listener: Listener) -> None:
        super().__init__(logging.WARNING)
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        """Warnings and errors."""
        self.listener.on_warning(record.name, record.getMessage())


def skip_frame(function: Callable[..., Any]) -> None:
    """Dynamo shall neither trace nor compile ``function`` itself; what it calls is still its business."""
    eval_frame.skip_code(function.__code__)


def backend_name(callback: Any) -> str:
    """The name that a user knows a backend by, through torch's wrappers around it."""
    seen = 0
    while callback is not None and seen < 8:
        if isinstance(name := getattr(callback, "compiler_name", None), str):
            return name
        inner = getattr(callback, "_torchdynamo_orig_backend", None)
        if inner is None:
            break
        callback, seen = inner, seen + 1
    return str(getattr(callback, "__name__", type(callback).__name__))


def counts(*groups: str) -> dict[str, int]:
    """Dynamo's counters of these groups, ``group.name`` to count."""
    return {f"{group}.{name}": int(number) for group in groups for name, number in counters[group].items()}


def keep_metrics(limit: int = 4096) -> None:
    """Dynamo keeps the metrics of so many compilations; 64 are usual. Kept ones are forgotten."""
    set_compilation_metrics_limit(0)
    set_compilation_metrics_limit(limit)


def metrics() -> list[dict[str, Any]]:
    """One record per compilation since :func:`keep_metrics`, as plain data."""
    return [dict(vars(one)) for one in get_compilation_metrics()]


def current_compile_id() -> str:
    """``frame/compilation`` of what is compiled in this thread, or ""."""
    return _compile_id()


def _compile_id() -> str:
    found = CompileContext.current_compile_id()
    if found is None or found.frame_id is None:
        return ""
    return f"{found.frame_id}/{found.frame_compile_id}"


def _is_the_graph(compiled: Any, module: Any) -> bool:
    return compiled is module or getattr(compiled, "__self__", None) is module


def _one_line(error: BaseException) -> str:
    text: Sequence[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]
