"""Regional compilation: each block of a decoder by torch.compile, and an account of what that cost.

Blocks share their code, so one compiled graph serves all layers: compiling takes as long for 48 layers as for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ridgeline.compiler.internals.settings import CallbackArgs, callback_handler, counters, get_compilation_metrics

if TYPE_CHECKING:
    from ridgeline.models.decoder import Decoder


def compile_blocks(decoder: Decoder, **options: Any) -> Decoder:
    """Compile every block of ``decoder.blocks`` in place, lazily at its first call; ``options`` go to torch.compile.

    The block's ``forward`` is compiled, not its ``__call__``: FSDP2's hooks stay outside the graph. ``fullgraph`` is
    the default, so that a break inside a block is an error with its place and never a slow step.
    """
    options = {"fullgraph": True, "dynamic": False, **options}
    for block in decoder.blocks:
        block.forward = torch.compile(block.forward, **options)
    return decoder


def compile_function(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` compiled whole, lazily at its first call: for the loss, which is no block."""
    return torch.compile(function, **{"fullgraph": True, "dynamic": False, **options})


@dataclass
class CompileReport:
    """What torch.compile did: wall seconds in the compiler, graphs, graph breaks, recompiles with their reasons."""

    seconds: float = 0.0
    compilations: int = 0
    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    reasons: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class CompileWatch:
    """Counts what the compiler does while the ``with`` block runs. Reads dynamo's own callbacks and counters."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._compilations = 0
        self._started = 0.0
        self._graphs = _graphs()
        self._breaks = _breaks()
        self._seen = {id(metric) for metric in get_compilation_metrics()}

    def __enter__(self) -> CompileWatch:
        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)
        return self

    def __exit__(self, *error: object) -> None:
        callback_handler.remove_start_callback(self._on_start)
        callback_handler.remove_end_callback(self._on_end)

    @property
    def compilations(self) -> int:
        """Times the compiler has run so far, backward graphs included. A step during which it grows is not steady."""
        return self._compilations

    def report(self) -> CompileReport:
        """The account so far."""
        fresh = [metric for metric in get_compilation_metrics() if id(metric) not in self._seen]
        reasons = [reason for metric in fresh if (reason := getattr(metric, "recompile_reason", None))]
        return CompileReport(
            seconds=round(self._seconds, 3),
            compilations=self._compilations,
            graphs=_graphs() - self._graphs,
            graph_breaks=_breaks() - self._breaks,
            recompiles=len(reasons),
            reasons=[" ".join(reason.split())[:200] for reason in reasons[:8]],
        )

    def _on_start(self, args: CallbackArgs) -> None:
        self._started = time.perf_counter()

    def _on_end(self, args: CallbackArgs) -> None:
        self._seconds += time.perf_counter() - self._started
        self._compilations += 1


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _breaks() -> int:
    return int(sum(counters["graph_break"].values()))
