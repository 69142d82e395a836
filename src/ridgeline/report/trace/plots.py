"""Drawings as SVG text: the roofline on logarithmic axes and memory over time as stacked steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.report.page import Html, Section, esc, number, seconds, si, table

Row = Mapping[str, Any]
BOUND = {"compute": "#0b6bcb", "memory": "#b85800"}
CATEGORIES = ("#0b6bcb", "#23845b", "#8a4fbf", "#e0954a", "#c9a227", "#c4314b", "#8a94a0")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1180, 420, 84, 20, 18, 46


def roofline(rows: Sequence[Row], ceilings: Mapping[str, Any], limit: int = 12) -> Section:
    """Operators by arithmetic intensity and achieved rate under the device's roofs; a circle's area is its time.

    ``ceilings``: ``flops_per_second`` (a number, or one per dtype), ``bytes_per_second``, both may be absent, and
    ``source``.
    """
    good = [row for row in rows if (row.get("intensity") or 0) > 0 and (row.get("achieved_flops_per_second") or 0) > 0]
    shown = sorted(good, key=lambda row: -int(row.get("time_ns") or 0))
    source = ceilings.get("source") or ("" if ceilings else "no ceiling of this device is known, so no roof is drawn")
    lead = f"Each circle is an operator, its area the time it took; {esc(source) or 'the lines are the limits'}."
    if not shown:
        body = '<p class="why">No operator has both counted FLOPs and bytes.</p>'
        return Section("Roofline", lead, body, "roofline")
    head = ["#", "operator", "time", "FLOPs", "bytes", "FLOP/byte", "achieved", "bound"]
    cells = [[at, *_operator(row)] for at, row in enumerate(shown[:limit], 1)]
    body = _roof_svg(shown, ceilings, limit)
    body += f'<div class="scroll">{table(head, cells, numeric=[0, 2, 3, 4, 5, 6])}</div>'
    return Section("Roofline", lead, body, "roofline")


def _operator(row: Row) -> list[Any]:
    return [
        Html(f'<div class="name">{esc(row.get("name", ""))}</div>'),
        seconds((row.get("time_ns") or 0) / 1e9),
        si(row.get("flops"), "FLOP"),
        si(row.get("bytes"), "B"),
        number(row.get("intensity")),
        si(row.get("achieved_flops_per_second"), "FLOP/s"),
        row.get("bound") or "–",
    ]


class _Log:
    """A logarithmic axis from whole power of ten to whole power of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.high = max(self.high, self.low + 1)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def powers(self) -> list[int]:
        return list(range(self.low, self.high + 1))


def _roof_svg(rows: Sequence[Row], ceilings: Mapping[str, Any], limit: int) -> str:
    given = ceilings.get("flops_per_second") or {}
    roofs = dict(given) if isinstance(given, Mapping) else {"peak": float(given)}
    speed = ceilings.get("bytes_per_second")
    ridges = [rate / speed for rate in roofs.values()] if speed else []
    across = _Log([row["intensity"] for row in rows] + ridges, LEFT, WIDTH - RIGHT)
    rates = [row["achieved_flops_per_second"] for row in rows]
    up = _Log(rates + list(roofs.values()), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up), *(_roof(name, rate, speed, across, up) for name, rate in roofs.items())]
    longest = max(int(row.get("time_ns") or 0) for row in rows) or 1
    for at in reversed(range(len(rows))):
        row = rows[at]
        x, y = across(row["intensity"]), up(row["achieved_flops_per_second"])
        radius = max(3.5, 22 * math.sqrt((row.get("time_ns") or 0) / longest))
        colour = BOUND.get(str(row.get("bound")), "#5b6776")
        words = (
            f"{row.get('name', '')}: {seconds((row.get('time_ns') or 0) / 1e9)}, {row.get('bound') or 'bound unknown'}"
        )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity=".3" '
            f'stroke="{colour}"><title>{esc(words)}</title></circle>'
        )
        if at < limit:
            parts.append(
                f'<text class="strong" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
                f'pointer-events="none">{at + 1}</text>'
            )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="roofline of {len(rows)} operators">{"".join(parts)}</svg>'
        '<ul class="legend"><li><i style="background:#0b6bcb"></i>bound by compute</li>'
        '<li><i style="background:#b85800"></i>bound by memory</li></ul>'
    )


