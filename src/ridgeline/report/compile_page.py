"""One self-contained HTML page of a compilation: six panes of linked lines, the kernels, their roofline.

Nothing is computed here; every figure is the compiler room's. The page needs no network, no library and no server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ridgeline.report.page import STYLE, esc, number, seconds, si
from ridgeline.runs import write_atomic


def write_compile_page(view: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a view to ``out``, atomically; returns ``out``.

    ``view`` is plain data: ``title``; ``subtitle``; ``panes`` (name, title, about, lines, of: the entity of each line
    or -1, sections: title, first, phase); ``up`` and ``weak``: parents of each entity; ``kernels`` (entity, name,
    loops, phase, graph, kind, operators, bytes_moved, bytes_unfused, flops, intensity, bound, floor_seconds, peak,
    sources: file, line, code, entity); ``device`` (name, source, bytes_per_second); ``totals``; ``note``.
    """
    page = _asset("page.html")
    fields = {
        "TITLE": esc(view["title"]),
        "SUBTITLE": esc(view["subtitle"]),
        "FIGURES": _figures(view["totals"]),
        "DEVICE": esc(f"on {view['device']['name']}"),
        "NOTE": esc(view["note"]),
        "DATA": _json({name: view[name] for name in ("panes", "up", "weak", "kernels", "device")}),
    }
    for name, value in fields.items():
        page = page.replace(f"@@{name}@@", value, 1)
    head = f'<meta charset="utf-8"><title>{esc(view["title"])}: compiled</title><meta name="viewport" content="width=device-width,initial-scale=1">'
    style = f"<style>{STYLE}{_asset('style.css')}</style>"
    write_atomic(
        out,
        f'<!doctype html><html lang="en"><head>{head}{style}<script>{_asset("app.js")}</script></head><body>{page}</body></html>',
    )
    return out


def _figures(totals: Mapping[str, Any]) -> str:
    saved = 1 - totals["bytes_moved"] / totals["bytes_unfused"] if totals["bytes_unfused"] else 0.0
    items = [
        (number(totals["graphs"]), "graph" if totals["graphs"] == 1 else "graphs"),
        (number(totals["kernels"]), "kernels"),
        (si(totals["bytes_moved"], "B"), f"moved, {100 * saved:.0f} % less by fusion"),
        (si(totals["flops"], "FLOP"), "computed"),
        (_short_time(totals["floor_seconds"]), "at best"),
    ]
    return "".join(f"<li><b>{esc(value)}</b> {esc(name)}</li>" for value, name in items)


def _short_time(value: float) -> str:
    return f"{value * 1e9:.3g} ns" if value < 1e-6 else seconds(value)


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("ridgeline.report.compile").joinpath(name).read_text(encoding="utf-8")
