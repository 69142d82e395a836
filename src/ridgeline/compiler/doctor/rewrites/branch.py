"""``if tensor:`` as data flow: ``torch.where`` where both sides may be computed, else ``torch.cond``.

::

    if x.sum() > 0:                      y = torch.where(x.sum() > 0, torch.relu(x), -x)
        y = torch.relu(x)       -->
    else:                                # a side with log, sqrt, a product of tensors, an unknown call:
        y = -x                           y = torch.cond(x.sum() > 0, lambda: torch.log(x), lambda: -x)

``torch.where`` computes both sides. It is taken only if both surely have one shape, and finite derivatives: the gradient
of the side not taken is 0 times its derivative, NaN where that is infinite. ``torch.cond`` runs one side, as ``if`` does.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from ridgeline.compiler.doctor.rewrites.facts import (
    CONSTANT,
    ZERO,
    Facts,
    called,
    check_not_mutated,
    check_pure,
    is_fresh,
)
from ridgeline.compiler.doctor.rewrites.text import Edit, Refused, Rewrite, Source, fresh_name, names_bound, names_read

COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
PYTHON_BOOLS = frozenset(("equal", "allclose", "is_tensor", "isinstance", "hasattr", "len"))
NON_FINITE = frozenset(("isnan", "isinf", "isfinite"))


@dataclass(frozen=True)
class Choice:
    """``names[i] = yes[i] if the condition holds else no[i]``; no names when the values are returned."""

    names: tuple[str, ...]
    yes: tuple[ast.expr, ...]
    no: tuple[ast.expr, ...]
    end: ast.stmt


def rewrite_branch(source: Source, node: ast.If) -> Rewrite:
    """The ``if`` whose test is a tensor, without it.

    Raises:
        Refused: it cannot be shown to keep the meaning.
    """
    function = source.function_of(node)
    if function is None:
        raise Refused("the branch is not in a function")
    above = source.parent(node)
    if isinstance(above, ast.If) and any(one is node for one in above.orelse) and not _own_line(source, node):
        raise Refused("an elif: write it as if inside else")
    facts = Facts(source, function, node)
    test = predicate(source, facts, node.test)
    choice = _choice(source, facts, node)
    check_pure([*choice.yes, *choice.no])
    check_pure([node.test], allowed=("item",))
    check_not_mutated(function, set(choice.names), node.lineno)
    may_where = _may_where(facts, node.test, choice)
    indent, before = source.indent(node), ""
    if may_where and len(choice.names) > 1:
        chosen = fresh_name("chosen", names_read([function]) | names_bound([function]))
        before, test = f"{chosen} = {test}\n{indent}", chosen
    text = _where(source, test, choice) if may_where else _cond(source, test, choice, indent)
    target = "return" if not choice.names else f"{', '.join(choice.names)} ="
    start, end = source.span(node)[0], source.span(choice.end)[1]
    return Rewrite(*_name(may_where, source.edited([Edit(start, end, f"{before}{target} {text}")])))


def rewrite_ternary(source: Source, node: ast.IfExp) -> Rewrite:
    """``a if tensor else b`` without Python's choice.

    Raises:
        Refused: it cannot be shown to keep the meaning.
    """
    function = source.function_of(node)
    statement = next((one for one in source.parents(node) if isinstance(one, ast.stmt)), None)
    if function is None or statement is None:
        raise Refused("the branch is not in a function")
    facts = Facts(source, function, statement)
    test = predicate(source, facts, node.test)
    choice = Choice((), (node.body,), (node.orelse,), statement)
    check_pure([*choice.yes, *choice.no])
    check_pure([node.test], allowed=("item",))
    may_where = _may_where(facts, node.test, choice)
    text = _where(source, test, choice) if may_where else _cond(source, test, choice, source.indent(statement))
    return Rewrite(*_name(may_where, source.edited([Edit(*source.span(node), text)])))


def _name(may_where: bool, text: str) -> tuple[str, str, str]:
    """Name, text and note of a rewrite."""
    note = "" if may_where else "outside of torch.compile torch.cond is slow: it compiles itself"
    return f"if tensor to torch.{'where' if may_where else 'cond'}", text, note


def predicate(source: Source, facts: Facts, test: ast.expr) -> str:
    """The test as text of a boolean tensor of no dimension.

    Raises:
        Refused: it is not surely a tensor, or Python's truth of it is not that of one comparison.
    """
    torch = source.torch_name()
    if isinstance(test, ast.BoolOp):
        raise Refused("'and' and 'or' stop early; write the test with & or |, or as two ifs")
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return f"{torch}.logical_not({predicate(source, facts, test.operand)})"
    name = called(test)
    if isinstance(test, ast.Call) and name in PYTHON_BOOLS:
        raise Refused(f"{name}() gives a Python bool")
    inner = _unwrapped(test, ("bool",))
    if inner is not None:
        return predicate(source, facts, inner)
    if isinstance(test, ast.Compare):
        return _comparison(source, facts, test)
    if not facts.is_tensor(test):
        raise Refused(f"'{source.segment(test)}' is not known to be a tensor")
    text = source.segment(test) if name in ("any", "all") else f"{source.operand(test)} != 0"
    return text if facts.shape(test) == ZERO else f"({text}).reshape(())"


def _comparison(source: Source, facts: Facts, test: ast.Compare) -> str:
    if len(test.ops) != 1 or not isinstance(test.ops[0], COMPARISONS):
        raise Refused("only one comparison with <, <=, >, >=, == or != can become a tensor")
    sides: list[str] = []
    scalar, tensor, python = True, False, False
    for side in (test.left, test.comparators[0]):
        inner = _unwrapped(side, ("float",))
        python = python or inner is not None
        about = side if inner is None else inner
        if facts.is_tensor(about):
            tensor = True
            scalar = scalar and (facts.shape(about) == ZERO or inner is not None)
            reshaped = inner is not None and facts.shape(about) != ZERO
            text = f"{source.operand(about)}.reshape(())" if reshaped else source.operand(about)
            sides.append(f"{text}.double()" if inner is not None else text)
        elif inner is not None or not isinstance(about, (ast.Constant, ast.UnaryOp, ast.Name, ast.Attribute)):
            raise Refused(f"'{source.segment(side)}' is not known to be a tensor")
        else:
            sides.append(source.operand(about))
    if not tensor:
        raise Refused(f"'{source.segment(test)}' is not known to compare tensors")
    operator = {"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!="}[type(test.ops[0]).__name__]
    text = f"{sides[0]} {operator} {sides[1]}"
    return text if scalar else f"({text}).reshape(())"


def _unwrapped(node: ast.expr, functions: tuple[str, ...]) -> ast.expr | None:
    """What ``x.item()`` or ``float(x)`` is taken of; None when it is neither."""
    if isinstance(node, ast.Call) and not node.keywords:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "item" and not node.args:
            return node.func.value
        if isinstance(node.func, ast.Name) and node.func.id in functions and len(node.args) == 1:
            return node.args[0]
    return None


def _own_line(source: Source, node: ast.If) -> bool:
    return source.segment(node).startswith("if")


def _choice(source: Source, facts: Facts, node: ast.If) -> Choice:
    if not source.alone(node):
        raise Refused("the branch shares its line with another statement")
    if isinstance(node.body[0], ast.Return):
        return _returned(source, node)
    yes, no = _assigned(node.body, facts), _assigned(node.orelse, facts)
    names = tuple(dict.fromkeys([*yes, *no]))
    for name in names:
        if name not in facts.bound and not (name in yes and name in no):
            raise Refused(f"{name} has no value when the branch is not taken")
    declared = (one for one in ast.walk(facts.function) if isinstance(one, (ast.Global, ast.Nonlocal)))
    if any(set(names) & set(one.names) for one in declared):
        raise Refused("a name of the branch is global or nonlocal")
    keep = {name: ast.copy_location(ast.Name(name, ast.Load()), node) for name in names}
    values = [tuple(side.get(name, keep[name]) for name in names) for side in (yes, no)]
    return Choice(names, values[0], values[1], node)


def _returned(source: Source, node: ast.If) -> Choice:
    after = node.orelse or source.following(node)[:1]
    if len(node.body) != 1 or len(after) != 1 or not isinstance(after[0], ast.Return):
        raise Refused("one side returns and the other goes on")
    sides = [node.body[0], after[0]]
    values = [one.value for one in sides if isinstance(one, ast.Return)]
    if any(value is None or isinstance(value, (ast.Tuple, ast.Dict, ast.List)) for value in values):
        raise Refused("a side returns no single tensor")
    return Choice((), (values[0],), (values[1],), node if node.orelse else after[0])  # type: ignore[arg-type]


def _assigned(body: list[ast.stmt], facts: Facts) -> dict[str, ast.expr]:
    """Name to value of a side that holds nothing but assignments, each from what was there before."""
    out: dict[str, ast.expr] = {}
    for one in body:
        if isinstance(one, ast.Pass):
            continue
        if isinstance(one, ast.AugAssign):
            raise Refused(f"'{ast.unparse(one)}' changes its tensor in place: the caller could see that")
        if not isinstance(one, ast.Assign) or len(one.targets) != 1 or not isinstance(one.targets[0], ast.Name):
            raise Refused(f"'{_short(one)}' is no plain assignment")
        if names_read([one.value]) & set(out):
            raise Refused(f"{one.targets[0].id} is computed from another name of the branch")
        if one.targets[0].id in out:
            raise Refused(f"{one.targets[0].id} is assigned twice in one side")
        out[one.targets[0].id] = one.value
    return out


def _short(node: ast.stmt) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) < 60 else f"{text[:57]}..."


def _may_where(facts: Facts, test: ast.expr, choice: Choice) -> bool:
    if any(called(one) in NON_FINITE for one in ast.walk(test)):
        return False  # the side not taken holds just what the test looks for
    for yes, no in zip(choice.yes, choice.no, strict=True):
        shape = facts.shape(yes)
        if shape is None or shape == CONSTANT or shape != facts.shape(no):
            return False
        if not (facts.is_tensor(yes) and facts.is_tensor(no) and facts.bounded(yes) and facts.bounded(no)):
            return False
    return True


def _where(source: Source, test: str, choice: Choice) -> str:
    torch, pairs = source.torch_name(), zip(choice.yes, choice.no, strict=True)
    return ", ".join(f"{torch}.where({test}, {_text(source, yes)}, {_text(source, no)})" for yes, no in pairs)


def _cond(source: Source, test: str, choice: Choice, indent: str) -> str:
    sides = []
    for side in (choice.yes, choice.no):
        if any(isinstance(one, ast.Constant) for one in side):
            raise Refused("a side is a Python constant and not a tensor")
        values = [_unaliased(source, one) for one in side]
        sides.append(values[0] if len(values) == 1 else f"({', '.join(values)})")
    torch = source.torch_name()
    flat = f"{torch}.cond({test}, lambda: {sides[0]}, lambda: {sides[1]})"
    if len(flat) + len(indent) <= 100 and "\n" not in flat:
        return flat
    inner = f"\n{indent}    "
    return f"{torch}.cond({inner}{test},{inner}lambda: {sides[0]},{inner}lambda: {sides[1]},\n{indent})"


def _unaliased(source: Source, node: ast.expr) -> str:
    """The value, as a tensor of its own: ``torch.cond`` takes no branch that hands back its input or a view of it."""
    if is_fresh(node):
        return _text(source, node)
    return f"{node.id if isinstance(node, ast.Name) else source.operand(node)}.clone()"


def _text(source: Source, node: ast.expr) -> str:
    """As written; a name that a side leaves as it is has no place of its own."""
    return node.id if isinstance(node, ast.Name) else source.segment(node)
