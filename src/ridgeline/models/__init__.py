"""Decoders on one device: configuration, modules, Hugging Face folders and GGUF files in and out.

Names are imported on first use: reading a configuration needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.models.config import DecoderConfig, config_from_section
    from ridgeline.models.decoder import Attend, Block, Decoder

_HOMES = {
    "DecoderConfig": "config",
    "config_from_section": "config",
    "Attend": "decoder",
    "Block": "decoder",
    "Decoder": "decoder",
}

__all__ = ["Attend", "Block", "Decoder", "DecoderConfig", "config_from_section"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ridgeline.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ridgeline.models.{_HOMES[name]}"), name)
