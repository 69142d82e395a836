"""A graph read as expressions, so that one pattern finds every spelling.

Every node becomes a *term*: an operation on terms and constants, in a canonical form. ``x / y.sqrt()``,
``x * y.rsqrt()`` and ``torch.mul(y ** -0.5, x)`` are one term; so are SiLU written as a call, as ``x * sigmoid(x)`` and
as ``x / (1 + exp(-x))``. Equal terms are the same object, whichever node computes them. Casts that change nothing and
copies vanish, a transposition is a permutation, ``x ** 2`` is ``x * x``.

A term stands for a value, and an in-place operation ends values: from there on, all that was computed before is
opaque. So no pattern reaches across a mutation, or across a switch of autograd or autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ridgeline.compiler.internals.graphs import known

COMMUTATIVE = frozenset({"mul", "add"})


class Term:
    """``op`` of ``args`` (terms and constants); ``nodes`` compute it. ``shape`` and ``dtype`` where known."""

    __slots__ = ("args", "dtype", "nodes", "op", "shape")

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args
        self.nodes: list[Node] = []
        self.shape: Any = None
        self.dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})" if self.args else self.op


Value = Any  # a Term or a constant
Rule = Callable[..., Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Say how the ATen operations ``names`` (all overloads) read as terms: ``f(terms, node, *arguments)``.

    Arguments are those of the schema, with defaults filled in. None means: opaque after all.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Terms:
    """The terms of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._table: dict[tuple[Any, ...], Term] = {}
        self._now: dict[Node, Value] = {}  # what a node is to those that read it from here on
        self._own: dict[Node, Value] = {}  # what it was when computed
        self._epochs: dict[Node, int] = {}
        self.epoch = 0
        for node in graph.nodes:
            if node.op == "output":
                break
            self._read(node)

    def of(self, node: Node) -> Value:
        """The term of ``node``, None for one added since."""
        return self._own.get(node)

    def enter(self, node: Node) -> None:
        """Make terms as they would have been made where ``node`` stands."""
        self.epoch = self._epochs.get(node, self.epoch)

    def alias(self, new: Node, old: Node) -> None:
        """``new`` computes what ``old`` did."""
        self._own[new] = self._own[old]

    def make(self, op: str, *args: Value) -> Term:
        """The one term of ``op`` and ``args`` in this epoch."""
        key = (self.epoch, op, *((id(a) if isinstance(a, Term) else (type(a), a)) for a in args))
        if key not in self._table:
            self._table[key] = Term(op, args)
        return self._table[key]

    def _read(self, node: Node) -> None:
        if node.op != "call_function":
            term: Value = self._leaf(node)
        elif not isinstance(node.target, torch._ops.OpOverload):
            if "getitem" in str(node.target):
                term = self._getitem(node)
            else:  # a switch of autograd or autocast
                term = self._new_epoch(node)
        elif node.target._schema.is_mutable:
            term = self._new_epoch(node)
        else:
            term = self._call(node)
        self._own[node] = self._now[node] = term
        self._epochs[node] = self.epoch
        if isinstance(term, Term):
            self._place(term, node)

    @staticmethod
    def _place(term: Term, node: Node) -> None:
        term.nodes.append(node)
        if len(term.nodes) == 1:
            value = node.meta.get("val")
            term.shape, term.dtype = getattr(value, "shape", None), getattr(value, "dtype", None)

    def _leaf(self, node: Node) -> Term:
        """A value of unknown origin, equal to no other."""
        return Term(f"%{node.name}", ())

    def _new_epoch(self, node: Node) -> Term:
        self.epoch += 1
        for old in self._now:
            self._now[old] = self._leaf(old)
            self._place(self._now[old], old)
        return self._leaf(node)

    def _call(self, node: Node) -> Value:
        assert isinstance(node.target, torch._ops.OpOverload)
        name = node.target.overloadpacket.__name__
        arguments = [self._value(value) for value in schema_arguments(node).values()]
        if name in RULES:
            made = RULES[name](self, node, *arguments)
            if made is not None:
                return made
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return self._leaf(node)
        return self.make(str(node.target), *arguments)

    def _getitem(self, node: Node) -> Value:
        source, index = self._value(node.args[0]), node.args[1]
        if isinstance(source, Term) and source.op == "parts" and isinstance(index, int):
            x, dim, bounds = source.args
            return self.slice(x, dim, *bounds[index])
        if isinstance(source, Term) and source.op == "max" and index == 0:
            return self.make("amax", *source.args)
        return self.make("getitem", source, index)

    def _value(self, value: Any) -> Value:
        if isinstance(value, Node):
            return self._now[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._value(item) for item in value)
        return value

    # The algebra: every term made by a rule goes through these.

    def mul(self, x: Value, y: Value) -> Value:
        """Product; constants fold, ``1 * x`` is ``x``, ``e / e.sum(-1)`` with ``e = exp(s - max s)`` is a softmax."""
        if not isinstance(x, Term) and not isinstance(y, Term):
            return x * y
        if isinstance(x, Term) and not isinstance(y, Term):
            x, y = y, x
        if not isinstance(x, Term):
            if x == 1:
                return y
            if y.op == "mul" and isinstance(y.args[0], (int, float)):
                return self.mul(x * y.args[0], y.args[1])
            if y.op == "sum" and y.args[1] == -1 and x * y.args[3] == 1:
                return self.make("mean", y.args[0], -1, y.args[2])
        for a, b in ((x, y), (y, x)):
            scores = _softmax_of(a, b)
            if scores is not None:
                return self.make("softmax", scores, -1)
        return self.make("mul", x, y)

    def add(self, x: Value, y: Value) -> Value:
        """Sum; a constant comes first, ``x @ w.T + b`` is a linear with bias."""
        if not isinstance(x, Term) and not isinstance(y, Term):
            return x + y
        if isinstance(x, Term) and not isinstance(y, Term):
            x, y = y, x
        for a, b in ((x, y), (y, x)):
            if isinstance(a, Term) and a.op == "linear" and a.args[2] is None and _rank(b) == 1:
                return self.make("linear", *a.args[:2], b)
        return self.make("add", x, y)

    def recip(self, x: Value) -> Value:
        """``1 / x``."""
        if not isinstance(x, Term):
            return 1 / x
        return self.make("rsqrt", *x.args) if x.op == "sqrt" else self.make("recip", x)

    def sigmoid(self, x: Value) -> Value:
        """``1 / (1 + exp(-x))``."""
        return self.recip(self.add(1, self.make("exp", self.mul(-1, x))))

    def cast(self, x: Value, dtype: torch.dtype | None) -> Value:
        """``x`` in ``dtype``, which is ``x`` itself when it already is."""
        if dtype is None or not isinstance(x, Term) or x.dtype == dtype:
            return x
        made = self.make("cast", x, dtype)
        made.dtype = dtype
        if made.shape is None:
            made.shape = x.shape
        return made

    def permute(self, x: Value, dims: tuple[int, ...]) -> Value:
        """Dims of ``x`` in another order; two permutations are one, heads are repeated after all but a final turn."""
        if dims == tuple(range(len(dims))):
            return x
        if x.op == "permute":
            return self.permute(x.args[0], tuple(x.args[1][d] for d in dims))
        turned = dims == (*range(len(dims) - 2), len(dims) - 1, len(dims) - 2)
        if x.op == "repeat_heads" and not turned:
            inner, times, dim = x.args
            return self.make("repeat_heads", self.permute(inner, dims), times, dims.index(dim))
        return self.make("permute", x, dims)

    def slice(self, x: Value, dim: int, start: Any, stop: Any, step: int = 1) -> Value:
        """A stretch of one dim in fractions of it, so that halves are halves at every width."""
        size = x.shape[dim]
        if isinstance(start, Term) or isinstance(stop, Term):
            return self.make("slice_sized", x, dim, start, stop, step)
        if known(start == 0) and known(stop >= size) and step == 1:
            return x
        if isinstance(size, int) and isinstance(start, int) and isinstance(stop, int):
            start, stop = (start + size if start < 0 else start), (stop + size if stop < 0 else min(stop, size))
            return self.make("slice", x, dim - len(x.shape), start / size, stop / size, step)
        return self.make("slice_sized", x, dim, start, stop, step)

    def matmul(self, x: Value, y: Value) -> Value:
        """Product of matrices; constant factors stand before it; with a transposed matrix it is a linear."""
        factor: Any = 1
        x, y = self._strip_factor(x), self._strip_factor(y)
        for side in (x, y):
            factor = factor * side[0]
        left, right = x[1], y[1]
        if right.op == "permute" and right.args[1] == (1, 0):
            return self.mul(factor, self.make("linear", left, right.args[0], None))
        return self.mul(factor, self.make("matmul", left, right))

    def _strip_factor(self, x: Term) -> tuple[Any, Term]:
        """(constant, rest), looking through transposition and repetition."""
        if x.op == "mul" and isinstance(x.args[0], (int, float)):
            return x.args
        if x.op == "permute" and (inner := self._strip_factor(x.args[0]))[0] != 1:
            return inner[0], self.permute(inner[1], x.args[1])
        return 1, x


def schema_arguments(node: Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, in the order of its schema, with defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = node.target._schema.arguments
    given = dict(zip((argument.name for argument in names), node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in names}


def _rank(x: Value) -> int | None:
    return len(x.shape) if isinstance(x, Term) and x.shape is not None else None


def _softmax_of(a: Value, b: Value) -> Value:
    """``s`` when ``a`` is ``exp(s - max s)`` and ``b`` is 1 over its sum over the last dim."""
    if not (isinstance(a, Term) and isinstance(b, Term) and a.op == "exp" and b.op == "recip"):
        return None
    total, shifted = b.args[0], a.args[0]
    if total.op != "sum" or total.args[:3] != (a, -1, True) or shifted.op != "add":
        return None
    for scores, peak in (shifted.args, shifted.args[::-1]):
        if isinstance(peak, Term) and peak.op == "mul" and peak.args[0] == -1:
            most = peak.args[1]
            if most.op == "amax" and most.args == (scores, -1, True):
                return scores
    return None
