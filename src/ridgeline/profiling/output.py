"""May a result be written under this name? Asked before the work is done, and never answered by destroying something.

Files are written beside their name and renamed, which would put a file in place of whatever bears the name: the trace
that was read, or a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ridgeline.errors import UserError


def check_output(what: str, target: Path, sources: Iterable[str | Path]) -> None:
    """Nothing, when ``target`` can be (re)placed and is none of the ``sources`` it is made of; ``what`` writes it.

    Raises:
        UserError: a source itself, a folder, something that is no file, or a name in a folder that is not there.
    """
    folder = target.parent
    if target.is_dir():
        raise UserError(f"{what} {target}: is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise UserError(f"{what} {target}: is no regular file; name another")
    if not folder.is_dir():
        raise UserError(f"{what} {target}: no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{what} {target}: folder {folder} may not be written to")
    if any(target.exists() and Path(one).exists() and target.samefile(one) for one in sources):
        raise UserError(f"{what} {target}: is the trace itself; name another file")


class Replacing:
    """A temporary file beside ``target`` that takes its place when all went well, and is removed otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.{os.getpid()}.partial")

    def __enter__(self) -> Replacing:
        check_output("export", self.target, ())
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            os.replace(self.path, self.target)
        else:
            self.path.unlink(missing_ok=True)
