"""Blocks of a trace's page that need no script: integrity, findings, bars, tables. Figures are shown, never computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.report.page import Html, Section, esc, number, percent, seconds, table

Row = Mapping[str, Any]
BLUE, ORANGE, PURPLE, GREY, LIGHT = "#0b6bcb", "#b85800", "#8a4fbf", "#5b6776", "#dde3ea"
CAUSES = ("#2a7a8c", "#a8487f", "#23845b", "#6a5acd", "#c4314b", "#8f6d0f", "#4d7cc3", "#7a4a2b")
"""Colours of idle time: none of those of busy time; white text can be read on each."""


def integrity(lines: Sequence[str | Row]) -> Section:
    """What the capture lost, before anything else; a defect that makes figures unsafe says which."""
    lead = "What the capture lost or cannot support. Read it before the figures."
    if not lines:
        return Section("Integrity", lead, '<p class="sure">Nothing was found missing.</p>', "integrity")
    body = "<ul class='doubts'>" + "".join(f"<li>{_defect(line)}</li>" for line in lines) + "</ul>"
    return Section("Integrity", lead, body, "integrity")


def _defect(line: str | Row) -> str:
    if isinstance(line, str):
        return esc(line)
    where = "" if line.get("rank") is None else f"rank {line['rank']}: "
    unsafe = ", ".join(line.get("unsafe") or ())
    return esc(f"{where}{line['message']}") + (f" <strong>Unsafe: {esc(unsafe)}.</strong>" if unsafe else "")


def findings(rows: Sequence[Row], origins: Mapping[int, int]) -> Section:
    """Findings in the order given, each with its evidence and its knob. ``origins``: the timeline's zero of each rank."""
    lead = "What costs time, and one reversible change for each that has one."
    if not rows:
        return Section("Findings", lead, '<p class="why">No finding is large enough to name.</p>', "findings")
    body = '<ol class="findings">' + "".join(_finding(row, origins) for row in rows) + "</ol>"
    return Section("Findings", lead, body, "findings")


def _finding(row: Row, origins: Mapping[int, int]) -> str:
    cost = f"{esc(seconds(row.get('seconds')))}<span>{esc(row.get('per', 'at stake'))}</span>"
    rank = "" if row.get("rank") is None or f"rank {row['rank']}" in row["title"] else f" · rank {esc(row['rank'])}"
    parts = [f"<h3>{esc(row['title'])}{rank}</h3>"]
    if row.get("evidence"):
        parts.append(f'<p class="evidence">{esc(row["evidence"])}</p>')
    gain = row.get("gain_seconds")
    saves = (
        f": saves {esc(seconds(gain[0]) if gain[0] else '0')} to {esc(seconds(gain[1]))}" if gain and gain[1] else ""
    )
    if row.get("knob"):
        parts.append(f"<p>Try <code>{esc(row['knob'])}</code>{saves}</p>")
    if row.get("unsafe"):
        parts.append(
            f'<p class="evidence"><strong>Doubtful: {esc(", ".join(row["unsafe"]).replace("_", " "))}</strong></p>'
        )
    if row.get("start_ns") is not None and row.get("end_ns") is not None:
        origin = origins.get(row.get("rank", -1), min(origins.values()))
        low, high = int(row["start_ns"]) - origin, int(row["end_ns"]) - origin
        parts.append(
            f'<p><button class="link" data-low="{low}" data-high="{high}">show it in the timeline</button></p>'
        )
    return f'<li><b class="gain">{cost}</b><div>{"".join(parts)}</div></li>'


def breakdown(rows: Sequence[Row], idle: Sequence[Row] | None) -> Section:
    """One bar per rank on one scale; below it what of the communication was hidden; then idle by cause."""
    longest = max((int(row.get("span_ns") or 0) for row in rows), default=0) or 1
    used: dict[str, str] = {}
    bars = "".join(_rank_bar(row, longest, used) for row in rows)
    body = f'<div class="bars">{bars}</div>{_legend(used)}'
    head = ["rank", "span", "busy", "compute", "communication", "exposed", "overlap", "kernels"]
    body += "<div class='scroll'>" + table(head, [_summary_row(row) for row in rows], numeric=range(1, 8)) + "</div>"
    if idle:
        body += "<h3>Idle time by cause</h3>" + _idle(idle)
    lead = "Each bar is one rank's span on a common scale; its parts are disjoint and sum to it. The thin line below is communication that ran under compute."
    return Section("Where the time went", lead, body, "breakdown")


