"""A trial's process: start it, wait for its end or its time limit, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ridgeline.errors import JobError, UserError

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.02
ABORTED = {code for one in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS) for code in (-one, 128 + one)}
"""Exit codes of a process that a signal ended from inside, as its parent or a shell reports them."""
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)$")


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int:
    """Run to the end, everything it prints in ``log``; its exit code.

    Raises:
        UserError: there is no such program.
        JobError: it was still running after ``seconds``; it and its descendants were ended.
    """
    with open(log, "wb") as sink:
        try:
            process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"cannot start '{command[0]}': {error.strerror}") from None
        try:
            return _wait(process, seconds)
        finally:
            if process.poll() is None:
                end(process)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise JobError(f"still running after {seconds:g} s (--timeout)")
        time.sleep(POLL_SECONDS)
    return int(process.returncode)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then after a grace SIGKILL, for the process and all it started (launchers make groups of their own)."""
    family = {process.pid, *descendants(process.pid)}
    _signal(family, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(POLL_SECONDS)
    _signal((family - {process.pid}) | set(descendants(process.pid)), signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()


def descendants(parent: int) -> list[int]:
    """Processes below ``parent``, by the kernel's table; empty where there is none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [parent]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def aborted_at_exit(code: int, log: Path) -> bool:
    """Whether a process that had written its results died as it ended, rather than of an exception."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return code in ABORTED and "Traceback (most recent call last)" not in text


def last_words(log: Path) -> str:
    """Why a job failed: the first line of its log that names an exception after a traceback, else its last line.

    The first, because a launcher and the ranks that lost their peer print errors of their own afterwards.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    seen = False
    for line in lines:
        seen = seen or "Traceback (most recent call last)" in line
        match = _ERROR.match(line)
        if seen and match:
            return match.group(1)[:300]
    return lines[-1][:300] if lines else "it printed nothing"
