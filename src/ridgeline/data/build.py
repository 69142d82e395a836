"""The build: sources to a dataset, in four passes that can each be cut off at any moment and taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.config import DataSection
from ridgeline.data.assemble import assemble
from ridgeline.data.dataset import MANIFEST, Dataset
from ridgeline.data.disk import REBUILD, digest
from ridgeline.data.foreign import refuse_foreign
from ridgeline.data.ledger import Ledger
from ridgeline.data.pool import Workers, worker_count
from ridgeline.data.provenance import write_provenance
from ridgeline.data.reading import read_shards
from ridgeline.data.sources import SourceFile, resolve, with_digests
from ridgeline.data.tokenizer import end_token, load_tokenizer, tokenizer_file
from ridgeline.data.tokenizing import prepare_tokenizer, tokenize_shards
from ridgeline.data.workspace import ENDED, Description, Workspace, refuse
from ridgeline.errors import UserError

# Called while a pass goes on: (pass, done, total or None where it is not known, what is counted).
Progress = Callable[[str, int, int | None, str], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build did. ``seconds`` is this call's, by pass in ``passes``; ``reused`` = the dataset was there already."""

    folder: str
    fingerprint: str
    files: int
    source_bytes: int
    documents: int
    kept: int
    dropped: dict[str, int]
    splits: dict[str, dict[str, int]]
    tokens: int
    vocab_size: int
    vocab_hash: str
    dtype: str
    workers: int
    reused: bool
    resumed_shards: int
    seconds: float = 0.0
    megabytes_per_second: float | None = None
    passes: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def figures(self) -> dict[str, Any]:
        """The headline figures of a run's summary. ``bytes_per_second`` is of source text, over the whole build."""
        figures = {
            "documents": self.documents,
            "documents_kept": self.kept,
            "tokens": self.tokens,
            "splits": {name: split["tokens"] for name, split in self.splits.items()},
            "fates": {"kept": self.kept, **{f"dropped: {reason}": count for reason, count in self.dropped.items()}},
            "vocab_size": self.vocab_size,
            "dtype": self.dtype,
            "source_bytes": self.source_bytes,
            "build_seconds": self.seconds,
            "reused": self.reused,
            "fingerprint": self.fingerprint,
        }
        if not self.reused:
            figures |= {"bytes_per_second": self.source_bytes / self.seconds, "workers": self.workers}
        return figures


def build(
    section: DataSection,
    progress: Progress | None = None,
    root: str | Path | None = None,
    rebuild: bool = False,
) -> BuildReport:
    """Build ``section.folder`` (below ``root`` when it is relative), or continue, or find it already built.

    The same sources and settings give the same bytes, on any number of workers and after any number of kills.

    Args:
        progress: called many times a second.
        rebuild: start anew even where a dataset or unfinished work of another configuration lies; what is there
            stays usable until the new one is complete.

    Raises:
        UserError: a source, a record (with ``on_bad_record = "stop"``) or a setting is wrong, the folder holds another
            configuration's work (it names the changed field) or files of somebody else, or no document is left.
        JobError: the disk is full, a worker was killed, or stored work is damaged. Finished shards are kept.
    """
    clock = _Clock(progress)
    folder = Path(root or ".") / section.folder
    with clock.stage("list sources", "files") as advance:
        found = resolve(section.sources)
        files = with_digests(found.files, lambda done, total: advance(1, total))
        tokenizer = tokenizer_file(section.tokenizer.path) if section.tokenizer.path else None
        if tokenizer:  # one that will not do is refused before any work
            end_token(load_tokenizer(tokenizer), tokenizer)
        description = Description.of(section, files, digest(tokenizer) if tokenizer else None)
    workspace = Workspace(folder)
    if not rebuild and (folder / MANIFEST).is_file() and not (workspace.path / "plan.json").is_file():
        return _reuse(section, description, folder, clock)
    refuse_foreign(folder, rebuild)
    workspace.acquire()
    try:
        if rebuild or not workspace.agree(description):
            workspace.clear()
            workspace.save("plan.json", description.to_dict())
        report = _run(section, files, description, workspace, clock)
    finally:
        workspace.release()
    notes = [f"{found.ignored:,} files of unknown kind were passed over"] if found.ignored else []
    return replace(report, notes=(*notes, *report.notes))


