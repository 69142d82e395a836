"""The table that answers for every document: where it came from, what was measured, where it went and why."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.config import FilterSection
from ridgeline.data.dataset import Dataset
from ridgeline.data.disk import atomic
from ridgeline.data.features import FEATURES
from ridgeline.data.ledger import SPLITS, Ledger, document_id
from ridgeline.data.rules import Rule, rules
from ridgeline.data.shards import open_shard
from ridgeline.data.sources import SourceFile
from ridgeline.data.workspace import ENDED, Workspace
from ridgeline.errors import UserError

STORED = ("file", "offset", "length", "content_hash", "reason", "value", "limit", "broken", "detail")
NAME = "provenance.parquet"
MOST_COMPARED = 20_000  # names an unknown document is compared with: about a second


def write_provenance(
    target: Path,
    workspace: Workspace,
    ledger: Ledger,
    files: Sequence[SourceFile],
    lengths: npt.NDArray[np.int64],
) -> None:
    """Write one row per document that was read, in source order, a row group per shard.

    Columns: ``id, source, offset, length, content_hash, fate ("kept" | "dropped"), reason, value, limit, broken
    (every rule it broke), duplicate_of (an id), detail (what was malformed), split, token_offset (in the split's
    .bin), tokens`` (end token included) and every feature. ``lengths`` are tokens per document, 0 where dropped.
    """
    import pyarrow.parquet as pq

    offsets = np.zeros(len(lengths), np.int64)
    for split in range(len(SPLITS)):
        mask = ledger.splits == split
        offsets[mask] = np.cumsum(lengths[mask]) - lengths[mask]
    places: list[tuple[int, int]] = []
    with atomic(target) as file:
        writer = None
        for number in range(len(ledger.shard_sizes)):
            rows = ledger.shard(number)
            stored = open_shard(workspace, number, [*STORED, *FEATURES])
            places += zip(stored.column("file").to_pylist(), stored.column("offset").to_pylist(), strict=True)
            table = _table(stored, rows, ledger, files, places, lengths, offsets)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _table(
    stored: Any,
    rows: slice,
    ledger: Ledger,
    files: Sequence[SourceFile],
    places: Sequence[tuple[int, int]],
    lengths: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> Any:
    import pyarrow as pa

    def identify(index: int) -> str:
        file, offset = places[index]
        return document_id(files[file].name, offset)

    indices = range(rows.start, rows.stop)
    kept = ledger.splits[rows] >= 0
    originals = [ledger.duplicate_of.get(index) for index in indices]
    text, whole = pa.string(), pa.int64()
    columns = {
        "id": pa.array([identify(index) for index in indices], text),
        "source": pa.array([files[places[index][0]].name for index in indices], text),
        "offset": stored.column("offset"),
        "length": stored.column("length"),
        "content_hash": stored.column("content_hash"),
        "fate": pa.array(np.where(kept, "kept", "dropped").tolist(), text),
        "reason": pa.array(ledger.reasons[rows], text),
        **{name: stored.column(name) for name in ("value", "limit", "broken")},
        "duplicate_of": pa.array([None if o is None else identify(o) for o in originals], text),
        "detail": stored.column("detail"),
        "split": pa.array([SPLITS[s] if s >= 0 else None for s in ledger.splits[rows].tolist()], text),
        "token_offset": pa.array(offsets[rows], whole, mask=~kept),
        "tokens": pa.array(lengths[rows], whole, mask=~kept),
        **{name: stored.column(name) for name in FEATURES},
    }
    return pa.table(columns)


@dataclass(frozen=True)
class Fate:
    """What became of one document. ``row`` is its row of the provenance table, ``limits`` the rules it was held to."""

    row: Mapping[str, Any]
    limits: Sequence[Rule]

    @property
    def line(self) -> str:
        """One sentence for people."""
        row = self.row
        if row["fate"] == "kept":
            if row["split"] is None:  # a build that ended before the splits
                return "passed every filter, in a build that did not finish"
            end = row["token_offset"] + row["tokens"]
            return f"kept: {row['tokens']:,} tokens of {row['split']}, {row['token_offset']:,} to {end:,}"
        reason = row["reason"]
        if row["duplicate_of"]:
            return f"dropped: {reason} of {row['duplicate_of']}"
        if row["detail"]:
            return f"dropped: {reason}, {row['detail']}"
        if row["value"] is None:
            return f"dropped: {reason}"
        side = "below" if reason.startswith("min_") else "above"
        return f"dropped by {reason}: {row['value']:.4g} is {side} {row['limit']:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        limits = {rule.feature: {rule.side: rule.limit} for rule in self.limits}
        for rule in self.limits:
            limits[rule.feature][rule.side] = rule.limit
        return {**self.row, "answer": self.line, "limits": limits}


def why(folder: str | Path, document: str) -> Fate:
    """What became of ``document`` in the dataset ``folder``, or in its build that ended with nothing left.

    ``document`` is an id, a source (or the last parts of its path), ``SOURCE@OFFSET``, or the unique
    beginning of an id or of a file name.

    Raises:
        UserError: no dataset, no such document, or several.
    """
    import pyarrow.parquet as pq

    path, config = _provenance(Path(folder))
    table = pq.read_table(path, columns=["id", "source", "offset"], partitioning=None)
    index = _find(document, table)
    row = pq.read_table(path, partitioning=None).slice(index, 1).to_pylist()[0]
    return Fate(row, rules(FilterSection.model_validate(config["filters"])))


def _provenance(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    unfinished = Workspace(folder)
    plan = unfinished.load("plan.json")
    if plan is not None and (unfinished.path / ENDED).is_file():
        return unfinished.path / ENDED, plan["config"]
    dataset = Dataset.open(folder)
    return dataset.path / NAME, dataset.manifest["config"]


def _find(document: str, table: Any) -> int:
    ids, sources = table.column("id").to_pylist(), table.column("source").to_pylist()
    name, at, offset = document.rpartition("@")
    if at and offset.isdigit():
        offsets = table.column("offset").to_pylist()
        matches = [i for i, s in enumerate(sources) if _is_source(s, name) and offsets[i] == int(offset)]
    else:
        matches = [i for i, value in enumerate(ids) if value == document]
        matches = matches or [i for i, source in enumerate(sources) if _is_source(source, document)]
        matches = matches or [i for i, value in enumerate(ids) if len(document) > 2 and value.startswith(document)]
        matches = matches or [
            i for i, s in enumerate(sources) if document and s.rpartition("/")[2].startswith(document)
        ]
    if not matches:
        raise UserError(f"document '{document}': not among {len(ids):,}{_nearest(document, sources)}")
    if len(matches) > 1:
        some = ", ".join(f"{ids[i]} ({sources[i]})" for i in matches[:3])
        raise UserError(
            f"document '{document}': {len(matches):,} documents fit, such as {some}; give an id or SOURCE@OFFSET"
        )
    return matches[0]


def _nearest(document: str, sources: Sequence[str]) -> str:
    """`` (did you mean ...?)``: up to three file names that hold ``document``, else those most like it."""
    wanted = document.rpartition("/")[2].partition("@")[0].lower()
    names = {source.rpartition("/")[2] for source in sources}
    lower = {name.lower(): name for name in sorted(names)}
    found = [name for name in lower if wanted and wanted in name][:3]
    for count, cutoff in ((1, 0.6), (3, 0.3)):  # one that is close, else some that are less so
        found = found or difflib.get_close_matches(wanted, list(lower)[:MOST_COMPARED], count, cutoff)
    some = " or ".join(f"'{lower[name]}'" for name in found)
    return f" (did you mean {some}?)" if some else f" (such as '{min(names)}')" if names else ""


def _is_source(source: str, wanted: str) -> bool:
    """``wanted`` is the whole name or whole last parts of it."""
    return bool(wanted) and (source == wanted or source.endswith("/" + wanted.lstrip("/")))
