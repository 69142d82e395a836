"""Serving: one engine behind an OpenAI-compatible HTTP endpoint, and the load test that measures it.

A request's path: ``app`` (routes) -> ``endpoints`` (limits, dialect) -> ``engine_thread`` (the one owner of the
engine) -> ``dialects`` (back to the client's shape). Nothing here imports torch; the engine does.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "EngineThread": "ridgeline.serving.engine_thread",
    "ServeSettings": "ridgeline.serving.settings",
    "create_app": "ridgeline.serving.app",
    "serve": "ridgeline.serving.server",
    "LoadSettings": "ridgeline.serving.load.workload",
    "load_test": "ridgeline.serving.load.runner",
}

__all__ = ["EngineThread", "LoadSettings", "ServeSettings", "create_app", "load_test", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ridgeline.serving' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
