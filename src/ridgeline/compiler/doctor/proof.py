"""Does a compiled function still compute the same? Outputs, gradients and changed state against float64.

::

    baseline process            snapshot of a call --> eager, and eager in float64 --> saved
    process with the fix        the same call, the saved tensors put in --> compiled under the fix
    verdict                     distance(fix, float64) <= 2 x distance(eager, float64)

A snapshot is a deep copy of the module and the inputs, taken before the call; where a model cannot be copied, its state
is, and the live module is used after the program's end. Random numbers are drawn from the same seed on all sides.
"""

from __future__ import annotations

import contextlib
import copy
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

LOW = (torch.float32, torch.bfloat16, torch.float16)
TIMES_EAGER = 2.0
"""A fix may be this much further from float64 than eager in the program's own precision."""
SEED = 20_000
NUMBERS = (bool, int, float)
MODULE_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")
MOST_BYTES = 1 << 30
"""Snapshots of all calls together; what does not fit is not proven, and that is said."""


class NotComparable(Exception):
    """The call cannot be repeated or compared; one line says why."""


@dataclass
class Result:
    """What a call gave: tensors and other values of the output, gradients of leaves, tensors it changed by index."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    state: dict[int, torch.Tensor] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Tensors, lists and texts alone: ``torch.save`` with nothing that needs a pickle to be trusted."""
        return {"outputs": self.outputs, "others": self.others, "gradients": self.gradients, "state": self.state}


class Snapshot:
    """One call of a compiled function, to be repeated on copies: the function, what it reaches, and its arguments.

    Raises:
        NotComparable: something cannot be copied.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.function = function
        self.owner = getattr(function, "__self__", None)
        plain = inner_function(function)
        reached = _reached(plain) if isinstance(plain, types.FunctionType) else ({}, ())
        self.note = ""
        self._live: dict[str, torch.Tensor] | None = None
        try:
            self._roots = _copied((self.owner, args, kwargs, *reached))
        except Exception as error:
            if not isinstance(self.owner, torch.nn.Module):
                raise NotComparable(f"cannot be copied: {_line(error)}") from None
            self.note = f"the model cannot be copied ({_line(error)}): its state was, and the live model was used"
            self._live = {name: one.detach().clone() for name, one in self.owner.state_dict().items()}
            self._roots = _copied((None, args, kwargs, {}, ()))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the snapshot in a fixed order: two runs of one program have the same list."""
        return [*_tensors(self._roots), *(self._live or {}).values()]

    def load(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put another run's values in, so that both compute from the same numbers.

        Raises:
            NotComparable: the other run's call had other shapes.
        """
        mine = self.tensors
        if [(one.shape, one.dtype) for one in mine] != [(one.shape, one.dtype) for one in tensors]:
            raise NotComparable("the call has other inputs under the fix: the program takes another way")
        with torch.no_grad():
            for one, value in zip(mine, tensors, strict=True):
                one.copy_(value)

    def run(self, wrap: Callable[..., Any] | None = None, double: bool = False) -> Result:
        """Repeat the call on fresh copies: eager, in float64 (``double``), or as what ``wrap`` makes of it."""
        owner, args, kwargs, names, cells = _copied(self._roots)
        if self._live is not None:
            assert isinstance(self.owner, torch.nn.Module)
            owner = self.owner
            owner.load_state_dict(self._live)
        call: Any = _rebuilt(self.function, owner, names, cells)
        if wrap is not None:
            whole = isinstance(owner, torch.nn.Module) and self.function.__name__ in MODULE_CALLS
            call = wrap(owner if whole else call)
        given = _tensors((owner, args, kwargs, names, cells))
        low = next((one.dtype for one in given if one.dtype in LOW), torch.float32)
        for one in given:
            one.grad = None
            if double and one.dtype in LOW:
                one.data = one.data.double()
        before = [one.detach().clone() for one in given]
        torch.manual_seed(SEED)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if double else usual)
        try:
            with Double(low) if double else contextlib.nullcontext():
                return _collect(call(*args, **kwargs), given, before)
        finally:
            torch.set_default_dtype(usual)


def inner_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The plain function of a method or of a wrapper that torch put around it."""
    return getattr(function, "__func__", function)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:120]}"


def _tensors(roots: Any) -> list[torch.Tensor]:
    """Every tensor that a deep copy of ``roots`` visits, once, in the order of the visit."""
    found: list[torch.Tensor] = []
    _Collector(found, set()).walk(roots)
    return found


