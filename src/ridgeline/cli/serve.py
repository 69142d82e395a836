"""``ridgeline serve MODEL``: an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import typer

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, new_app, verb

app = new_app("Serve a model over an OpenAI-compatible HTTP endpoint with continuous batching.")


@app.command()
@verb
def serve(
    model: str = typer.Argument(..., help="Model folder, training run, .gguf file or hub id."),
    host: str = typer.Option("127.0.0.1", "--host"),
    port: int = typer.Option(8000, "--port", help="0 chooses a free one."),
    name: str = typer.Option(None, "--name", help="Name clients use [default: the folder's or run's name]."),
    max_batch: int = typer.Option(8, "--max-batch", help="Sequences that run at once."),
    max_queue: int = typer.Option(64, "--max-queue", help="Sequences that may wait; beyond that 429."),
    max_context: int = typer.Option(None, "--max-context", help="Tokens of one sequence [default: the model's]."),
    max_tokens: int = typer.Option(None, "--max-tokens", help="Completion tokens a request may ask for."),
    prefill_chunk: int = typer.Option(
        None, "--prefill-chunk", help="Prompt tokens computed in one piece [default: 128 on CPU, 512 on CUDA]."
    ),
    max_body_bytes: int = typer.Option(4 * 1024 * 1024, "--max-body-bytes", help="Request body; beyond that 413."),
    drain_seconds: float = typer.Option(120.0, "--drain-seconds", help="After SIGTERM, then open requests are cut."),
    stall_seconds: float = typer.Option(120.0, "--stall-seconds", help="A longer step counts as dead (/health/live)."),
    dtype: str = typer.Option("bf16", "--dtype", help="bf16, fp16 or fp32."),
    no_compile: bool = typer.Option(False, "--no-compile", help="Start at once, run slower."),
    api_key: str = typer.Option(None, "--api-key", envvar="RIDGELINE_API_KEY", help="Required from clients when set."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP endpoint."""
    from ridgeline.inference import resolve_model
    from ridgeline.serving.loading import engine_loader, known_ceilings, served_name
    from ridgeline.serving.server import Serving, raise_for
    from ridgeline.serving.server import serve as run_server
    from ridgeline.serving.settings import ServeSettings

    folder = resolve_model(model, runs, lambda line: print(line, file=sys.stderr))
    settings = ServeSettings(
        name=served_name(model, folder) if name is None else name,
        host=host,
        port=port,
        max_batch=max_batch,
        max_context=max_context,
        max_queue=max_queue,
        max_tokens=max_tokens,
        prefill_chunk=prefill_chunk,
        max_body_bytes=max_body_bytes,
        api_key=api_key,
        stall_seconds=stall_seconds,
        drain_seconds=drain_seconds,
    )
    _log_to_stderr()
    loader = engine_loader(folder, settings, dtype=dtype, compile=not no_compile)
    config = {"model": str(folder), "dtype": dtype, "compile": not no_compile}

    def announce(serving: Serving) -> None:
        _announce(serving, as_json)

    limits = known_ceilings()
    if limits is None:
        print(
            "ridgeline: no measured ceilings, so no MBU will be shown (`ridgeline env` measures them)", file=sys.stderr
        )
    outcome = run_server(loader, settings, config=config, ceilings=limits, runs_root=runs, on_ready=announce)
    console(as_json).print(f"run {outcome.run.id}")
    sys.stdout.flush()
    if outcome.stuck:  # the engine's thread is inside a step that does not end: no clean way to join it
        os._exit(1)
    raise_for(outcome)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("ridgeline.serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _announce(serving: Any, as_json: bool) -> None:
    name = serving.settings.name
    if as_json:
        document = {"url": serving.url, "model": name, "run": serving.run.id, "pid": os.getpid()}
        print(json.dumps(document), flush=True)
        return
    out = console()
    body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 32})
    key = ' -H "Authorization: Bearer $RIDGELINE_API_KEY"' if serving.settings.api_key else ""
    limits = f"context {serving.context}, batch {serving.settings.max_batch}, queue {serving.settings.max_queue}"
    out.print(f"ready: {serving.url} serves {name} ({limits})", soft_wrap=True)
    out.print(f"  curl {serving.url}/v1/completions{key} -d '{body}'", soft_wrap=True, markup=False)
    sys.stdout.flush()
