"""``ridgeline doctor``: what torch.compile does to a program, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, progress_line, verb
from ridgeline.cli.units import human_seconds
from ridgeline.errors import JobError, UserError

app = new_app("What torch.compile does to a program: breaks, recompilations, silent fallbacks, and what they cost.")

TARGET = typer.Argument(
    metavar="SCRIPT [ARGUMENTS...] | module:function | -- COMMAND ...", help="What to run, as it is; options go first."
)
MARKS = {
    "graph_break": "yellow",
    "recompile": "yellow",
    "recompile_limit": "red",
    "backend_fallback": "red",
    "precision_lowered": "red",
    "cudagraphs_skipped": "red",
    "compile_failed": "red",
    "rank_divergence": "red",
}
PHASES = {
    "dynamo": "tracing (Dynamo), guards",
    "aot": "autograd, functionalisation",
    "backend": "backend",
    "inductor": "lowering and scheduling (Inductor)",
    "codegen": "writing and building kernels",
}
BAR = 24


@app.command(context_settings={"allow_interspersed_args": False})
@verb
def doctor(
    target: list[str] = TARGET,
    compile_path: list[str] = typer.Option(
        [], "--compile", metavar="PATH", help="Compile this too: model, or model.layers.* for each block."
    ),
    backend: str = typer.Option("inductor", "--backend", help="Backend of --compile."),
    no_fix: bool = typer.Option(False, "--no-fix", help="Observe and time only; try no fixes."),
    apply: bool = typer.Option(False, "--apply", help="Edit the files as the kept fixes say; the diff is kept."),
    no_timing: bool = typer.Option(False, "--no-timing", help="One run: no second start, no eager against compiled."),
    check: bool = typer.Option(False, "--check", help="For CI: one run, no fixes; exit 1 beyond the budget."),
    breaks: int = typer.Option(0, "--breaks", min=0, help="Budget of --check."),
    recompiles: int = typer.Option(0, "--recompiles", min=0, help="Budget of --check."),
    fallbacks: int = typer.Option(0, "--fallbacks", min=0, help="Budget of --check: silent events."),
    top: int = typer.Option(12, "--top", min=1, help="Findings printed; all are in the run and in --json."),
    timeout: float = typer.Option(1800.0, "--timeout", min=1.0, help="Seconds one run may take."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Run an unmodified program and say what torch.compile does to it, ranked by the seconds it loses.

    `ridgeline doctor train.py --lr 1e-3`, `ridgeline doctor package.module:main`, `ridgeline doctor -- torchrun ...`.
    The program runs twice, in processes of its own: once observed with an empty cache, once timed from that cache with
    eager and compiled steps in turn. What it prints goes to the run's folder.
    """
    from ridgeline.compiler.doctor.report import document, over_budget
    from ridgeline.compiler.doctor.session import Plan, check_cache_folder, diagnose
    from ridgeline.compiler.doctor.target import resolve_target
    from ridgeline.runs import Run

    if apply and (no_fix or check):
        raise UserError(f"--apply: {'--no-fix' if no_fix else '--check'} tries no fixes to apply")
    check_cache_folder()
    chosen = resolve_target(target, compile_path)
    plan = Plan(timeout=timeout, backend=backend)
    config = {"command": list(chosen.command), "compile": list(compile_path), "backend": backend}
    out = console(as_json)
    with Run.create("doctor", chosen.name, config=config, root=runs) as run:
        with progress_line() as say:
            timing = not (check or no_timing)
            observation = diagnose(chosen, run.artifact("runs"), plan, timing=timing, say=say)
        if not as_json:
            print_observation(out, observation, chosen.name, top)
        trials = None if check or no_fix or not observation.findings else _fix(chosen, observation, run, plan)
        after = trials.after.summary() if trials is not None and trials.after is not None else None
        answer = document(observation, trials or (), after)
        run.save_json("artifacts/doctor.json", answer)
        run.summarize(**{name: answer["before"][name] for name in SUMMARY})
        edited = _keep(trials, run, apply)
        if as_json:
            emit({**answer, "run": run.id, "edited": edited})
        else:
            print_trials(out, trials, observation.findings, run.path, edited, target)
            out.print(f"run {run.path}", soft_wrap=True, markup=False)
        budget = {"breaks": breaks, "recompiles": recompiles, "fallbacks": fallbacks}
        if check and (beyond := over_budget(observation, budget)):
            raise JobError(f"over budget: {'; '.join(beyond)}")


def _fix(target: Any, observation: Any, run: Any, plan: Any) -> Any:
    """Try the fixes; their processes' logs stay in the run."""
    from ridgeline.compiler.doctor.fixes import try_fixes

    with progress_line() as say:
        folder = run.artifact("trials")
        return try_fixes(target, observation, progress=say, folder=folder, timeout=plan.timeout, backend=plan.backend)


