"""Chat templates: Jinja programs that ship with a model, run in a sandbox as transformers runs them. No torch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError


class ChatTemplate:
    """One compiled template. ``special_tokens`` (``bos_token`` and the like) are variables of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the model's chat template is not valid Jinja: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises `UserError` with the template's own words when it refuses the messages."""
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"the model's chat template refused the messages: {error}") from None


def find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The source: ``chat_template.jinja``, else ``chat_template.json``, else ``tokenizer_config.json``'s own.

    Of several named templates the one called "default" is taken.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = settings.get("chat_template")
    file = folder / "chat_template.json"
    if file.is_file():
        found = json.loads(file.read_text("utf-8")).get("chat_template", found)
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise UserError(f"{folder}: chat_template is neither a text nor a list of named texts")
    return found


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Without the HTML escapes of Jinja's own filter, as transformers defines it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
