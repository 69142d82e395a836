"""Numbers with units, for people and from people."""

from __future__ import annotations

import re

from ridgeline.errors import UserError

DECIMAL = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}


def human_bytes(value: float | None) -> str:
    """``2.0 GiB``; a dash for None."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def human_rate(value: float | None, unit: str) -> str:
    """``426 GFLOP/s``, ``41.6 GB/s`` (decimal prefixes); a dash for None."""
    return "-" if value is None else human_count(value, " ") + unit


def human_count(value: float, space: str = "") -> str:
    """``14.1M``, ``157.7 T``: four significant digits with a decimal prefix."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{space}{prefix}"
    return f"{value:.4g}{space}"


def human_seconds(value: float | None) -> str:
    """``12.3 ms``, ``1.23 s``, ``33.9 days``; a dash for None."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} us"
    if value < 3 * 3600:
        return f"{value:.4g} s"
    return f"{value / 86400:.1f} days" if value >= 2 * 86400 else f"{value / 3600:.1f} h"


def parse_count(text: str, what: str) -> float:
    """``300B``, ``18.4e9``, ``1.5T`` to a number (B and G are both 1e9).

    Raises:
        UserError: not a positive number with one of the suffixes K, M, B, G, T, P.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([KMGBTPkmgbtp]?)\s*", text)
    if match is None:
        raise UserError(f"{what} '{text}': expected a number such as 300B, 18.4e9 or 1.5T")
    value = float(match[1].replace("_", "").replace(",", "")) * DECIMAL[match[2].upper()]
    if value <= 0:
        raise UserError(f"{what} '{text}': must be positive")
    return value
