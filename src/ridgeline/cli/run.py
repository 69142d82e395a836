"""``ridgeline run``: a script under the settings that the doctor has proven, without touching its code."""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

from ridgeline.cli.common import JSON_OPTION, emit, new_app, verb
from ridgeline.errors import UserError, nearest

app = new_app("Run a script with compiler settings from a doctor.toml; its code stays as it is.")

ARGUMENTS = typer.Argument(metavar="SCRIPT [ARGUMENTS...]", help="A Python script and its arguments; options go first.")


@app.command(context_settings={"allow_interspersed_args": False})
@verb
def run(
    script: list[str] = ARGUMENTS,
    doctor: Path = typer.Option(..., "--doctor", metavar="FILE", help="The doctor.toml that `ridgeline doctor` wrote."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run a Python script as `python SCRIPT` does, with the settings of a doctor.toml applied first.

    The settings hold in this process; processes that the script starts anew do not have them. The exit code is the
    script's. With --json what the script prints goes to stderr.
    """
    from ridgeline.compiler.doctor.plan_toml import read_toml

    setting = read_toml(doctor)
    path = _script(script[0])

    from ridgeline.compiler.doctor.settings import applied, check

    check(setting)
    stdout = os.dup(1)
    if as_json:
        os.dup2(2, 1)
    began = time.perf_counter()
    with applied(setting):
        code = run_script(path, script[1:])
    seconds = time.perf_counter() - began
    sys.stdout.flush()
    os.dup2(stdout, 1)
    os.close(stdout)
    if as_json:
        emit({"script": str(path), "settings": setting, "exit_code": code, "seconds": seconds})
    raise typer.Exit(code)


def _script(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    folder = path.parent if path.parent.is_dir() else Path()
    what = "is a folder" if path.is_dir() else "no such script"
    others = [one.name for one in folder.glob("*.py")]
    raise UserError(f"{name}: {what}{nearest(path.name, others) if others else ''}")


def run_script(path: Path, arguments: Sequence[str]) -> int:
    """The script as ``__main__``, in this process; its exit code. An exception of its own is shown as Python shows it."""
    argv, first = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.resolve().parent)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leaving:
        return _exit_code(leaving.code)
    except Exception as error:
        _show(error, path)
        return 1
    finally:
        sys.argv, sys.path[0] = argv, first
    return 0


def _exit_code(code: object) -> int:
    """As the interpreter does it: None is 0, a text is printed and is 1."""
    if isinstance(code, int) or code is None:
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


def _show(error: Exception, path: Path) -> None:
    """The traceback from the script's own first line on."""
    frames = error.__traceback__
    while frames is not None and Path(frames.tb_frame.f_code.co_filename).resolve() != path.resolve():
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames or error.__traceback__)
