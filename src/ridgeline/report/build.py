"""Runs to a report: one page, with the line as a picture when a demo run is among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ridgeline.report import charts
from ridgeline.report.page import Section, esc, number, render_page, seconds, si
from ridgeline.report.picture import Stage, draw_line
from ridgeline.report.sections import runs_table, section_of
from ridgeline.runs import Run, write_atomic


def write_report(runs: Sequence[Run], target: Path) -> None:
    """Write the report of ``runs`` to ``target`` (HTML, self-contained, atomic).

    A demo run first makes the page of the whole line: the picture, samples of text, then its stages' sections.
    """
    first, rest = runs[0], list(runs[1:])
    if first.kind == "demo":
        rest = rest or [Run.open(run_id, first.path.parent) for run_id in first.info["parents"]]
        by_id = {run.id: run for run in rest}
        sections = [_line_section(first, by_id), *_text_sections(first)]
        sections += [section_of(run) for run in rest if run.kind not in ("serve", "models")]
        title, subtitle = "From raw text to a served endpoint", _subtitle(first, rest)
    else:
        sections = [section_of(run) for run in runs]
        title, subtitle = f"Ridgeline: {', '.join(run.kind for run in runs)}", esc(runs[0].info["created"])
    sections.append(runs_table(list(runs) if first.kind != "demo" else [first, *rest]))
    scripts = [charts.plotly_script()] if any("plotly-graph-div" in section.body for section in sections) else []
    write_atomic(target, render_page(title, subtitle, sections, scripts))


def _subtitle(demo: Run, stages: Sequence[Run]) -> str:
    ceilings: dict[str, Any] = next((run.load_json("ceilings.json") or {} for run in stages if run.kind == "env"), {})
    environment = demo.load_json("environment.json") or {}
    versions = environment.get("versions", {})
    return esc(
        f"{demo.info['created'][:16].replace('T', ' ')} UTC, {ceilings.get('device', 'unknown device')}, "
        f"{environment.get('cores', '?')} cores, torch {versions.get('torch', '?')}, "
        f"ridgeline {versions.get('ridgeline', '?')}; the whole line took {seconds(demo.summary.get('seconds') or _total(demo))}"
    )


def _total(demo: Run) -> float:
    return sum(float(stage["seconds"]) for stage in demo.load_json("stages.json") or [])


def _line_section(demo: Run, runs: dict[str, Run]) -> Section:
    stages = []
    for stage in demo.load_json("stages.json") or []:
        run = runs.get(stage["document"].get("run", ""))
        stages.append(_stage(stage, run))
    lead = "Each card: what the stage made, its share of the time (orange), its share of the hardware's limit (blue)."
    return Section("The line", lead, draw_line(stages), "line")


def _stage(stage: dict[str, Any], run: Run | None) -> Stage:
    name, spent = stage["name"], float(stage["seconds"])
    summary = run.summary if run else {}
    kind = run.kind if run else ""
    if kind == "env":
        rates = (run.load_json("ceilings.json") or {}).get("gemm_flops_per_second", {}) if run else {}
        text = f"bf16 {si(rates.get('bf16'), 'FLOP/s')}"
        return Stage(name, text, f"fp32 {si(rates.get('fp32'), 'FLOP/s')}", spent, None, "these are the limits")
    if kind == "data":
        text = f"{number(summary.get('tokens'))} tokens"
        detail = f"{number(summary.get('documents_kept'))} of {number(summary.get('documents'))} documents kept"
        return Stage(name, text, detail, spent)
    if kind == "plan":
        text = f"{si(summary.get('parameters'), ' parameters')}"
        return Stage(name, text, f"step predicted {seconds(summary.get('step_seconds'))}", spent)
    if kind == "train":
        text = f"loss {number(summary.get('validation_loss'), 4)}"
        detail = f"{number(summary.get('tokens_per_second'))} tokens/s, {number(summary.get('steps'))} steps"
        return Stage(name, text, detail, spent, summary.get("mfu"), "MFU")
    if kind == "profile":
        parts, total = summary.get("parts") or {}, summary.get("step_seconds") or 1.0
        bound = summary.get("bound_by", "unknown")
        headline = "near the ceiling" if bound == "balanced" else f"bound by {bound}"
        share = parts.get("compute", 0.0) / total
        return Stage(name, headline, f"step {seconds(total)} under the profiler", spent, share, "of the step computes")
    if kind == "generate":
        text = f"{number(summary.get('tokens_per_second'))} tokens/s"
        return Stage(name, text, "one stream, decode", spent, summary.get("mbu"), "MBU")
    if kind == "serve":
        return Stage(
            name, "endpoint ready", str(summary.get("model", "")), spent, None, "OpenAI API, drained on SIGTERM"
        )
    if kind == "models":
        text = si(summary.get("parameters"), " parameters")
        return Stage(name, text, f"{summary.get('family', '')}, {summary.get('dtype', '')}, from GGUF", spent)
    if kind == "load":
        text = f"{number(summary.get('tokens_per_second'))} tokens/s"
        detail = f"TTFT p50 {seconds(summary.get('ttft_p50'))}, {number(summary.get('errors'))} errors"
        return Stage(name, text, detail, spent, summary.get("mbu"), "MBU")
    return Stage(name, kind or "done", "", spent)


def _text_sections(demo: Run) -> list[Section]:
    sections = []
    samples = demo.load_json("samples.json") or []
    if samples:
        body = "".join(
            f'<div class="sample"><span class="who">{esc(s["model"])}</span><span class="prompt">{esc(s["prompt"])}</span>'
            f"{esc(s['text'] if s['text'].startswith((' ', ',', '.')) else ' ' + s['text'])}</div>"
            for s in samples
        )
        sections.append(Section("Samples of generated text", "Prompt in blue, then what the model wrote.", body))
    chat = demo.load_json("chat.json") or []
    if chat:
        body = "".join(
            f'<div class="sample"><span class="who">{esc(turn["role"])}, {esc(turn["model"])}</span>{esc(turn["text"])}</div>'
            for turn in chat
        )
        sections.append(Section("Through the endpoint", "With the openai Python client, unchanged.", body))
    return sections
