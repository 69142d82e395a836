"""What can be told about expressions of one function without running it: tensor or not, shape, purity, derivative.

A shape is a token: ``ZERO`` for tensors of no dimension, ``CONSTANT`` for Python numbers, a name such as ``x`` for "the
same as x had there", and None for unknown. Two expressions with equal tokens have equal shapes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from itertools import count

from ridgeline.compiler.doctor.rewrites.text import Function, Refused, Source, argument_names, names_bound


def words(text: str) -> frozenset[str]:
    """The set of the text's words."""
    return frozenset(text.split())


ZERO, CONSTANT = "()", "constant"
SUITE_STATEMENTS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)

BOUNDED = words("relu relu6 tanh sigmoid hardtanh hardsigmoid leaky_relu softsign abs neg clone detach")
"""Element by element, and their derivative stays finite for every input but NaN."""
ELEMENTWISE = BOUNDED | words(
    "exp log log2 log10 log1p expm1 sqrt rsqrt square sin cos erf gelu silu elu softplus selu mish logsigmoid "
    "reciprocal round floor ceil sign trunc"
)
REDUCTIONS = words("sum mean max min amax amin norm std var prod any all nansum nanmean count_nonzero")
SAME_SHAPE = words("softmax log_softmax cumsum cumprod contiguous float double half bfloat16")
OTHERS = words(
    "view reshape transpose permute unsqueeze squeeze flatten expand matmul mm bmm masked_fill clamp pow mul sub argmax "
    "argmin isnan isinf isfinite gather index_select div add maximum minimum type_as"
)
EVIDENCE = (ELEMENTWISE | REDUCTIONS | OTHERS | {"softmax", "log_softmax", "item", "numel", "tolist", "dim"}) - {
    "round", "add", "all", "any", "log", "index_select", "view",
}  # fmt: skip
"""Methods that show their object to be a tensor; sets, loggers and data frames have those taken out."""
RESULTS = ELEMENTWISE | REDUCTIONS | SAME_SHAPE | OTHERS
MADE = words(
    "tensor zeros ones full empty rand randn arange linspace eye cat stack where outer einsum addmm zeros_like "
    "ones_like full_like rand_like randn_like empty_like cond"
)
SCALAR_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
TORCH_ROOTS = frozenset(("torch", "F"))
IMPURE_CALLS = words("print open input exec eval setattr delattr next breakpoint")
IMPURE_METHODS = words(
    "append extend insert update pop remove clear add_scalar write item tolist numpy backward step zero_grad "
    "debug info warning error exception critical log"
)


def attribute_root(node: ast.expr) -> str | None:
    """``torch`` of ``torch.nn.functional.relu``; None when it does not begin with a plain name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def called(node: ast.AST) -> str | None:
    """The last name of what a call calls: ``relu`` of ``torch.relu(x)``."""
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def is_torch_call(node: ast.AST) -> bool:
    """``torch.f(...)`` or ``F.f(...)``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return attribute_root(node.func) in TORCH_ROOTS


def subject(node: ast.Call) -> ast.expr | None:
    """The tensor that a call is about: ``x`` of ``x.relu()`` and of ``torch.relu(x)``."""
    if is_torch_call(node):
        return node.args[0] if node.args else None
    return node.func.value if isinstance(node.func, ast.Attribute) else None


