"""The two failures a user can meet, and the helper that names the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong: one line saying what, where, and the nearest valid value. Exit code 2."""


class JobError(RuntimeError):
    """The input was fine and the job failed (a full disk, a damaged checkpoint, a lost peer). Exit code 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``valid``, or the list of valid names when none is close."""
    options = sorted(valid)
    match = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if match:
        return f" (did you mean '{match[0]}'?)"
    return f" (valid: {', '.join(options)})" if options else ""
