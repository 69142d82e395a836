"""``.item()`` kept as a tensor where the number only meets tensors again.

::

    scale = x.abs().max().item()     -->     scale = x.abs().max().detach()
    y = x / scale                            y = x / scale

``detach`` because a number carries no gradient; ``double`` too where numbers are computed with each other, which Python
does in double precision. A number that leaves the arithmetic (a size, a branch, a log line, an attribute) is refused.
"""

from __future__ import annotations

import ast

from ridgeline.compiler.doctor.rewrites.facts import ZERO, Facts, called, is_fresh, words
from ridgeline.compiler.doctor.rewrites.text import Edit, Function, Refused, Rewrite, Source, names_bound

ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
TAKES_SCALAR_TENSOR = words("mul div add sub pow masked_fill")
DEPTH = 8


def scalar_reads(statement: ast.stmt) -> list[ast.Call]:
    """``t.item()`` and ``float(t)`` of a statement, not of statements below it; ``float(t.item())`` counts once."""
    own = [one for one in ast.iter_child_nodes(statement) if isinstance(one, ast.expr)]
    found = [one for top in own for one in ast.walk(top) if isinstance(one, ast.Call) and operand(one) is not None]
    inner = {id(below) for one in found for below in ast.walk(one) if below is not one}
    return [one for one in found if id(one) not in inner]


def operand(node: ast.Call) -> ast.expr | None:
    """The tensor whose number is taken, None when the call takes none."""
    if node.keywords:
        return None
    if isinstance(node.func, ast.Attribute) and node.func.attr == "item" and not node.args:
        return node.func.value
    if isinstance(node.func, ast.Name) and node.func.id == "float" and len(node.args) == 1:
        below = node.args[0]
        return operand(below) or below if isinstance(below, ast.Call) else below
    return None


def rewrite_item(source: Source, statement: ast.stmt) -> Rewrite:
    """The statement with its numbers kept as tensors.

    Raises:
        Refused: a number is used as a number.
    """
    function = source.function_of(statement)
    if function is None:
        raise Refused("not in a function")
    calls = scalar_reads(statement)
    if not calls:
        raise Refused("no .item() and no float() here")
    facts, edits = Facts(source, function, statement), []
    for call in calls:
        value = operand(call)
        assert value is not None
        if called(call) == "float" and not facts.is_tensor(value):
            raise Refused(f"'{source.segment(value)}' is not known to be a tensor")
        follow = _Uses(source, function, facts)
        follow.of(call, DEPTH)
        flat = "" if facts.shape(value) == ZERO else ".reshape(())"  # a number has no dimension
        own = "" if is_fresh(value) else ".clone()"  # a number does not change when its tensor does
        exact = ".double()" if follow.numbers else ""
        edits.append(Edit(*source.span(call), f"{source.operand(value)}.detach(){own}{flat}{exact}"))
    return Rewrite(".item() kept as a tensor", source.edited(edits))


class _Uses:
    """Follows a number through the function until it meets a tensor; ``numbers`` tells that it met another number."""

    def __init__(self, source: Source, function: Function, facts: Facts) -> None:
        self.source, self.function, self.facts, self.numbers = source, function, facts, False

    def of(self, node: ast.expr, depth: int) -> None:
        """Where the value of this expression goes.

        Raises:
            Refused: somewhere that wants a number.
        """
        above = self.source.parent(node)
        if depth == 0:
            raise Refused("the number goes too far to be followed")
        if isinstance(above, ast.UnaryOp) and isinstance(above.op, (ast.USub, ast.UAdd)):
            self.of(above, depth - 1)
        elif isinstance(above, ast.BinOp) and isinstance(above.op, ARITHMETIC):
            other = above.right if above.left is node else above.left
            if self.facts.is_tensor(other):
                return  # a tensor from here on, as before
            if not isinstance(other, (ast.Constant, ast.Name, ast.UnaryOp)):
                raise Refused(f"'{self.source.segment(other)}' is not known to be a tensor or a number")
            if isinstance(other, ast.Name) and other.id not in _numbers(self.function):
                raise Refused(f"'{other.id}' is not known to be a tensor or a number")
            self.numbers = True
            self.of(above, depth - 1)
        elif isinstance(above, ast.Assign):
            self._named(above, depth)
        elif isinstance(above, ast.Call) and self._takes(above, node):
            return
        else:
            raise Refused(_used_as(above, self.source))

    def _named(self, node: ast.Assign, depth: int) -> None:
        target = node.targets[0]
        if len(node.targets) != 1 or not isinstance(target, ast.Name):
            raise Refused(f"the number is stored in '{ast.unparse(target)}'")
        bound = [
            one
            for one in ast.walk(self.function)
            if isinstance(one, (ast.Name, ast.arg)) and _binds(one, target.id) and one is not target
        ]
        nested = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.Global, ast.Nonlocal)
        if bound or any(isinstance(one, nested) and one is not self.function for one in ast.walk(self.function)):
            raise Refused(f"{target.id} has more than one value, or a function inside could read it")
        for use in ast.walk(self.function):
            if isinstance(use, ast.Name) and use.id == target.id and isinstance(use.ctx, ast.Load):
                self.of(use, depth - 1)

    def _takes(self, call: ast.Call, node: ast.expr) -> bool:
        """``tensor.mul(number)`` and the like, which take a tensor in its place."""
        method = isinstance(call.func, ast.Attribute) and self.facts.is_tensor(call.func.value)
        return method and called(call) in TAKES_SCALAR_TENSOR and any(one is node for one in call.args)


def _binds(node: ast.Name | ast.arg, name: str) -> bool:
    return node.arg == name if isinstance(node, ast.arg) else node.id == name and not isinstance(node.ctx, ast.Load)


def _numbers(function: Function) -> set[str]:
    """Names whose every value in the function is a literal number or taken from a tensor by ``.item()``."""
    plain: dict[str, bool] = {}
    for one in ast.walk(function):
        if isinstance(one, ast.Assign) and len(one.targets) == 1 and isinstance(one.targets[0], ast.Name):
            literal = isinstance(one.value, ast.Constant) and type(one.value.value) in (int, float)
            name = one.targets[0].id
            plain[name] = plain.get(name, True) and (literal or called(one.value) == "item")
    others = names_bound([one for one in ast.walk(function) if isinstance(one, (ast.For, ast.With, ast.AugAssign))])
    return {name for name, yes in plain.items() if yes} - others


def _used_as(above: ast.AST | None, source: Source) -> str:
    """What an ``.item()`` that stays is needed for, in one line."""
    if isinstance(above, (ast.If, ast.While, ast.IfExp, ast.Compare, ast.BoolOp)):
        return "the number decides a branch"
    if isinstance(above, ast.Return):
        return "the number is returned: whoever calls expects a number"
    if isinstance(above, (ast.FormattedValue, ast.JoinedStr)):
        return "the number becomes text"
    if isinstance(above, (ast.Subscript, ast.Slice)):
        return "the number is an index"
    if isinstance(above, (ast.List, ast.Tuple, ast.Dict, ast.Set)):
        return "the number goes into a container"
    if isinstance(above, ast.AugAssign):
        return f"the number goes into '{ast.unparse(above.target)}', which others may read"
    if isinstance(above, ast.Call):
        return f"the number is given to {called(above) or 'a call'}()"
    return f"the number is used as a number: '{ast.unparse(above)}'" if above is not None else "the number is not used"
