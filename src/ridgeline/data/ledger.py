"""The fate of every document: what the filters said, what is a duplicate of what, and which split it belongs to."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ridgeline.config import DataSection
from ridgeline.data.rules import DUPLICATE, MALFORMED
from ridgeline.data.shards import open_shard
from ridgeline.data.sources import SourceFile
from ridgeline.data.workspace import Workspace
from ridgeline.errors import UserError

SPLITS = ("train", "validation", "test")
DROPPED = -1


def document_id(source: str, offset: int) -> str:
    """64 bits (hex) that name a document for good: they depend on where it came from and on nothing else."""
    return hashlib.blake2b(f"{source}\0{offset}".encode(), digest_size=8).hexdigest()


def split_of(content_hash: str, seed: int, shares: Sequence[float]) -> int:
    """0, 1 or 2 (train, validation, test) from the content and the seed alone, so equal texts share a split."""
    state = hashlib.blake2b(f"{seed}\0{content_hash}".encode(), digest_size=8)
    place = int.from_bytes(state.digest(), "big") / 2**64
    if place < shares[0]:
        return 0
    # A share of exactly 0 stays empty even where the sums of shares round to just below 1.
    return 1 if shares[1] and (place < shares[0] + shares[1] or not shares[2]) else 2 if shares[2] else 0


@dataclass
class Ledger:
    """One entry per document over all shards, in source order."""

    shard_sizes: list[int]
    reasons: list[str | None]
    duplicate_of: dict[int, int]
    splits: npt.NDArray[np.int8]

    @classmethod
    def judge(cls, section: DataSection, workspace: Workspace, shards: int) -> Ledger:
        """Deduplicate and split the documents that the filters left. The first in source order stays."""
        sizes: list[int] = []
        reasons: list[str | None] = []
        hashes: list[str | None] = []
        for number in range(shards):
            table = open_shard(workspace, number, ["reason", "content_hash"])
            sizes.append(table.num_rows)
            reasons += table.column("reason").to_pylist()
            hashes += table.column("content_hash").to_pylist()
        first: dict[str, int] = {}
        duplicates: dict[int, int] = {}
        splits = np.full(len(reasons), DROPPED, np.int8)
        for index, (reason, content) in enumerate(zip(reasons, hashes, strict=True)):
            if reason is not None or content is None:
                continue
            original = first.setdefault(content, index)
            if section.deduplicate and original != index:
                reasons[index] = DUPLICATE
                duplicates[index] = original
            else:
                splits[index] = split_of(content, section.seed, section.split)
        return cls(sizes, reasons, duplicates, splits)

    def shard(self, number: int) -> slice:
        """Where shard ``number`` lies among all documents."""
        start = sum(self.shard_sizes[:number])
        return slice(start, start + self.shard_sizes[number])

    def dropped(self) -> dict[str, int]:
        """How many documents each reason dropped, the most frequent first."""
        counts = Counter(reason for reason in self.reasons if reason is not None)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def require_content(self, section: DataSection, files: Sequence[SourceFile]) -> None:
        """Refuse a corpus of which nothing, or no training text, is left.

        Raises:
            UserError: it names the rule that removed most, or the split.
        """
        total, kept = len(self.reasons), int((self.splits != DROPPED).sum())
        if not total:
            raise UserError(f"the corpus is empty: no document in {len(files)} files of {', '.join(section.sources)}")
        if not kept:
            dropped = self.dropped()
            rule, count = next(iter(dropped.items()))
            others = ", ".join(f"{name} {number:,}" for name, number in list(dropped.items())[1:4])
            raise UserError(
                f"all {total:,} documents were removed, {count:,} of them by {rule}{f' ({others})' if others else ''}"
                f"{_advice(rule)}; `ridgeline data why DOC --dataset {section.folder}` answers for each"
            )
        if section.split[0] > 0 and not (self.splits == 0).any():
            raise UserError(
                f"the train split is empty: all of the {kept:,} documents kept fell into validation or test by their "
                f"hash; use another data.seed or data.split (now {list(section.split)})"
            )


def _advice(rule: str) -> str:
    if rule == MALFORMED:
        return "; data.on_bad_record=stop shows the first one"
    return "" if rule in ("empty", DUPLICATE) else "; data.filters sets the limits"
