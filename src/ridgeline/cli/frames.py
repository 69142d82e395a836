"""A Polars frame for people, with units from its column names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli.units import human_bytes, human_rate, human_seconds

if TYPE_CHECKING:
    import polars as pl

WIDEST_TEXT = 56
PIPE_WIDTH = 140
"""Columns of a table that no terminal limits."""
UNITS = ("_flops_per_second", "_bytes_per_second", "_ns", "_bytes", "_flops")
_NOISE = re.compile(r"^void |at::native::|\(anonymous namespace\)::|at::cuda::|std::|c10::|at::detail::|, *(?=[>)])")


def print_frame(frame: pl.DataFrame, title: str, columns: Sequence[str] | None = None, top: int | None = None) -> None:
    """Print the first ``top`` rows on stdout; a pipe gets wide lines rather than folded ones."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=PIPE_WIDTH)
    out.print(frame_table(frame, title, columns, top))


def frame_table(frame: pl.DataFrame, title: str, columns: Sequence[str] | None = None, top: int | None = None) -> Table:
    """The first ``top`` rows; ``_ns`` becomes a time, ``_bytes`` a size, a share a percentage. Columns that say nothing
    (all null) are left out."""
    rows = frame.head(top) if top else frame
    shown = [
        name for name in (columns or frame.columns) if name in frame.columns and rows[name].null_count() < rows.height
    ]
    more = f" ({rows.height} of {frame.height} rows)" if rows.height < frame.height else ""
    table = Table(title=title + more, title_justify="left")
    cells = [[cell(name, value) for name, value in row.items()] for row in rows.select(shown).iter_rows(named=True)]
    for at, name in enumerate(shown):
        number, title = frame.schema[name].is_numeric(), heading(name)
        # Text gives way when a line is too narrow, figures never do.
        least = max([len(max(title.split(), key=len)), *(len(row[at]) for row in cells)]) if number else None
        table.add_column(
            title, justify="right" if number else "left", no_wrap=True, overflow="ellipsis", min_width=least
        )
    for row in cells:
        table.add_row(*map(Text, row))  # a kernel's `[clone .kd]` is a name and no markup
    return table


def heading(name: str) -> str:
    """``mean_ns`` -> ``mean``, ``total_ns_a`` -> ``total A``: the unit stands in the cells."""
    if name.endswith(("_a", "_b")):
        return f"{heading(name[:-2])} {name[-1].upper()}"
    for unit in UNITS:
        if name.endswith(unit) and name != unit[1:]:
            return name.removesuffix(unit).replace("_", " ")
    return name.replace("_", " ")


def cell(name: str, value: Any) -> str:
    """One value with the unit that its column's name ends in; a dash for none."""
    if value is None:
        return "-"
    name = name.removesuffix("_a").removesuffix("_b")
    if isinstance(value, (list, tuple)):
        return " > ".join(short_name(str(one), WIDEST_TEXT // max(len(value), 1)) for one in value)
    if isinstance(value, str):
        return short_name(value)
    if name.endswith("_ns"):
        return human_seconds(value / 1e9) if value >= 0 else "-" + human_seconds(-value / 1e9)
    for ending, unit in (("flops_per_second", "FLOP/s"), ("bytes_per_second", "B/s"), ("flops", "FLOP")):
        if name.endswith(ending):
            return human_rate(value, unit)
    if name.endswith("bytes"):
        return human_bytes(value)
    if name.endswith(("share", "fraction", "share_of_ceiling", "mfu")):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_name(name: str, width: int = WIDEST_TEXT) -> str:
    """A kernel's name without its namespaces and its argument list, cut to ``width``; other text as it is, cut."""
    if "<" in name or name.startswith("void "):
        name = _NOISE.sub("", name)
        name = re.sub(r"\([^()]*\)$", "", name)
    return name if len(name) <= width else name[: width - 1] + "…"