def _run(
    section: DataSection, files: list[SourceFile], description: Description, workspace: Workspace, clock: _Clock
) -> BuildReport:
    total = sum(file.bytes for file in files)
    plain = all(not file.compression and file.kind != "parquet" for file in files)
    done_before = len(list(workspace.path.glob("tokens-*.npz")))
    with Workers(worker_count(section.workers, total)) as workers:
        with clock.stage("read and filter", "bytes", total if plain else None) as advance:
            shards = read_shards(section, files, workspace, workers, advance)
        ledger = Ledger.judge(section, workspace, shards)
        _require_content(section, files, workspace, ledger)
        with clock.stage(
            "train tokenizer" if not section.tokenizer.path else "load tokenizer", "characters"
        ) as advance:
            tokenizer = prepare_tokenizer(section, workspace, ledger, advance)
        with clock.stage("tokenise", "characters") as advance:
            resumed = tokenize_shards(workspace, ledger, tokenizer, workers, advance)
        with clock.stage("write", "tokens") as advance:
            manifest = assemble(section, files, description, workspace, ledger, advance)
    report = _report(section, manifest, workspace.dataset, clock, workers.count)
    return replace(report, resumed_shards=max(resumed, done_before), megabytes_per_second=total / 1e6 / clock.seconds)


def _require_content(section: DataSection, files: list[SourceFile], workspace: Workspace, ledger: Ledger) -> None:
    """Where nothing is left, leave the table that says why before raising."""
    try:
        ledger.require_content(section, files)
    except UserError:
        lengths = np.zeros(len(ledger.reasons), np.int64)
        write_provenance(workspace.path / ENDED, workspace, ledger, files, lengths)
        raise


def _reuse(section: DataSection, description: Description, folder: Path, clock: _Clock) -> BuildReport:
    dataset = Dataset.open(folder)
    built = Description.from_dict(dataset.manifest)
    refuse(built.difference(description, finished=True), f"{folder} holds a dataset")
    bad = dataset.manifest["documents"]["dropped"].get("malformed", 0)
    if bad and section.on_bad_record == "stop":
        raise UserError(
            f"{folder} was built with data.on_bad_record=skip and left out {bad:,} records; use the same, or {REBUILD}"
        )
    return replace(_report(section, dict(dataset.manifest), folder, clock, 0), reused=True)


def _report(section: DataSection, manifest: dict[str, Any], folder: Path, clock: _Clock, workers: int) -> BuildReport:
    splits = manifest["splits"]
    notes = [
        f"the {name} split is empty: none of {manifest['documents']['kept']:,} documents fell into its share of {share:g}"
        for (name, split), share in zip(splits.items(), section.split, strict=True)
        if share > 0 and not split["documents"]
    ]
    if not section.tokenizer.path and manifest["vocab_size"] < section.tokenizer.vocab_size:
        notes.append(
            f"the vocabulary has {manifest['vocab_size']:,} tokens, not {section.tokenizer.vocab_size:,}: "
            "the text has no more pairs to join"
        )
    return BuildReport(
        folder=str(folder),
        fingerprint=manifest["fingerprint"],
        files=len(manifest["sources"]),
        source_bytes=sum(file["bytes"] for file in manifest["sources"]),
        documents=manifest["documents"]["read"],
        kept=manifest["documents"]["kept"],
        dropped=manifest["documents"]["dropped"],
        splits=splits,
        tokens=sum(split["tokens"] for split in splits.values()),
        vocab_size=manifest["vocab_size"],
        vocab_hash=manifest["vocab_hash"],
        dtype=manifest["dtype"],
        workers=workers,
        reused=False,
        resumed_shards=0,
        seconds=clock.seconds,
        passes=clock.passes,
        notes=tuple(notes),
    )


class _Clock:
    """Times the passes and hands their progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.started = time.perf_counter()
        self.passes: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 3)

    @contextmanager
    def stage(self, name: str, unit: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        started, done = time.perf_counter(), 0

        def advance(amount: int, known_total: int | None = None) -> None:
            nonlocal done
            done += amount
            if self.progress:
                self.progress(name, done, known_total or total, unit)

        yield advance
        self.passes[name] = round(time.perf_counter() - started, 3)
