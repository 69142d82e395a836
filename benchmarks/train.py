"""Training speed: ours against Hugging Face's ways, interleaved in one session, beside the measured GEMM ceiling.

Each contender of each round is a process of its own, in alternating order (A B C, C B A, ...); the first two steps
and every step that compiles are left out; a figure is the median over rounds of the median step. The A/A floor is what
no change at all looks like in this session. The model is examples/demo.toml's, the batch 8 x 512 tokens.

    python benchmarks/train.py --rounds 3 --steps 10 --out train.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ridgeline.bench import Session, interleave
from ridgeline.config import load_config
from ridgeline.hardware import Ceilings, ceilings
from ridgeline.models import config_from_section
from ridgeline.plan import flops_per_token

HERE = Path(__file__).parent
DEMO = HERE.parent / "examples/demo.toml"
PEER = HERE / "peers/transformers_train.py"
TOKENS, WARMUP = 8 * 512, 2
VOCAB = 8192
OURS = {
    "ridgeline, 1 process": ["--procs", "1"],
    "ridgeline, 2 processes": ["--procs", "2", "train.micro_batch_size=4"],
}
THEIRS = {
    "HF Trainer, bf16 autocast, eager": "trainer",
    "HF loop, bf16 autocast, eager": "autocast",
    "HF loop, bf16 autocast, compiled": "autocast-compiled",
    "HF loop, pure bf16, eager": "pure-bf16",
    "HF loop, pure bf16, compiled": "pure-bf16-compiled",
    "HF loop, FSDP2, eager": "fsdp2",
    "HF loop, FSDP2, compiled layers": "fsdp2-compiled",
}
BASE = "HF Trainer, bf16 autocast, eager"
OURS_1 = "ridgeline, 1 process"


def main() -> None:
    """Measure, print the table, keep the JSON."""
    options = _arguments()
    console = Console(stderr=True, highlight=False)
    console.print("measuring the ceilings of this session")
    limits = ceilings(refresh=not options.cached_ceilings)
    with tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            name: partial(ours, extra, options.steps, Path(folder)) for name, extra in OURS.items()
        }
        contenders |= {name: partial(theirs, peer, options.steps, options.python) for name, peer in THEIRS.items()}
        chosen = {name: run for name, run in contenders.items() if any(word in name for word in options.only or [""])}
        session = interleave(
            chosen, options.rounds, lambda round_, name, found: console.print(f"round {round_ + 1}: {name}: {found}")
        )
    document = report(session, limits)
    Console(highlight=False).print(table(document))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps of each contender, warm-up included")
    parser.add_argument("--only", action="append", help="contenders whose name holds this (may be repeated)")
    parser.add_argument("--python", default=_peer_python(), help="interpreter with transformers and accelerate")
    parser.add_argument("--cached-ceilings", action="store_true", help="do not measure the ceilings again")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _peer_python() -> str:
    own = HERE / "peers/transformers/.venv/bin/python"
    return str(own) if own.is_file() else sys.executable


def ours(extra: list[str], steps: int, folder: Path) -> dict[str, float]:
    """``ridgeline train`` on the demo's configuration; its own medians of steady steps."""
    command = [sys.executable, "-m", "ridgeline", "train", str(DEMO), *extra, "--runs", str(folder), "--json"]
    command += [f"train.steps={steps}", "train.eval_every=0", "train.eval_batches=1", "train.checkpoint_every=0"]
    summary = json.loads(_output(command))["summary"]
    return {
        "tokens_per_second": summary["tokens_per_second"],
        "compile_seconds": summary["compile_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def theirs(peer: str, steps: int, python: str) -> dict[str, float]:
    """One of transformers' ways, in its own environment."""
    found = json.loads(_output([python, str(PEER), peer, "--steps", str(steps)]).splitlines()[-1])
    steady = statistics.median(found["seconds"][WARMUP:])
    return {
        "tokens_per_second": TOKENS / steady,
        "compile_seconds": max(0.0, sum(found["seconds"][:WARMUP]) - WARMUP * steady),
    }


def report(session: Session, limits: Ceilings) -> dict[str, Any]:
    """Plain data: a row per contender, ratios to the Trainer, MFU against the ceiling of this session."""
    job = load_config(DEMO)
    count = flops_per_token(config_from_section(job.model, VOCAB), job.train.seq_len)
    peak = limits.gemm_flops_per_second["bf16"]
    rows = []
    for name in [*OURS, *THEIRS]:
        if name not in session.samples:
            if name in session.failures:
                rows.append({"name": name, "failure": session.failures[name]})
            continue
        rate = session.median(name, "tokens_per_second")
        rows.append(
            {
                "name": name,
                "tokens_per_second": rate,
                "mfu": rate * count.model / peak,
                "ratio_to_trainer": rate / session.median(BASE, "tokens_per_second")
                if BASE in session.samples
                else None,
                "start_seconds": session.median(name, "compile_seconds"),
                "aa_floor": session.floor(name, "tokens_per_second"),
            }
        )
    return {
        "rows": rows,
        "session": session.to_dict(),
        "device": limits.device,
        "ceilings": limits.to_dict(),
        "flops_per_token": count.model,
        "formula": count.formula,
        "denominator_flops_per_second": peak,
        "attainable_ratio_to_trainer": peak / count.model / session.median(BASE, "tokens_per_second")
        if BASE in session.samples
        else None,
    }


def table(document: dict[str, Any]) -> Table:
    """For people."""
    peak = document["denominator_flops_per_second"]
    title = (
        f"{document['device']}: MFU = ({document['formula']}) x tokens/s / {peak / 1e12:.3f} TFLOP/s measured bf16 GEMM"
    )
    shown = Table(title=title)
    for column in ("contender", "tokens/s", "MFU", "x Trainer", "compile + warm-up s", "A/A floor"):
        shown.add_column(column, justify="left" if column == "contender" else "right")
    for row in document["rows"]:
        if "failure" in row:
            shown.add_row(row["name"], row["failure"], "", "", "", "")
            continue
        ratio = row["ratio_to_trainer"]
        shown.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row['start_seconds']:.1f}",
            f"{row['aa_floor']:.1%}",
        )
    return shown


def _output(command: list[str]) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return done.stdout


if __name__ == "__main__":
    main()
