"""The two failures a user can meet, what the system refused in one line, and the nearest valid value."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable

SHOWN = 5  # valid names of a message; a list of hundreds hides what was wrong


class UserError(ValueError):
    """The input is wrong: one line saying what, where, and the nearest valid value. Exit code 2."""


class JobError(RuntimeError):
    """The input was fine and the job failed (a full disk, a damaged checkpoint, a lost peer). Exit code 1."""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The one of ``valid`` that ``name`` was probably meant to be, or None."""
    return next(iter(difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.6)), None)


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``valid``, or the first few valid names when none is close."""
    options = sorted(valid)
    match = closest(name, options)
    if match is not None:
        return f" (did you mean '{match}'?)"
    more = f" and {len(options) - SHOWN} more" if len(options) > SHOWN else ""
    return f" (valid: {', '.join(options[:SHOWN])}{more})" if options else ""


def os_reason(error: OSError) -> str:
    """``PATH: reason`` of what the operating system refused, without its number."""
    reason = "no space left on the device" if error.errno == errno.ENOSPC else error.strerror or str(error)
    reason = reason[:1].lower() + reason[1:]
    return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, (str, bytes)) else reason
