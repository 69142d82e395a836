"""From a model reference to a function that makes its engine (torch is imported when it is called)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ridgeline.serving.settings import ServeSettings


def served_name(reference: str, folder: Path) -> str:
    """The name clients use for a model: that of its file, folder or run."""
    path = Path(reference)
    if path.suffix == ".gguf":
        return path.stem
    return path.name if path.exists() and path.name not in ("", "model") else _run_name(reference, folder)


def _run_name(reference: str, folder: Path) -> str:
    """A run's id for ``RUN/artifacts/model``, else the folder's own name."""
    if folder.name == "model" and folder.parent.name == "artifacts":
        return folder.parent.parent.name
    return folder.resolve().name or reference


def engine_loader(folder: Path, settings: ServeSettings, *, dtype: str, compile: bool) -> Callable[[], Any]:
    """A function that loads the engine and runs it once, so that compilation is over before the first client."""

    def load() -> Any:
        from ridgeline.inference import Engine

        engine = Engine.load(
            folder, dtype=dtype, max_batch=settings.max_batch, max_context=settings.max_context, compile=compile
        )
        warm_up(engine)
        return engine

    return load


def warm_up(engine: Any) -> None:
    """One short greedy request, thrown away."""
    from ridgeline.inference import Request, SamplingParams

    engine.submit(Request(id="warm-up", prompt=[0], params=SamplingParams(max_tokens=2, temperature=0.0)))
    while engine.has_work():
        engine.step()
