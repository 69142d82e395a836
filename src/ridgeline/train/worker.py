"""A launched process: ``python -m ridgeline.train.worker SESSION_FILE``, started by the elastic agent.

Failures go to ``errors/rankN.json`` in the run folder, where the parent reads them; the terminal stays quiet.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from ridgeline.errors import JobError, UserError

ERRORS = "errors"


def main(file: str) -> int:
    """Run one rank; the exit code."""
    folder = Path(file).parent
    try:
        import torch

        from ridgeline.train.session import Session, run_session

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        run_session(Session.read(file), say_on_stderr)
    except BaseException as error:  # whatever it is, the parent must learn of it
        _report(folder, error)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End a rank's process without running C++ destructors.

    With gloo and two ranks, torch 2.13 now and then aborts in them ("terminate called without an active exception",
    1 exit in 30 on loaded cores) after everything is done and written, and the launcher would call the job failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say_on_stderr(message: str) -> None:
    """Print one line for people, where it can not disturb ``--json``."""
    print(f"ridgeline: {message}", file=sys.stderr, flush=True)


def _report(folder: Path, error: BaseException) -> None:
    rank = int(os.environ.get("RANK", "0"))
    kind = type(error).__name__ if isinstance(error, (UserError, JobError)) else "crash"
    text = " ".join(str(error).split())
    document = {
        "rank": rank,
        "kind": kind,
        "message": text if kind != "crash" else f"{type(error).__name__}: {text}"[:500],
        "time": time.time(),
        "traceback": traceback.format_exc(),
    }
    (folder / ERRORS).mkdir(exist_ok=True)
    (folder / ERRORS / f"rank{rank}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    leave(main(sys.argv[1]))
