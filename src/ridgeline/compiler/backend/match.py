"""The pattern language: a search function, a replacement, example inputs, guards; and the pass that applies them.

::

    @pattern(examples=(of(2, 8), of(8), 1.5e-6), guard=weight_is_last_dim)
    def rms_norm(x, weight, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    @rms_norm.replacement
    def _(x, weight, eps):
        return kernels.rms_norm(x, weight, eps)

Search functions are run on their examples, once per dtype, and read as terms (`terms.py`): so they match every spelling
that has the same canonical form. A float among the examples stands for any constant. Where forms differ for good, add
``@rms_norm.spelling``. A match is refused when an inner value is used elsewhere, when the guard says so, or when the
replacement would change shape, dtype or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ridgeline.compiler.backend import spellings  # noqa: F401  (fills the rules)
from ridgeline.compiler.backend.terms import COMMUTATIVE, Term, Terms, Value
from ridgeline.compiler.internals.graphs import in_fake_mode, same_shape, trace

Bound = dict[str, Value]  # search parameter -> term or constant
Guard = Callable[..., str | None]
SOURCE = ("stack_trace", "nn_module_stack")  # what a replacement inherits
TOLERANCE = 1e-6  # of constants such as sqrt(2 / pi), relative


@dataclass
class Pattern:
    """Search and replacement. ``pays`` maps a device type to a guard-like function: None there means apply."""

    name: str
    examples: Callable[[torch.dtype], tuple[Any, ...]]
    guard: Guard
    pays: dict[str, Guard]
    searches: list[Callable[..., Any]]
    replace: Callable[..., Any] | None = None
    prepare: Callable[[Bound], Bound] = dict
    _read: dict[torch.dtype, list[Term]] = field(default_factory=dict)

    def spelling(self, search: Callable[..., Any]) -> Pattern:
        """Another form to search for, with the same parameters."""
        self.searches.append(search)
        return self

    def replacement(self, replace: Callable[..., Any]) -> Pattern:
        """What to put there, given the tensors and constants the parameters matched."""
        self.replace = replace
        return self

    def preparation(self, prepare: Callable[[Bound], Bound]) -> Pattern:
        """A last look at what was bound, which may bind more for the replacement."""
        self.prepare = prepare
        return self

    def terms(self, dtype: torch.dtype) -> list[Term]:
        """The searches read with examples in ``dtype``."""
        if dtype not in self._read:
            self._read[dtype] = [self._term(search, dtype) for search in self.searches]
        return self._read[dtype]

    def _term(self, search: Callable[..., Any], dtype: torch.dtype) -> Term:
        names = search.__code__.co_varnames[: search.__code__.co_argcount]
        examples = self.examples(dtype)
        tensors = [e for e in examples if isinstance(e, Tensor)]

        def run(*given: Tensor) -> Any:
            left = iter(given)
            return search(*(next(left) if isinstance(e, Tensor) else e for e in examples))

        graph = trace(run, tensors).graph
        terms = Terms(graph)
        places = iter(node for node in graph.nodes if node.op == "placeholder")
        for name, example in zip(names, examples, strict=False):
            if isinstance(example, Tensor) and (term := terms.of(next(places))):
                term.op, term.args = "var", (name,)
        constants = {e: n for n, e in zip(names, examples, strict=False) if isinstance(e, float)}
        (out,) = (node for node in graph.nodes if node.op == "output")
        made: Term = _with_variables(terms.of(out.args[0]), constants)
        return made


def pattern(
    examples: Callable[[torch.dtype], tuple[Any, ...]], guard: Guard = lambda **_: None, **pays: Guard
) -> Callable[[Callable[..., Any]], Pattern]:
    """Make the decorated search function a `Pattern`.

    ``examples(dtype)`` gives its arguments; ``guard(**bound)`` and ``pays`` (``cpu=``, ``cuda=``) get what the parameters
    matched, as `Term` or constant, and return None or the reason to refuse.
    """
    return lambda search: Pattern(search.__name__, examples, guard, pays, [search])


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    """An example; its values do not matter."""
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def always(**_: Any) -> None:
    """The guard that refuses nothing."""


def _with_variables(term: Value, constants: dict[float, str]) -> Value:
    """``term`` with constants that stand for parameters turned into variables."""
    if not isinstance(term, Term):
        return Term("var", (constants[term],)) if isinstance(term, float) and term in constants else term
    if term.op != "var":
        term.args = tuple(_with_variables(argument, constants) for argument in term.args)
    return term


# Matching


@dataclass
class Match:
    """What the parameters stand for, and the inner terms the match walked through."""

    bound: Bound
    inner: list[Term]


def matches(search: Value, term: Value, terms: Terms, so_far: Match) -> Iterator[Match]:
    """Every way ``term`` is an instance of ``search``."""
    if isinstance(search, Term) and search.op == "var":
        name = search.args[0]
        known = so_far.bound.get(name, so_far)
        if known is so_far:
            yield Match({**so_far.bound, name: term}, so_far.inner)
        elif known is term or (not isinstance(term, Term) and known == term):
            yield so_far
    elif not isinstance(search, Term) or not isinstance(term, Term):
        if _same_constant(search, term):
            yield so_far
    elif search.op == term.op and not search.op.startswith("%"):
        below = Match(so_far.bound, [*so_far.inner, term])
        for arguments in _orders(search, term, terms):
            if len(arguments) == len(search.args):
                yield from _all(search.args, arguments, terms, below)


def _all(searches: tuple[Value, ...], values: tuple[Value, ...], terms: Terms, so_far: Match) -> Iterator[Match]:
    if not searches:
        yield so_far
        return
    for match in matches(searches[0], values[0], terms, so_far):
        yield from _all(searches[1:], values[1:], terms, match)


def _orders(search: Term, term: Term, terms: Terms) -> Iterator[tuple[Value, ...]]:
    """The ways to read ``term``: both orders of a sum or product, and ``a (b c)`` as ``(a b) c`` where that is sought."""
    yield term.args
    if term.op == "permute" and len(search.args[1]) == len(term.args[1]):  # of a value that was itself permuted
        inverse = tuple(map(search.args[1].index, range(len(search.args[1]))))
        yield terms.permute(term, inverse), search.args[1]
    if term.op not in COMMUTATIVE:
        return
    x, y = term.args
    yield y, x
    if not any(isinstance(a, Term) and a.op == term.op for a in search.args):
        return
    for outer, inner in ((x, y), (y, x)):
        if isinstance(inner, Term) and inner.op == term.op:
            for left, right in (inner.args, inner.args[::-1]):
                combined = terms.make(term.op, *sorted((outer, left), key=lambda v: isinstance(v, Term)))
                yield combined, right
                yield right, combined


def _same_constant(search: Value, term: Value) -> bool:
    if isinstance(search, (tuple, list)) and isinstance(term, (tuple, list)):
        return len(search) == len(term) and all(map(_same_constant, search, term))
    numbers = (int, float)
    if isinstance(search, numbers) and isinstance(term, numbers) and not isinstance(search, bool):
        return search == term or abs(search - term) <= TOLERANCE * abs(search)
    return not isinstance(search, Term) and not isinstance(term, Term) and search == term


# Application


@dataclass
class Applied:
    """One replacement, or a match that was refused and why."""

    pattern: str
    where: str
    refused: str | None = None


def rewrite(graph: GraphModule, patterns: list[Pattern], device: str, everywhere: bool = False) -> list[Applied]:
    """Replace what ``patterns`` find in a normal form, outermost first; ``everywhere``: even where it does not pay."""
    chosen = [p for p in patterns if everywhere or device in p.pays]
    if not chosen:
        return []
    values = (node.meta.get("val") for node in graph.graph.nodes)
    dtypes = sorted({v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}, key=str)
    pass_ = _Pass(graph, Terms(graph.graph), None if everywhere else device)
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_function" and node not in pass_.erased:
            pass_.visit(node, [(p, s) for p in chosen for dtype in dtypes for s in p.terms(dtype)])
    if pass_.erased:
        graph.graph.lint()
        graph.recompile()
    return pass_.done


class _Pass:
    """One walk over a graph."""

    def __init__(self, graph: GraphModule, terms: Terms, device: str | None) -> None:
        self.graph, self.terms, self.device = graph.graph, terms, device
        self.erased: set[Node] = set()
        self.done: list[Applied] = []

    def visit(self, node: Node, searches: list[tuple[Pattern, Term]]) -> None:
        """Replace ``node`` by the first pattern that matches and is not refused."""
        term = self.terms.of(node)
        self.terms.enter(node)
        refusals = {}
        for pattern, search in searches:
            if not isinstance(term, Term) or search.op != term.op:
                continue
            for match in matches(search, term, self.terms, Match({}, [])):
                refused = self.refusal(pattern, match, term) or self.splice(node, pattern, match)
                if refused is None:
                    self.done.append(Applied(pattern.name, line_of(node)))
                    return
                refusals[pattern.name] = Applied(pattern.name, line_of(node), refused)
        self.done += refusals.values()

    def refusal(self, pattern: Pattern, match: Match, root: Term) -> str | None:
        """Why a match must not be replaced, or None."""
        inner = {*map(id, match.inner)}
        for node in (node for one in match.inner if one is not root for node in one.nodes):
            outside = self.user_outside(node, inner)
            if outside is not None:
                return f"{node.name} is used by {outside.name} too"
        missing = [t for t in match.bound.values() if isinstance(t, Term) and not (t.nodes or t.op in BUILT)]
        if missing:
            return f"no value of the program is {missing[0].op}"
        return pattern.guard(**match.bound) or (pattern.pays[self.device](**match.bound) if self.device else None)

    def user_outside(self, node: Node, inner: set[int], depth: int = 4) -> Node | None:
        """A user of ``node`` that is not part of the match; steps that the canonical form skips are part of it."""
        for user in node.users:
            if id(self.terms.of(user)) in inner:
                continue
            if user.op == "output" or depth == 0 or self.user_outside(user, inner, depth - 1) is not None:
                return user
        return None

    def splice(self, root: Node, pattern: Pattern, match: Match) -> str | None:
        """Put the replacement before ``root`` and hand it root's users; None, or why it was not done."""
        assert pattern.replace is not None
        bound = pattern.prepare(match.bound)
        names = pattern.replace.__code__.co_varnames[: pattern.replace.__code__.co_argcount]
        with self.graph.inserting_before(root):
            given = {name: self.node_of(bound.get(name), root) for name in names}
            out = self.insert(pattern.replace, given, root)
        new, old = out.meta["val"], root.meta["val"]
        if (new.dtype, new.device) != (old.dtype, old.device) or not same_shape(new, old):
            self.erase(out)
            return f"it would give {new.dtype} {list(new.shape)} for {old.dtype} {list(old.shape)}"
        self.terms.alias(out, root)
        root.replace_all_uses_with(out)
        self.erase(root)
        return None

    def insert(self, function: Callable[..., Any], given: Mapping[str, Any], like: Node) -> Node:
        """The nodes of ``function`` at the current place of the graph, with the source line of what they replace."""
        inputs = {name: value for name, value in given.items() if isinstance(value, Node)}
        fakes = [value.meta["val"] for value in inputs.values()]

        def run(*tensors: Tensor) -> Any:
            return function(**{**given, **dict(zip(inputs, tensors, strict=True))})

        with in_fake_mode(fakes):
            made = trace(run, fakes)
        copies: dict[Node, Node] = {}
        left = iter(inputs.values())
        for node in made.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(left)
            elif node.op == "call_function":
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
                copies[node].meta |= {key: like.meta[key] for key in SOURCE if key in like.meta}
        (out,) = (node for node in made.graph.nodes if node.op == "output")
        return copies[out.args[0]]

    def node_of(self, value: Value, like: Node) -> Any:
        """The node that computes a term, made when the program has none; constants as they are."""
        if not isinstance(value, Term) or value.nodes:
            return value.nodes[0] if isinstance(value, Term) else value
        x, *more = value.args
        return self.insert(lambda x: BUILT[value.op](x, *more), {"x": self.node_of(x, like)}, like)

    def erase(self, node: Node) -> None:
        """Remove a node without users, and what only it used."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        self.erased.add(node)
        for one in inputs:
            if one not in self.erased and not one.users and one.op == "call_function" and not one.is_impure():
                self.erase(one)


BUILT: dict[str, Callable[..., Tensor]] = {
    "permute": lambda x, dims: x.permute(dims),
    "rows": lambda x: x.reshape(-1, x.shape[-1]),
    "cast": lambda x, dtype: x.to(dtype),
    "unsqueeze": lambda x, dim: x.unsqueeze(dim),
}


def line_of(node: Node) -> str:
    """The user's source: ``File "x.py", line 3, in forward``."""
    lines = [line for line in (node.meta.get("stack_trace") or "").splitlines() if line.lstrip().startswith("File")]
    return lines[-1].strip() if lines else ""
