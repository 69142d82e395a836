"""The ladder of changes that make a trained model faster. Exact formats first: prepacked bf16 linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.optimize.prepack import PackDecision, PackedLinear, decide, pack_decoder

__all__ = ["PackDecision", "PackedLinear", "decide", "pack_decoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ridgeline.optimize' has no attribute '{name}'")
    from ridgeline.optimize import prepack

    return getattr(prepack, name)
