"""``doctor.toml``: settings of the compiler that were proven to help, applied by ``ridgeline run --doctor``.

::

    [dynamo]
    capture_scalar_outputs = true
    reorderable_logging_functions = ["builtins.print"]

    [compiler]
    dynamic_sources = "L['x']"

    [compile]
    regional = true
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ridgeline.compiler.doctor.settings import Setting
from ridgeline.errors import UserError, nearest, os_reason

SECTIONS = ("dynamo", "compiler", "compile")


def to_toml(setting: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The text of a ``doctor.toml``; ``notes`` become comments at its top."""
    lines = [f"# {note}" for note in notes]
    for section in SECTIONS:
        own = {name.partition(".")[2]: value for name, value in setting.items() if name.partition(".")[0] == section}
        if own:
            lines += [
                *([""] if lines else []),
                f"[{section}]",
                *(f"{name} = {_value(own[name])}" for name in sorted(own)),
            ]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """JSON's spelling of true, numbers, strings and lists is TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def write_toml(path: Path, setting: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Write it, complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(to_toml(setting, notes), encoding="utf-8")
    os.replace(temporary, path)


def read_toml(path: Path) -> Setting:
    """The settings of a file; whether this torch has them is :func:`.settings.check`'s to say.

    Raises:
        UserError: it cannot be read, is no TOML, or has another section.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(os_reason(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    for section, values in document.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise UserError(f"{path}: no section [{section}]{nearest(section, SECTIONS)}")
    return {f"{section}.{name}": value for section, values in document.items() for name, value in values.items()}
