"""The page: one self-contained HTML file, styles and scripts inside, readable offline and on paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

STYLE = """
:root{--ink:#1b2430;--soft:#5b6776;--line:#dde3ea;--paper:#fff;--ground:#f5f7fa;--accent:#0b6bcb;--warm:#d9730d;--good:#23845b;--bad:#c4314b}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
header h1{font-size:28px;line-height:1.2;margin:0 0 4px}
header p{color:var(--soft);margin:0 0 20px}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:20px 24px;margin:18px 0;overflow-x:auto}
h2{font-size:19px;margin:0 0 4px}
h3{font-size:15px;margin:18px 0 6px}
.lead{color:var(--soft);margin:0 0 14px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0;font-size:14px}
th{font-weight:600;text-align:left;color:var(--soft);border-bottom:1px solid var(--line);padding:4px 18px 4px 0;white-space:nowrap}
td{padding:4px 18px 4px 0;border-bottom:1px solid #eef1f5;vertical-align:top}
td.n,th.n{text-align:right}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:8px 0 4px}
.tile{border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:150px;background:#fbfcfe}
.tile b{display:block;font-size:21px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.verdict{border-left:4px solid var(--accent);background:#eef5fd;padding:10px 14px;border-radius:0 8px 8px 0;margin:10px 0}
.sample{background:#fbfcfe;border:1px solid var(--line);border-radius:8px;padding:10px 14px;margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere}
.sample .prompt{color:var(--accent);font-weight:600}
.who{color:var(--soft);font-size:13px;display:block;white-space:normal}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:#f5f7fa;border:1px solid var(--line);border-radius:8px;padding:10px 14px;overflow-x:auto}
details summary{cursor:pointer;color:var(--soft)}
svg text{font-family:inherit}
footer{color:var(--soft);font-size:13px;margin-top:24px}
@media print{body{background:#fff}section{break-inside:avoid;border-color:#ccc}}
"""


@dataclass(frozen=True)
class Section:
    """A titled block of the page; ``body`` is HTML."""

    title: str
    lead: str
    body: str
    anchor: str = ""


def render_page(title: str, subtitle: str, sections: Iterable[Section], scripts: Sequence[str] = ()) -> str:
    """The whole document as text."""
    blocks = "".join(
        f'<section id="{esc(s.anchor or s.title.lower().replace(" ", "-"))}"><h2>{esc(s.title)}</h2>'
        f'<p class="lead">{s.lead}</p>{s.body}</section>'
        for s in sections
    )
    code = "".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style>{code}</head>'
        f"<body><main><header><h1>{esc(title)}</h1><p>{subtitle}</p></header>{blocks}</main></body></html>"
    )


def esc(value: Any) -> str:
    """Text made safe for HTML."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = ()) -> str:
    """A table; columns in ``numeric`` are right-aligned. Cells are escaped unless they are :class:`Html`."""
    marks = ["n" if index in numeric else "" for index in range(len(head))]
    top = "".join(f'<th class="{mark}">{esc(cell)}</th>' for cell, mark in zip(head, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{m}">{_cell(c)}</td>' for c, m in zip(row, marks, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Headline figures: (value, what it is)."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{esc(v)}</b><span>{esc(k)}</span></div>' for v, k in items)
        + "</div>"
    )


class Html(str):
    """Text that is HTML already."""


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, Html) else esc(value)


def number(value: Any, digits: int = 3) -> str:
    """A figure for people: thousands separated, a sensible number of digits, an en dash for what is unknown."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def si(value: float | None, unit: str, base: float = 1000.0) -> str:
    """``1.74 TFLOP/s`` for (1.74e12, "FLOP/s"); ``1.2 GiB`` with base 1024 and unit "iB"."""
    if value is None:
        return "–"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if base == 1024 and not prefix and abs(value) < base:
            return f"{value:.3g} B"  # a count of bytes has no binary prefix to wait for
        if abs(value) < base or prefix == "P":
            text = f"{value:.3g} {prefix.upper() if base == 1024 else prefix}{unit}"
            return " ".join(text.split())
        value /= base
    raise AssertionError("unreachable")


def seconds(value: float | None) -> str:
    """A duration: µs, ms, s or minutes."""
    if value is None:
        return "–"
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{int(value // 60)} min {int(value % 60):02d} s"


def percent(value: float | None) -> str:
    """A share as per cent."""
    return "–" if value is None else f"{100 * value:.1f} %"
