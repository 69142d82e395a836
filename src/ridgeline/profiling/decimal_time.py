"""Decimal microseconds, as text, to exact int64 nanoseconds, a column at a time.

A float64 that holds microseconds since the epoch resolves a quarter of a microsecond, so the text never
becomes a float: digits are summed by place, and what is unusual (signs, exponents, quotes, more than 19
digits) goes one by one through :class:`decimal.Decimal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Times

_SEPARATOR, _POINT, _ZERO = ord(" "), ord("."), ord("0")
_WIDEST = 20  # 19 digits, which int64 holds up to a first digit of 8, and a point
_LARGEST = 2**63 - 1
_PADDING = b"0" * 16  # so that sixteen characters lie before every end
_ZEROS, _ABOVE_NINE, _HIGH_BITS = (np.uint64(byte * 0x0101010101010101) for byte in (0x30, 0x76, 0x80))
_BELOW = np.array([0, 100, 10, 1], np.uint64)
"""ns that the last of so many decimals of a microsecond stands for."""
BELIEVABLE = 2**61
"""ns; 73 years."""


def microseconds_to_ns(texts: Sequence[Any]) -> Times:
    """``texts`` (JSON numbers as bytes-like objects, in us) as int64 ns, rounded half up below 1 ns. ``[len(texts)]``

    Raises:
        ValueError: a text that is no number.
    """
    out, plain = _fast(texts)
    for at in np.flatnonzero(~plain).tolist():
        out[at] = _slow(bytes(texts[at]))
    return out


def readable_ns(texts: Sequence[Any]) -> tuple[Times, NDArray[np.bool_]]:
    """Like :func:`microseconds_to_ns`, but what is no time is 0 there and False in the mask. Both ``[len(texts)]``.

    Times further than 73 years from zero are not believed either, so that a base, a start and a length always sum
    within int64.
    """
    out, plain = _fast(texts)
    good = np.ones(out.size, np.bool_)
    for at in np.flatnonzero(~plain).tolist():
        try:
            out[at] = _slow(bytes(texts[at]))
        except ValueError:
            good[at] = False
    good &= (out <= BELIEVABLE) & (out >= -BELIEVABLE)
    out[~good] = 0
    return out, good


def _fast(texts: Sequence[Any]) -> tuple[Times, NDArray[np.bool_]]:
    """The ns of the plain texts, and which are plain."""
    if not texts:
        return np.empty(0, np.int64), np.empty(0, np.bool_)
    buffer = np.frombuffer(_PADDING + b" ".join(texts) + b" ", np.uint8)
    stops = np.flatnonzero(buffer == _SEPARATOR)
    if stops.size != len(texts):
        return np.zeros(len(texts), np.int64), np.zeros(len(texts), np.bool_)
    starts = np.concatenate(([len(_PADDING)], stops[:-1] + 1))
    out, plain = _usual(buffer, starts, stops)
    if not plain.all():
        rest = np.flatnonzero(~plain)
        value, decimals, plain[rest] = _digits(buffer, starts[rest], (stops - starts)[rest])
        out[rest] = _scale(value, decimals)
    return out, plain


def _usual(buffer: NDArray[np.uint8], starts: Times, stops: Times) -> tuple[Times, NDArray[np.bool_]]:
    """The ns of what profilers write, up to 16 digits and up to three decimals, and which texts are that.

    Eight characters are one 64-bit word, and its digits are summed in three multiplications.
    """
    words = np.ndarray((buffer.size - 7,), "<u8", buffer, strides=(1,))
    decimals = np.zeros(stops.size, np.int64)
    for places in (1, 2, 3):
        decimals[(buffer[stops - 1 - places] == _POINT) & (stops - starts > places + 1)] = places
    end = stops - decimals - (decimals > 0)
    width = end - starts
    value, plain = _eight(words[end - 8], np.minimum(width, 8))
    plain &= (width > 0) & (width <= 16)
    if int(width.max()) > 8:
        above, good = _eight(words[end - 16], np.clip(width - 8, 0, 8))
        value += above * np.uint64(10**8)
        plain &= good & (value <= _LARGEST // 1000 - 1)
    value *= np.uint64(1000)
    if decimals.any():
        below, good = _eight(words[stops - 8], decimals)
        value += below * _BELOW[decimals]
        plain &= good
    return value.view(np.int64), plain


def _eight(words: NDArray[np.uint64], width: Times) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The number that the last ``width`` characters of each word spell (the last one is its highest byte), and whether
    they are digits."""
    shift = (64 - 8 * width).astype(np.uint64)
    digits = (words ^ _ZEROS) >> shift << shift
    good = ((digits + _ABOVE_NINE) | digits) & _HIGH_BITS == 0
    digits = digits * np.uint64(10 * 2**8 + 1) >> np.uint64(8) & np.uint64(0x00FF00FF00FF00FF)
    digits = digits * np.uint64(100 * 2**16 + 1) >> np.uint64(16) & np.uint64(0x0000FFFF0000FFFF)
    return digits * np.uint64(10**4 * 2**32 + 1) >> np.uint64(32), good


def _digits(buffer: NDArray[np.uint8], starts: Times, widths: Times) -> tuple[Times, Times, NDArray[np.bool_]]:
    """Horner's rule over character columns: the digits as one integer, how many follow the point, and whether plain."""
    value = np.zeros(starts.size, np.int64)
    point = np.full(starts.size, -1, np.int64)
    plain = (widths > 0) & (widths <= _WIDEST)
    last = buffer.size - 1
    for column in range(min(int(widths.max()), _WIDEST)):
        inside = column < widths
        character = buffer[np.minimum(starts + column, last)]
        is_point = inside & (character == _POINT)
        digit = character.astype(np.int64) - _ZERO
        is_digit = inside & (digit >= 0) & (digit <= 9)
        value = np.where(is_digit, value * 10 + digit, value)
        plain &= ~inside | is_digit | (is_point & (point < 0))
        point = np.where(is_point, column, point)
    decimals = np.where(point >= 0, widths - 1 - point, 0)
    digits = widths - (point >= 0)
    fits = (digits < 19) | ((digits == 19) & (buffer[starts] <= ord("8")))
    plain &= (digits > 0) & fits & (value <= _LARGEST // 10 ** np.clip(3 - decimals, 0, 3))
    return value, decimals, plain


def _scale(value: Times, decimals: Times) -> Times:
    up = 10 ** np.clip(3 - decimals, 0, 3)
    down = 10 ** np.clip(decimals - 3, 0, 18)
    return np.where(decimals <= 3, value * up, (value + down // 2) // down)


def _slow(text: bytes) -> int:
    try:
        exact = Decimal(text.decode("ascii").strip('" '))
        if not exact.is_finite():
            raise InvalidOperation
        if exact.adjusted() > 30:  # an exponent without limit would become an integer without limit
            raise ValueError(f"{text[:40]!r} us is beyond int64 ns")
        value = int((exact * 1000).to_integral_value(rounding="ROUND_HALF_UP"))
    except (InvalidOperation, UnicodeDecodeError, OverflowError):
        raise ValueError(f"{text[:40]!r} is not a time") from None
    if abs(value) >= 2**63:
        raise ValueError(f"{text[:40]!r} us is beyond int64 ns")
    return value
