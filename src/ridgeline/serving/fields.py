"""Checks of single request fields, and the reader that applies a table of them to a body.

A check takes (field name, value), returns the value to use, or raises a 400 that names the field. ``null`` always
means "not given". A field the API knows and this server does not support is accepted only at its neutral value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ridgeline.errors import nearest
from ridgeline.serving.problems import ApiError, invalid

Check = Callable[[str, Any], Any]


def read_fields(body: Mapping[str, Any], checks: Mapping[str, Check], where: str = "") -> dict[str, Any]:
    """The checked values of ``body``; unknown names are refused with the nearest known one.

    ``where`` prefixes the field names in messages, such as ``stream_options.``.
    """
    out: dict[str, Any] = {}
    for name, value in body.items():
        check = checks.get(name)
        if check is None:
            param = f"{where}{name}"
            raise invalid(f"{param[:80]}: unknown field{nearest(name[:80], checks)}", param[:80], "unknown_field")
        if value is not None:
            out[name] = check(f"{where}{name}", value)
    return out


def integer(lowest: int, highest: int) -> Check:
    """A whole number in [lowest, highest]; true and 3.0 are not."""

    def check(name: str, value: Any) -> int:
        if type(value) is not int:
            raise wrong(name, "an integer", value)
        if not lowest <= value <= highest:
            raise invalid(f"{name}: {_show(value)} is outside {lowest} to {highest}", name, "out_of_range")
        return value

    return check


def number(lowest: float, highest: float, *, above: bool = False) -> Check:
    """A finite number in [lowest, highest], or in (lowest, highest] with ``above``."""

    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float):
            raise wrong(name, "a number", value)
        if not lowest <= value <= highest or (above and value == lowest):  # also false for NaN
            limits = f"above {lowest:g} up to {highest:g}" if above else f"{lowest:g} to {highest:g}"
            raise invalid(f"{name}: {_show(value)} is outside {limits}", name, "out_of_range")
        return float(value)

    return check


def boolean(name: str, value: Any) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise wrong(name, "true or false", value)
    return value


def string(name: str, value: Any) -> str:
    """Text that can be encoded (no lone surrogates)."""
    if type(value) is not str:
        raise wrong(name, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(f"{name}: holds a lone surrogate, which is not text", name, "invalid_utf8") from None
    return value


def stops(name: str, value: Any) -> tuple[str, ...]:
    """One stop string or up to four, none of them empty."""
    values = [value] if type(value) is str else value
    if type(values) is not list:
        raise wrong(name, "a string or an array of strings", value)
    if len(values) > 4:
        raise invalid(f"{name}: {len(values)} stop strings, at most 4", name, "out_of_range")
    texts = tuple(string(f"{name}[{index}]", text) for index, text in enumerate(values))
    if "" in texts:
        raise invalid(f"{name}: a stop string is empty", name, "out_of_range")
    return texts


def stream_options(name: str, value: Any) -> dict[str, Any]:
    """``{"include_usage": bool}``."""
    if type(value) is not dict:
        raise wrong(name, "an object", value)
    checks = {"include_usage": boolean, "include_obfuscation": only(False), "continuous_usage_stats": only(False)}
    return read_fields(value, checks, f"{name}.")


def only(*neutral: Any) -> Check:
    """A known field this server does not support: its neutral values pass, every other one is refused by name."""

    def check(name: str, value: Any) -> Any:
        if any(type(value) is type(option) and value == option for option in neutral):
            return None
        if type(value) is int and any(type(option) is float and value == option for option in neutral):
            return None
        allowed = " or ".join(json.dumps(option) for option in (*neutral, None))
        raise invalid(f"{name}: not supported by this server (leave it out, or give {allowed})", name, "unsupported")

    return check


def ignored(name: str, value: Any) -> str:
    """A label for the caller's own records (``user``): any string, written to the request's log line."""
    return string(name, value)[:64]


def wrong(name: str, needed: str, value: Any) -> ApiError:
    """A 400 for a value of the wrong type."""
    shown = _show(value)
    return invalid(f"{name}: {needed} is needed, got {shown}", name, "wrong_type")


def _show(value: Any) -> str:
    """A short, one-line picture of a JSON value."""
    if isinstance(value, Mapping):
        return "an object" if value else "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"an array of {len(value)}" if value else "[]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
