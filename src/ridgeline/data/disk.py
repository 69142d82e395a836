"""Files that are either whole or not there: write beside, flush to the disk, rename.

A full disk is a :class:`JobError` that says what was being written and where, and removes its temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ridgeline.errors import JobError, UserError

# What a message names where only a new build helps. Other verbs than `data build` print it too.
REBUILD = "`ridgeline data build CONFIG --rebuild`"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what a disk can answer while ``target`` is written into the two known failures."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise JobError(
                f"disk full while writing {target} ({_free(target)}); free space and run it again"
            ) from error
        if error.errno in FORBIDDEN:
            raise UserError(f"cannot write {target}: {error.strerror}") from error
        raise JobError(f"writing {target} failed: {error}") from error


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``target`` only when the block ends well.

    Raises:
        JobError: the disk is full or broken; ``target`` is as it was before and no temporary file is left.
        UserError: the folder may not be written to.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    with writing(target):
        file = open(temporary, "wb")  # noqa: SIM115 - closed below, where a failing close must not hide the reason
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(target: Path, data: bytes | memoryview) -> None:
    """``target`` holds ``data``, or what it held before."""
    with atomic(target) as file:
        file.write(data)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Put renames inside ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """blake2b (160 bits, hex) of the file's bytes."""
    state = hashlib.blake2b(digest_size=20)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _free(target: Path) -> str:
    folder = next((p for p in (target, *target.parents) if p.is_dir()), Path("."))
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free in {folder}"
