"""Run the benchmarks one after the other, keep their raw results in a run, and write ``evidence/*.json``.

    make bench                                (everything, about half an hour on two cores)
    python benchmarks/all.py --only train     (one of them)

Each benchmark is a script of its own beside this one; what it writes is turned into quoted figures here, in one
place, so that a figure's key, format and command are easy to find.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ridgeline.bench import write_evidence
from ridgeline.hardware import ceilings
from ridgeline.runs import Run

HERE = Path(__file__).parent
ROOT = HERE.parent
Document = dict[str, Any]
Figures = dict[str, dict[str, Any]]
Rows = list[list[str]]


def main() -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS))
    parser.add_argument("--from", dest="source", type=Path, help="folder with NAME.json of earlier runs: only convert")
    options = parser.parse_args()
    names = options.only or list(BENCHMARKS)
    with Run.create("bench", "-".join(names)) as run:
        for name in names:
            document = json.loads((options.source / f"{name}.json").read_text()) if options.source else measure(name)
            run.save_json(f"artifacts/{name}.json", document)
            publish(name, document, run)
    return 0


def measure(name: str) -> Document:
    """Run one benchmark script; its document."""
    print(f"$ python benchmarks/{name}.py", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out)]
        subprocess.run(command, check=True, cwd=ROOT)
        document: Document = json.loads(out.read_text())
    return document


def publish(name: str, document: Document, run: Run) -> None:
    """Write the evidence file of ``name`` and the run's headline figures."""
    convert, measures = BENCHMARKS[name]
    figures, tables = convert(document)
    limits = ceilings()
    write_evidence(
        ROOT / "evidence" / f"{name}.json",
        figures,
        tables,
        command=f"python benchmarks/all.py --only {name}",
        device=f"{limits.device}, {len(os.sched_getaffinity(0))} cores",
        measures=measures,
        run=run.id,
    )
    run.summarize(**{key: figure["value"] for key, figure in figures.items()})
    for key, figure in figures.items():
        print(f"{key:<36} {format(figure['value'], figure.get('format', 'g'))} {figure['unit']}")


def figure(value: float, unit: str, floor: float | None, shape: str = ".1f") -> dict[str, Any]:
    """One quoted figure."""
    return {"value": value, "unit": unit, "aa_floor": floor, "format": shape}


def of_train(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """Tokens/s, MFU and ratios of every contender."""
    rows = {row["name"]: row for row in document["rows"]}
    ours = rows["ridgeline, 1 process"]
    floor = max(row["aa_floor"] for row in rows.values() if "aa_floor" in row)
    figures = {
        "train.tokens_per_second": figure(ours["tokens_per_second"], "tokens/s", floor, ",.0f"),
        "train.mfu": figure(100 * ours["mfu"], "%", floor, ".0f"),
        "train.attainable": figure(document["attainable_ratio_to_trainer"], "x", floor),
    }
    for key, name in (
        ("trainer", "HF Trainer, bf16 autocast, eager"),
        ("fsdp2_compiled", "HF loop, FSDP2, compiled layers"),
        ("pure_bf16_compiled", "HF loop, pure bf16, compiled"),
    ):
        if "tokens_per_second" in rows.get(name, {}):
            ratio = ours["tokens_per_second"] / rows[name]["tokens_per_second"]
            figures[f"train.vs_{key}"] = figure(ratio, "x", floor, ".2f")
    head = ["contender", "tokens/s", "MFU", "x Trainer", "compile + warm-up", "A/A floor"]
    cells = [
        [row["name"], row["failure"], "", "", "", ""]
        if "failure" in row
        else [
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.0%}",
            f"{row['ratio_to_trainer']:.2f}",
            f"{row['start_seconds']:.0f} s",
            f"{row['aa_floor']:.1%}",
        ]
        for row in rows.values()
    ]
    limits = document["ceilings"]["gemm_flops_per_second"]
    figures["train.ceiling_bf16"] = figure(limits["bf16"] / 1e12, "TFLOP/s", None, ".3f")
    figures["train.ceiling_fp32"] = figure(limits["fp32"] / 1e12, "TFLOP/s", None, ".3f")
    return figures, {"train": [head, *cells]}


