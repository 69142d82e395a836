"""From a model reference to a function that makes its engine (torch is imported when it is called)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError
from ridgeline.serving.settings import ServeSettings

CACHE_KEY = re.compile(r"-[0-9a-f]{12}$")  # what `resolve_model` appends to the folder of an imported GGUF file


def served_name(reference: str, folder: Path) -> str:
    """The name clients use for a model unless told: its GGUF file's, run's or folder's, or its hub id."""
    if reference.endswith(".gguf"):
        return CACHE_KEY.sub("", folder.name)
    if not folder.exists():
        return reference  # a hub id
    folder = folder.resolve()
    if folder.name == "model" and folder.parent.name == "artifacts":
        return folder.parent.parent.name
    return folder.name


def engine_loader(folder: Path, settings: ServeSettings, *, dtype: str, compile: bool) -> Callable[[], Any]:
    """A function that loads the engine and runs it once, so that the first client meets a warm one.

    It raises `UserError` for a model that cannot be served: not readable, or without a tokenizer.
    """

    def load() -> Any:
        from ridgeline.inference import Engine

        engine = Engine.load(
            folder,
            dtype=dtype,
            max_batch=settings.max_batch,
            max_context=settings.max_context,
            compile=compile,
            chunk=settings.prefill_chunk,
        )
        if engine.tokenizer is None:
            raise UserError(f"{folder}: no tokenizer.json, so text cannot be read or written")
        warm_up(engine)
        return engine

    return load


def known_ceilings() -> Any | None:
    """The device's measured ceilings when they are in the cache: a server does not measure (25 s) before it answers."""
    from ridgeline.hardware.measured import cache_folder, cache_key, ceilings, digest

    file = cache_folder() / f"ceilings-{digest(cache_key())}.json"
    return ceilings() if file.is_file() else None


def warm_up(engine: Any) -> None:
    """One short greedy request, thrown away."""
    from ridgeline.inference import Request, SamplingParams

    engine.submit(Request(id="warm-up", prompt=[0], params=SamplingParams(max_tokens=2, temperature=0.0)))
    while engine.has_work():
        engine.step()
