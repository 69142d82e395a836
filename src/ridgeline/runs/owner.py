"""Which command and which process a run belongs to, so that one that was killed does not run for ever."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAME_START_SECONDS = 5.0  # a process's start is known to the clock's adjustments since boot, not better


def this_command() -> list[str]:
    """What to type for this again; ``python -m ridgeline`` is the program of that name."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py" and program.parent.name == "ridgeline"
    return ["ridgeline" if module else program.name, *sys.argv[1:]]


def this_process() -> dict[str, Any]:
    """Which process owns a run. Its start tells it from a later one with the same number."""
    import psutil

    return {"pid": os.getpid(), "host": platform.node(), "process_started": psutil.Process().create_time()}


def process_is_gone(info: Mapping[str, Any]) -> bool:
    """True only where this machine can tell."""
    import psutil

    pid, started = info.get("pid"), info.get("process_started")
    if info.get("host") != platform.node() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return isinstance(started, float) and abs(process.create_time() - started) > SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # it is there and not ours to look at
        return False
