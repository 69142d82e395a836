"""Using a package: the compiled model without compiling, the caches put where the compiler looks for them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ridgeline.compiler.package import manifest
from ridgeline.errors import JobError, UserError


def load(folder: str | Path) -> Callable[..., Any]:
    """The model of a package, ready to be called as the model was, without gradients. Needs no C++ compiler.

    Raises:
        UserError: it is no package, is damaged, or was made for another torch, device or CPU; which, is named.
        JobError: torch cannot load the program.
    """
    from ridgeline.compiler.internals.aoti import load_program

    folder = Path(folder)
    manifest.check(folder, manifest.PROGRAM)
    try:
        return load_program(folder / manifest.PROGRAM)
    except RuntimeError as error:
        raise JobError(f"{folder / manifest.PROGRAM}: {' '.join(str(error).split())[:200]}") from None


def restore(folder: str | Path) -> tuple[Path, int]:
    """Put the compiler's caches of a package where `torch.compile` looks; returns (that folder, files written).

    Files that are there already stay as they are.

    Raises:
        UserError: as `load`; or the cache folder cannot be written.
    """
    from ridgeline.compiler.failures import check_cache_folder

    folder = Path(folder)
    manifest.check(folder, manifest.CACHE)
    target, written = check_cache_folder(), 0
    with zipfile.ZipFile(folder / manifest.CACHE) as archive:
        for entry in archive.infolist():
            written += _extract(archive, entry, target)
    return target, written


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> bool:
    """Write one file under a temporary name and rename it; False when it is there."""
    parts = PurePosixPath(entry.filename).parts
    if entry.is_dir() or ".." in parts or PurePosixPath(entry.filename).is_absolute():
        raise UserError(f"{archive.filename}: damaged (entry {entry.filename!r})")
    file = target.joinpath(*parts)
    if file.exists():
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(archive.read(entry))
    temporary.chmod(entry.external_attr >> 16 or 0o644)
    temporary.replace(file)
    return True
