"""Which operator makes compiled code less accurate than eager: bisection over operators, then over the compiler.

The idea: cut the captured graph after its n-th operator and compile that. Once the guilty operator is inside, its
value (or the gradient through it) is worse than eager's; before, nothing is. So the first bad n is found by
bisection. That operator is then tried alone, and with as few of its neighbours as make it fail, because what is
accurate alone and wrong in company is the fault of the fusion. At last the small graph goes through the compiler
stage by stage, to say where it goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ridgeline.compiler.accuracy.measure import Row, rows
from ridgeline.compiler.accuracy.prefix import Captured, first, only, spelled
from ridgeline.compiler.accuracy.reference import answer, reference
from ridgeline.compiler.internals.fx_graphs import user_frames
from ridgeline.compiler.internals.settings import inductor_options

Backend = str | Callable[..., Any]
MOST_COMPANY = 16  # operators before the guilty one that are tried with it
# Stages of the default compiler, each doing all that the one before does, and more.
STAGES: tuple[tuple[str, Backend, dict[str, Any]], ...] = (
    ("Dynamo's graph", "eager", {}),
    ("AOTAutograd's graphs", "aot_eager", {}),
    ("the decompositions", "aot_eager_decomp_partition", {}),
    ("Inductor's loops, unfused", "inductor", {"max_fusion_size": 1, "epilogue_fusion": False}),
)


@dataclass
class Blame:
    """The operator found, where it stands, what fails around it, and the stage of the compiler that does it."""

    operator: str
    node: str
    graph: int
    file: str | None
    line: int | None
    company: list[str]  # operators that must be compiled with it for the fault to show
    stage: str
    cured_by_roundings: bool  # the fault disappears when Inductor rounds wherever eager does
    errors: Row
    compiles: int
    small: Captured

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        document = {name: value for name, value in vars(self).items() if name not in ("errors", "small")}
        return {**document, "errors": asdict(self.errors)}


class Judge:
    """Compiles captured parts with one backend and compares; counts how often."""

    def __init__(self, backend: Backend, say: Callable[[str], None] = lambda line: None) -> None:
        self.backend, self.say, self.compiles = backend, say, 0

    def rows(self, captured: Captured, backend: Backend | None = None) -> list[Row]:
        """Errors of the part's outputs and of the gradients of its inputs."""
        self.compiles += 1
        leaves = [one for one in captured.inputs if isinstance(one, Tensor) and one.is_floating_point()]
        module = captured.graph
        exact = reference(Functional(module), captured.inputs, {})
        eager = answer(lambda: module(*captured.inputs), leaves)
        torch.compiler.reset()
        compiled = torch.compile(module, backend=backend or self.backend, dynamic=False)
        got = answer(lambda: compiled(*captured.inputs), leaves)
        return rows([f"input {at}" for at in range(len(leaves))], exact, eager, got)

    def worst(self, captured: Captured, backend: Backend | None = None) -> Row | None:
        """The row that is worst by the rule, or None when all are good."""
        bad = [one for one in self.rows(captured, backend) if one.worse]
        return max(bad, key=lambda one: one.compiled, default=None)


class Functional:
    """A graph module as a plain function: its parameters are inputs already, so nothing needs a copy in float64."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module

    def __call__(self, *values: Any) -> Any:
        return self.module(*values)


def find(graphs: Sequence[Captured], judge: Judge) -> Blame | None:
    """The first operator that is worse compiled, or None when every graph alone is as good as eager."""
    for number, captured in enumerate(graphs):
        judge.say(f"graph {number}: {len(captured.operators)} operators")
        if judge.worst(captured) is None:
            continue
        count = _first_bad(captured, judge)
        guilty = captured.operators[count - 1]
        small, company = _smallest(captured, count, judge)
        errors = judge.worst(small)
        assert errors is not None
        frames = user_frames(guilty.meta.get("stack_trace"))
        stage, casts = _stage(small, judge)
        return Blame(
            operator=spelled(guilty),
            node=guilty.name,
            graph=number,
            file=frames[-1][0] if frames else None,
            line=frames[-1][1] if frames else None,
            company=[spelled(one) for one in company],
            stage=stage,
            cured_by_roundings=casts,
            errors=errors,
            compiles=judge.compiles,
            small=small,
        )
    return None


def _first_bad(captured: Captured, judge: Judge) -> int:
    """Least n for which the first n operators fail; all of them do."""
    low, high = 0, len(captured.operators)  # the first `low` are good, the first `high` bad
    while high - low > 1:
        middle = (low + high) // 2
        judge.say(f"bisecting operators {low + 1} to {high}")
        if judge.worst(first(captured, middle)) is None:
            low = middle
        else:
            high = middle
    return high


def _smallest(captured: Captured, count: int, judge: Judge) -> tuple[Captured, list[Node]]:
    """The guilty operator with the fewest operators before it that still fail, and those; at worst all of them."""
    before = captured.operators[:count]
    for size in (1, 2, 4, 8, MOST_COMPANY):
        judge.say(f"the operator with {min(size, count) - 1} before it")
        chosen = before[-size:]
        small = only(captured, chosen)
        if judge.worst(small) is not None:
            return _thinned(captured, chosen, small, judge)
        if size >= count:
            break
    return first(captured, count), before[:-1]


def _thinned(captured: Captured, chosen: list[Node], small: Captured, judge: Judge) -> tuple[Captured, list[Node]]:
    """Leave out every operator that the fault does not need; the last one is the guilty one."""
    for one in list(chosen[:-1]):
        fewer = [other for other in chosen if other is not one]
        attempt = only(captured, fewer)
        if judge.worst(attempt) is not None:
            chosen, small = fewer, attempt
    return small, chosen[:-1]


def _stage(small: Captured, judge: Judge) -> tuple[str, bool]:
    """(the first stage that is worse, whether keeping eager's roundings cures it); for Inductor only."""
    if judge.backend != "inductor":
        name = judge.backend if isinstance(judge.backend, str) else getattr(judge.backend, "__name__", "the backend")
        return f"backend {name}", False
    for name, backend, options in STAGES:
        judge.say(f"trying {name}")
        with inductor_options(options or {}):
            if judge.worst(small, backend) is not None:
                return name, False
    with inductor_options({"emulate_precision_casts": True}):
        cured = judge.worst(small) is None
    return "Inductor's fusion", cured
