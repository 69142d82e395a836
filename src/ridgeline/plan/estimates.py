"""Estimates people make by hand: Megatron's FLOPs per iteration, training time, speculative decoding.

Units are plain: FLOP, FLOP/s, seconds, tokens, parameters. Sources beside each formula.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.errors import UserError

CREDIBLE_UTILISATION = 0.9
SECONDS_PER_DAY = 86_400


def megatron_flops(batch: int, seq: int, layers: int, hidden: int, vocab: int, recompute: bool) -> float:
    """FLOPs of one iteration at global ``batch`` (Narayanan et al. 2021, arXiv:2104.04473, eq. 3).

    With full recomputation ``96 B s l h^2 (1 + s/(6h) + V/(16 l h))``; without ``72 B s l h^2 (1 + s/(6h) + V/(12 l h))``:
    the vocabulary's term changes too, because logits are never recomputed. Both count full, not causal, attention.
    """
    coefficient, vocab_divisor = (96, 16) if recompute else (72, 12)
    scale = 1 + seq / (6 * hidden) + vocab / (vocab_divisor * layers * hidden)
    return coefficient * batch * seq * layers * hidden**2 * scale


def training_seconds(parameters: float, tokens: float, devices: int, flops_per_second: float, recompute: bool) -> float:
    """``8 T P / (n X)`` with full recomputation, ``6 T P / (n X)`` without; X is the *achieved* FLOP/s of one device."""
    positive(parameters=parameters, tokens=tokens, devices=devices, flops_per_second=flops_per_second)
    return coefficient(recompute) * tokens * parameters / (devices * flops_per_second)


def coefficient(recompute: bool) -> int:
    """FLOPs per parameter and token: 2 forward, 4 backward, and 2 more when the forward pass is repeated."""
    return 8 if recompute else 6


def utilisation_warning(utilisation: float) -> str | None:
    """A utilisation above 90 % of a peak is not credible: the peak was of another dtype than ran."""
    if utilisation <= CREDIBLE_UTILISATION:
        return None
    return f"{utilisation:.1%} of the peak is not credible: wrong peak dtype? (TF32 or bf16 may have run where fp32 was meant)"


@dataclass(frozen=True)
class Speculation:
    """What drafting gains (Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8)."""

    accept: float
    cost_ratio: float
    k: int
    speedup: float
    ceiling: float
    break_even_accept: float | None
    best_k: int
    best_speedup: float

    @property
    def verdict(self) -> str:
        """``gain``, ``loss`` or ``even``."""
        return "gain" if self.speedup > 1 else "loss" if self.speedup < 1 else "even"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def speculation(accept: float, cost_ratio: float, k: int, most: int = 16) -> Speculation:
    """Speed-up of drafting ``k`` tokens accepted with probability ``accept`` each; ``cost_ratio = t_draft / t_target``.

    ``break_even_accept`` is None when even accepting every token is no gain; ``best_k`` is searched in 1 .. ``most``.

    Raises:
        UserError: accept outside [0, 1], a negative cost ratio, or k below 1.
    """
    if not 0 <= accept <= 1:
        raise UserError(f"accept {accept:g}: must be between 0 and 1")
    if cost_ratio < 0:
        raise UserError(f"cost-ratio {cost_ratio:g}: must not be negative")
    if k < 1:
        raise UserError(f"k {k}: must be at least 1")
    best = max(range(1, most + 1), key=lambda count: speculation_speedup(accept, cost_ratio, count))
    return Speculation(
        accept,
        cost_ratio,
        k,
        speedup=speculation_speedup(accept, cost_ratio, k),
        ceiling=(k + 1) / (k * cost_ratio + 1),
        break_even_accept=_break_even(cost_ratio, k),
        best_k=best,
        best_speedup=speculation_speedup(accept, cost_ratio, best),
    )


def speculation_speedup(accept: float, cost_ratio: float, k: int) -> float:
    """``(1 - a^(k+1)) / ((1 - a)(k c + 1))``: expected tokens per round over its cost in target steps."""
    tokens = float(k + 1) if accept == 1 else (1 - accept ** (k + 1)) / (1 - accept)
    return tokens / (k * cost_ratio + 1)


def _break_even(cost_ratio: float, k: int) -> float | None:
    """The acceptance at which the speed-up is 1, by bisection (the speed-up grows with acceptance)."""
    if (k + 1) / (k * cost_ratio + 1) <= 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if speculation_speedup(middle, cost_ratio, k) < 1 else (low, middle)
    return high


def positive(**values: float) -> None:
    """Raise :class:`UserError` for the first value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name.replace('_', '-')} {value:g}: must be positive")
