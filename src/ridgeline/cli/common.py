"""What every verb shares: errors to exit codes, ``--json``, consoles. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console

from ridgeline.errors import JobError, UserError, os_reason

JSON_OPTION = typer.Option(False, "--json", help="One JSON document on stdout; everything else on stderr.")
RUNS_OPTION = typer.Option(None, "--runs", help="Folder that holds runs [default: $RIDGELINE_RUNS or runs].")


def new_app(help_text: str) -> typer.Typer:
    """A verb's Typer application, with plain one-line usage errors."""
    return typer.Typer(
        help=help_text,
        add_completion=False,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """What runs now, on stderr: one line that changes on a terminal, one line each elsewhere."""
    stderr = Console(stderr=True, highlight=False)
    if not stderr.is_terminal:
        yield lambda line: stderr.print(line, soft_wrap=True, markup=False)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda line: bar.update(task, description=line)


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds as Ctrl-C does, so that runs are closed and children ended."""


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what is known to go wrong into one line and an exit code.

    2 for a user's error, 1 for a failed job or what the system refused, 130 for Ctrl-C, 143 for SIGTERM.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with _sigterm_unwinds():
                return function(*args, **kwargs)
        except UserError as error:
            fail(str(error), 2)
        except JobError as error:
            fail(str(error), 1)
        except BrokenPipeError:
            raise  # the reader of stdout has gone: see main
        except OSError as error:
            fail(os_reason(error), 1)
        except Terminated:
            fail("terminated", 128 + signal.SIGTERM)
        except KeyboardInterrupt:
            fail("interrupted", 130)

    return wrapped


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Terminated`, unless someone else has a meaning for it already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def unwind(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked worker ends as if this had not been installed
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(message: str) -> None:
    """Print one line on stderr."""
    print(f"ridgeline: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and leave with ``code``."""
    say(message)
    raise typer.Exit(code)


def console(as_json: bool = False) -> Console:
    """For people: stdout, or stderr when stdout carries JSON."""
    return Console(stderr=as_json, highlight=False)


def emit(document: Any) -> None:
    """Print the one JSON document of ``--json``."""
    json.dump(document, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")
