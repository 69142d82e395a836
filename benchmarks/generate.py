"""Generation without HTTP on SmolLM2-135M, bf16: one stream against transformers' ``generate``, eight against one.

Every contender of every round is a process of its own, in alternating order (A B C, C B A, ...). Each warms up first
(compilation is reported apart), then generates the same number of tokens three times and reports the median. Tokens
per second are new tokens over wall time, prefill included, for everyone; ``decode_*`` figures are of decode steps
alone. MBU = bytes the decode steps had to read (weights once per step, and the resident cache) / decode seconds /
the read bandwidth measured in this session.

    python benchmarks/generate.py --rounds 4 --out generate.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from options import leave, of_a_model
from ridgeline.bench import Session, interleave
from ridgeline.hardware import ceilings
from ridgeline.runs import environment

HERE = Path(__file__).parent
PEER = HERE / "peers/transformers_generate.py"
OURS = {
    "ridgeline, 1 stream": ["1"],
    "ridgeline, 1 stream, eager": ["1", "--no-compile"],
    "ridgeline, 8 streams": ["8"],
    "ridgeline, 8 streams, eager": ["8", "--no-compile"],
}
THEIRS = {"transformers, 1 stream": "default", "transformers, 1 stream, static cache compiled": "static"}
ONE, EIGHT = "ridgeline, 1 stream", "ridgeline, 8 streams"
BASE, STRONG = THEIRS
FIGURE = "tokens_per_second"


def main() -> None:
    """Measure, print, keep the JSON."""
    options = _arguments()
    if options.worker:
        print(json.dumps(work(options)))
        return
    from ridgeline.inference import resolve_model

    options.model = str(resolve_model(options.model, say=tell))
    limits = ceilings(refresh=not options.cached_ceilings)
    session = interleave(contenders(options), options.rounds, report)
    leave(summarise(session, limits.to_dict(), options), options.out)


def _arguments() -> argparse.Namespace:
    parser = of_a_model(__doc__, rounds=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", help="names of contenders, instead of all")
    parser.add_argument("--cached-ceilings", action="store_true")
    parser.add_argument("--worker", type=int, metavar="STREAMS", help=argparse.SUPPRESS)
    parser.add_argument("--no-compile", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def contenders(options: argparse.Namespace) -> dict[str, Any]:
    """Name -> a function that runs one process and returns its figures."""
    shared = ["--model", options.model, "--tokens", str(options.tokens), "--repeats", str(options.repeats)]
    shared += ["--prompt-tokens", str(options.prompt_tokens)]
    made = {
        name: partial(_process, [sys.executable, __file__, "--worker", *rest, *shared]) for name, rest in OURS.items()
    }
    own = HERE / "peers/transformers/.venv/bin/python"
    python = str(own if own.exists() else sys.executable)
    made |= {name: partial(_process, [python, str(PEER), "--way", way, *shared]) for name, way in THEIRS.items()}
    return {name: run for name, run in made.items() if not options.only or name in options.only}


def _process(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def work(options: argparse.Namespace) -> dict[str, float]:
    """One of our contenders, in its own process."""
    import torch

    from ridgeline.inference import Engine, SamplingParams, generate
    from ridgeline.inference.api import measure

    streams = options.worker
    started = time.perf_counter()
    engine = Engine.load(options.model, dtype="bf16", max_batch=streams, compile=not options.no_compile)
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    prompts = [list(range(1000 + i, 1000 + i + options.prompt_tokens)) for i in range(streams)]
    generate(engine, prompts, params)
    warm, samples = time.perf_counter() - started, []
    for _ in range(options.repeats):
        before, began = engine.stats(), time.perf_counter()
        made = generate(engine, prompts, params)
        samples.append((time.perf_counter() - began, measure(before, engine.stats(), None)))
        assert all(len(one.tokens) == options.tokens for one in made)
    seconds, speed = sorted(samples, key=lambda sample: sample[0])[len(samples) // 2]
    stats = engine.stats()
    assert stats["recompiles"] == 0
    return {
        FIGURE: streams * options.tokens / seconds,
        "decode_tokens_per_second": speed.tokens_per_second or 0.0,
        "decode_bytes_per_second": speed.bytes_per_second or 0.0,
        "prefill_seconds": speed.prompt_seconds,
        "warm_seconds": warm,
        "compile_seconds": stats["compile_seconds"],
        "packed": float(stats["linears"]["packed"]),
        "threads": float(torch.get_num_threads()),
    }


def summarise(session: Session, limits: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, floors, MBU, and the ratios the bars are about."""
    read = limits["read_bytes_per_second"]
    rows = {}
    for name, figures in session.samples.items():
        row: dict[str, Any] = {figure: session.median(name, figure) for figure in figures}
        row["aa_floor"] = session.floor(name, FIGURE)
        if "decode_bytes_per_second" in row:
            row["mbu"] = row["decode_bytes_per_second"] / read
        rows[name] = row
    pairs = {"one_stream_over_transformers": (BASE, ONE), "one_stream_over_transformers_compiled": (STRONG, ONE)}
    pairs |= {"eight_streams_over_one": (ONE, EIGHT)}
    return {
        "rows": rows,
        "ratios": {
            key: session.compare(a, b, FIGURE).to_dict() for key, (a, b) in pairs.items() if a in rows and b in rows
        },
        "failures": session.failures,
        "samples": session.samples,
        "settings": {key: getattr(options, key) for key in ("model", "rounds", "tokens", "prompt_tokens", "repeats")},
        "ceilings": limits,
        "environment": environment(),
    }


def report(round_: int, name: str, figures: Any) -> None:
    """One line per process on stderr."""
    what = figures if isinstance(figures, str) else f"{figures[FIGURE]:.1f} tokens/s"
    tell(f"round {round_ + 1}  {name:<46} {what}")


def tell(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
