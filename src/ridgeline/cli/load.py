"""``ridgeline load URL``: open- and closed-loop load on an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb

app = new_app("Load-test an OpenAI-compatible endpoint: TTFT, inter-token latency, end to end, tokens/s, errors.")


@app.command()
@verb
def load(
    url: str = typer.Argument(..., help="Base URL, such as http://127.0.0.1:8000."),
    model: str = typer.Option(None, "--model", help="Model name [default: the first one the server lists]."),
    chat: bool = typer.Option(False, "--chat", help="Use /v1/chat/completions instead of /v1/completions."),
    concurrency: int = typer.Option(8, "--concurrency", help="Clients of the closed loop."),
    requests: int = typer.Option(64, "--requests", help="Requests to send in all, at most."),
    rate: float = typer.Option(None, "--rate", help="Open loop: Poisson arrivals per second."),
    duration: float = typer.Option(30.0, "--duration", help="Open loop: seconds of arrivals."),
    max_tokens: int = typer.Option(64, "--max-tokens", help="Completion tokens per request."),
    prompt_words: int = typer.Option(64, "--prompt-words", help="Words of a synthetic prompt."),
    prompts: Path = typer.Option(None, "--prompts", help="jsonl of strings or {'prompt': ...}, used in turn."),
    temperature: float = typer.Option(0.0, "--temperature"),
    ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Ask for exactly --max-tokens (vLLM's extension)."),
    stream: bool = typer.Option(True, "--stream/--no-stream", help="Without streaming there is no TTFT or ITL."),
    seed: int = typer.Option(0, "--seed", help="Of prompts and arrival times."),
    slo_ttft: float = typer.Option(None, "--slo-ttft", help="Target in seconds; prints goodput."),
    slo_itl: float = typer.Option(None, "--slo-itl", help="Target of a request's mean gap in seconds; prints goodput."),
    timeout: float = typer.Option(120.0, "--timeout", help="Seconds one request may take."),
    max_seconds: float = typer.Option(600.0, "--max-seconds", help="Seconds the whole test may take."),
    api_key: str = typer.Option(None, "--api-key", envvar="RIDGELINE_API_KEY", help="Sent as a bearer token."),
    yes_remote: bool = typer.Option(False, "--yes-remote", help="Allow a host that is not this machine."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Load-test an OpenAI-compatible endpoint."""
    from ridgeline.serving.load.workload import LoadSettings

    settings = LoadSettings(
        url=url,
        model=model,
        chat=chat,
        concurrency=concurrency,
        requests=requests,
        rate=rate,
        duration=duration,
        max_tokens=max_tokens,
        prompt_words=prompt_words,
        prompts=str(prompts) if prompts else None,
        temperature=temperature,
        ignore_eos=ignore_eos,
        stream=stream,
        seed=seed,
        slo_ttft=slo_ttft,
        slo_itl=slo_itl,
        timeout=timeout,
        max_seconds=max_seconds,
        api_key=api_key,
        allow_remote=yes_remote,
    )
    run = _run(settings, runs)
    if as_json:
        emit({"run": run.id, "path": str(run.path), "summary": run.summary})
    else:
        _print(run, run.summary)


def _run(settings: Any, runs: Path | None) -> Any:
    """The test under a progress bar on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ridgeline.serving.load.runner import load_test

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = console(True)
    with Progress(*columns, console=bar, transient=True, disable=not bar.is_terminal) as progress:
        expected = settings.requests
        if settings.rate is not None:
            expected = min(expected, round(settings.rate * settings.duration))
        task = progress.add_task("requests", total=expected)
        return load_test(settings, runs_root=runs, progress=lambda done: progress.update(task, completed=done))


def _print(run: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{summary['model']} at {summary['url']}", title_justify="left")
    for name in ("milliseconds", "p50", "p90", "p99"):
        table.add_column(name, justify="left" if name == "milliseconds" else "right")
    for label, key in (("time to first token", "ttft"), ("inter-token latency", "itl"), ("end to end", "e2e")):
        values = [summary[f"{key}_p{level}"] for level in (50, 90, 99)]
        table.add_row(label, *("-" if value is None else f"{value * 1000:.1f}" for value in values))
    out = console()
    out.print(table)
    out.print(
        f"{summary['completed']} of {summary['requests']} requests in {summary['seconds']:.1f} s: "
        f"{summary['tokens_per_second']:.1f} tokens/s, {summary['requests_per_second']:.2f} requests/s"
    )
    if "decode_bytes_per_second" in summary:
        out.print(_bandwidth(summary))
    if "goodput" in summary:
        out.print(f"goodput {summary['goodput']:.2f} requests/s ({summary['slo_met']} met the targets)")
    for kind, count in summary["errors_by_kind"].items():
        out.print(f"errors: {count} {kind}")
    out.print(f"run {run.id}; plot {run.path / 'artifacts' / 'latency.html'}")


def _bandwidth(summary: dict[str, Any]) -> str:
    """The server's own account, beside its limit."""
    from ridgeline.cli.units import human_rate

    ceiling = summary["read_ceiling_bytes_per_second"]
    beside = f" of {human_rate(ceiling, 'B/s')} measured, MBU {summary['mbu']:.0%}" if ceiling else ""
    rate = human_rate(summary["decode_bytes_per_second"], "B/s")
    return f"decode batch {summary['decode_batch_mean']:.1f} on average, {rate}{beside}"