def _keep(trials: Any, run: Any, edit: bool) -> list[str]:
    """Kept settings and rewrites into the run; into the user's files only when asked, after the diff is written."""
    if trials is None:
        return []
    from ridgeline.compiler.doctor.fixes import apply
    from ridgeline.compiler.doctor.plan_toml import write_toml

    if trials.setting:
        write_toml(run.artifact("doctor.toml"), trials.setting, [f"kept by ridgeline doctor, run {run.id}"])
    if trials.diff and not edit:
        run.artifact("fixes.diff").write_text(trials.diff, encoding="utf-8")
    return [str(one) for one in apply(trials, run.artifact("fixes.diff"))] if edit else []


SUMMARY = ("graphs", "breaks", "recompiles", "fallbacks", "compile_seconds", "steps", "step_seconds", "lost_seconds")


def print_observation(out: Console, observation: Any, name: str, top: int) -> None:
    """Verdict on top, then where it is lost, what compiling takes, eager against compiled, and what to try."""
    from ridgeline.compiler.doctor.report import verdict

    style = "bold green" if not observation.findings else "bold"
    out.print(Text(verdict(observation), style=style))
    out.print(_facts(observation, name), style="dim", soft_wrap=True, markup=False)
    shown = observation.findings[:top]
    if shown:
        out.print()
        out.print(findings_table(shown, observation.wall_seconds))
        if len(observation.findings) > top:
            out.print(f"and {len(observation.findings) - top} smaller ones (--top)", style="dim")
        _print_details(out, shown)
    out.print()
    if observation.timing is not None:
        out.print(timing_table(observation))
    if observation.compile_seconds:
        out.print(phases_table(observation))
    for note in observation.notes:
        out.print(f"- {note}", style="dim", soft_wrap=True, markup=False)


def _facts(observation: Any, name: str) -> str:
    entries = ", ".join(f"{one['name']} ({one['backend']}, {one['calls']} calls)" for one in observation.entries[:3])
    more = f" and {len(observation.entries) - 3} more" if len(observation.entries) > 3 else ""
    world = f", {observation.world} ranks" if observation.world > 1 else ""
    graphs = f"{observation.graphs} graph{'s' if observation.graphs != 1 else ''}"
    return f"{name}: {graphs} of {entries}{more}; torch {observation.torch}, {observation.device}{world}"


