"""What goes wrong inside torch.compile, as one line that names the cause."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ridgeline.errors import JobError, UserError


@contextlib.contextmanager
def compiling(name: str) -> Iterator[None]:
    """Within the block, a failure of the compiler is one line; the cache folder is checked first.

    Raises:
        JobError: no C++ compiler, or torch.compile failed on ``name``.
        UserError: the cache folder cannot be written.
    """
    check_cache_folder()
    try:
        yield
    except (UserError, JobError, KeyboardInterrupt, OSError):
        raise
    except Exception as error:
        raise JobError(_one_line(name, error)) from None


def check_cache_folder() -> Path:
    """Inductor's cache folder, made if need be.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cache folder {folder}: {reason}; set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        ) from None
    return folder


def _default_folder() -> str:
    from ridgeline.compiler.internals.settings import default_cache_folder

    return default_cache_folder()


def _one_line(name: str, error: BaseException) -> str:
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or getattr(chain[-1], "inner_exception", None)) and deeper not in chain:
        chain.append(deeper)
    for one in reversed(chain):
        if type(one).__name__ == "InvalidCxxCompiler" or "No working C++ compiler" in str(one):
            return f"{name}: no working C++ compiler: install g++, or set CXX to one"
    root = chain[-1]
    text = " ".join(str(root).split()).partition(" Set TORCHDYNAMO_VERBOSE")[0]
    return f"{name}: {type(root).__name__}: {text[:300]}"
