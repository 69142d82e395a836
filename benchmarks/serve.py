"""Serving: tokens/s of eight parallel streams against one, through HTTP, on SmolLM2-135M.

One server process, one load client; the two contenders take turns (A B, B A, ...), every request asks for the same
number of tokens (``ignore_eos``). Tokens per second are completion tokens over wall time, prefill included.

    python benchmarks/serve.py --out serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from options import leave, of_a_model
from ridgeline.bench.ab import interleave
from ridgeline.runs import environment
from ridgeline.serving.load.runner import measure
from ridgeline.serving.load.stats import summarize
from ridgeline.serving.load.workload import LoadSettings

FIGURES = ("tokens_per_second", "ttft_p50", "itl_p50", "itl_p99")


def main() -> None:
    """Measure and print; ``--out`` keeps the JSON."""
    options = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a benchmark that is cut short stops its server
    server, url = start_server(options)
    try:
        document = compare(url, options)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    leave(document, options.out)


def _arguments() -> argparse.Namespace:
    parser = of_a_model(__doc__, rounds=6)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    return parser.parse_args()


def start_server(options: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """``ridgeline serve`` on a free port, warmed up; its process and URL."""
    command = [sys.executable, "-m", "ridgeline", "serve", options.model, "--port", "0", "--json"]
    command += ["--max-batch", str(options.streams), "--dtype", options.dtype, "--runs", str(options.runs)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise SystemExit(f"the server ended with exit code {server.wait()} before it was ready")
    return server, json.loads(line)["url"]


def measure_streams(url: str, streams: int, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """One closed-loop measurement: each stream sends one request of ``tokens`` tokens."""
    settings = LoadSettings(
        url,
        concurrency=streams,
        requests=streams,
        max_tokens=options.tokens,
        prompt_words=options.words,
        ignore_eos=True,
        seed=seed,
    )
    _, exchanges, seconds = asyncio.run(measure(settings))
    summary = summarize(exchanges, seconds, settings)
    expected = streams * options.tokens
    if summary["errors"] or summary["completion_tokens"] != expected:
        raise RuntimeError(f"{summary['completion_tokens']} of {expected} tokens, errors {summary['errors_by_kind']}")
    return {key: summary[key] for key in FIGURES}


def compare(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both contenders interleaved; medians, the ratio and the A/A floors."""
    seeds = iter(range(10_000))
    one = lambda: measure_streams(url, 1, options, next(seeds))
    many = lambda: measure_streams(url, options.streams, options, next(seeds))
    for warm in (one, many):
        warm()
    names = ("1 stream", f"{options.streams} streams")
    session = interleave({names[0]: one, names[1]: many}, options.rounds)
    if session.failures:
        raise SystemExit(f"failed: {session.failures}")
    comparison = session.compare(*names, "tokens_per_second")
    return {
        "model": options.model,
        "dtype": options.dtype,
        "streams": options.streams,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "one_stream_tokens_per_second": session.median(names[0], "tokens_per_second"),
        "parallel_tokens_per_second": session.median(names[1], "tokens_per_second"),
        "ratio": comparison.ratio,
        "comparison": comparison.to_dict(),
        "aa_floor": {name: session.floor(name, "tokens_per_second") for name in names},
        "medians": {name: {key: session.median(name, key) for key in FIGURES} for name in names},
        "samples": session.samples,
        "environment": {**environment(), "load_average": os.getloadavg()[0]},
    }


if __name__ == "__main__":
    main()
