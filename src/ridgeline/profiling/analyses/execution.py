"""Torch's execution trace (``torch.profiler.ExecutionTraceObserver``): operators with the tensors they take and give.

Nodes stand in the file in the order in which they ended, children before parents; ``ctrl_deps`` is the parent. A tensor
is ``[id, storage, offset, elements, bytes of one, device]``; the schema of an operator says which arguments it changes
(``Tensor(a!)``) and which results are views (``Tensor(a)``). Schema of the file: 1.0.3 and later (torch 2.4 on).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ridgeline.errors import UserError
from ridgeline.profiling.capture import EXECUTION


class _Side(msgspec.Struct, gc=False):
    values: list[Any] = []
    shapes: list[Any] = []
    types: list[Any] = []
    strides: list[Any] = []


class _Attribute(msgspec.Struct, gc=False):
    name: str = ""
    value: Any = None


class Node(msgspec.Struct, gc=False):
    """One operator, range or autograd node."""

    id: int
    name: str = ""
    ctrl_deps: int = 0
    inputs: _Side = msgspec.field(default_factory=_Side)
    outputs: _Side = msgspec.field(default_factory=_Side)
    attrs: list[_Attribute] = []

    def attribute(self, name: str) -> Any:
        """The value of an attribute, or None."""
        return next((one.value for one in self.attrs if one.name == name), None)


class _File(msgspec.Struct):
    nodes: list[Node]
    schema: str = ""


class Tensor(NamedTuple):
    """A tensor as a node names it. ``bytes`` reaches from its first to its last element in the storage."""

    storage: int
    bytes: int
    dtype: str
    device: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Effects:
    """What a schema says: places of arguments it changes, and for each result whether it is new memory."""

    changes: frozenset[int]
    fresh: tuple[bool, ...]
    known: bool


def load_execution_trace(path: str | Path) -> list[Node]:
    """The nodes of an execution trace (``.json`` or ``.json.gz``), in the order in which they ended.

    Raises:
        UserError: unreadable, or not an execution trace.
    """
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return msgspec.json.decode(data, type=_File).nodes
    except msgspec.DecodeError as error:
        raise UserError(f"execution trace {path}: not one of ExecutionTraceObserver's ({error})") from None
    except (OSError, EOFError) as error:
        raise UserError(f"execution trace {path}: cannot be read ({error})") from None


def is_execution_trace(path: str | Path) -> bool:
    """Whether a file begins as an execution trace does, and not as a profiler's trace."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            head = file.read(256)
    except (OSError, EOFError):
        return False
    return head.lstrip().startswith(b"{") and b'"schema"' in head and b'"traceEvents"' not in head


def recorded_beside(trace: str | Path) -> Path | None:
    """The execution trace that was recorded with a profiler's trace: the file of its name in ``execution/``."""
    found = Path(trace).parent / EXECUTION / Path(trace).name
    return found if found.is_file() else None


def execution_files(traces: Mapping[int, str], given: str | Path | None = None) -> dict[int, Path]:
    """rank -> its execution trace, for the ranks' trace files.

    ``given``: a file (for one rank), a folder whose files have the traces' names, or None for what was recorded beside
    them; ranks without one are left out.

    Raises:
        UserError: nothing there, or one file for several ranks.
    """
    if given is None:
        whole = len(set(traces.values())) == len(traces)  # a merged file has no execution trace of one rank beside it
        beside = {rank: recorded_beside(trace) for rank, trace in traces.items()} if whole else {}
        return {rank: path for rank, path in beside.items() if path is not None}
    path = Path(given)
    if path.is_dir():
        inside = {rank: path / Path(trace).name for rank, trace in traces.items()}
        found = {rank: one for rank, one in inside.items() if one.is_file()}
        if not found:
            raise UserError(
                f"execution trace {path}: holds no file with a trace's name ({next(iter(inside.values())).name})"
            )
        return found
    if len(traces) > 1:
        raise UserError(f"execution trace {path}: is of one rank, and the trace has {len(traces)}; add --rank")
    return dict.fromkeys(traces, path)


def tensors(side: _Side) -> Iterator[tuple[int, Tensor]]:
    """(place of the argument, tensor) of every tensor on one side of a node, those in lists included."""
    blank: list[Any] = [[]] * len(side.values)
    columns = (side.values, side.types, side.shapes or blank, side.strides or blank)
    for place, (value, kind, shape, stride) in enumerate(zip(*columns, strict=False)):
        yield from ((place, one) for one in _unpack(value, str(kind), shape, stride))


def _unpack(value: Any, kind: str, shape: Any, stride: Any) -> Iterator[Tensor]:
    if kind.startswith("Tensor("):
        if _is_tensor(value) and value[1] > 0:
            dims, steps = tuple(shape or ()), tuple(stride or ())
            yield Tensor(value[1], _extent(value, dims, steps), kind[7:-1], str(value[5]), dims, steps)
    elif kind.startswith(("GenericList[", "Tuple[")) and isinstance(value, list):
        inner = kind[kind.index("[") + 1 : -1].split(",")
        for at, one in enumerate(value):
            inside = (side[at] if isinstance(side, list) and at < len(side) else [] for side in (shape, stride))
            yield from _unpack(one, inner[at] if at < len(inner) else "", *inside)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 6 and all(type(one) is int for one in value[:5])


def _extent(value: list[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if len(strides) != len(shape) or not all(type(one) is int for one in (*shape, *strides)):
        return int(value[3]) * int(value[4])
    if 0 in shape:
        return 0
    return (sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1) * int(value[4])


@lru_cache(maxsize=4096)
def effects(schema: str) -> Effects:
    """What an operator's schema says of its arguments and results."""
    head, arrow, results = schema.partition(" -> ")
    if not arrow or "(" not in head:
        return Effects(frozenset(), (), known=False)
    arguments = _split(head[head.index("(") + 1 : -1])
    changes = frozenset(at for at, one in enumerate(one for one in arguments if one != "*") if "!" in one)
    inner = results[1:-1] if results.startswith("(") and results.endswith(")") else results
    fresh = tuple("(" not in one.split(" ")[0] for one in _split(inner))
    return Effects(changes, fresh, known=True)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    return [one.strip() for one in re.split(r",(?![^(\[]*[)\]])", text) if one.strip()]
