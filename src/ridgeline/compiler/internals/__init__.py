"""Private torch APIs of the compiler room, one file per concern, behind one version check.

Every file here calls :func:`check_version` before its first private import is used: a torch we have not read gives one
line instead of an AttributeError from deep inside.
"""

from __future__ import annotations

from ridgeline.errors import UserError

LOWEST, HIGHEST = (2, 11), (2, 13)
"""Releases (major, minor) whose private APIs these files are written for."""


def require_torch(
    low: tuple[int, int] = LOWEST, high: tuple[int, int] = HIGHEST, what: str = "this"
) -> tuple[int, int]:
    """The installed torch as (major, minor), which is between ``low`` and ``high``, both included.

    Raises:
        UserError: torch is missing or of another release; the message names ``what`` needs it.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{what} needs torch {_name(low)} to {_name(high)}: torch is not installed") from None
    version = parse_version(torch.__version__)
    if not low <= version <= high:
        raise UserError(f"{what} needs torch {_name(low)} to {_name(high)}, this is {torch.__version__}")
    return version


def check_version(what: str = "this") -> tuple[int, int]:
    """:func:`require_torch` with the releases of this package."""
    return require_torch(LOWEST, HIGHEST, what)


def parse_version(text: str) -> tuple[int, int]:
    """``2.13.0+cpu`` is (2, 13); a text that is no version is (0, 0)."""
    major, _, rest = str(text).partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _name(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
