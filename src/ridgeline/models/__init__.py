"""Decoders on one device: configuration, modules, Hugging Face folders and GGUF files in and out.

Names are imported on first use: reading a configuration needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.models.config import DecoderConfig, config_from_section
    from ridgeline.models.decoder import Attend, Block, Decoder
    from ridgeline.models.folder import load, save
    from ridgeline.models.hf_config import load_config
    from ridgeline.models.names import from_hf_state_dict, hf_state_dict

_HOMES = {
    "DecoderConfig": "config",
    "config_from_section": "config",
    "Attend": "decoder",
    "Block": "decoder",
    "Decoder": "decoder",
    "load": "folder",
    "save": "folder",
    "load_config": "hf_config",
    "from_hf_state_dict": "names",
    "hf_state_dict": "names",
}

__all__ = [
    "Attend",
    "Block",
    "Decoder",
    "DecoderConfig",
    "config_from_section",
    "from_hf_state_dict",
    "hf_state_dict",
    "load",
    "load_config",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ridgeline.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ridgeline.models.{_HOMES[name]}"), name)
