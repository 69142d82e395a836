"""The limits on the features, in the order in which the first broken one becomes a document's reason.

The features of every document are kept whatever the verdict, so that another limit is a query over
``provenance.parquet`` and not another build.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ridgeline.config import FilterSection
from ridgeline.data.features import FEATURES

# Rae et al. 2021, table A1; not settings, because a corpus is compared with others by these very numbers.
REPETITION_LIMITS = {
    "duplicate_line_ratio": 0.30,
    "duplicate_paragraph_ratio": 0.30,
    "duplicate_line_char_ratio": 0.20,
    "duplicate_paragraph_char_ratio": 0.20,
    "top_2_gram_char_ratio": 0.20,
    "top_3_gram_char_ratio": 0.18,
    "top_4_gram_char_ratio": 0.16,
    "duplicate_5_gram_char_ratio": 0.15,
    "duplicate_6_gram_char_ratio": 0.14,
    "duplicate_7_gram_char_ratio": 0.13,
    "duplicate_8_gram_char_ratio": 0.12,
    "duplicate_9_gram_char_ratio": 0.11,
    "duplicate_10_gram_char_ratio": 0.10,
}
# Reasons that are not a limit on a feature.
EMPTY, DUPLICATE, MALFORMED = "empty", "duplicate", "malformed"


class Rule(NamedTuple):
    """Drop a document whose ``feature`` is below (``side`` "min") or above ("max") ``limit``."""

    name: str
    feature: str
    side: str
    limit: float

    def broken(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which rows of the feature matrix ``[documents, features]`` break it."""
        column = values[:, FEATURES.index(self.feature)]
        return column < self.limit if self.side == "min" else column > self.limit


class Verdict(NamedTuple):
    """Why a document goes: the first broken rule, the value it had, its limit, and every broken rule."""

    reason: str
    value: float
    limit: float
    broken: tuple[str, ...]


def rules(section: FilterSection) -> list[Rule]:
    """The rules that ``section`` asks for, in order."""
    if not section.enabled:
        return []
    symbols = section.max_symbol_word_ratio
    found = [
        Rule("min_words", "words", "min", section.min_words),
        Rule("max_words", "words", "max", section.max_words),
        Rule("min_mean_word_length", "mean_word_length", "min", section.min_mean_word_length),
        Rule("max_mean_word_length", "mean_word_length", "max", section.max_mean_word_length),
        Rule("max_hash_word_ratio", "hash_word_ratio", "max", symbols),
        Rule("max_ellipsis_word_ratio", "ellipsis_word_ratio", "max", symbols),
        Rule("max_bullet_line_ratio", "bullet_line_ratio", "max", section.max_bullet_line_ratio),
        Rule("max_ellipsis_line_ratio", "ellipsis_line_ratio", "max", section.max_ellipsis_line_ratio),
        Rule("min_alpha_word_ratio", "alpha_word_ratio", "min", section.min_alpha_word_ratio),
        Rule("min_stop_words", "stop_words", "min", section.min_stop_words),
    ]
    if section.repetition:
        found += [Rule(f"max_{feature}", feature, "max", limit) for feature, limit in REPETITION_LIMITS.items()]
    return found


def judge(values: npt.NDArray[np.float64], limits: Sequence[Rule]) -> list[Verdict | None]:
    """A verdict for every row of the feature matrix that goes, None for every row that stays."""
    verdicts: list[Verdict | None] = [None] * len(values)
    if not limits:
        return verdicts
    broken = np.stack([rule.broken(values) for rule in limits], axis=1)
    for row in np.flatnonzero(broken.any(axis=1)).tolist():
        hit = [limits[index] for index in np.flatnonzero(broken[row]).tolist()]
        value = float(values[row, FEATURES.index(hit[0].feature)])
        verdicts[row] = Verdict(hit[0].name, value, float(hit[0].limit), tuple(rule.name for rule in hit))
    return verdicts
