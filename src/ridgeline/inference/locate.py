"""What a user may name as a model: a folder, a training run, a GGUF file, a hub id. No torch unless a GGUF is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ridgeline.errors import UserError
from ridgeline.hardware import cache_folder
from ridgeline.runs import Run


def resolve_model(
    reference: str | Path, runs: str | Path | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """The model folder of ``reference``; a GGUF file is imported into the cache folder first, and ``say`` told so.

    ``reference`` is a model folder, a run (its ``artifacts/model``) by folder, id or unique prefix, a .gguf file,
    ``package:NAME/*.gguf``, or a hub id ``org/name`` (returned as it is: it is fetched when it is loaded).

    Raises:
        UserError: it is none of these, or the run left no model.
    """
    text = str(reference)
    if text.startswith("package:") or text.endswith(".gguf"):
        return _imported(text, say or (lambda line: None))
    path = Path(text)
    if (path / "config.json").is_file() and not (path / "run.json").is_file():
        return path
    if (path / "run.json").is_file() or not path.exists():
        return _of_run(text, path, runs)
    raise UserError(f"{text}: not a model folder (no config.json), not a run, not a .gguf file")


def _of_run(text: str, path: Path, runs: str | Path | None) -> Path:
    try:
        run = Run.open(path if (path / "run.json").is_file() else text, runs)
    except UserError as error:
        if text.count("/") == 1 and not text.startswith((".", "/")) and not path.parent.is_dir():
            return path  # may be a hub id
        raise UserError(f"model '{text}': no such folder or file; {error}") from None
    model = run.path / "artifacts" / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"run {run.id} ({run.kind}, {run.info['status']}) holds no model in {model}")
    return model


def _imported(reference: str, say: Callable[[str], None]) -> Path:
    """The folder a GGUF file was, or now is, imported into; named by its content's size, time and place."""
    from ridgeline.models.gguf import import_gguf, resolve

    file = resolve(reference).resolve()
    stat = file.stat()
    key = hashlib.sha256(f"{file}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder() / "models" / f"{file.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    say(f"importing {file.name} into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    import_gguf(file, target)
    return target
