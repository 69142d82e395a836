"""From token ids to text: KV cache, scheduler, sampler, model runner, engine. Knows nothing of HTTP.

Names are imported on first use: requests, scheduling and model lookup need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.inference.api import Generation, generate, stream
    from ridgeline.inference.engine import Engine
    from ridgeline.inference.locate import resolve_model
    from ridgeline.inference.request import Request, SamplingParams, TokenEvent
    from ridgeline.inference.tokenizer import Tokenizer

_HOMES = {
    "Engine": "engine",
    "Generation": "api",
    "generate": "api",
    "stream": "api",
    "resolve_model": "locate",
    "Request": "request",
    "SamplingParams": "request",
    "TokenEvent": "request",
    "Tokenizer": "tokenizer",
}

__all__ = [
    "Engine",
    "Generation",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "Tokenizer",
    "generate",
    "resolve_model",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ridgeline.inference' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ridgeline.inference.{_HOMES[name]}"), name)
