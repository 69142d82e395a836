"""What every verb shares: errors to exit codes, ``--json``, consoles. Nothing heavy is imported here."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from ridgeline.errors import JobError, UserError

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


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the two known failures into exit codes: 2 for a user's error, 1 for a failed job."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            fail(str(error), 2)
        except JobError as error:
            fail(str(error), 1)
        except KeyboardInterrupt:
            fail("interrupted", 130)

    return wrapped


def fail(message: str, code: int) -> None:
    """Print one line on stderr and leave with ``code``."""
    print(f"ridgeline: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def console(as_json: bool = False) -> Console:
    """For people: stdout, or stderr when stdout carries JSON."""
    return Console(stderr=as_json, highlight=False)


def emit(document: Any) -> None:
    """Print the one JSON document of ``--json``."""
    json.dump(document, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")
