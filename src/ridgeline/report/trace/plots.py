"""Drawings as SVG text: the roofline on logarithmic axes and memory over time as stacked steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.report.page import Html, Section, esc, number, percent, seconds, si, table

Row = Mapping[str, Any]
BOUND = {"compute": "#0b6bcb", "memory": "#b85800"}
CATEGORIES = ("#0b6bcb", "#23845b", "#8a4fbf", "#e0954a", "#c9a227", "#c4314b", "#8a94a0")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1180, 420, 112, 24, 26, 46


def roofline(rows: Sequence[Row], ceilings: Mapping[str, Any], limit: int = 12) -> Section:
    """Operators by arithmetic intensity and achieved rate under the device's roofs; a circle's area is its time.

    ``ceilings``: ``gemm_flops_per_second`` (by dtype), ``read_bytes_per_second``, ``source``; each may be absent.
    """
    good = [row for row in rows if (row["intensity_flops_per_byte"] or 0) > 0 and (row["flops_per_second"] or 0) > 0]
    shown = sorted(good, key=lambda row: -int(row["device_time_ns"]))
    source = str(ceilings.get("source") or "this device's ceilings")
    roofs = f"roofs: {source}" if _roofs(ceilings) else "no ceiling of the device is known, so no roof is drawn"
    lead = f"Each circle is an operator with its input sizes, its area the time it took; {esc(roofs)}."
    if not shown:
        times: dict[str, int] = {}
        for row in rows:
            reason = str(row.get("not_counted") or "nothing to count")
            times[reason] = times.get(reason, 0) + int(row["device_time_ns"])
        why = max(times, key=lambda reason: times[reason])
        return Section("Roofline", "", f'<p class="why">No operator has counted FLOPs: {esc(why)}.</p>', "roofline")
    whole, counted = (sum(int(row["device_time_ns"]) for row in some) for some in (rows, shown))
    if counted < whole:
        lead += f" Drawn: {percent(counted / whole)} of the time; the FLOPs of the rest are not known or none."
    ranked = len({row.get("rank") for row in rows}) > 1
    head = ["operator", "inputs", "dtype", "time", "FLOPs", "FLOP/byte", "achieved", "of its ceiling", "bound"]
    head = ["#", *(["rank"] if ranked else []), *head]
    cells = [[at, *([row["rank"]] if ranked else []), *_operator(row)] for at, row in enumerate(shown[:limit], 1)]
    body = _roof_svg(shown, ceilings, limit)
    body += f'<div class="scroll">{table(head, cells, numeric=[0, *range(4 + ranked, 9 + ranked)])}</div>'
    return Section("Roofline", lead, body, "roofline")


def _operator(row: Row) -> list[Any]:
    return [
        Html(f'<div class="name short">{esc(row.get("operator") or "no known operator")}</div>'),
        Html(f'<div class="name dims">{esc(_sizes(row.get("input_dims")))}</div>'),
        row.get("dtype") or "–",
        seconds(row["device_time_ns"] / 1e9),
        si(row.get("flops"), "FLOP"),
        number(row["intensity_flops_per_byte"]),
        si(row["flops_per_second"], "FLOP/s"),
        percent(row.get("share_of_ceiling")),
        row.get("bound") or "–",
    ]


def _sizes(dims: Any) -> str:
    """``64×256, 256×256`` for the JSON ``[[64,256],[256,256],[]]``: scalars have no sizes to show."""
    try:
        given = json.loads(dims or "[]")
    except (TypeError, ValueError):
        return str(dims)
    flat = [one for one in given if isinstance(one, list) and one and all(isinstance(size, int) for size in one)]
    if len(flat) < sum(bool(one) for one in given):  # lists of tensors
        return str(dims)
    return ", ".join("×".join(map(str, one)) for one in flat) or "–"


def _roofs(ceilings: Mapping[str, Any]) -> dict[str, float]:
    given = ceilings.get("gemm_flops_per_second") or {}
    return {str(name): float(rate) for name, rate in given.items() if rate}


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
    roofs, speed = _roofs(ceilings), ceilings.get("read_bytes_per_second")
    ridges = [rate / speed for rate in roofs.values()] if speed else []
    across = _Log([row["intensity_flops_per_byte"] for row in rows] + ridges, LEFT, WIDTH - RIGHT)
    rates = [row["flops_per_second"] for row in rows]
    up = _Log(rates + list(roofs.values()), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up)]
    for at, (name, rate) in enumerate(sorted(roofs.items(), key=_second)):
        parts.append(_roof(name, rate, speed, across, up, above=at == len(roofs) - 1))
    longest = max(int(row["device_time_ns"]) for row in rows) or 1
    places = [(across(row["intensity_flops_per_byte"]), up(row["flops_per_second"])) for row in rows]
    sizes = [max(3.5, 22 * math.sqrt(row["device_time_ns"] / longest)) for row in rows]
    for row, (x, y), radius in reversed(list(zip(rows, places, sizes, strict=True))):
        parts.append(_circle(row, x, y, radius))
    parts += _numbers(places[:limit], sizes)
    used = {str(row.get("bound")) for row in rows}
    chips = [f'<li><i style="background:{BOUND[name]}"></i>bound by {name}</li>' for name in BOUND if name in used]
    return (
        f'<div class="scroll"><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="roofline of {len(rows)} operators">{"".join(parts)}</svg></div>'
        f'<ul class="legend">{"".join(chips)}</ul>'
    )


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _numbers(places: Sequence[tuple[float, float]], sizes: Sequence[float]) -> list[str]:
    """The table's numbers on their circles, beside small ones; of those that would cover each other only the first."""
    shown: list[tuple[float, float]] = []
    parts = []
    for at, ((x, y), radius) in enumerate(zip(places, sizes, strict=False), 1):
        anchor, x = ("middle", x) if radius > 9 else ("start", x + radius + 3)
        if all(abs(x - a) > 20 or abs(y - b) > 13 for a, b in shown):
            shown.append((x, y))
            parts.append(
                f'<text class="strong" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}" '
                f'pointer-events="none">{at}</text>'
            )
    return parts