class _Collector:
    """Walks what a deep copy would: containers, modules, objects with a ``__dict__``."""

    def __init__(self, found: list[torch.Tensor], seen: set[int]) -> None:
        self.found, self.seen = found, seen

    def walk(self, value: Any) -> None:
        """Depth first; each object once."""
        stack = [value]
        while stack:
            one = stack.pop()
            if id(one) in self.seen or isinstance(
                one, (str, bytes, int, float, bool, type(None), type, types.ModuleType)
            ):
                continue
            self.seen.add(id(one))
            if isinstance(one, torch.Tensor):
                self.found.append(one)
            elif isinstance(one, dict):
                stack.extend(reversed(list(one.values())))
            elif isinstance(one, (list, tuple, set, frozenset)):
                stack.extend(reversed(list(one)))
            elif hasattr(one, "__dict__") and not isinstance(one, types.FunctionType):
                stack.extend(reversed(list(vars(one).values())))


def _leaves(roots: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(roots) if isinstance(one, torch.Tensor)]


def _copied(roots: Any) -> Any:
    """A deep copy; tensors in the middle of an autograd graph become leaves."""
    memo: dict[int, Any] = {}
    found: list[torch.Tensor] = []
    _Collector(found, set()).walk(roots)
    for one in found:
        if not one.is_leaf:
            memo[id(one)] = one.detach().clone().requires_grad_(one.requires_grad)
    return copy.deepcopy(roots, memo)


