"""Checkpoints: written whole or not at all, verified before they are trusted.

::

    checkpoints/step-00000100/
      shard-00001-model-00001-of-00001.safetensors   one file per rank, by torch.distributed.checkpoint
      manifest.json     step, cursor, layout, and size and CRC-32 of every file
      complete          CRC-32 of manifest.json; written last, then the folder is renamed into place

Shards are safetensors: nothing in a checkpoint is ever unpickled. A checkpoint written on one layout loads on another.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ridgeline.errors import JobError

PREFIX = "step-"
FORMAT = 1


@dataclass(frozen=True)
class Found:
    """A verified checkpoint, and the damaged newer ones that were passed over with what is wrong with each."""

    path: Path
    manifest: dict[str, Any]
    damaged: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimiser steps taken when it was written."""
        return int(self.manifest["step"])


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies below a run's ``checkpoints`` folder."""
    return root / f"{PREFIX}{step:08d}"


def save(tensors: dict[str, torch.Tensor], root: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of ``tensors`` and remove all but the ``keep`` newest. A collective.

    Raises:
        JobError: it could not be written (disk full, no permission). Nothing half-written is left and earlier
            checkpoints are untouched.
    """
    final = folder_of(root, step)
    partial = root / f".{final.name}.partial"
    problem = _on_main(lambda: _prepare(partial, tensors))
    if problem is None:
        problem = _write(tensors, partial)
    if problem is None:
        problem = _on_main(lambda: _seal(partial, final, step, facts))
    if problem is not None:
        _on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise JobError(f"checkpoint of step {step} was not written to {final}: {problem}{_still_there(root)}")
    _on_main(lambda: _prune(root, keep))
    return final


def find(root: Path) -> Found | None:
    """The newest checkpoint below ``root`` that verifies, or None when there is none at all.

    Raises:
        JobError: there are checkpoints and all of them are damaged.
    """
    damaged: list[str] = []
    for folder in sorted(root.glob(f"{PREFIX}*"), reverse=True):
        problem = verify(folder)
        if problem is None:
            return Found(folder, json.loads((folder / "manifest.json").read_text()), tuple(damaged))
        damaged.append(f"{folder.name}: {problem}")
    if damaged:
        raise JobError(f"every checkpoint below {root} is damaged: {'; '.join(damaged)}")
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when marker, manifest, sizes and checksums all agree."""
    try:
        marker = (folder / "complete").read_text().strip()
        text = (folder / "manifest.json").read_bytes()
    except OSError as error:
        return f"{Path(error.filename or folder).name} is missing"
    if marker != _hex(zlib.crc32(text)):
        return "manifest.json is not the one that was written"
    for name, facts in json.loads(text)["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes of {facts['bytes']}"
        if _file_crc(file) != facts["crc32"]:
            return f"{name} has a wrong checksum"
    return None


def load(tensors: dict[str, torch.Tensor], found: Found) -> None:
    """Fill ``tensors`` in place, resharding as their layout needs. A collective.

    Raises:
        JobError: the checkpoint holds other tensors than these.
    """
    try:
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(found.path)))
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise JobError(f"checkpoint {found.path} does not fit this job: {_reason(error)}") from None


def find_agreed(root: Path) -> Found | None:
    """:func:`find` on rank 0, its answer (or its error) on every rank. A collective."""
    box: list[Found | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            box = [find(root)]
        except JobError as error:
            box = [str(error)]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], str):
        raise JobError(box[0])
    return box[0]


def _prepare(partial: Path, tensors: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


def _write(tensors: dict[str, torch.Tensor], partial: Path) -> str | None:
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    try:
        dcp_save(tensors, storage_writer=writer)
    except (CheckpointException, OSError, RuntimeError) as error:
        return _reason(error)
    return None


def _seal(partial: Path, final: Path, step: int, facts: dict[str, Any]) -> None:
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": _file_crc(file)}
        for file in sorted(partial.glob("*.safetensors"))
    }
    manifest = {"format": FORMAT, "step": step, "world_size": dist.get_world_size(), **facts, "files": files}
    text = json.dumps(manifest, indent=1).encode()
    _write_synced(partial / "manifest.json", text)
    _write_synced(partial / "complete", _hex(zlib.crc32(text)).encode())
    if final.exists():  # an older attempt at the same step, found damaged or superseded by a resume
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync_folder(final.parent)


def _prune(root: Path, keep: int) -> None:
    for folder in sorted(root.glob(f"{PREFIX}*"), reverse=True)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def _on_main(action: Callable[[], object]) -> str | None:
    """Run ``action`` on rank 0 and tell every rank how it went: None, or the reason in one line."""
    box: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            box = [_reason(error)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _reason(error: BaseException) -> str:
    """One line for people: what the innermost error says."""
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()))
        error = inner[0] if isinstance(inner, tuple) else inner
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return error.strerror if error.strerror and error.strerror.startswith("disk full") else "disk full"
    text = str(error).strip() or type(error).__name__
    return "disk full" if "No space left on device" in text else text.splitlines()[0][:300]


def _still_there(root: Path) -> str:
    kept = sorted(folder.name for folder in root.glob(f"{PREFIX}*"))
    return f" (checkpoint {kept[-1]} is intact)" if kept else " (there is no earlier checkpoint)"


def _file_crc(file: Path) -> str:
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return _hex(crc)


def _hex(crc: int) -> str:
    return f"{crc & 0xFFFFFFFF:08x}"


def _write_synced(target: Path, data: bytes) -> None:
    with open(target, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
