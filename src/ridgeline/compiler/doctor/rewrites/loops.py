"""Loops that end when a tensor says so, with their bound written in the code: all turns, each guarded.

::

    i = 0                                        def turn(x, err):
    while i < 8 and err > tol:                       x_new = g(x)
        x_new = g(x)                                 err = (x_new - x).norm()
        err = (x_new - x).norm()       -->           x = x_new
        x = x_new                                    return x, err
        i += 1                                   for i in range(0, 8):
                                                     x, err = torch.cond(err > tol, turn, lambda x, err: ..., (x, err))

Once the condition is false nothing it depends on changes, so it stays false: the turns that follow do nothing. Also
``for i in range(8): if err < tol: break``. A loop without a bound is refused: how often it turns is not known.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass

from ridgeline.compiler.doctor.rewrites.branch import predicate
from ridgeline.compiler.doctor.rewrites.facts import Facts, check_pure, is_fresh
from ridgeline.compiler.doctor.rewrites.text import (
    Edit,
    Function,
    Refused,
    Rewrite,
    Source,
    fresh_name,
    names_bound,
    names_read,
)

MOST_TURNS = 32
RANDOM = frozenset(
    ("rand", "randn", "randint", "bernoulli", "multinomial", "normal", "dropout", "rand_like", "randn_like")
)


@dataclass(frozen=True)
class Bounded:
    """A loop of ``range(start, stop)`` turns that goes on while ``test`` (or while not, when ``negated``)."""

    counter: str
    start: int
    stop: int
    test: ast.expr
    negated: bool
    body: list[ast.stmt]
    first: ast.stmt


def rewrite_loop(source: Source, node: ast.While | ast.For) -> Rewrite:
    """The loop with all its turns, each under ``torch.cond``.

    Raises:
        Refused: it has no bound, too many turns, or does more than assign tensors.
    """
    function = source.function_of(node)
    if function is None:
        raise Refused("the loop is not in a function")
    if node.orelse:
        raise Refused("the loop has an else")
    loop = _while(source, node) if isinstance(node, ast.While) else _for(source, node)
    if loop.stop - loop.start > MOST_TURNS:
        raise Refused(f"{loop.stop - loop.start} turns in one graph are more than {MOST_TURNS}")
    facts = Facts(source, function, node)
    _check_body(facts, loop)
    carried = _carried(function, node, loop)
    for name in carried:
        if name not in facts.bound or name not in facts.tensors:
            raise Refused(f"{name} is not known to be a tensor before the loop")
    test = predicate(source, facts, loop.test)
    if loop.negated:
        test = f"{source.torch_name()}.logical_not({test})"
    text = _text(source, function, loop, carried, test)
    start, end = source.span(loop.first)[0], source.span(node)[1]
    between = source.preceding(node)
    if loop.first is not node and (not between or between[-1] is not loop.first):
        raise Refused("the counter does not start just before the loop")
    return Rewrite("loop bounded", source.edited([Edit(start, end, text)]))


def _while(source: Source, node: ast.While) -> Bounded:
    parts = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else []
    if len(parts) != 2:
        raise Refused("the loop has no bound: how often it turns is not known; write `while i < N and ...`")
    counters = [at for at, one in enumerate(parts) if _limit(one) is not None]
    if len(counters) != 1:
        raise Refused("the loop has no bound by a counter and a literal number")
    name, stop = _limit(parts[counters[0]])  # type: ignore[misc]
    before = source.preceding(node)
    first = before[-1] if before else None
    start = _started(first, name)
    steps = [one for one in node.body if name in names_bound([one])]
    if first is None or start is None or len(steps) != 1 or not _counts(steps[0], name):
        raise Refused(f"{name} does not count from a literal number in steps of one")
    after = [one for one in node.body[node.body.index(steps[0]) + 1 :] if name in names_read([one])]
    if after:
        raise Refused(f"{name} is read after it was counted up")
    body = [one for one in node.body if one is not steps[0]]
    return Bounded(name, start, stop, parts[1 - counters[0]], False, body, first)


def _limit(node: ast.expr) -> tuple[str, int] | None:
    """``(i, 8)`` of ``i < 8``."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
        limit = node.comparators[0]
        if isinstance(node.ops[0], (ast.Lt, ast.LtE)) and isinstance(limit, ast.Constant) and type(limit.value) is int:
            return node.left.id, limit.value + isinstance(node.ops[0], ast.LtE)
    return None


