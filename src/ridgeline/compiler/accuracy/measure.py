"""How far eager and compiled are from float64, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ridgeline.compiler.accuracy.reference import Answer

ALLOWED = 2.0  # times eager's own error
CLEARLY = 1.1  # a smaller ratio of errors is called equal


@dataclass(frozen=True)
class Row:
    """One output or gradient: errors against float64, relative (2-norm) and largest absolute.

    ``worse``: compiled is more than twice as far as eager, and by more than rounding's luck (half an epsilon of the
    tensor's dtype, relative).
    """

    name: str
    dtype: str
    shape: list[int]
    eager: float
    compiled: float
    eager_largest: float
    compiled_largest: float
    closer: str  # "compiled", "eager" or "equal"
    worse: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def rows(names: Sequence[str], exact: Answer, eager: Answer, compiled: Answer) -> list[Row]:
    """A row for every output and every gradient; ``names`` are those of the leaves."""
    found = [
        row(f"output {at}", truth, one, other)
        for at, (truth, one, other) in enumerate(zip(exact.outputs, eager.outputs, compiled.outputs, strict=True))
    ]
    for name, truth, one, other in zip(names, exact.gradients, eager.gradients, compiled.gradients, strict=True):
        if truth is not None and one is not None and other is not None:
            found.append(row(f"gradient of {name}", truth, one, other))
    return found


def row(name: str, truth: Tensor, eager: Tensor, compiled: Tensor) -> Row:
    """The errors of one tensor; what is not finite where the truth is counts as infinitely wrong."""
    ours, theirs = distance(eager, truth), distance(compiled, truth)
    luck = torch.finfo(eager.dtype).eps / 2
    worse = theirs[0] > ALLOWED * max(ours[0], luck)
    return Row(
        name=name,
        dtype=str(eager.dtype).removeprefix("torch."),
        shape=[*eager.shape],
        eager=ours[0],
        compiled=theirs[0],
        eager_largest=ours[1],
        compiled_largest=theirs[1],
        closer="compiled" if theirs[0] * CLEARLY < ours[0] else "eager" if ours[0] * CLEARLY < theirs[0] else "equal",
        worse=worse,
    )


def distance(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(relative error in the 2-norm, largest absolute error). With a truth of zero the first is absolute too."""
    difference = value.double() - truth.double()
    same = (value.double() == truth.double()) | (value.isnan() & truth.isnan())  # equal infinities are no error
    difference = torch.where(same, 0.0, difference)
    if not difference.numel():
        return 0.0, 0.0
    if not bool(difference.isfinite().all()):
        return math.inf, math.inf
    size = float(torch.where(truth.isfinite(), truth, 0.0).double().norm())
    return float(difference.norm()) / (size or 1.0), float(difference.abs().max())