def of_serve(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """Parallel streams against one, through HTTP."""
    floor = max(document["aa_floor"].values())
    figures = {
        "serve.ratio": figure(document["ratio"], "x", floor),
        "serve.one": figure(document["one_stream_tokens_per_second"], "tokens/s", floor),
        "serve.parallel": figure(document["parallel_tokens_per_second"], "tokens/s", floor),
    }
    head = ["SmolLM2-135M, bf16, HTTP", "tokens/s", "TTFT p50", "between tokens p50", "between tokens p99"]
    cells = [
        [
            name,
            f"{row['tokens_per_second']:.1f}",
            *(f"{1e3 * row[key]:.0f} ms" for key in ("ttft_p50", "itl_p50", "itl_p99")),
        ]
        for name, row in document["medians"].items()
    ]
    return figures, {"serve": [head, *cells]}


def of_startup(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """Seconds until the program answers."""
    return {
        f"startup.{name}": figure(row["seconds"], "s", row["aa_floor"], ".2f") for name, row in document.items()
    }, {}


def of_generate(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """One stream against transformers, and eight streams against one, without HTTP."""
    rows = document["rows"]
    floor = max(row["aa_floor"] for row in rows.values())
    keys = {
        "one_stream_over_transformers": "generate.vs_transformers",
        "one_stream_over_transformers_compiled": "generate.vs_transformers_compiled",
        "eight_streams_over_one": "generate.eight_over_one",
    }
    figures = {keys[name]: figure(ratio["ratio"], "x", floor, ".2f") for name, ratio in document["ratios"].items()}
    head = ["SmolLM2-135M, bf16", "tokens/s", "MBU of decode", "A/A floor"]
    cells = [
        [
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{row['mbu']:.0%}" if "mbu" in row else "–",
            f"{row['aa_floor']:.1%}",
        ]
        for name, row in rows.items()
    ]
    cells += [[name, reason, "", ""] for name, reason in document["failures"].items()]
    return figures, {"generate": [head, *cells]}


def of_traces(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """Loading and analysing traces against Holistic Trace Analysis, file by file and in total."""
    floor, total = document["aa_floor"], document["total"]
    raw = sum(row["ridgeline"]["raw_bytes"] for row in document["rows"].values())
    load = sum(row["ridgeline"]["load"] for row in document["rows"].values())
    figures = {
        "traces.vs_hta": figure(document["times_faster"], "x", floor),
        "traces.vs_hta_slowest": figure(document["slowest_times_faster"], "x", floor),
        "traces.memory_of_hta": figure(100 * document["memory_ratio"], "%", None, ".0f"),
        "traces.memory_of_hta_worst": figure(100 * document["worst_memory_ratio"], "%", None, ".0f"),
        "traces.load": figure(raw / load / 1e6, "MB/s", floor, ".0f"),
    }
    head = ["trace", "text", "events kept", "HTA", "Ridgeline", "faster", "HTA's memory", "Ridgeline's memory"]
    cells = [_trace_cells(name, row) for name, row in document["rows"].items()]
    ours, theirs = total["ridgeline"], total["HTA"]
    sums = [f"{theirs['seconds']:.1f} s", f"{ours['seconds']:.1f} s", f"{document['times_faster']:.1f}x"]
    memory = [f"{theirs['peak_bytes'] / 1e6:.0f} MB", f"{ours['peak_bytes'] / 1e6:.0f} MB"]
    return figures, {"traces": [head, *cells, ["sum of all", f"{raw / 1e6:.0f} MB", "", *sums, *memory]]}


def _trace_cells(path: str, row: Document) -> list[str]:
    name = path.removesuffix(".json.gz").split("__")[0]
    name = name if len(name) <= WIDEST_NAME else f"{name[:WIDEST_NAME]}…"
    ours, theirs = row["ridgeline"], row.get("HTA")
    size = [f"{ours['raw_bytes'] / 1e6:.1f} MB", f"{ours['rows']:,.0f}"]
    mine = f"{ours['peak_bytes'] / 1e6:.0f} MB"
    if theirs is None:
        reason = row["hta_failures"].get("load", "failed")
        return [name, *size, reason, f"{ours['seconds']:.2f} s", "", "", mine]
    speed = [f"{theirs['seconds']:.2f} s", f"{ours['seconds']:.2f} s", f"{row['times_faster']:.1f}x"]
    return [name, *size, *speed, f"{theirs['peak_bytes'] / 1e6:.0f} MB", mine]


WIDEST_NAME = 48
Converter = Callable[[Document], tuple[Figures, dict[str, Rows]]]
INFERENCE = ["src/ridgeline/inference", "src/ridgeline/models", "src/ridgeline/kernels", "src/ridgeline/optimize"]


def of_compiler(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """Our backend against Inductor's default and eager, case by case."""
    figures: Figures = {}
    cells = [["case", "of Inductor's speed", "of eager's speed", "A/A floor", "of Inductor's compile time"]]
    for row in document["rows"]:
        if "failure" in row:
            cells.append([row["name"], row["failure"], "", "", ""])
            continue
        key = "compiler." + row["name"].replace(" ", "_")
        figures[key] = figure(row["over_inductor"], "x", row["aa_floor"], ".2f")
        compiled = f"{row['compile']['ratio']:.2f}" if "compile" in row else "-"
        speeds = [f"{row['over_inductor']:.2f}", f"{row['over_eager']:.2f}"]
        cells.append([row["name"], *speeds, f"{row['aa_floor']:.1%}", compiled])
    return figures, {"compiler": cells}


def of_cold_start(document: Document) -> tuple[Figures, dict[str, Rows]]:
    """From starting a process to the demo model's first output."""
    rows = document["rows"]
    floor = max(row["aa_floor"] for row in rows.values())
    cold = rows["compile, cold"]["seconds"]
    figures = {
        "cold_start.compile": figure(cold, "s", floor),
        "cold_start.package": figure(rows["package, cold"]["seconds"], "s", floor),
        "cold_start.restored": figure(rows["restored, cold"]["seconds"], "s", floor),
        "cold_start.cold_ratio": figure(document["cold_ratio"], "x", floor, ".2f"),
        "cold_start.warm_ratio": figure(document["warm_ratio"], "x", floor, ".2f"),
    }
    cells = [
        [name, f"{row['seconds']:.1f} s", f"{row['seconds'] / cold:.2f}", f"{row['aa_floor']:.1%}"]
        for name, row in rows.items()
    ]
    return figures, {"cold_start": [["start", "first output after", "of a cold compile", "A/A floor"], *cells]}


BENCHMARKS: dict[str, tuple[Converter, list[str]]] = {
    "startup": (of_startup, ["src/ridgeline/cli/main.py"]),
    "train": (of_train, [f"src/ridgeline/{room}" for room in ("train", "parallel", "models", "kernels", "compiler")]),
    "generate": (of_generate, INFERENCE),
    "traces": (of_traces, ["src/ridgeline/profiling"]),
    "serve": (of_serve, [*INFERENCE, "src/ridgeline/serving"]),
    "compiler": (of_compiler, ["src/ridgeline/compiler/backend", "src/ridgeline/compiler/internals/graphs.py"]),
    "cold_start": (of_cold_start, ["src/ridgeline/compiler/package", "src/ridgeline/compiler/internals/aoti.py"]),
}

if __name__ == "__main__":
    raise SystemExit(main())