class Facts:
    """What is known just before ``place``, a statement of ``function``.

    ``tensors`` are names with evidence: a tensor method is called on them, torch is given them, or they hold the result
    of such a call. ``bound`` are names that surely have a value.
    """

    def __init__(self, source: Source, function: Function, place: ast.stmt) -> None:
        self.source, self.function, self.place = source, function, place
        self.tensors = _evidence(function)
        self.shapes: dict[str, str | None] = {}
        self.bound = set(argument_names(function))
        self._numbers = count()
        for statement in self._before():
            self._note(statement)
        for above in source.parents(place):
            if above is function:
                break
            if isinstance(above, (ast.For, ast.While, ast.AsyncFor)):
                self._forget(names_bound([above]))  # an earlier turn may have changed them

    def _before(self) -> Iterable[ast.stmt]:
        chain: list[ast.stmt] = [self.place]
        for above in self.source.parents(self.place):
            if above is self.function:
                break
            if isinstance(above, ast.stmt):
                chain.append(above)
        for statement in reversed(chain):
            yield from self.source.preceding(statement)

    def _note(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                self.bound.add(target.id)
                shape = self.shape(statement.value)
                self.shapes[target.id] = shape if shape is not None else self._new(target.id)
                return
        if isinstance(statement, SUITE_STATEMENTS):
            self._forget(names_bound([statement]) & (self.bound | set(self.shapes)))
            return
        names = names_bound([statement])
        self._forget(names)
        self.bound |= names

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.shapes[name] = self._new(name)

    def _new(self, name: str) -> str:
        return f"{name}#{next(self._numbers)}"

    def is_tensor(self, node: ast.expr) -> bool:
        """Whether the expression surely is a tensor."""
        if isinstance(node, ast.Name):
            return node.id in self.tensors
        if isinstance(node, ast.BinOp):
            return self.is_tensor(node.left) or self.is_tensor(node.right)
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            return self.is_tensor(node.operand)
        if isinstance(node, ast.Compare):
            return len(node.ops) == 1 and (self.is_tensor(node.left) or self.is_tensor(node.comparators[0]))
        if isinstance(node, ast.Call):
            return _gives_tensor(node, self.tensors)
        return False

    def shape(self, node: ast.expr) -> str | None:
        """The expression's shape token, None when it cannot be told."""
        if isinstance(node, ast.Constant):
            return CONSTANT if isinstance(node.value, (int, float)) else None
        if isinstance(node, ast.Name):
            return self.shapes.get(node.id, node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return self.shape(node.operand)
        if isinstance(node, ast.BinOp) and isinstance(node.op, SCALAR_ARITHMETIC):
            return _together(self.shape(node.left), self.shape(node.right))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return _together(self.shape(node.left), self.shape(node.comparators[0]))
        if isinstance(node, ast.Call):
            return self._call_shape(node)
        return None

    def _call_shape(self, node: ast.Call) -> str | None:
        about, name = subject(node), called(node)
        plain = not node.keywords and len(node.args) == (1 if is_torch_call(node) else 0)
        if about is None:
            return None
        if name in ELEMENTWISE and plain:
            return self.shape(about)
        if name in SAME_SHAPE:
            return self.shape(about)
        if name in REDUCTIONS and plain and self.is_tensor(about):
            return ZERO
        return None

    def bounded(self, node: ast.expr) -> bool:
        """Whether it has a finite derivative everywhere, so that ``torch.where`` may compute it and not use it.

        Where the branch that is not taken has an infinite one, its gradient is 0 times infinity: NaN.
        """
        if isinstance(node, (ast.Name, ast.Constant)):
            return True
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, (ast.USub, ast.UAdd)) and self.bounded(node.operand)
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, (ast.Add, ast.Sub)):
                return self.bounded(node.left) and self.bounded(node.right)
            if isinstance(node.op, ast.Mult):
                pair = (node.left, node.right)
                return any(_number(a) is not None and self.bounded(b) for a, b in (pair, pair[::-1]))
            return isinstance(node.op, ast.Div) and bool(_number(node.right)) and self.bounded(node.left)
        if isinstance(node, ast.Call) and called(node) in BOUNDED and self._call_shape(node) is not None:
            about = subject(node)
            return about is not None and self.bounded(about)
        return False


def is_fresh(node: ast.expr) -> bool:
    """Whether the value surely is a tensor of its own and no view of another."""
    made = (ELEMENTWISE | REDUCTIONS | {"matmul", "mm", "bmm", "where", "cat", "stack", "linear", "zeros_like"}) - {
        "detach"
    }
    return isinstance(node, (ast.BinOp, ast.UnaryOp)) or called(node) in made


