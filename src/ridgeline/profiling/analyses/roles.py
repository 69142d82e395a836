"""What every kernel is taken for, and on which evidence: the table to read before believing a breakdown."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from ridgeline.errors import UserError
from ridgeline.profiling import classify
from ridgeline.profiling.intervals import contains, union
from ridgeline.profiling.table import TraceTable

COLUMNS = {
    "classify_kernels": {
        "name": "the device event's name",
        "role": "compute, optimizer, communication, memory or unknown (counts as compute in totals)",
        "evidence": "what speaks for the role: user table, category, arguments, launch, name, stream, or none",
        "confidence": "certain, strong, weak or none; none: a kernel counts as compute by default",
        "count": "device events of this name, role and evidence",
        "sum_ns": "ns: sum of their durations",
    }
}
_SCHEMA = {
    "name": pl.String,
    "role": pl.String,
    "evidence": pl.String,
    "confidence": pl.String,
    "count": pl.Int64,
    "sum_ns": pl.Int64,
}
UserTable = str | Path | Mapping[str, str] | None


def classify_kernels(
    table: TraceTable, user_table: UserTable = None, window: tuple[int, int] | None = None
) -> pl.DataFrame:
    """One row per device event's name, role and evidence, longest first. Columns: ``COLUMNS``.

    ``user_table``: patterns of names to roles, as a mapping or the path of a TOML or JSON file that holds one.

    Raises:
        UserError: the user's table cannot be read, or has a wrong pattern or role.
    """
    launched = classify.launches(table)
    found = classify.kernel_roles(table, classify.find_phases(table), launched, read_user_table(user_table))
    device = table.device_rows
    if window is not None:
        device &= contains(union(np.array([window[0]]), np.array([window[1]])), table.start)
    rows = np.flatnonzero(device)
    keys = np.stack((table.name[rows].astype(np.int64), found.role[rows], found.evidence[rows]), axis=1)
    distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    sums = np.zeros(len(distinct), np.int64)
    np.add.at(sums, inverse, np.maximum(table.duration[rows], 0))
    counts = np.bincount(inverse, minlength=len(distinct))
    evidence = [classify.EVIDENCE[code] for code in distinct[:, 2].tolist()]
    frame = pl.DataFrame(
        {
            "name": [table.names[code] for code in distinct[:, 0].tolist()],
            "role": [classify.ROLES[code] for code in distinct[:, 1].tolist()],
            "evidence": evidence,
            "confidence": [classify.CONFIDENCE[one] for one in evidence],
            "count": counts.astype(np.int64),
            "sum_ns": sums,
        },
        schema=_SCHEMA,
    )
    return frame.sort("sum_ns", "name", "role", "evidence", descending=[True, False, False, False])


def with_roles(table: TraceTable, user_table: UserTable) -> TraceTable:
    """The same trace, of which every analysis takes a kernel for what the reader's table says.

    The roles are derived once per table and kept; here that happens with the reader's patterns, before anyone asks.

    Raises:
        UserError: the user's table cannot be read, or has a wrong pattern or role.
    """
    patterns = read_user_table(user_table)
    if not patterns:
        return table
    anew = replace(table)  # what the other table has kept was derived without the patterns
    phases, launched = classify.find_phases(anew), classify.launches(anew)
    anew.once("kernel roles", lambda: classify.kernel_roles(anew, phases, launched, patterns))
    return anew


def read_user_table(source: UserTable) -> dict[str, str]:
    """The reader's own patterns: a mapping, or a ``.toml`` or ``.json`` file of ``"pattern" = "role"`` lines (at the top
    or under ``roles``). None gives none.

    Raises:
        UserError: no such file, not TOML or JSON, or a wrong pattern or role.
    """
    found = source if isinstance(source, Mapping) else _read_file(Path(source)) if source is not None else {}
    if not all(isinstance(key, str) and isinstance(role, str) for key, role in found.items()):
        raise UserError(f"role table {source}: every line is a pattern and a role, both text")
    classify.checked_roles(found)
    return dict(found)


def _read_file(path: Path) -> Mapping[str, str]:
    try:
        text = path.read_text("utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"role table {path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # what both parsers and the decoder raise
        raise UserError(f"role table {path}: not TOML or JSON ({error})") from None
    found = document.get("roles", document) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"role table {path}: not a mapping of patterns to roles")
    return found
