"""What a collective moved and between whom, from the arguments that writers leave.

Best source first: the kernel's and ``record_param_comms``' own fields (``Collective name``, ``In msg nelems``, ``dtype``,
``Process Group Name``, ``Group size``, ``Seq``), else shapes and types of the call's tensors (``Input Dims``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from ridgeline.profiling.table import TraceTable

DTYPES = {
    "float": ("float32", 4),
    "c10::half": ("float16", 2),
    "half": ("float16", 2),
    "c10::bfloat16": ("bfloat16", 2),
    "bfloat16": ("bfloat16", 2),
    "double": ("float64", 8),
    "long": ("int64", 8),
    "long int": ("int64", 8),
    "int": ("int32", 4),
    "short": ("int16", 2),
    "short int": ("int16", 2),
    "char": ("int8", 1),
    "signed char": ("int8", 1),
    "byte": ("uint8", 1),
    "unsigned char": ("uint8", 1),
    "bool": ("bool", 1),
    "float8_e4m3fn": ("float8_e4m3fn", 1),
    "float8_e5m2": ("float8_e5m2", 1),
    "c10::float8_e4m3fn": ("float8_e4m3fn", 1),
    "c10::float8_e5m2": ("float8_e5m2", 1),
}
"""Writers' names of dtypes (``record_param_comms`` and C++), in lower case: torch's name and the element's bytes."""


class _Arguments(msgspec.Struct, gc=False):
    collective: Any = msgspec.field(default=None, name="Collective name")
    group: Any = msgspec.field(default=None, name="Process Group Name")
    group_ranks: Any = msgspec.field(default=None, name="Process Group Ranks")
    group_size: Any = msgspec.field(default=None, name="Group size")
    dtype: Any = None
    sent: Any = msgspec.field(default=None, name="In msg nelems")
    received: Any = msgspec.field(default=None, name="Out msg nelems")
    sequence: Any = msgspec.field(default=None, name="Seq")
    dims: Any = msgspec.field(default=None, name="Input Dims")
    types: Any = msgspec.field(default=None, name="Input type")


@dataclass(frozen=True)
class Message:
    """Facts of one collective; None where no source says. ``elements`` is the larger of input and output; where only
    the input's shape is known (``input_only``) an all-gather's output has to be worked out from the group's size."""

    collective: str | None = None
    group: str | None = None
    group_ranks: str | None = None
    group_size: int | None = None
    dtype: str | None = None
    elements: int | None = None
    input_only: bool = False
    sequence: int | None = None

    def size(self, op: str | None, world: int | None) -> int | None:
        """Bytes of the larger of input and output, or None."""
        width = dict(DTYPES.values()).get(self.dtype or "")
        if self.elements is None or width is None:
            return None
        ranks = self.group_size or world
        if self.input_only and op == "all_gather":
            return _count(self.elements * width * ranks) if ranks else None
        return _count(self.elements * width)


def read_messages(table: TraceTable, sources: list[Any]) -> list[Message]:
    """The facts of each collective from its rows in ``sources`` (arrays ``[n]`` of table rows, -1 for none), each fact
    from the first source that states it."""
    out = [Message()] * len(sources[0])
    for rows in sources:
        known = np.flatnonzero(np.asarray(rows) >= 0)
        found = table.decode(np.asarray(rows)[known], _Arguments)
        for at, arguments in zip(known.tolist(), found, strict=True):
            if arguments is not None:
                out[at] = _fill(out[at], _read(arguments, table.names[table.name[rows[at]]]))
    return out


def _read(found: _Arguments, name: str) -> Message:
    counts = [one for one in (_count(found.sent), _count(found.received)) if one is not None]
    dims = list(_volumes(found.dims)) if not counts and name != "record_param_comms" else []
    elements = max(counts or dims, default=None)
    return Message(
        collective=_text(found.collective),
        group=_text(found.group),
        group_ranks=_text(found.group_ranks),
        group_size=_count(found.group_size),
        dtype=_dtype(found),
        elements=elements,
        input_only=(not counts and not name.startswith("c10d::")) or len(dims) == 1,
        sequence=_count(found.sequence),
    )


def _fill(first: Message, other: Message) -> Message:
    """``first`` with what it lacks taken from ``other``; a volume comes with the knowledge of what it measures."""
    merged = {name: mine if mine is not None else getattr(other, name) for name, mine in vars(first).items()}
    merged["input_only"] = first.input_only if first.elements is not None else other.input_only
    return replace(first, **merged)


def _volumes(dims: Any) -> Iterable[int]:
    """Elements of each tensor argument: ``[[8, 4], [], [[3], [5]]]`` gives 32 and, for the list of tensors, 3 + 5."""
    for one in dims if isinstance(dims, list) else []:
        if isinstance(one, list) and one:
            if all(isinstance(size, int) for size in one):
                yield math.prod(one)
            else:
                volume = sum(_volumes(one))
                if volume:
                    yield volume


def _dtype(found: _Arguments) -> str | None:
    types = found.types if isinstance(found.types, list) else []
    for one in (found.dtype, *types):
        known = DTYPES.get(str(one).lower())
        if known is not None:
            return known[0]
    return None


def _count(value: Any) -> int | None:
    """A count that a column can hold, or None."""
    return value if isinstance(value, int) and 0 <= value < 2**63 else None


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
