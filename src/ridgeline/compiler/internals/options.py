"""Options of the compiler by name: read, set, put back. The only place that touches ``torch._dynamo.config``.

Names are those of ``torch._dynamo.config`` and ``torch.compiler.config``; a name that this torch does not have is an
error and never skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch._dynamo.config
import torch.compiler.config

from ridgeline.compiler.internals import check_version
from ridgeline.errors import UserError, nearest

HOMES = {"dynamo": torch._dynamo.config, "compiler": torch.compiler.config}


def get_option(home: str, name: str) -> Any:
    """The value now.

    Raises:
        UserError: there is no such option in this torch.
    """
    check_version("a compiler setting")
    config: Any = HOMES[home]
    if name.startswith("_") or not hasattr(config, name):
        raise UserError(
            f"torch {torch.__version__} has no option {home}.{name}{nearest(name, config.get_config_copy())}"
        )
    return getattr(config, name)


def set_option(home: str, name: str, value: Any) -> None:
    """Set it for this process.

    Raises:
        UserError: there is no such option, or it holds another type.
    """
    old = get_option(home, name)
    if old is not None and not isinstance(value, type(old)):
        raise UserError(f"{home}.{name} is a {type(old).__name__}, not {value!r}")
    setattr(HOMES[home], name, value)


@contextlib.contextmanager
def options(values: Mapping[tuple[str, str], Any]) -> Iterator[None]:
    """Within the block the options have these values, by (home, name)."""
    before = {key: get_option(*key) for key in values}
    try:
        for key, value in values.items():
            set_option(*key, value)
        yield
    finally:
        for key, value in before.items():
            set_option(*key, value)
