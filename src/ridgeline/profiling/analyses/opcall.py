"""One operator call as the profiler recorded it: sizes, types, strides and concrete arguments, checked as they are asked.

Asking for what was not recorded raises ``LookupError`` or ``ValueError``; :mod:`opcosts` turns that into "not counted".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec

Shape = list[int]

TYPES = {
    "float": ("float32", 4),
    "double": ("float64", 8),
    "c10::Half": ("float16", 2),
    "c10::BFloat16": ("bfloat16", 2),
    "c10::Float8_e4m3fn": ("float8_e4m3fn", 1),
    "c10::Float8_e4m3fnuz": ("float8_e4m3fnuz", 1),
    "c10::Float8_e5m2": ("float8_e5m2", 1),
    "c10::Float8_e5m2fnuz": ("float8_e5m2fnuz", 1),
    "long": ("int64", 8),
    "long int": ("int64", 8),
    "int": ("int32", 4),
    "short": ("int16", 2),
    "short int": ("int16", 2),
    "signed char": ("int8", 1),
    "unsigned char": ("uint8", 1),
    "bool": ("bool", 1),
    "c10::complex<float>": ("complex64", 8),
    "c10::complex<double>": ("complex128", 16),
}


class OpArguments(msgspec.Struct, gc=False):
    """What the profiler writes of an operator's inputs with ``record_shapes``; one entry per argument."""

    dims: list[Any] = msgspec.field(name="Input Dims", default_factory=list)
    types: list[Any] = msgspec.field(name="Input type", default_factory=list)
    strides: list[Any] = msgspec.field(name="Input Strides", default_factory=list)
    concrete: list[Any] = msgspec.field(name="Concrete Inputs", default_factory=list)


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one call; ``dtype`` is torch's name of the type it computes in; ``matmul`` its class."""

    flops: int
    bytes: int
    dtype: str
    matmul: bool


class Call:
    """One call's arguments, checked as they are asked for; ``LookupError``/``ValueError`` = cannot be counted."""

    def __init__(self, arguments: OpArguments) -> None:
        self.arguments = arguments

    def shape(self, at: int) -> Shape:
        """Sizes of the tensor in place ``at``."""
        self.size_of(at)
        dims = self.arguments.dims[at]
        if not all(isinstance(one, int) and one >= 0 for one in dims):
            raise ValueError("not one tensor")
        return list(dims)

    def size_of(self, at: int) -> int:
        """Bytes of one element of the tensor in place ``at``."""
        return TYPES[self.arguments.types[at]][1]

    def is_tensor(self, at: int) -> bool:
        """Whether a tensor of a known type stands there."""
        return at < len(self.arguments.types) and self.arguments.types[at] in TYPES

    def rank_of(self, at: int) -> tuple[bool, int]:
        """Order of type promotion: floating types first, then wider ones."""
        name, size = TYPES[self.arguments.types[at]]
        return name.startswith(("float", "bfloat", "complex")), size

    def count(self, at: int) -> int:
        """Distinct elements of the tensor in place ``at``."""
        shape = self.shape(at)
        strides = self.arguments.strides[at] if at < len(self.arguments.strides) else []
        if len(strides) != len(shape):
            return prod(shape)
        return prod(size for size, stride in zip(shape, strides, strict=True) if stride != 0 or size == 0)

    def bytes_of(self, *places: int) -> int:
        """Bytes of these tensors; places without one count nothing."""
        return sum(self.count(at) * self.size_of(at) for at in places if self.is_tensor(at))

    def tensors(self) -> list[int]:
        """Places that hold a tensor."""
        return [at for at in range(len(self.arguments.types)) if self.is_tensor(at)]

    def value(self, at: int) -> Any:
        """The concrete (non-tensor) argument: number, bool, list or text."""
        text = self.arguments.concrete[at]
        if text in ("True", "False"):
            return text == "True"
        return json.loads(text.replace("True", "true").replace("False", "false"))

    def made(self, flops: int, total: int, at: int = 0, matmul: bool = True) -> Cost:
        """The cost, with the type of the tensor in place ``at``."""
        return Cost(flops, total, TYPES[self.arguments.types[at]][0], matmul)
