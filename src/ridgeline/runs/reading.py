"""Reading the files of a run: damage is one line that names the file, never a traceback."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError

# run.json: what a reader may rely on, then what it may find missing, and then takes for this.
REQUIRED = ("id", "kind", "status", "created")
DEFAULTS: dict[str, Any] = {
    "name": "",
    "command": [],
    "parents": [],
    "resumes": [],
    "finished": None,
    "seconds": None,
    "error": None,
}


def parse(text: bytes, where: str) -> Any:
    """JSON text; ``where`` is what a :class:`UserError` names when it is none."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{where}: damaged (not UTF-8)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({error})") from None


def read_info(file: Path) -> dict[str, Any]:
    """``run.json``, checked, with what an older version did not write filled in."""
    info = parse(file.read_bytes(), str(file))
    if not isinstance(info, dict):
        raise UserError(f"{file}: damaged (not an object)")
    for name in REQUIRED:
        if not isinstance(info.get(name), str):
            raise UserError(f"{file}: damaged (no {name})")
    try:
        datetime.datetime.fromisoformat(info["created"])
    except ValueError as error:
        raise UserError(f"{file}: damaged (created: {error})") from None
    for name in ("command", "parents", "resumes"):
        if not isinstance(info.get(name, []), list):
            raise UserError(f"{file}: damaged ({name} is no list)")
    return {**DEFAULTS, **info}


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one on each line; a last line that a kill cut off is left out."""
    if not file.is_file():
        return
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            value = parse(line, f"{file}, line {number}")
            if not isinstance(value, dict):
                raise UserError(f"{file}, line {number}: damaged (not an object)")
            yield value
