"""The batches of a job: a closed-form function of (seed, step), the same on every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ridgeline.config import DataSection, TrainSection
from ridgeline.data import Dataset, batch, build

Say = Callable[[str], None]


def ensure_dataset(section: DataSection, say: Say, progress: Any = None) -> Path:
    """The folder of the built dataset; builds it first, and says so, when it is not there or was built differently."""
    folder = Path(section.folder)
    if not (folder / "manifest.json").is_file():
        say(f"dataset {folder} is not built yet: building it from {', '.join(section.sources) or 'no sources'}")
    build(section, progress)
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
        """Predicted tokens of one optimiser step over all ranks."""
        return self.section.global_batch_size * self.section.seq_len

    def step(self, step: int, rows: range) -> torch.Tensor:
        """Rows ``rows`` of the global batch of optimiser step ``step`` (from 1): int64 ``[rows, seq + 1]``."""
        return self._rows("train", step - 1, rows)

    def validation(self, index: int, rows: range) -> torch.Tensor:
        """Rows of validation batch ``index``; the same ones at every validation and for every layout."""
        return self._rows("validation", index, rows)

    def _rows(self, split: str, index: int, rows: range) -> torch.Tensor:
        tokens = batch(
            self.dataset, index, self.section.global_batch_size, self.section.seq_len, self.section.seed, split=split
        )
        return torch.from_numpy(np.ascontiguousarray(tokens[rows.start : rows.stop]))
