"""The batches of a job: a closed-form function of (seed, step), the same on every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ridgeline.config import DataSection, TrainSection
from ridgeline.data import Dataset, Progress, batch, batch_samples, build

Say = Callable[[str], None]


def ensure_dataset(section: DataSection, say: Say, progress: Progress | None = None) -> Path:
    """The folder of the built dataset; builds it first, and says so, when it is not there.

    Raises:
        UserError: the folder holds a dataset of another configuration (the message names the difference).
    """
    folder = Path(section.folder)
    built = (folder / "manifest.json").is_file()
    if built and not section.sources:
        return folder  # a dataset without its sources at hand can be trained on
    if not built:
        say(f"dataset {folder} is not built yet: building it from {', '.join(section.sources) or 'no sources'}")
    report = build(section, progress)
    if not built:
        say(f"dataset {folder}: {report.kept:,} documents, {report.tokens:,} tokens in {report.seconds:.1f} s")
    return folder


@dataclass
class Batches:
    """Rows of token ids for steps. ``train.seed`` fixes the order; a step's batch never depends on the ranks."""

    dataset: Dataset
    section: TrainSection

    @classmethod
    def open(cls, folder: str | Path, section: TrainSection) -> Batches:
        """Open a built dataset."""
        return cls(Dataset.open(folder), section)

    @property
    def tokens_per_step(self) -> int:
        """Predicted positions of one optimiser step over all ranks."""
        return self.section.global_batch_size * self.section.seq_len

    def step(self, step: int, rows: range) -> torch.Tensor:
        """Rows ``rows`` of the global batch of optimiser step ``step`` (from 1): int64 ``[rows, seq + 1]``."""
        return self._rows("train", step - 1, rows)

    def validation(self, index: int, rows: range) -> torch.Tensor:
        """Rows of validation batch ``index``; the same ones at every validation and for every layout."""
        return self._rows("validation", index, rows)

    def describe(self, step: int) -> list[dict[str, Any]]:
        """The samples of a step: ``{sample, tokens: [first, end), documents: [id (source), ...]}`` each."""
        section = self.section
        tokens = self.dataset.split("train")
        samples = batch_samples(
            tokens, step - 1, section.global_batch_size, section.seq_len, section.seed, split="train"
        )
        documents = _train_documents(self.dataset.path)
        starts = np.array([offset for offset, _ in documents], dtype=np.int64)
        described = []
        for sample in samples.tolist():
            first, end = sample * section.seq_len, sample * section.seq_len + section.seq_len + 1
            low, high = np.searchsorted(starts, [first, end - 1], side="right")
            names = [name for _, name in documents[max(0, low - 1) : high]]
            described.append({"sample": sample, "tokens": [first, end], "documents": names})
        return described

    def _rows(self, split: str, index: int, rows: range) -> torch.Tensor:
        section, part = self.section, slice(rows.start, rows.stop)
        tokens = batch(
            self.dataset, index, section.global_batch_size, section.seq_len, section.seed, split=split, rows=part
        )
        return torch.from_numpy(tokens)


def _train_documents(folder: Path) -> list[tuple[int, str]]:
    """``(token offset, "id (source)")`` of every document of the train split, in the order of the tokens."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "provenance.parquet", columns=["id", "source", "split", "token_offset"])
    table = table.filter(pc.equal(table["split"], "train"))
    names = [
        f"{row} ({source})" for row, source in zip(table["id"].to_pylist(), table["source"].to_pylist(), strict=True)
    ]
    return sorted(zip(table["token_offset"].to_pylist(), names, strict=True))
