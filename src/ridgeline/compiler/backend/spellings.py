"""How each ATen operation reads as a term. Adding a spelling means adding a rule here.

A rule gets the terms, the node, and the arguments of the operation's schema with defaults filled in; it returns a term,
or None where the operation stays opaque after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ridgeline.compiler.backend.terms import Term, Terms, Value, rule
from ridgeline.compiler.internals.graphs import known

# Arithmetic

rule("mul", "multiply")(lambda t, n, x, y: t.mul(x, y))
rule("add")(lambda t, n, x, y, alpha: t.add(x, t.mul(alpha, y)))
rule("sub", "subtract")(lambda t, n, x, y, alpha=1: t.add(x, t.mul(-1, t.mul(alpha, y))))
rule("rsub")(lambda t, n, x, y, alpha: t.add(y, t.mul(-1, t.mul(alpha, x))))
rule("neg")(lambda t, n, x: t.mul(-1, x))
rule("div", "divide", "true_divide")(lambda t, n, x, y, mode=None: None if mode else t.mul(x, t.recip(y)))
rule("reciprocal")(lambda t, n, x: t.recip(x))
rule("square")(lambda t, n, x: t.mul(x, x))
rule("sqrt")(lambda t, n, x: t.make("sqrt", x))
rule("rsqrt")(lambda t, n, x: t.make("rsqrt", x))
rule("exp")(lambda t, n, x: t.make("exp", x))
rule("erf")(lambda t, n, x: t.make("erf", x))
rule("tanh")(lambda t, n, x: t.make("tanh", x))
rule("log")(lambda t, n, x: t.make("log_softmax", *x.args) if x.op == "softmax" else t.make("log", x))
rule("sigmoid")(lambda t, n, x: t.sigmoid(x))
rule("silu")(lambda t, n, x: t.mul(x, t.sigmoid(x)))


@rule("pow")
def _pow(t: Terms, node: Node, x: Value, exponent: Any) -> Value:
    if not isinstance(x, Term) or isinstance(exponent, Term):
        return None
    forms: dict[Any, Callable[[], Value]] = {
        2: lambda: t.mul(x, x),
        3: lambda: t.mul(t.mul(x, x), x),
        0.5: lambda: t.make("sqrt", x),
        -0.5: lambda: t.make("rsqrt", x),
        -1: lambda: t.recip(x),
    }
    return forms[exponent]() if exponent in forms else None


@rule("gelu")
def _gelu(t: Terms, node: Node, x: Value, approximate: str) -> Value:
    if approximate == "none":
        inner = t.make("erf", t.mul(math.sqrt(0.5), x))
    else:
        cubic = t.add(x, t.mul(0.044715, t.mul(t.mul(x, x), x)))
        inner = t.make("tanh", t.mul(math.sqrt(2 / math.pi), cubic))
    return t.mul(t.mul(0.5, x), t.add(1, inner))


# Reductions over the last dim


def _last(x: Value, dims: Any) -> bool:
    """Whether ``dims`` (an int or a tuple of one) is the last dim of ``x``."""
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    return len(dims) == 1 and x.shape is not None and dims[0] in (-1, len(x.shape) - 1)


@rule("mean")
def _mean(t: Terms, node: Node, x: Value, dims: Any = None, keep: Any = False, *_: Any) -> Value:
    return t.make("mean", t.cast(x, node.meta["val"].dtype), -1, keep) if _last(x, dims) else None


@rule("sum")
def _sum(t: Terms, node: Node, x: Value, dims: Any = None, keep: Any = False, *_: Any) -> Value:
    if not _last(x, dims):
        return None
    size = x.shape[-1]  # so that a division by it makes a mean
    return t.make("sum", t.cast(x, node.meta["val"].dtype), -1, keep, size if isinstance(size, int) else 0)


@rule("var")
def _var(t: Terms, node: Node, x: Value, dims: Any = None, correction: Any = None, keep: Any = False) -> Value:
    if not _last(x, dims) or correction not in (False, 0):  # var.dim says unbiased=False, var.correction says 0
        return None
    centred = t.add(x, t.mul(-1, t.make("mean", x, -1, True)))
    return t.make("mean", t.mul(centred, centred), -1, keep)


rule("amax")(lambda t, n, x, dims, keep: t.make("amax", x, -1, keep) if _last(x, dims) else None)
rule("max")(lambda t, n, x, dim=None, keep=False: t.make("max", x, -1, keep) if _last(x, dim) else None)
rule("softmax")(lambda t, n, x, dim, dtype: t.make("softmax", t.cast(x, dtype), -1) if _last(x, dim) else None)
rule("log_softmax")(lambda t, n, x, dim, dtype: t.make("log_softmax", t.cast(x, dtype), -1) if _last(x, dim) else None)
rule("logsumexp")(lambda t, n, x, dims, keep: t.make("logsumexp", x, keep) if _last(x, dims) else None)

# Shapes and dtypes

rule("contiguous", "clone")(lambda t, n, x, *_: x)
rule("dropout")(lambda t, n, x, p, train: x if not train or p == 0 else Term(f"%{n.name}", ()))
rule("permute")(lambda t, n, x, dims: t.permute(x, tuple(d % len(dims) for d in dims)))
rule("unsqueeze")(lambda t, n, x, dim: t.make("unsqueeze", x, dim % n.meta["val"].dim()))
rule("expand")(lambda t, n, x, *_: t.make("expand", x) if x.op == "unsqueeze" else None)
rule("t", "numpy_T")(lambda t, n, x: t.permute(x, (1, 0)) if n.meta["val"].dim() == 2 else None)
rule("mT")(lambda t, n, x: _transpose(t, n, x, -1, -2))


@rule("to", "_to_copy", "type_as")
def _to(t: Terms, node: Node, x: Value, *_: Any) -> Value:
    same_device = x.nodes and x.nodes[0].meta["val"].device == node.meta["val"].device
    return t.cast(x, node.meta["val"].dtype) if same_device else None


@rule("transpose")
def _transpose(t: Terms, node: Node, x: Value, first: int, second: int) -> Value:
    dims = list(range(node.meta["val"].dim()))
    dims[first], dims[second] = dims[second], dims[first]
    return t.permute(x, tuple(dims))


@rule("view", "reshape", "_unsafe_view", "flatten")
def _reshape(t: Terms, node: Node, x: Value, *_: Any) -> Value:
    new, old = node.meta["val"].shape, x.shape
    if old is None:
        return None
    if len(new) == len(old) and all(known(a == b) for a, b in zip(new, old, strict=True)):
        return x
    if x.op == "expand" and len(old) == len(new) + 1:  # heads repeated by expansion of a new dim
        inner, dim = x.args[0].args
        if isinstance(old[dim], int) and known(new[dim - 1] == old[dim - 1] * old[dim]):
            return t.make("repeat_heads", inner, old[dim], dim - 1)
    if len(new) == 2 and len(old) > 2 and known(new[1] == old[-1]):
        return _rows(t, x)
    return t.make("flat", x) if len(new) == 1 else None


def _rows(t: Terms, x: Term) -> Term:
    """``x.reshape(-1, x.shape[-1])``, moved to the inside of casts and linears."""
    if x.op == "cast":
        made: Term = t.cast(_rows(t, x.args[0]), x.args[1])
        return made
    if x.op == "linear":
        return t.make("linear", _rows(t, x.args[0]), *x.args[1:])
    made = t.make("rows", x)
    made.dtype = x.dtype
    return made


@rule("repeat_interleave")
def _repeat_interleave(t: Terms, node: Node, x: Value, times: Any, dim: Any = None, *_: Any) -> Value:
    return t.make("repeat_heads", x, times, dim % len(x.shape)) if isinstance(times, int) and dim is not None else None


@rule("slice")
def _slice(t: Terms, node: Node, x: Value, dim: int, start: Any, stop: Any, step: Any) -> Value:
    if x.shape is None:
        return None
    dim = dim % len(x.shape)
    return t.slice(x, dim, start or 0, x.shape[dim] if stop is None else stop, step)


@rule("chunk", "split")
def _split(t: Terms, node: Node, x: Value, size: Any, dim: int) -> Value:
    dim, bounds, start = dim % len(node.meta["val"][0].shape), [], 0
    for part in node.meta["val"]:
        bounds.append((start, start + part.shape[dim]))
        start = start + part.shape[dim]
    return t.make("parts", x, dim, tuple(bounds)) if all(isinstance(b, int) for ab in bounds for b in ab) else None


@rule("cat", "concat")
def _cat(t: Terms, node: Node, parts: Any, dim: int) -> Value:
    rank = node.meta["val"].dim()
    return t.make("cat", *parts, dim % rank - rank) if len(parts) == 2 else None


# Products of matrices

rule("linear")(lambda t, n, x, weight, bias: t.make("linear", x, weight, bias))
rule("matmul", "bmm", "mm")(lambda t, n, x, y: t.matmul(x, y))
rule("addmm")(lambda t, n, b, x, y, beta, alpha: t.add(t.mul(beta, b), t.mul(alpha, t.matmul(x, y))))


@rule("scaled_dot_product_attention")
def _sdpa(
    t: Terms, n: Node, q: Value, k: Value, v: Value, mask: Any, p: Any, causal: Any, scale: Any, gqa: Any
) -> Value:
    return t.make("sdpa", q, k, v, mask, causal, scale, gqa) if p == 0 else None


@rule("einsum")
def _einsum(t: Terms, node: Node, equation: str, operands: Any, *_: Any) -> Value:
    """Products of heads, whatever the letters: both sides are brought to ``[.., rows, inner] @ [.., inner, columns]``."""
    inputs, _arrow, out = equation.replace(" ", "").partition("->")
    sides = inputs.split(",")
    if len(sides) != 2 or "." in equation or any(len(set(s)) != len(s) or len(s) != 4 for s in (*sides, out)):
        return None
    batch, row, column = out[:2], out[2], out[3]
    inner = next(iter(set(sides[0]) - set(out)), "")
    if set(sides[0]) != {*batch, row, inner} or set(sides[1]) != {*batch, inner, column}:
        return None
    left = t.permute(operands[0], tuple(sides[0].index(letter) for letter in (*batch, row, inner)))
    right = t.permute(operands[1], tuple(sides[1].index(letter) for letter in (*batch, inner, column)))
    return t.matmul(left, right)


# Choice

rule("masked_fill")(lambda t, n, x, mask, value: _where(t, n, mask, value, x))
rule("bitwise_not", "logical_not")(lambda t, n, x: x.args[0] if x.op == "not" else t.make("not", x))


@rule("where")
def _where(t: Terms, node: Node, condition: Value, x: Value = None, y: Value = None) -> Value:
    x, y = (side.args[0] if isinstance(side, Term) and side.op == "scalar" else side for side in (x, y))
    if condition.op == "not":
        return t.make("where", condition.args[0], y, x)
    return t.make("where", condition, x, y)


@rule("scalar_tensor", "full")
def _scalar(t: Terms, node: Node, *arguments: Any) -> Value:
    value = next((a for a in arguments if isinstance(a, (int, float))), None)
    return t.make("scalar", float(value)) if value is not None and node.meta["val"].dim() == 0 else None


# Losses: "chosen" is the entry of each row that an index names


@rule("cross_entropy_loss")
def _cross_entropy(
    t: Terms, n: Node, x: Value, y: Value, weight: Any, reduction: int, ignore: Any, smooth: Any
) -> Value:
    plain = weight is None and not smooth and n.args[0].meta["val"].dim() == 2  # type: ignore[union-attr]
    return t.make("cross_entropy", x, y, reduction, ignore) if plain else None


@rule("nll_loss", "nll_loss_nd")
def _nll_loss(t: Terms, node: Node, x: Value, target: Value, weight: Any, reduction: int, ignore: Any) -> Value:
    known_form = weight is None and x.op == "log_softmax"
    return t.make("cross_entropy", x.args[0], target, reduction, ignore) if known_form else None


@rule("gather")
def _gather(t: Terms, node: Node, x: Value, dim: int, index: Value, *_: Any) -> Value:
    column = _last(x, dim) and index.op == "unsqueeze" and index.args[1] == 1 and len(x.shape) == 2
    return t.make("chosen_column", x, index.args[0]) if column else None


@rule("squeeze", "select")
def _squeeze(t: Terms, node: Node, x: Value, dim: Any = None, index: int = 0) -> Value:
    return t.make("chosen", *x.args) if x.op == "chosen_column" and dim in (1, -1) and index == 0 else None
