"""Training: the loop, its checkpoints and resume, launching. Names are imported on first use; ``train`` needs torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.train.launch import launch
    from ridgeline.train.start import train

_HOMES = {"train": "start", "launch": "launch"}

__all__ = ["launch", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ridgeline.train' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ridgeline.train.{_HOMES[name]}"), name)
