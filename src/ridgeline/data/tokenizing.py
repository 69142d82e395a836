"""Second pass: kept texts to tokens, shard by shard, in the pool."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.config import DataSection
from ridgeline.data.disk import REBUILD, digest, write_bytes
from ridgeline.data.ledger import DROPPED, Ledger
from ridgeline.data.pool import Workers
from ridgeline.data.reading import BATCH_RECORDS
from ridgeline.data.shards import open_shard
from ridgeline.data.tokenizer import (
    EncodeTask,
    encode_batch,
    end_token,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
)
from ridgeline.data.workspace import Workspace
from ridgeline.errors import JobError

ENCODE_CHARACTERS = 256 << 10
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def prepare_tokenizer(
    section: DataSection, workspace: Workspace, ledger: Ledger, progress: Callable[[int], None]
) -> Path:
    """``tokenizer.json`` of the build: the one that is there, a copy of the loaded one, or one trained on the train split.

    Validation and test texts stay unseen: their compression would otherwise look better than it is.
    """
    target = workspace.path / "tokenizer.json"
    if target.is_file():
        return target
    if section.tokenizer.path:
        source = tokenizer_file(section.tokenizer.path)
        for name in COMPANIONS:
            if source.with_name(name).is_file():
                write_bytes(workspace.path / name, source.with_name(name).read_bytes())
        write_bytes(target, source.read_bytes())
        return target
    tokenizer = train_tokenizer(_training_texts(workspace, ledger, progress), section.tokenizer.vocab_size)
    write_bytes(target, tokenizer.to_str(pretty=True).encode())
    return target


def tokenize_shards(
    workspace: Workspace, ledger: Ledger, tokenizer: Path, workers: Workers, progress: Callable[[int], None]
) -> int:
    """Write every ``tokens-NNNNN.npz`` that is not there yet; return how many were there already."""
    _, end = end_token(load_tokenizer(tokenizer), tokenizer)
    name = digest(tokenizer)
    shards = range(len(ledger.shard_sizes))
    missing = [number for number in shards if not workspace.shard("tokens", number).is_file()]
    batches = ((number, texts) for number in missing for texts in _batches(workspace, ledger, number))
    owners: list[int] = []

    def tasks() -> Iterator[EncodeTask]:
        for number, texts in batches:
            owners.append(number)
            progress(sum(map(len, texts)))
            yield EncodeTask(str(tokenizer), name, end, texts)

    arrays: list[npt.NDArray[Any]] = []
    lengths: list[int] = []
    waiting = list(missing)
    for index, (tokens, counts) in enumerate(workers.map(encode_batch, tasks())):
        while owners[index] != waiting[0]:
            _write(workspace, waiting.pop(0), arrays, lengths)
            arrays, lengths = [], []
        arrays.append(tokens)
        lengths += counts
    for number in waiting:
        _write(workspace, number, arrays, lengths)
        arrays, lengths = [], []
    return len(shards) - len(missing)


def open_tokens(workspace: Workspace, number: int, documents: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Tokens and document lengths of a finished shard.

    Raises:
        JobError: the file is missing, damaged or another build's.
    """
    path = workspace.shard("tokens", number)
    try:
        with np.load(path, allow_pickle=False) as stored:
            tokens, lengths = stored["tokens"], stored["lengths"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise JobError(f"{path}: {what}; {REBUILD} starts anew") from None
    if len(lengths) != documents or int(lengths.sum()) != len(tokens):
        raise JobError(f"{path}: holds {len(lengths)} documents, expected {documents}; {REBUILD} starts anew")
    return tokens, lengths


def kept_texts(workspace: Workspace, ledger: Ledger, number: int, split: int | None = None) -> list[str]:
    """The texts of shard ``number`` that are kept, or those of one split."""
    splits = ledger.splits[ledger.shard(number)]
    chosen = np.flatnonzero(splits != DROPPED if split is None else splits == split)
    column = open_shard(workspace, number, ["text"]).column("text")
    return [str(text) for text in column.take(chosen).to_pylist()]


def _training_texts(workspace: Workspace, ledger: Ledger, progress: Callable[[int], None]) -> Iterator[list[str]]:
    for number in range(len(ledger.shard_sizes)):
        texts = kept_texts(workspace, ledger, number, 0 if (ledger.splits == 0).any() else None)
        for start in range(0, len(texts), BATCH_RECORDS):
            part = texts[start : start + BATCH_RECORDS]
            yield part
            progress(sum(map(len, part)))


def _batches(workspace: Workspace, ledger: Ledger, number: int) -> Iterator[list[str]]:
    batch: list[str] = []
    total = 0
    for text in kept_texts(workspace, ledger, number):
        batch.append(text)
        total += len(text)
        if total >= ENCODE_CHARACTERS or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _write(workspace: Workspace, number: int, arrays: list[npt.NDArray[Any]], lengths: list[int]) -> None:
    buffer = io.BytesIO()
    tokens = np.concatenate(arrays) if arrays else np.empty(0, np.uint16)
    np.savez(buffer, tokens=tokens, lengths=np.array(lengths, np.int64))
    write_bytes(workspace.shard("tokens", number), buffer.getbuffer())