def _axes(across: _Log, up: _Log) -> str:
    parts = []
    for power in across.powers():
        x = across(10.0**power)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{10.0**power:g}</text>')
    for power in up.powers():
        y = up(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{si(10.0**power, "FLOP/s")}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">FLOP per byte</text>')
    return "".join(parts)


def _roof(name: str, rate: float, speed: float | None, across: _Log, up: _Log) -> str:
    """The flat part, and where the memory's speed is known the slope that meets it at the ridge point."""
    high, low = 10.0**across.high, 10.0**across.low
    points = [(low, rate), (high, rate)]
    if speed:
        foot = max(low, 10.0**up.low / speed)
        points = [(foot, foot * speed), (rate / speed, rate), (high, rate)]
    path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
    return (
        f'<path d="M{path}" fill="none" stroke="#1b2430" stroke-width="1.5"/>'
        f'<text x="{WIDTH - RIGHT - 4}" y="{up(rate) - 6:.1f}" text-anchor="end">{esc(name)} {si(rate, "FLOP/s")}</text>'
    )


def memory(rows: Sequence[Row], peak: Row | None, points: int = 600) -> Section:
    """Bytes by category over time, one drawing per rank; ``rows`` give a category's bytes from ``time_ns`` on."""
    lead = "Bytes held by category over time; the dashed line is the peak."
    ranks = sorted({row.get("rank") for row in rows}, key=lambda rank: (rank is not None, rank))
    body = ""
    names = sorted({str(row.get("category")) for row in rows})
    colours = {name: CATEGORIES[at % len(CATEGORIES)] for at, name in enumerate(names)}
    for rank in ranks:
        mine = [row for row in rows if row.get("rank") == rank]
        body += (f"<h3>Rank {esc(rank)}</h3>" if rank is not None else "") + _memory_svg(mine, colours, points)
    chips = "".join(f'<li><i style="background:{colour}"></i>{esc(name)}</li>' for name, colour in colours.items())
    body += f'<ul class="legend">{chips}</ul>'
    if peak and peak.get("bytes") is not None:
        lead = f"Peak {si(peak['bytes'], 'iB', 1024)}. " + lead
    return Section("Memory", lead, body, "memory")


def _memory_svg(rows: Sequence[Row], colours: Mapping[str, str], points: int) -> str:
    times, stack = _thin(*_levels(rows, list(colours)), points)
    base, span, height = int(times[0]), max(int(times[-1] - times[0]), 1), 260
    total = stack.sum(axis=0)
    top = max(int(total.max()), 1)
    x = LEFT + (times - base) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - 34 - value / top * (height - 34 - TOP)

    parts, below = [], np.zeros(times.size)
    for name, level in zip(colours, stack, strict=True):
        upper = below + level
        there = "".join(f"H{a:.1f}V{y(b):.1f}" for a, b in zip(x[1:], upper[1:], strict=True))
        back = "".join(f"V{y(b):.1f}H{a:.1f}" for a, b in zip(x[-2::-1], below[-2::-1], strict=True))
        path = f"M{x[0]:.1f} {y(upper[0]):.1f}{there}V{y(below[-1]):.1f}{back}Z"
        parts.append(f'<path d="{path}" fill="{colours[name]}"><title>{esc(name)}</title></path>')
        below = upper
    parts.append(f'<path d="M{LEFT} {y(top):.1f}H{WIDTH - RIGHT}" stroke="#1b2430" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{LEFT - 8}" y="{y(top) + 4:.1f}" text-anchor="end">{si(top, "iB", 1024)}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = LEFT + share * (WIDTH - LEFT - RIGHT)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        label = seconds(share * span / 1e9) if share else "0"
        parts.append(f'<text x="{place:.1f}" y="{height - 12}" text-anchor="{anchor}">{label}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="memory over '
        f'{seconds(span / 1e9)}, peak {si(top, "iB", 1024)}">{"".join(parts)}</svg>'
    )


def _levels(rows: Sequence[Row], names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(times ``[t]``, bytes ``[categories, t]``): every category's latest value at each moment, 0 before its first."""
    times = np.array(sorted({int(row["time_ns"]) for row in rows}), np.int64)
    stack = np.zeros((len(names), times.size), np.int64)
    for at, name in enumerate(names):
        mine = sorted(
            ((int(r["time_ns"]), int(r["bytes"])) for r in rows if str(r.get("category")) == name), key=_first
        )
        given = np.array([time for time, _ in mine], np.int64)
        last = np.searchsorted(given, times, side="right") - 1
        values = np.array([value for _, value in mine] or [0], np.int64)
        stack[at] = np.where(last >= 0, values[np.maximum(last, 0)], 0)
    return times, stack


def _first(pair: tuple[int, int]) -> int:
    return pair[0]


def _thin(
    times: NDArray[np.int64], stack: NDArray[np.int64], points: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At most about ``points`` moments: of each equal part of the time the one with the largest sum, and both ends."""
    if times.size <= points:
        return times, stack
    part = (times - times[0]) * points // (times[-1] - times[0] + 1)
    order = np.lexsort((-stack.sum(axis=0), part))
    first = order[np.concatenate(([True], np.diff(part[order]) > 0))]
    keep = np.unique(np.concatenate(([0], first, [times.size - 1])))
    return times[keep], stack[:, keep]
