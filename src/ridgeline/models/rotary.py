"""Inverse frequencies of rotary positions and their scalings, as plain floats (no torch).

Each scaling stretches a model to contexts longer than it was trained on: *linear* divides every position,
*llama3* divides only the slow pairs with a ramp between, *yarn* (Peng et al. 2023, arXiv:2309.00071) ramps by the
number of turns within the trained context and sharpens attention by a factor.
"""

from __future__ import annotations

import math
from typing import Any

from ridgeline.errors import UserError, nearest

# rope type -> (required keys, optional keys)
SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def check_scaling(scaling: dict[str, Any] | None) -> None:
    """Refuse a scaling that is not known in full: its type, then each key, by name."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(f"rope_scaling type '{kind}' is not supported{nearest(str(kind), SCALINGS)}")
    required, optional = SCALINGS[kind]
    for key in sorted(scaling.keys() - required - optional - {"rope_type"}):
        raise UserError(
            f"rope_scaling key '{key}' is not supported for type '{kind}'{nearest(key, required | optional)}"
        )
    for key in sorted(required - scaling.keys()):
        raise UserError(f"rope_scaling of type '{kind}' needs '{key}'")
    for key, value in scaling.items():
        _check_value(key, value)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError("rope_scaling high_freq_factor must be above low_freq_factor")


def _check_value(key: str, value: Any) -> None:
    if key == "rope_type":
        return
    if key == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"rope_scaling key 'truncate' must be true or false, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"rope_scaling key '{key}' must be a positive number, got {value!r}")


def inverse_frequencies(theta: float, rope_dim: int, scaling: dict[str, Any] | None) -> list[float]:
    """Angle per position of each pair: ``rope_dim / 2`` values, ``theta^(-2i / rope_dim)`` before scaling."""
    plain = [theta ** (-2 * i / rope_dim) for i in range(rope_dim // 2)]
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return [value / scaling["factor"] for value in plain]
    if scaling["rope_type"] == "llama3":
        return [_llama3(value, scaling) for value in plain]
    return _yarn(plain, theta, rope_dim, scaling)


def attention_factor(scaling: dict[str, Any] | None) -> float:
    """What YaRN multiplies cosines and sines by; 1 for every other scaling."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], mscale_all)
    return _mscale(scaling["factor"], 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(value: float, scaling: dict[str, Any]) -> float:
    turns = scaling["original_max_position_embeddings"] * value / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return float((1 - smooth) * value / scaling["factor"] + smooth * value)


def _yarn(plain: list[float], theta: float, rope_dim: int, scaling: dict[str, Any]) -> list[float]:
    def pair_of(turns: float) -> float:
        trained = scaling["original_max_position_embeddings"]
        return rope_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    width = (high - low) or 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    return [value / scaling["factor"] * r + value * (1 - r) for value, r in zip(plain, ramp, strict=True)]