def findings_table(findings: Sequence[Any], wall_seconds: float) -> Table:
    """Rank, kind, place, calls, seconds, share of the run."""
    table = Table(title=f"Seconds lost, at most, of a run of {human_seconds(wall_seconds)}", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("finding", no_wrap=True)
    table.add_column("where", overflow="fold")
    for name in ("met", "calls", "lost", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(findings, 1):
        place = f"{Path(one.file).name}:{one.line}" if one.file else "-"
        lost = human_seconds(one.lost_seconds) if one.lost_seconds else "-"
        share = f"{one.lost_seconds / wall_seconds:.0%}" if wall_seconds and one.lost_seconds else "-"
        kind = Text(one.kind.replace("_", " "), style=MARKS.get(one.kind, ""))
        table.add_row(str(number), kind, Text(place), str(one.count), str(one.calls or "-"), lost, share)
    return table


def _print_details(out: Console, findings: Sequence[Any]) -> None:
    """Per finding: the full place, the line itself, why, and what to try."""
    from ridgeline.compiler.doctor.report import advice

    for number, one in enumerate(findings, 1):
        where = f" {one.where}" if one.file else ""
        inside = f" in {one.function}" if one.function else ""
        code = f" {one.detail['gb']}" if one.detail.get("gb") else ""
        out.print(f"{number}. {one.kind.replace('_', ' ')}{code}{where}{inside}", soft_wrap=True, markup=False)
        if one.code:
            out.print(Padding(Syntax(one.code, "python", background_color="default", word_wrap=True), (0, 0, 0, 5)))
        out.print(Padding(Text(one.reason), (0, 0, 0, 3)))
        if one.detail.get("sources"):
            out.print(Padding(Text(f"guards: {', '.join(one.detail['sources'][:5])}", style="dim"), (0, 0, 0, 3)))
        if words := advice(one):
            out.print(Padding(Text(f"try: {words}", style="cyan"), (0, 0, 0, 3)))


def timing_table(observation: Any) -> Table:
    """Eager and compiled in one session, and what starting costs."""
    timing = observation.timing
    table = Table(title=f"Eager against compiled, {timing.samples} steps each in turn", title_justify="left")
    for name in ("", "eager", "compiled", "gain", "floor (A/A)"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    gain = timing.gain_seconds
    sign = "-" if gain < 0 else ""
    row = [human_seconds(timing.eager_seconds), human_seconds(timing.compiled_seconds)]
    table.add_row("a steady step", *row, f"{sign}{human_seconds(abs(gain))}", human_seconds(timing.floor_seconds))
    for name, cost, step in (
        ("cold start", timing.cold_seconds, timing.break_even_step),
        ("warm start", timing.warm_seconds, timing.break_even_warm_step),
    ):
        pays = f"from step {step:,}" if step else "never pays"
        table.add_row(name, "-", human_seconds(cost), pays, "-")
    return table


def phases_table(observation: Any) -> Table:
    """Where compile time goes: by phase, then the functions that took most of it."""
    total = sum(observation.phases.values()) or 1.0
    title = f"Compile time {human_seconds(observation.compile_seconds)}, by phase and by function"
    table = Table(title=title, title_justify="left")
    for name in ("", "time", ""):
        table.add_column(name, justify="right" if name else "left")
    for phase, seconds in observation.phases.items():
        if seconds > 0:
            bar = "█" * max(round(BAR * seconds / total), 1)
            table.add_row(PHASES[phase], human_seconds(seconds), f"[cyan]{bar}[/] {seconds / total:.0%}")
    table.add_section()
    for place, frames in _by_function(observation.frames)[:5]:
        seconds = sum(one.seconds for one in frames)
        guards = max(one.guards for one in frames)
        what = f"{len(frames)} compilations, {guards} guards"
        table.add_row(Text(place), human_seconds(seconds), what)
    return table


def print_trials(
    out: Console, trials: Any, findings: Sequence[Any], run: Path, edited: Sequence[str], target: Sequence[str]
) -> None:
    """What was tried and what was kept, then how to have it. Numbers are the findings' in the table above."""
    if trials is None:
        return
    numbers = {one.key: number for number, one in enumerate(findings, 1)}
    out.print()
    if trials.note:
        out.print(f"no fixes tried: {trials.note}", soft_wrap=True, markup=False)
        return
    if any(one.fix for one in trials):
        out.print(trials_table(trials, numbers))
    reasons: dict[tuple[str, str], list[str]] = {}  # one fix may answer several findings
    for one in trials:
        if one.why:
            reasons.setdefault((one.fix or "no fix", one.why), []).append(str(numbers.get(one.finding.key, "-")))
    for (fix, why), of in reasons.items():
        out.print(Padding(Text(f"{', '.join(of)}. {fix}: {why}", style="dim"), (0, 0, 0, 1)))
    if trials.gain is not None:
        before, after = human_seconds(trials.gain.before_seconds), human_seconds(trials.gain.after_seconds)
        out.print(Text(f"Kept together: {before} before, {after} after.", style="bold green"))
    elif any(one.fix for one in trials):
        out.print("nothing kept: the program stays as it is")
    if trials.setting:
        command = f"ridgeline run --doctor {run / 'artifacts' / 'doctor.toml'} {' '.join(target)}"
        out.print(f"settings, without touching the code: {command}", soft_wrap=True, markup=False)
    if trials.diff:
        verb = f"edited: {', '.join(edited)}; taken back by" if edited else "to apply (or --apply):"
        flags = "-R -p1" if edited else "-p1"
        out.print(f"{verb} patch {flags} < {run / 'artifacts' / 'fixes.diff'}", soft_wrap=True, markup=False)
        out.print(Syntax(trials.diff, "diff", background_color="default", word_wrap=True))


def trials_table(trials: Sequence[Any], numbers: dict[Any, int]) -> Table:
    """Finding, fix, breaks and recompilations before and after, error against eager's, gain, kept or not."""
    title = "Fixes tried: proven against float64, timed in turn; seconds saved over the run"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("fix", overflow="fold", min_width=16)
    for name in ("breaks", "recompiles", "error", "predicted", "measured", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in (one for one in trials if one.fix):
        ratio = f"{one.error / one.error_eager:.1f}x eager" if one.error and one.error_eager else "-"
        table.add_row(
            str(numbers.get(one.finding.key, "")),
            Text(one.fix, style="" if one.kept else "dim"),
            _from_to(one.breaks_before, one.breaks_after),
            _from_to(one.recompiles_before, one.recompiles_after),
            "0" if one.error == 0 else ratio,
            _signed(one.predicted_seconds),
            _signed(one.gain_seconds),
            Text("kept", style="bold green") if one.kept else Text("no", style="dim"),
        )
    return table


def _from_to(before: int, after: int) -> str:
    return f"{before} -> {after}" if before != after else str(before)


def _signed(seconds: float | None) -> str:
    return human_seconds(seconds) if seconds is None or seconds >= 0 else f"-{human_seconds(-seconds)}"


def _by_function(frames: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Resumed parts and backwards belong to their function."""
    groups: dict[str, list[Any]] = {}
    for one in frames:
        groups.setdefault(f"{one.function} ({Path(one.file).name})" if one.function else "(not named)", []).append(one)
    return sorted(groups.items(), key=lambda pair: -sum(one.seconds for one in pair[1]))