def _rank_bar(row: Row, longest: int, used: dict[str, str]) -> str:
    span, busy = int(row.get("span_ns") or 0), int(row.get("busy_ns") or 0)
    compute, exposed = int(row.get("compute_ns") or 0), int(row.get("exposed_communication_ns") or 0)
    hidden = int(row.get("communication_ns") or 0) - exposed
    copies = max(busy - compute - exposed, 0)
    parts = [
        ("compute", compute, BLUE),
        ("exposed communication", exposed, ORANGE),
        ("copies and sets not hidden", copies, PURPLE),
        ("idle", max(span - busy, 0), LIGHT),
    ]
    under = [("", max(compute - hidden, 0), "transparent"), ("communication under compute", hidden, "#e0954a")]
    label = ", ".join(f"{name} {percent(ns / span)}" for name, ns, _ in parts if ns and span)
    used |= {name: colour for name, ns, colour in [*parts, *under] if ns and name}
    device = f"<small>{esc(row['device'])}</small>" if row.get("device") else ""
    line = f'<div class="bar under">{_pieces(under, longest, False)}</div>' if hidden else ""
    return (
        f'<div class="who">rank {esc(row.get("rank", "?"))}{device}</div><div>'
        f'<div class="bar" role="img" aria-label="{esc(label)}" style="width:{100 * span / longest:.2f}%">'
        f"{_pieces(parts, span, True)}</div>{line}</div>"
    )


def _pieces(parts: Sequence[tuple[str, int, str]], whole: int, text: bool) -> str:
    out = []
    for name, ns, colour in parts:
        share = ns / whole if whole else 0
        if ns:
            words = f"{percent(share)}" if text and share > 0.06 else ""
            kind = ("light " if colour == LIGHT else "") + ("" if words else "thin")
            title = f' title="{esc(name)}: {esc(seconds(ns / 1e9))}"' if name else ""
            out.append(
                f'<span class="{kind}" style="flex:0 0 {100 * share:.3f}%;background:{colour}"{title}>{words}</span>'
            )
    return "".join(out)


def _legend(used: Mapping[str, str]) -> str:
    chips = "".join(f'<li><i style="background:{colour}"></i>{esc(name)}</li>' for name, colour in used.items())
    return f'<ul class="legend">{chips}</ul>'


def _summary_row(row: Row) -> list[str]:
    span, busy = row.get("span_ns") or 0, row.get("busy_ns") or 0
    keys = ("compute_ns", "communication_ns", "exposed_communication_ns")
    return [
        str(row.get("rank", "?")),
        _time(row.get("span_ns")),
        f"{_time(busy)} ({percent(busy / span)})" if span else "–",
        *(_time(row.get(key)) for key in keys),
        percent(row.get("overlap_fraction")),
        number(row.get("kernel_count")),
    ]


def _idle(rows: Sequence[Row]) -> str:
    """One bar per device and stream, split by cause."""
    several = len({row.get("rank") for row in rows}) > 1
    keys = ("rank", "device", "stream") if several else ("device", "stream")
    groups: dict[tuple[Any, ...], dict[str, int]] = {}
    for row in (one for one in rows if one.get("idle_ns")):
        causes, cause = groups.setdefault(tuple(row.get(key) for key in keys), {}), str(row["cause"]).replace("_", " ")
        causes[cause] = causes.get(cause, 0) + int(row["idle_ns"])
    if not groups:
        return '<p class="why">There was no idle time.</p>'
    names = sorted({name for causes in groups.values() for name in causes})
    known = [name for name in names if name != "unknown"]
    colours = {name: CAUSES[at % len(CAUSES)] for at, name in enumerate(known)}
    colours |= {name: GREY for name in names if name not in colours}
    longest = max(sum(causes.values()) for causes in groups.values()) or 1
    order = sorted(names, key=lambda name: -sum(causes.get(name, 0) for causes in groups.values()))
    bars = ""
    for group, causes in groups.items():
        who = ", ".join(f"{key} {value}" for key, value in zip(keys, group, strict=True) if value is not None)
        who += ", all streams" if group[-2] is not None and group[-1] is None else ""
        whole = sum(causes.values())
        parts = [(name, causes[name], colours[name]) for name in order if name in causes]
        bars += (
            f'<div class="who">{esc(who or "the host")}<small>{_time(whole)} idle</small></div>'
            f'<div class="bar" style="width:{100 * whole / longest:.2f}%">{_pieces(parts, whole, True)}</div>'
        )
    return f'<div class="bars">{bars}</div>{_legend({name: colours[name] for name in order})}'