def _number(node: ast.expr) -> float | None:
    """The value of a literal number, also a negative one; None for all else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    plain = isinstance(node, ast.Constant) and type(node.value) in (int, float)
    return float(node.value) if plain else None  # type: ignore[attr-defined]


def _together(a: str | None, b: str | None) -> str | None:
    """Shape of an element-by-element operation on both."""
    if a is None or b is None:
        return None
    for small in (CONSTANT, ZERO):
        if a == small or b == small:
            return b if a == small else a
    return a if a == b else None


def _gives_tensor(node: ast.Call, tensors: set[str]) -> bool:
    """Whether the call's result is one tensor."""
    name = called(node)
    if name in ("max", "min") and len(node.args) + len(node.keywords) > (1 if is_torch_call(node) else 0):
        return False  # with a dim they give a pair
    if is_torch_call(node):
        return attribute_root(node.func) == "F" or name in RESULTS | MADE
    if not isinstance(node.func, ast.Attribute) or name not in RESULTS:
        return False
    value = node.func.value
    if isinstance(value, ast.Call):
        return _gives_tensor(value, tensors)
    if isinstance(value, ast.Compare):
        return True  # Python's own comparisons have no methods
    return _is_result(value, tensors) or (isinstance(value, ast.Name) and value.id in tensors)


def _evidence(function: Function) -> set[str]:
    """Names that are tensors wherever the function runs without an error."""
    given = function.args
    annotated = [one for one in [*given.posonlyargs, *given.args, *given.kwonlyargs] if one.annotation is not None]
    found = {one.arg for one in annotated if one.annotation and ast.unparse(one.annotation).split(".")[-1] == "Tensor"}
    for node in ast.walk(function):
        about = subject(node) if isinstance(node, ast.Call) else None
        if isinstance(about, ast.Name) and about.id not in TORCH_ROOTS:
            known = attribute_root(node.func) == "F" if is_torch_call(node) else False  # type: ignore[attr-defined]
            if known or called(node) in EVIDENCE:
                found.add(about.id)
    for _ in range(3):  # results of results
        for name, value in _plain_assignments(function):
            if _is_result(value, found):
                found.add(name)
    others = {name for name, value in _plain_assignments(function) if _is_number(value)}
    return found - others


def _plain_assignments(function: Function) -> list[tuple[str, ast.expr]]:
    """``name = value`` anywhere in the function."""
    out = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            out.append((node.targets[0].id, node.value))
    return out


def _is_number(node: ast.expr) -> bool:
    """A literal, or what surely is a Python number: a name that also holds this is no tensor everywhere."""
    return isinstance(node, ast.Constant) or called(node) in ("item", "tolist", "float", "int", "size", "len")


def _is_result(node: ast.expr, tensors: set[str]) -> bool:
    if isinstance(node, ast.Call):
        return _gives_tensor(node, tensors)
    if isinstance(node, ast.BinOp):
        return any(
            (isinstance(one, ast.Name) and one.id in tensors) or _is_result(one, tensors)
            for one in (node.left, node.right)
        )
    return False


def check_pure(nodes: Sequence[ast.AST], allowed: Sequence[str] = ()) -> None:
    """Nothing but values: no side effect that running it twice, or not at all, would show. ``allowed`` names calls.

    Raises:
        Refused: with the first thing found.
    """
    for node in (one for top in nodes for one in ast.walk(top)):
        if isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
            raise Refused("an expression assigns, awaits or yields")
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            raise Refused("an expression has a scope of its own (lambda or comprehension)")
        name = called(node)
        if name is None or not isinstance(node, ast.Call) or name in allowed:
            continue
        method = isinstance(node.func, ast.Attribute)
        if name == "super":
            raise Refused("super() cannot move into another function")
        mathematics = is_torch_call(node) or (name == "log" and not node.args)
        if (name in IMPURE_CALLS and not method) or (name in IMPURE_METHODS and method and not mathematics):
            raise Refused(f"{name}() has a side effect or leaves the graph")
        if method and name.endswith("_") and not name.endswith("__"):
            raise Refused(f"{name}() changes its tensor in place")
        if any(word.arg == "out" for word in node.keywords):
            raise Refused("out= changes a tensor in place")


def check_not_mutated(function: Function, names: set[str], after: int) -> None:
    """None of the tensors is changed in place after line ``after``: it may be another object then, an alias no more.

    Raises:
        Refused: with the place.
    """
    for node in ast.walk(function):
        line = getattr(node, "lineno", 0)
        if line <= after:
            continue
        target: ast.expr | None = None
        if isinstance(node, ast.AugAssign):
            target = node.target
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            target = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            target = node.func.value
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name) and target.id in names:
            raise Refused(f"{target.id} is changed in place on line {line}: the caller could see that")
