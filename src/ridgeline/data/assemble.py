"""Last pass: shards to the files of the dataset. The manifest comes last and makes it complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline import __version__
from ridgeline.config import DataSection
from ridgeline.data.dataset import FORMAT, MANIFEST
from ridgeline.data.disk import atomic, digest, make_folder, sync_folder, write_bytes, writing
from ridgeline.data.ledger import SPLITS, Ledger
from ridgeline.data.megatron import write_index
from ridgeline.data.provenance import write_provenance
from ridgeline.data.sources import SourceFile
from ridgeline.data.tokenizer import end_token, load_tokenizer, settings, token_dtype, vocab_hash, vocab_size
from ridgeline.data.tokenizing import COMPANIONS, open_tokens
from ridgeline.data.workspace import Description, Workspace


def assemble(
    section: DataSection,
    files: Sequence[SourceFile],
    description: Description,
    workspace: Workspace,
    ledger: Ledger,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Write the splits, the tokenizer and the provenance, check them, then the manifest; return the manifest.

    Everything is written below ``.build`` and renamed into place at the end, so that a kill or a full disk leaves
    either the dataset that was there before or one without a manifest, which the next build completes.
    """
    final = workspace.path / "final"
    shutil.rmtree(final, ignore_errors=True)  # what an earlier attempt left is not part of this one
    make_folder(final)
    tokenizer_file = workspace.path / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file)
    end, end_id = end_token(tokenizer, tokenizer_file)
    dtype = np.dtype(token_dtype(vocab_size(tokenizer)))
    names = _copy_tokenizer(workspace.path, final, end)
    lengths = _write_splits(workspace, ledger, final, dtype, progress)
    write_provenance(final / "provenance.parquet", workspace, ledger, files, lengths)
    entries = {p.name: {"bytes": p.stat().st_size, "digest": digest(p)} for p in sorted(final.iterdir())}
    kept = {split: lengths[ledger.splits == number] for number, split in enumerate(SPLITS)}
    manifest = {
        "format": FORMAT,
        "version": 1,
        "ridgeline": __version__,
        "name": section.name,
        "fingerprint": description.fingerprint,
        **description.to_dict(),
        "documents": {"read": len(ledger.reasons), "kept": int((lengths > 0).sum()), "dropped": ledger.dropped()},
        "splits": {k: {"documents": len(v), "tokens": int(v.sum())} for k, v in kept.items()},
        "dtype": dtype.name,
        "vocab_size": vocab_size(tokenizer),
        "vocab_hash": vocab_hash(tokenizer),
        "end_token": end,
        "end_token_id": end_id,
        "tokenizer_files": names,
        "files": entries,
    }
    _publish(final, workspace.dataset, manifest)
    workspace.remove()
    return manifest


def _copy_tokenizer(origin: Path, final: Path, end: str) -> list[str]:
    names = ["tokenizer.json"]
    write_bytes(final / names[0], (origin / names[0]).read_bytes())
    for name in COMPANIONS:
        if (origin / name).is_file():
            write_bytes(final / name, (origin / name).read_bytes())
            names.append(name)
    if COMPANIONS[0] not in names:
        write_bytes(final / COMPANIONS[0], (json.dumps(settings(end), indent=1) + "\n").encode())
        names.append(COMPANIONS[0])
    return names


def _write_splits(
    workspace: Workspace, ledger: Ledger, final: Path, dtype: np.dtype[Any], progress: Callable[[int], None]
) -> npt.NDArray[np.int64]:
    """Write ``.bin`` and ``.idx`` of every split; return the tokens of every document, 0 for a dropped one."""
    lengths = np.zeros(len(ledger.reasons), np.int64)
    for split, name in enumerate(SPLITS):
        with atomic(final / f"{name}.bin") as file:
            for number, tokens, counts in _shards(workspace, ledger):
                splits = ledger.splits[ledger.shard(number)]
                kept = splits[splits >= 0]
                part = tokens[np.repeat(kept == split, counts)].astype(dtype, copy=False)
                file.write(part.data if len(part) else b"")
                lengths[ledger.shard(number)][splits >= 0] = counts
                progress(len(part))
        write_index(final / f"{name}.idx", lengths[ledger.splits == split], dtype)
    return lengths


def _shards(workspace: Workspace, ledger: Ledger) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.int64]]]:
    for number in range(len(ledger.shard_sizes)):
        kept = int((ledger.splits[ledger.shard(number)] >= 0).sum())
        tokens, counts = open_tokens(workspace, number, kept)
        yield number, tokens, counts


def _publish(final: Path, dataset: Path, manifest: Mapping[str, Any]) -> None:
    """Move the files into place: the old manifest goes first and the new one comes last."""
    text = (json.dumps(manifest, indent=1) + "\n").encode()
    write_bytes(final / MANIFEST, text)
    with writing(dataset):
        (dataset / MANIFEST).unlink(missing_ok=True)
        for name in manifest["files"]:
            os.replace(final / name, dataset / name)
        sync_folder(dataset)
        os.replace(final / MANIFEST, dataset / MANIFEST)
        sync_folder(dataset)
