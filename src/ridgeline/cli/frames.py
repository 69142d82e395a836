"""A Polars frame for people, with units from its column names, and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ridgeline.cli.units import human_bytes, human_rate, human_seconds

if TYPE_CHECKING:
    import polars as pl

WIDEST_TEXT = 60


def frame_table(frame: pl.DataFrame, title: str, columns: Sequence[str] | None = None, top: int | None = None) -> Table:
    """The first ``top`` rows; ``_ns`` becomes a time, ``_bytes`` a size, a share a percentage."""
    shown = [name for name in (columns or frame.columns) if name in frame.columns]
    rows = frame.select(shown).head(top) if top else frame.select(shown)
    more = f" ({rows.height} of {frame.height} rows)" if rows.height < frame.height else ""
    table = Table(title=title + more, title_justify="left")
    for name in shown:
        text = frame.schema[name].is_numeric()
        table.add_column(heading(name), justify="right" if text else "left", overflow="fold", no_wrap=text)
    for row in rows.iter_rows(named=True):
        table.add_row(*(cell(name, value) for name, value in row.items()))
    return table


def heading(name: str) -> str:
    """``mean_ns`` -> ``mean``: the unit stands in the cells."""
    for unit in ("_ns", "_bytes", "_flops_per_second", "_bytes_per_second", "_flops"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")


def cell(name: str, value: Any) -> str:
    """One value with the unit that its column's name ends in; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " > ".join(str(one) for one in value)[-WIDEST_TEXT:]
    if isinstance(value, str):
        return value if len(value) <= WIDEST_TEXT else value[: WIDEST_TEXT - 3] + "..."
    if name.endswith("_ns"):
        return human_seconds(value / 1e9) if value >= 0 else "-" + human_seconds(-value / 1e9)
    for ending, unit in (("_flops_per_second", "FLOP/s"), ("_bytes_per_second", "B/s"), ("flops", "FLOP")):
        if name.endswith(ending):
            return human_rate(value, unit)
    if name.endswith("bytes"):
        return human_bytes(value)
    if name.endswith(("share", "fraction")):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
