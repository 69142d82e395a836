"""Start a measuring process, follow its lines, bring back its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ridgeline
from ridgeline.errors import JobError

TIMEOUT_SECONDS = 300
# Set by launchers for their own workers; a measuring process belongs to no job.
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "OMP_", "MKL_", "KMP_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def measure(kind: str, threads: int, quick: bool, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Run :mod:`ridgeline.hardware.measure` in a process of its own.

    Raises:
        JobError: the process failed; the last line it wrote on stderr is quoted.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "ridgeline.hardware.measure", kind, str(threads), "quick" if quick else "full"]
    result = None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment(threads), stdout=subprocess.PIPE, stderr=errors, text=True)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            assert process.stdout is not None
            for line in process.stdout:  # every step of the child is short and ends in a line
                if line.startswith("{"):
                    result = json.loads(line)
                elif "\t" in line:
                    fraction, text = line.rstrip("\n").split("\t", 1)
                    progress(text, float(fraction))
                if time.monotonic() > deadline:
                    raise JobError(f"measuring ceilings took over {TIMEOUT_SECONDS} s")
            process.wait(timeout=30)
        finally:
            stop(process)
        if result is None:
            errors.seek(0)
            raise JobError(f"measuring ceilings failed: {last_line(errors.read()) or f'exit {process.returncode}'}")
    return {**result, "seconds": time.perf_counter() - began}


def environment(threads: int) -> dict[str, str]:
    """This process's environment without a launcher's variables, with ``threads`` and a path to this package."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }
    source = str(Path(ridgeline.__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [source, env.get("PYTHONPATH", "")]))
    env["OMP_NUM_THREADS"] = str(threads)
    return env


def stop(process: subprocess.Popen[str]) -> None:
    """End a child that is still running."""
    if process.poll() is None:
        process.kill()
        process.wait()


def last_line(text: str) -> str:
    """The last line that is not empty, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
