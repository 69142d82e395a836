"""TOML files and ``section.key=value`` overrides to a validated :class:`JobConfig`."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ridgeline.config.schema import JobConfig
from ridgeline.errors import UserError, nearest


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read ``path`` (TOML), apply ``overrides`` (``train.steps=20``), validate.

    Raises:
        UserError: the file is missing or not TOML, or a key or a value is not valid; the message names it.
    """
    file = Path(path)
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration {file}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"configuration {file}: is a folder, expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {file}: {error}") from None
    return parse_config(raw, overrides, where=str(file))


def parse_config(raw: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> JobConfig:
    """Validate nested tables; ``overrides`` win over ``raw``. ``where`` names the origin in errors."""
    tables = _copy(raw)
    check_keys(JobConfig, tables, where)
    for override in overrides:
        _apply_override(tables, override)
    try:
        return JobConfig.model_validate(tables)
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None


def check_keys(model: type[BaseModel], table: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raise :class:`UserError` for the first key of ``table`` that ``model`` does not have, with the nearest one."""
    for key, value in table.items():
        field = model.model_fields.get(key)
        if field is None:
            kind = "key" if prefix else "table"
            raise UserError(f"{where}: unknown {kind} '{prefix}{key}'{nearest_key(model, key, prefix)}")
        inner = _section(field.annotation)
        if inner is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: '{prefix}{key}' must be a table, got {value!r}")
            check_keys(inner, value, where, f"{prefix}{key}.")


def nearest_key(model: type[BaseModel], key: str, prefix: str) -> str:
    """The suggestion for an unknown ``key``: full dotted names, so that it can be pasted back."""
    suggestion = nearest(key, model.model_fields)
    return suggestion.replace("'", f"'{prefix}", 1) if "did you mean" in suggestion else suggestion


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            inner = _section(option)
            if inner is not None:
                return inner
    return None


def _apply_override(tables: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UserError(f"override '{override}': expected section.key=value, such as train.steps=20")
    nested: Any = _parse_value(text)
    for part in reversed(parts):
        nested = {part: nested}
    check_keys(JobConfig, nested, f"override '{override}'")
    target = tables
    for part in parts[:-1]:
        target = target.setdefault(part, {})
    target[parts[-1]] = _parse_value(text)


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string, so that ``train.dtype=fp32`` needs no quotes in a shell."""
    text = text.strip()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text.lower() in ("none", "null") else text


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _one_line(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    location: Iterable[Any] = first["loc"]
    name = ".".join(str(part) for part in location)
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    got = f", got {first['input']!r}" if name and not isinstance(first["input"], Mapping) else ""
    return f"{where}: {name + ': ' if name else ''}{message}{got}{more}"