def kernels(rows: Sequence[Row], title: str, limit: int = 15) -> Section:
    """What took the time, by name: kernels, or on a CPU trace operators, as ``title`` says."""
    ordered = sorted(rows, key=lambda row: -int(row.get("sum_ns") or 0))[:limit]
    largest = max((float(row.get("share") or 0) for row in ordered), default=0) or 1.0
    ranked = len({row.get("rank") for row in rows}) > 1
    cells = [
        [
            *([row.get("rank")] if ranked else []),
            _name(row.get("name")),
            row.get("role", ""),
            number(row.get("count")),
            _time(row.get("sum_ns")),
            _time(row.get("mean_ns")),
            Html(
                f'<span class="share"><i class="meter" style="width:{90 * float(row.get("share") or 0) / largest:.1f}px"></i> {percent(row.get("share"))}</span>'
            ),
        ]
        for row in ordered
    ]
    head = [*(["rank"] if ranked else []), "name", "role", "count", "total", "mean", "share"]
    shift = int(ranked)
    body = f'<div class="scroll">{table(head, cells, numeric=[2 + shift, 3 + shift, 4 + shift])}</div>'
    lead = f"The {len(ordered)} largest of {number(len(rows))} names, by time."
    return Section(title, lead, body, "kernels")


def communication(rows: Sequence[Row], limit: int = 8) -> Section:
    """Who made whom wait: a cell is the time that the column's rank waited for the row's; below it, at what."""
    lead = "Waiting in collectives: how long each column's rank waited for each row's rank, which came last."
    waited: dict[tuple[int, int], int] = {}
    for row in rows:
        pair = (int(row["late_rank"]), int(row["waiting_rank"]))
        waited[pair] = waited.get(pair, 0) + int(row["wait_ns"])
    ranks = sorted({rank for pair in waited for rank in pair})
    most = max(waited.values(), default=0)
    if not most:
        return Section("Who waited for whom", lead, '<p class="why">No rank waited for another.</p>', "communication")
    head = "".join(f"<th scope='col'>rank {rank}</th>" for rank in ranks)
    lines = "".join(
        f"<tr><th scope='row'>rank {one} was last</th>"
        + "".join(_cell(waited.get((one, other), 0), most, one == other) for other in ranks)
        + "</tr>"
        for one in ranks
    )
    body = f'<div class="scroll"><table class="matrix"><thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    named = sorted((row for row in rows if row.get("name")), key=lambda row: -int(row["wait_ns"]))[:limit]
    if named:
        cells = [
            [
                row["late_rank"],
                row["waiting_rank"],
                _name(row["name"]),
                _name(row.get("operator") or "–"),
                number(row.get("count")),
                _time(int(row["wait_ns"])),
            ]
            for row in named
        ]
        columns = ["last", "waited", "at", "what the last one ran meanwhile", "times", "waited for it"]
        body += f'<div class="scroll">{table(columns, cells, numeric=[0, 1, 4, 5])}</div>'
    return Section("Who waited for whom", lead, body, "communication")


def _cell(waited: int, most: int, own: bool) -> str:
    if own:
        return '<td style="background:#f5f7fa">–</td>'
    share = waited / most
    colour = f"rgba(217,115,13,{0.08 + 0.62 * share:.2f})" if waited else "#f5f7fa"
    return f'<td style="background:{colour}">{_time(waited) if waited else "0"}</td>'


def critical_path(segments: Sequence[Row], limit: int = 12) -> Section:
    """The names on the critical path by the time they hold it."""
    sums: dict[tuple[str, str], list[int]] = {}
    for one in segments:
        entry = sums.setdefault((str(one.get("name", "")), str(one.get("type", ""))), [0, 0])
        entry[0] += int(one["end_ns"]) - int(one["start_ns"])
        entry[1] += 1
    whole = sum(ns for ns, _ in sums.values()) or 1
    largest = sorted(sums.items(), key=lambda item: -item[1][0])[:limit]
    cells = [
        [_name(name), kind, number(count), _time(ns), percent(ns / whole)] for (name, kind), (ns, count) in largest
    ]
    lead = f"The longest chain of dependent work, {_time(whole)}; a lane of its own in the timeline, and red under its events."
    head = ["on the path", "why the time passed", "times", "total", "share"]
    return Section("Critical path", lead, f'<div class="scroll">{table(head, cells, [2, 3, 4])}</div>', "critical-path")


def absent(title: str, reason: str) -> Section:
    """A section that this trace cannot have, and why."""
    return Section(title, "", f'<p class="why">{esc(reason[:1].upper() + reason[1:])}</p>')


def _name(name: Any) -> Html:
    """A name of which two lines show; the whole of it is its title."""
    shown = str(name).removeprefix("void ")
    return Html(f'<div class="name" title="{esc(name)}">{esc(shown)}</div>')


def _time(ns: int | None) -> str:
    return seconds(None if ns is None else ns / 1e9)