def _circle(row: Row, x: float, y: float, radius: float) -> str:
    colour = BOUND.get(str(row.get("bound")), "#5b6776")
    words = f"{row.get('operator')}: {seconds(row['device_time_ns'] / 1e9)}, {row.get('bound') or 'bound unknown'}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity=".3" '
        f'stroke="{colour}"><title>{esc(words)}</title></circle>'
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


def _roof(name: str, rate: float, speed: float | None, across: _Log, up: _Log, above: bool) -> str:
    """The flat part, and where the memory's speed is known the slope that meets it at the ridge point. The highest
    roof has its name ``above``, the others below."""
    high, low = 10.0**across.high, 10.0**across.low
    points = [(low, rate), (high, rate)]
    if speed:
        foot = max(low, 10.0**up.low / speed)
        points = [(foot, foot * speed), (rate / speed, rate), (high, rate)]
    path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
    return (
        f'<path d="M{path}" fill="none" stroke="#1b2430" stroke-width="1.5"/>'
        f'<text x="{WIDTH - RIGHT - 4}" y="{up(rate) + (-6 if above else 15):.1f}" text-anchor="end">{esc(name)} {si(rate, "FLOP/s")}</text>'
    )


def memory(
    rows: Sequence[Row], peak: Sequence[Row], origins: Mapping[int, int], points: int = 600, limit: int = 12
) -> Section:
    """Bytes by category over time, one drawing per rank and device, and what the peak is made of.

    ``rows``: ``rank``, ``device``, ``time_ns`` and one column ``<category>_bytes`` each, of what is held from then on;
    ``allocated_bytes`` and ``reserved_bytes`` are sums and not drawn. ``peak``: ``category``, ``operator``, ``where``,
    ``count``, ``bytes``, ``share``. ``origins``: the timeline's zero of each rank.
    """
    lead = "Bytes held by category, on the timeline's clock; the dashed line is the peak."
    columns = [key for key in rows[0] if key.endswith("_bytes") and key not in ("allocated_bytes", "reserved_bytes")]
    used = [key for key in columns if any(row.get(key) for row in rows)]
    colours = {key: CATEGORIES[at % len(CATEGORIES)] for at, key in enumerate(used)}
    body = ""
    for who in dict.fromkeys((row.get("rank"), row.get("device")) for row in rows):
        mine = [row for row in rows if (row.get("rank"), row.get("device")) == who]
        named = ", ".join(([f"rank {who[0]}"] if who[0] is not None else []) + ([str(who[1])] if who[1] else []))
        body += (f"<h3>{esc(named)}</h3>" if named else "") + _memory_svg(
            mine, colours, origins.get(-1 if who[0] is None else who[0], min(origins.values())), points
        )
    chips = "".join(f'<li><i style="background:{colours[key]}"></i>{esc(_category(key))}</li>' for key in used)
    body += f'<ul class="legend">{chips}</ul>'
    if peak:
        largest = sorted(peak, key=lambda row: -int(row["bytes"]))[:limit]
        head = ["rank", "device", "category", "allocated by", "where", "allocations", "bytes", "share"]
        cells = [_held(row) for row in largest]
        body += f'<h3>At the peak</h3><div class="scroll">{table(head, cells, numeric=[5, 6, 7])}</div>'
    return Section("Memory", lead, body, "memory")


def _held(row: Row) -> list[Any]:
    rank = row.get("rank")
    where = Html(f'<div class="name">{esc(row.get("where") or "–")}</div>')
    amount = [number(row.get("count")), _bytes(int(row["bytes"])), percent(row.get("share"))]
    category = str(row.get("category")).replace("_", " ")
    return [
        "–" if rank is None else rank,
        row.get("device") or "–",
        category,
        row.get("operator") or "–",
        where,
        *amount,
    ]


def _bytes(amount: int) -> str:
    return si(amount, "iB", 1024) if amount >= 1024 else f"{amount} B"


def _category(column: str) -> str:
    return column.removesuffix("_bytes").replace("_", " ")


def _memory_svg(rows: Sequence[Row], colours: Mapping[str, str], origin: int, points: int) -> str:
    times = np.array([int(row["time_ns"]) for row in rows], np.int64)
    held = np.array([[int(row.get(key) or 0) for row in rows] for key in colours], np.int64).reshape(-1, len(rows))
    order = np.argsort(times, kind="stable")
    times, stack = _thin(times[order], held[:, order], points)
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
        parts.append(f'<path d="{path}" fill="{colours[name]}"><title>{esc(_category(name))}</title></path>')
        below = upper
    parts.append(f'<path d="M{LEFT} {y(top):.1f}H{WIDTH - RIGHT}" stroke="#1b2430" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{LEFT - 8}" y="{y(top) + 4:.1f}" text-anchor="end">{_bytes(top)}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = LEFT + share * (WIDTH - LEFT - RIGHT)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        label = seconds((base - origin + share * span) / 1e9)
        parts.append(f'<text x="{place:.1f}" y="{height - 12}" text-anchor="{anchor}">{label}</text>')
    return (
        f'<div class="scroll"><svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="memory over '
        f'{seconds(span / 1e9)}, peak {_bytes(top)}">{"".join(parts)}</svg></div>'
    )


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