def _reached(function: types.FunctionType) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Modules, tensors and optimisers that a function finds in its globals and closure, and helpers that find them."""
    names: dict[str, Any] = {}
    todo, seen = [function], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for name in _names_of(one.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
                todo.append(value)
                names[name] = value
            elif isinstance(value, NUMBERS) or _holds_tensors(value):
                names[name] = value  # a counter in a global has its value of this call
    cells = tuple(_content(cell) for cell in function.__closure__ or ())
    return names, cells


def _names_of(code: types.CodeType) -> set[str]:
    out = set(code.co_names)
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            out |= _names_of(one)
    return out


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (torch.nn.Module, torch.Tensor, torch.optim.Optimizer)):
        return True
    return isinstance(value, (list, tuple, dict)) and bool(_leaves(value))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _rebuilt(
    function: Callable[..., Any], owner: Any, names: dict[str, Any], cells: tuple[Any, ...]
) -> Callable[..., Any]:
    """The function over copies of what it reaches."""
    plain = inner_function(function)
    if owner is not None and not isinstance(plain, types.FunctionType):
        return getattr(owner, function.__name__)  # type: ignore[no-any-return]
    if not isinstance(plain, types.FunctionType):
        return function
    scope = dict(plain.__globals__)
    for name, value in names.items():
        helper = isinstance(value, types.FunctionType)
        scope[name] = with_globals(value, scope, value.__closure__) if helper else value
    closure = tuple(types.CellType(one) for one in cells) or None
    made = with_globals(plain, scope, closure) if names or cells else plain
    return types.MethodType(made, owner) if owner is not None else made


def with_globals(function: types.FunctionType, scope: dict[str, Any], closure: Any) -> types.FunctionType:
    """The same function over other globals. Its code is a new object: what dynamo has compiled of the old one calls
    graphs by names in the old globals."""
    code = function.__code__.replace()
    made = types.FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update({key: value for key, value in vars(function).items() if not key.startswith("_torch")})
    return made


def _collect(out: Any, given: list[torch.Tensor], before: list[torch.Tensor]) -> Result:
    """The result, after a backward pass from fixed random weights on every output that has a gradient.

    A function that does its own backward pass has left its gradients already.
    """
    leaves = pytree.tree_leaves(out)
    outputs = [one for one in leaves if isinstance(one, torch.Tensor)]
    others = [_short(one) for one in leaves if not isinstance(one, torch.Tensor)]
    roots = [one for one in outputs if one.requires_grad and one.is_floating_point()]
    if roots and all(one.grad is None for one in given):
        draw = torch.Generator().manual_seed(SEED)
        weights = [torch.randn(one.shape, generator=draw, dtype=torch.float32).to(one) for one in roots]
        torch.autograd.backward(roots, weights)
    gradients = {at: one.grad.detach() for at, one in enumerate(given) if one.grad is not None}
    changed = {
        at: one.detach().clone()
        for at, (one, old) in enumerate(zip(given, before, strict=True))
        if one.shape == old.shape and not torch.equal(one.detach(), old)
    }
    return Result([one.detach().clone() for one in outputs], others, gradients, changed)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"  # a number read from a tensor: its error is not judged here
    return repr(value)[:200] if isinstance(value, (int, bool, str, type(None))) else type(value).__name__


class Double(TorchFunctionMode):
    """Every floating result is float64, also where the code names a lower type; random draws stay the lower type's."""

    DRAWS = frozenset(
        ("rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "bernoulli_", "uniform_", "normal_")
    )

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every torch function of the block."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("float", "half", "bfloat16"):
            return args[0].double()
        if name in ("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"):
            return self._dropout(func, args, kwargs)
        if name in self.DRAWS and not name.endswith("_"):
            return self._draw(func, args, kwargs)
        args = pytree.tree_map(self._raised, args)
        return func(*args, **{key: self._raised(value) for key, value in kwargs.items()})

    def _raised(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in LOW else value

    def _draw(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        lowered = [
            one.to(self.low) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in args
        ]
        if not any(isinstance(one, torch.Tensor) for one in args):
            kwargs.setdefault("dtype", torch.float32)
        drawn = func(*lowered, **kwargs)
        return drawn.double() if drawn.is_floating_point() else drawn

    def _dropout(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        value = args[0] if args else kwargs["input"]
        ones = torch.ones(value.shape, dtype=self.low, device=value.device)
        mask = func(ones, *args[1:], **{key: one for key, one in kwargs.items() if key not in ("input", "inplace")})
        return value * mask.double()


@dataclass(frozen=True)
class Verdict:
    """The larger of the distances of outputs, gradients and state; ``why`` names what failed, "" when it passed."""

    error: float
    error_eager: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the rule holds."""
        return not self.why


def compare(new: Result, eager: Result, exact: Result) -> Verdict:
    """The rule of the doctor: in each of outputs, gradients and state at most twice as far from float64 as eager is.

    A difference of one unit in the last place of the type is always allowed: eager may be exact by luck.
    """
    if new.others != eager.others:
        return Verdict(math.inf, 0.0, "a value that is no tensor differs")
    groups: list[tuple[str, Iterable[tuple[Any, Any, Any]]]] = [
        (
            "outputs",
            _aligned(dict(enumerate(new.outputs)), dict(enumerate(eager.outputs)), dict(enumerate(exact.outputs))),
        ),
        ("gradients", _aligned(new.gradients, eager.gradients, exact.gradients)),
        ("state", _aligned(new.state, eager.state, exact.state)),
    ]
    worst, worst_eager, why = 0.0, 0.0, ""
    for name, rows in groups:
        errors, errors_eager, unit = [0.0], [0.0], 0.0
        for mine, theirs, reference in rows:
            if mine is None or theirs is None or reference is None:
                return Verdict(math.inf, 0.0, f"{name}: one side has a tensor that the other lacks")
            if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                was = f"{theirs.dtype} {list(theirs.shape)}"
                return Verdict(math.inf, 0.0, f"{name}: {mine.dtype} {list(mine.shape)} instead of {was}")
            errors.append(distance(mine, reference))
            errors_eager.append(distance(theirs, reference))
            unit = max(unit, torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0.0)
        error, error_eager = max(errors), max(errors_eager)
        worst, worst_eager = max(worst, error), max(worst_eager, error_eager)
        if not error <= max(TIMES_EAGER * error_eager, unit) and not why:
            why = f"{name} are {error:.1e} from float64, eager's {error_eager:.1e}"
    return Verdict(worst, worst_eager, why)


def _aligned(new: dict[int, Any], eager: dict[int, Any], exact: dict[int, Any]) -> list[tuple[Any, Any, Any]]:
    return [(new.get(key), eager.get(key), exact.get(key)) for key in sorted({*new, *eager, *exact})]


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|`` in the 2-norm, in float64; infinite where only one is NaN or infinite."""
    a, b = value.detach().double().flatten(), reference.detach().double().flatten()
    if a.shape != b.shape or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return math.inf
    finite = torch.isfinite(a)
    a, b = a[finite], b[finite]
    norm = float(b.norm())
    gap = float((a - b).norm())
    return gap / norm if norm else (0.0 if gap == 0 else math.inf)
