"""A run's section of the report: which figures and plots people want from each kind of run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ridgeline.report import charts
from ridgeline.report.page import Html, Section, esc, number, percent, seconds, si, table, tiles
from ridgeline.runs import Run


def section_of(run: Run) -> Section:
    """The section for ``run``; a kind without one of its own gets its figures as a table."""
    return _SECTIONS.get(run.kind, _plain)(run)


def _env(run: Run) -> Section:
    ceilings = run.load_json("ceilings.json") or {}
    sheet = ceilings.get("datasheet") or {}
    rows: list[list[Any]] = [
        [f"GEMM {dtype}", si(rate, "FLOP/s" if dtype != "int8" else "OP/s"), _sheet(sheet, dtype)]
        for dtype, rate in (ceilings.get("gemm_flops_per_second") or {}).items()
    ]
    for key, label in (
        ("copy_bytes_per_second", "copy"),
        ("read_bytes_per_second", "read"),
        ("all_reduce_bytes_per_second", f"all-reduce, 2 processes ({ceilings.get('backend', '?')})"),
        ("all_gather_bytes_per_second", f"all-gather, 2 processes ({ceilings.get('backend', '?')})"),
    ):
        rows.append([label, si(ceilings.get(key), "B/s"), _sheet(sheet, key)])
    lead = f"{esc(ceilings.get('device', 'unknown device'))}; measured {esc(ceilings.get('measured_at', ''))}."
    return Section("Ceilings", lead, table(["what", "measured", "datasheet"], rows, numeric=[1, 2]))


def _sheet(sheet: dict[str, Any], key: str) -> str:
    value = sheet.get(key) or (sheet.get("flops_per_second") or {}).get(key)
    if value is None:
        return "–"
    return si(value, "B/s" if "bytes" in key else "FLOP/s")


def _data(run: Run) -> Section:
    summary = run.summary
    fates = {key: value for key, value in (summary.get("fates") or {}).items() if value}
    body = tiles(
        [
            (number(summary.get("documents_kept")), "documents kept"),
            (number(summary.get("documents")), "documents read"),
            (number(summary.get("tokens")), "tokens"),
            (si(summary.get("bytes_per_second"), "B/s"), "text to shards"),
        ]
    )
    if fates:
        body += "<h3>Fate of every document</h3>" + table(["fate", "documents"], sorted(fates.items()), numeric=[1])
    splits = summary.get("splits") or {}
    if splits:
        body += "<h3>Splits</h3>" + table(["split", "tokens"], [(k, number(v)) for k, v in splits.items()], numeric=[1])
    return Section("Data", f"Built in {seconds(run.info['seconds'])}; every document's fate is on record.", body)


def _plan(run: Run) -> Section:
    plan = run.load_json("prediction.json") or {}
    parts = plan.get("step_seconds_by_part") or {}
    memory = plan.get("bytes_by_category") or {}
    flops = plan.get("flops") or {}
    rows = [[name, seconds(value), percent(value / plan["step_seconds"])] for name, value in parts.items()]
    body = tiles(
        [
            (number(plan.get("parameters")), "parameters"),
            (si(flops.get("per_token"), "FLOP"), "per token, training"),
            (seconds(plan.get("step_seconds")), "predicted step"),
            (si(plan.get("peak_bytes"), "iB", 1024), "predicted peak per rank"),
        ]
    )
    body += "<h3>Predicted step by part</h3>" + table(["part", "time", "share"], rows, numeric=[1, 2])
    body += "<h3>Bytes per rank</h3>" + table(
        ["category", "bytes"], [(k, si(v, "iB", 1024)) for k, v in memory.items()], numeric=[1]
    )
    return Section("Plan", esc(flops.get("formula", "")), body)


def _train(run: Run) -> Section:
    summary, lines = run.summary, run.metrics()
    steps = [line for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
    body = tiles(
        [
            (number(summary.get("validation_loss"), 4), "validation loss"),
            (number(summary.get("tokens_per_second")), "tokens/s, median of steady steps"),
            (percent(summary.get("mfu")), "MFU"),
            (seconds(summary.get("seconds") or run.info["seconds"]), "training time"),
        ]
    )
    body += f"<p class='who'>MFU = {esc(summary.get('mfu_formula', '?'))}; denominator {esc(summary.get('mfu_denominator', '?'))}.</p>"
    x = [line["step"] for line in steps]
    body += charts.loss_curve(x, [line["loss"] for line in steps], validation)
    body += charts.series(
        x,
        {key: [line.get(f"{key}_seconds") for line in steps] for key in ("data", "compute", "optimizer")},
        "step",
        "seconds in the step",
    )
    body += predicted_against_measured(run)
    return Section("Training", f"{esc(run.id)}", body)


def predicted_against_measured(run: Run) -> str:
    """The rows of ``comparison.json``: what the planner said, what was measured, and their ratio."""
    rows = run.load_json("comparison.json")
    if not rows:
        return ""
    cells = [
        [row["name"], _unit(row["predicted"], row), _unit(row["measured"], row), number(row["ratio"])] for row in rows
    ]
    return "<h3>Predicted against measured</h3>" + table(
        ["what", "predicted", "measured", "predicted / measured"], cells, numeric=[1, 2, 3]
    )


def _unit(value: float | None, row: dict[str, Any]) -> str:
    unit = row.get("unit", "")
    if unit in ("s", "seconds"):
        return seconds(value)
    if unit in ("B", "bytes"):
        return si(value, "iB", 1024)
    return number(value)


def _profile(run: Run) -> Section:
    breakdown = run.load_json("breakdown.json") or {}
    ranks = breakdown.get("ranks") or {}
    parts = list((run.summary.get("parts") or {}).keys())
    body = f"<p class='verdict'>{esc(run.summary.get('verdict', 'no verdict'))}</p>"
    if ranks and parts:
        values = {part: [rank["parts"].get(part, 0.0) for rank in ranks.values()] for part in parts}
        body += charts.stacked_bars([f"rank {name}" for name in ranks], values, "seconds per step")
    total = run.summary.get("step_seconds") or 1.0
    rows = [[part, seconds(value), percent(value / total)] for part, value in (run.summary.get("parts") or {}).items()]
    body += table(["part of the step", "time", "share"], rows, numeric=[1, 2])
    return Section("Where a step's time goes", "From the trace; the parts sum to the step.", body)


def _generate(run: Run) -> Section:
    summary = run.summary
    body = tiles(
        [
            (number(summary.get("tokens_per_second")), "tokens/s, decode"),
            (si(summary.get("bytes_per_second"), "B/s"), "weights and cache read"),
            (percent(summary.get("mbu")), "MBU"),
        ]
    )
    for sample in run.load_json("samples.json") or []:
        body += (
            f'<div class="sample"><span class="who">{esc(sample.get("model", ""))}</span>'
            f'<span class="prompt">{esc(sample.get("prompt", ""))}</span>{esc(sample.get("text", ""))}</div>'
        )
    return Section("Generation", esc(summary.get("model", "")), body)


def _load(run: Run) -> Section:
    summary = run.summary
    body = tiles(
        [
            (number(summary.get("tokens_per_second")), "tokens/s"),
            (seconds(summary.get("ttft_p50")), "time to first token, p50"),
            (seconds(summary.get("itl_p50")), "between tokens, p50"),
            (number(summary.get("errors")), "errors"),
        ]
    )
    rows = [
        [label, *(seconds(summary.get(f"{key}_{p}")) for p in ("p50", "p90", "p99"))]
        for key, label in (("ttft", "time to first token"), ("itl", "between tokens"), ("e2e", "end to end"))
    ]
    body += table(["latency", "p50", "p90", "p99"], rows, numeric=[1, 2, 3])
    samples = run.load_json("latencies.json") or {}
    if samples:
        names = {"ttft": "time to first token", "itl": "between tokens", "e2e": "end to end"}
        body += charts.latency_curves({names.get(key, key): values for key, values in samples.items()})
    return Section("Serving under load", esc(summary.get("description", run.id)), body)


def _plain(run: Run) -> Section:
    rows = [[key, number(value)] for key, value in run.summary.items() if not isinstance(value, (dict, list))]
    body = table(["figure", "value"], rows, numeric=[1]) if rows else "<p>no figures</p>"
    return Section(run.kind, esc(run.id), body)


def runs_table(runs: list[Run]) -> Section:
    """Where everything came from: each run with the command that repeats it."""
    rows = [
        [
            run.id,
            run.status,
            seconds(run.info["seconds"]),
            Html(f"<code>{esc(' '.join(run.info['command']))}</code>"),
        ]
        for run in runs
    ]
    return Section(
        "Runs",
        "Each figure above comes from one of these folders.",
        table(["run", "status", "time", "command"], rows, numeric=[2]),
    )


_SECTIONS: dict[str, Callable[[Run], Section]] = {
    "env": _env,
    "data": _data,
    "plan": _plan,
    "train": _train,
    "profile": _profile,
    "generate": _generate,
    "load": _load,
}
