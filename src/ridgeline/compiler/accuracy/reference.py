"""The float64 answer to hold eager and compiled against: the same values, every operation in double precision.

Inputs and parameters are the low-precision ones, widened without loss. Casts inside the program (``x.float()``,
``dtype=torch.bfloat16``) would throw the precision away again, so a dispatch mode turns each into a cast to float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ridgeline.errors import UserError

LOW = (torch.float32, torch.bfloat16, torch.float16)


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block every operation on floating-point tensors is done in float64, whatever the program asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not func._schema.is_mutable:  # what is written in place keeps its type
            args, kwargs = tree_map(widen, (args, kwargs))
        if kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if one in LOW else one for one in args)
        return func(*args, **kwargs)


def widen(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.dtype in LOW else value


@dataclass
class Answer:
    """Floating-point outputs, and gradients (None: the leaf has none) for the given cotangents."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]


def answer(run: Callable[[], Any], leaves: Sequence[Tensor], seed: int = 0) -> Answer:
    """Run and differentiate: the gradient of ``sum(output * cotangent)`` with normal cotangents of this seed."""
    outputs = [one for one in tree_leaves(run()) if isinstance(one, Tensor) and one.is_floating_point()]
    draw = torch.Generator().manual_seed(seed)
    # In bf16's grid, so that no precision rounds them.
    cotangents = [torch.randn(one.shape, generator=draw).bfloat16().to(one.dtype).to(one.device) for one in outputs]
    wanted = [one for one in leaves if one.requires_grad]
    paired = [(one, ct) for one, ct in zip(outputs, cotangents, strict=True) if one.requires_grad]
    gradients: dict[int, Tensor | None] = {}
    if paired and wanted:
        found = torch.autograd.grad([o for o, _ in paired], wanted, [c for _, c in paired], allow_unused=True)
        gradients = {id(leaf): gradient for leaf, gradient in zip(wanted, found, strict=True)}
    return Answer([one.detach() for one in outputs], [gradients.get(id(leaf)) for leaf in leaves])


def reference(call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], seed: int = 0) -> Answer:
    """The answer of ``call`` in float64; leaves as :meth:`Target.leaves` orders them. Modules are copied, not changed.

    Raises:
        UserError: the model cannot be copied.
    """
    module = call if isinstance(call, nn.Module) else None
    if module is not None:
        try:
            module = copy.deepcopy(module).double()
        except Exception as error:
            raise UserError(f"the model cannot be copied, so there is no float64 reference: {error}") from None
        call = module
    leaves, spec = tree_flatten((list(args), dict(kwargs)))
    wide = [_wide_leaf(one) for one in leaves]
    args, kwargs = tree_unflatten(wide, spec)
    direct = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point()]
    double: Any = InFloat64
    with double():
        return answer(lambda: call(*args, **kwargs), [*direct, *(module.parameters() if module else ())], seed)


def _wide_leaf(value: Any) -> Any:
    return widen(value.detach()).clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