def _started(node: ast.stmt | None, name: str) -> int | None:
    """The literal that ``name = 0`` assigns."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.value, ast.Constant):
        return None
    named = isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    return node.value.value if named and type(node.value.value) is int else None


def _counts(node: ast.stmt, name: str) -> bool:
    """``name += 1``."""
    if not isinstance(node, ast.AugAssign) or not isinstance(node.target, ast.Name) or not isinstance(node.op, ast.Add):
        return False
    return isinstance(node.value, ast.Constant) and node.value.value == 1


def _for(source: Source, node: ast.For) -> Bounded:
    call, first = node.iter, node.body[0]
    numbers = [one.value for one in call.args if isinstance(one, ast.Constant)] if isinstance(call, ast.Call) else []
    literal = isinstance(call, ast.Call) and len(numbers) == len(call.args) and all(type(one) is int for one in numbers)
    if not literal or getattr(call.func, "id", "") != "range" or len(numbers) not in (1, 2):  # type: ignore[attr-defined]
        raise Refused("the loop has no bound: it needs range() of a literal number")
    leaves = (
        isinstance(first, ast.If) and not first.orelse and len(first.body) == 1 and isinstance(first.body[0], ast.Break)
    )
    if not leaves or not isinstance(node.target, ast.Name):
        raise Refused("the loop does not begin with `if ...: break`")
    start, stop = (0, *numbers)[-2:]
    assert isinstance(first, ast.If) and isinstance(start, int) and isinstance(stop, int)
    return Bounded(node.target.id, start, stop, first.test, True, node.body[1:], node)


def _check_body(facts: Facts, loop: Bounded) -> None:
    for one in loop.body:
        if not isinstance(one, ast.Assign) or len(one.targets) != 1 or not isinstance(one.targets[0], ast.Name):
            raise Refused(f"'{ast.unparse(one).splitlines()[0][:60]}' is no plain assignment")
        if not facts.source.alone(one):
            raise Refused("statements share a line")
    if not loop.body:
        raise Refused("the loop does nothing")
    check_pure([one.value for one in loop.body if isinstance(one, ast.Assign)])
    check_pure([loop.test], allowed=("item",))
    for part in (below for one in loop.body for below in ast.walk(one)):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.lineno != part.end_lineno:
            raise Refused("a turn holds a text of several lines, whose indentation would change")
    if loop.counter in names_read([loop.test]):
        raise Refused(f"the condition depends on {loop.counter}")
    if any(isinstance(one, ast.Attribute) and one.attr in RANDOM for one in ast.walk(loop.test)):
        raise Refused("the condition draws random numbers: it may hold again after it did not")


def _carried(function: Function, node: ast.stmt, loop: Bounded) -> list[str]:
    """Names that a turn hands to the next one, or to what follows the loop; all others live within a turn."""
    assigned = list(dict.fromkeys(one.targets[0].id for one in loop.body if isinstance(one, ast.Assign)))  # type: ignore[attr-defined]
    end = node.end_lineno or node.lineno
    later = {
        one.id
        for one in ast.walk(function)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load) and one.lineno > end
    }
    if loop.counter in later:
        raise Refused(f"{loop.counter} is read after the loop")
    early, seen = names_read([loop.test]), set[str]()
    for one in loop.body:
        assert isinstance(one, ast.Assign)
        early |= names_read([one.value]) - seen
        seen |= names_bound([one])
    out = [name for name in assigned if name in later | early]
    if not set(out) & names_read([loop.test]):
        raise Refused("the condition does not depend on what a turn computes")
    return out


def _text(source: Source, function: Function, loop: Bounded, carried: list[str], test: str) -> str:
    torch, indent = source.torch_name(), source.indent(loop.first)
    turn = fresh_name("turn", names_read([function]) | names_bound([function]))
    names, one = ", ".join(carried), len(carried) == 1
    body = textwrap.dedent("\n".join(source.indent(stmt) + source.segment(stmt) for stmt in loop.body))
    values = {stmt.targets[0].id: stmt.value for stmt in loop.body if isinstance(stmt, ast.Assign)}  # type: ignore[attr-defined]
    results = ", ".join(name if is_fresh(values[name]) else f"{name}.clone()" for name in carried)
    same = f"{names}.clone()" if one else f"({', '.join(f'{name}.clone()' for name in carried)})"
    given = f"({names},)" if one else f"({names})"
    head = f"for {loop.counter} in range({loop.start}, {loop.stop}):"
    define = [f"def {turn}({names}):", *textwrap.indent(body, "    ").splitlines(), f"    return {results}"]
    step = f"    {names} = {torch}.cond({test}, {turn}, lambda {names}: {same}, {given})"
    if loop.counter in names_read(loop.body):  # the turn closes over the counter, so it is made in each
        lines = [head, *(f"    {line}" for line in define), "", step]
    else:
        lines = [*define, "", head, step]
    return "\n".join(f"{indent}{line}" if line and at else line for at, line in enumerate(lines))
