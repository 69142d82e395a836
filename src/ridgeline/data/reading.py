"""First pass: sources to shards of normalised, measured and judged documents.

One process splits the files into raw records, in order; the pool decodes, normalises and measures batches of them;
the first process writes each shard when its last batch is back. So the work is spread evenly whether the corpus is
one large file or ten thousand small ones, and no shard depends on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ridgeline.config import DataSection
from ridgeline.data.features import FEATURES, measure
from ridgeline.data.normalize import normalize
from ridgeline.data.pool import Workers
from ridgeline.data.readers import Raw, read_raw, text_of
from ridgeline.data.rules import EMPTY, MALFORMED, Rule, judge, rules
from ridgeline.data.shards import open_shard, shard_end, write_shard
from ridgeline.data.sources import SourceFile
from ridgeline.data.workspace import Workspace
from ridgeline.errors import UserError

SHARD_BYTES = 64 << 20
BATCH_BYTES = 512 << 10
BATCH_RECORDS = 512


class Position(NamedTuple):
    """The next record to read: number of the file, number of the record inside it."""

    file: int
    record: int


class ReadTask(NamedTuple):
    """A batch for the pool. ``end`` is set on the last batch of a shard: where the next shard begins."""

    shard: int
    raws: list[Raw]
    text_key: str
    form: str
    end: Position | None


class ReadResult(NamedTuple):
    """What the pool makes of it: content hash and text of every record, or its problem, and all features."""

    shard: int
    places: list[tuple[int, int, int]]  # file, offset, length
    hashes: list[str]
    texts: list[str | None]
    problems: list[str | None]
    values: npt.NDArray[np.float64]
    end: Position | None


def content_hash(text: str) -> str:
    """128 bits (hex) that stand for a normalised text: the id of its content."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def process(task: ReadTask) -> ReadResult:
    """Decode, normalise, hash and measure one batch (runs in the pool)."""
    texts: list[str | None] = []
    problems: list[str | None] = []
    for raw in task.raws:
        text, problem = text_of(raw, task.text_key)
        texts.append(None if text is None else normalize(text, task.form))
        problems.append(problem)
    good = [index for index, text in enumerate(texts) if text is not None]
    values = np.full((len(texts), len(FEATURES)), np.nan)
    if good:
        values[good] = measure([text for text in texts if text is not None])
    hashes = ["" if text is None else content_hash(text) for text in texts]
    places = [(raw.file, raw.offset, raw.length) for raw in task.raws]
    return ReadResult(task.shard, places, hashes, texts, problems, values, task.end)


@dataclass
class _Shard:
    """The columns of a shard while its batches come in."""

    limits: Sequence[Rule]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    values: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, result: ReadResult) -> None:
        verdicts = judge(np.nan_to_num(result.values), self.limits)
        for index, (text, problem) in enumerate(zip(result.texts, result.problems, strict=True)):
            verdict, reason = verdicts[index], None
            if problem is not None:
                verdict, reason = None, MALFORMED
            elif not (text or "").strip():
                verdict, reason = None, EMPTY
            elif verdict is not None:
                reason = verdict.reason
            place = result.places[index]
            row = {
                "file": place[0],
                "offset": place[1],
                "length": place[2],
                "content_hash": result.hashes[index] or None,
                "reason": reason,
                "value": verdict.value if verdict else None,
                "limit": verdict.limit if verdict else None,
                "broken": ",".join(verdict.broken) if verdict else None,
                "detail": problem,
                "text": text if reason is None else None,
            }
            for key, value in row.items():
                self.columns.setdefault(key, []).append(value)
        self.values.append(result.values)


def read_shards(
    section: DataSection,
    files: Sequence[SourceFile],
    workspace: Workspace,
    workers: Workers,
    progress: Callable[[int], None],
) -> int:
    """Write every ``read`` shard that is not there yet; return how many there are.

    Raises:
        UserError: a malformed record, when ``on_bad_record`` is "stop".
        JobError: a shard on the disk is damaged, or the disk is full.
    """
    done = workspace.load("read.json")
    if done is not None:
        for number in range(done["shards"]):
            _stop_at_stored_problem(section, files, open_shard(workspace, number, ["file", "detail"]))
        return int(done["shards"])
    limits = rules(section.filters)
    shard, shards = _Shard(limits), 0
    for result in workers.map(process, _tasks(section, files, workspace, progress)):
        _stop_at_problem(section, files, result)
        shard.add(result)
        progress(sum(length for _, _, length in result.places))
        if result.end is not None:
            write_shard(workspace, result.shard, shard.columns, np.concatenate(shard.values), result.end)
            shard = _Shard(limits)
    while workspace.shard("read", shards).is_file():
        shards += 1
    workspace.save("read.json", {"shards": shards})
    return shards


def _tasks(
    section: DataSection, files: Sequence[SourceFile], workspace: Workspace, progress: Callable[[int], None]
) -> Iterator[ReadTask]:
    """Batches of the shards that are missing, in order. A finished shard says where the next one begins."""
    position, number = Position(0, 0), 0
    stream: Iterator[Raw] | None = None
    while position.file < len(files):
        if workspace.shard("read", number).is_file():
            table = open_shard(workspace, number, ["length", "detail", "file"])
            _stop_at_stored_problem(section, files, table)
            position, stream = Position(*shard_end(table)), None
            progress(sum(table.column("length").to_pylist()))
        else:
            stream = stream or _records(section, files, position)
            raws = _take_shard(stream, section.shard_documents)
            if not raws:
                return
            position = _after(raws[-1])
            yield from _batches(section, number, raws, position)
        number += 1


def _records(section: DataSection, files: Sequence[SourceFile], start: Position) -> Iterator[Raw]:
    for number in range(start.file, len(files)):
        yield from read_raw(number, files[number], section.text_key, start.record if number == start.file else 0)


def _take_shard(stream: Iterator[Raw], documents: int) -> list[Raw]:
    raws: list[Raw] = []
    total = 0
    for raw in stream:
        raws.append(raw)
        total += raw.length
        if len(raws) >= documents or total >= SHARD_BYTES:
            break
    return raws


def _batches(section: DataSection, number: int, raws: list[Raw], end: Position) -> Iterator[ReadTask]:
    start = total = 0
    for index, raw in enumerate(raws):
        total += raw.length
        last = index == len(raws) - 1
        if last or total >= BATCH_BYTES or index - start + 1 >= BATCH_RECORDS:
            part = raws[start : index + 1]
            yield ReadTask(number, part, section.text_key, section.normalize, end if last else None)
            start, total = index + 1, 0


def _after(raw: Raw) -> Position:
    return Position(raw.file + 1, 0) if raw.ended else Position(raw.file, raw.ordinal + 1)


def _stop_at_problem(section: DataSection, files: Sequence[SourceFile], result: ReadResult) -> None:
    for place, problem in zip(result.places, result.problems, strict=True):
        if problem is not None and section.on_bad_record == "stop":
            _stop(files[place[0]].name, problem)


def _stop_at_stored_problem(section: DataSection, files: Sequence[SourceFile], table: Any) -> None:
    """A build that skipped bad records is resumed by one that stops at them."""
    if section.on_bad_record == "stop":
        for file, problem in zip(table.column("file").to_pylist(), table.column("detail").to_pylist(), strict=True):
            if problem is not None:
                _stop(files[file].name, problem)


def _stop(source: str, problem: str) -> None:
    raise UserError(f"{source}: {problem} (data.on_bad_record=skip leaves such records out)")
