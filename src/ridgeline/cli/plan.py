"""``ridgeline plan``: parameters, FLOPs, memory and time before running; Megatron's and speculation's estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.cli.units import human_bytes, human_count, human_rate, human_seconds, parse_count

app = new_app("Parameters, FLOPs, memory and time before running.")

LAYERS = typer.Option(..., "--layers", min=1)
HIDDEN = typer.Option(..., "--hidden", min=8)
VOCAB = typer.Option(..., "--vocab", min=2)
SEQ = typer.Option(..., "--seq", min=8, help="Sequence length; for learned positions the table's length.")
RECOMPUTE = typer.Option(True, "--recompute/--no-recompute", help="Whether activations were recomputed in full.")


@app.command()
@verb
def show(
    config: Path = typer.Argument(help="Configuration of the job (TOML)."),
    overrides: list[str] = typer.Argument(None, help="section.key=value, such as train.seq_len=256."),
    device: str = typer.Option(None, "--device", help="cpu or cuda [default: the GPU when there is one]."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """The plan of a job on this device; left in a run of kind ``plan``."""
    from ridgeline.cli.env import measure_with_progress
    from ridgeline.config import load_config
    from ridgeline.plan import plan_job
    from ridgeline.plan.calibration import for_job
    from ridgeline.plan.resolve import resolve_model
    from ridgeline.runs import Run

    job = load_config(config, overrides or [])
    model, origin = resolve_model(job)
    with Run.create("plan", config.stem, config=job.model_dump(mode="json"), root=runs) as run:
        ceilings = measure_with_progress(refresh=False, quick=False, device=device)
        calibration = for_job(ceilings, job.train.dtype, job.parallel.procs, job.train.compile)
        document = plan_job(job, model, ceilings, calibration).to_dict()
        document["notes"] = [*origin, *document["notes"]]
        run.save_json("prediction.json", document)
        run.save_json("ceilings.json", ceilings.to_dict())
        run.summarize(
            **{key: document[key] for key in ("parameters", "step_seconds", "tokens_per_second", "mfu", "peak_bytes")}
        )
        if as_json:
            emit({"run": run.id, **document})
            return
        print_plan(console(), document)
        console().print(f"run {run.path}")


@app.command()
@verb
def params(
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    seq: int = SEQ,
    family: str = typer.Option("gpt2", "--family", help="gpt2, gptj, llama, mistral, qwen2 or qwen3."),
    heads: int = typer.Option(
        None, "--heads", help="Attention heads [default: hidden / 64 when that is whole, else 1]."
    ),
    kv_heads: int = typer.Option(None, "--kv-heads", help="Key/value heads [default: heads]."),
    head_dim: int = typer.Option(None, "--head-dim", help="[default: hidden / heads]"),
    intermediate: int = typer.Option(None, "--intermediate", help="MLP width [default: the family's]."),
    tied: bool = typer.Option(True, "--tied/--untied", help="Whether the head shares the embedding."),
    tp: int = typer.Option(1, "--tp", min=1, help="Tensor-parallel ranks, for the padded vocabulary."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Parameters, exact and by the closed formula, with the difference named; also with the vocabulary padded."""
    from ridgeline.plan.resolve import parameter_table

    shape = {"layers": layers, "hidden": hidden, "context_length": seq, "family": family, "tie_embeddings": tied}
    shape |= {"heads": heads or (hidden // 64 if hidden % 64 == 0 else 1)}
    optional = {"kv_heads": kv_heads, "head_dim": head_dim, "intermediate": intermediate}
    document = parameter_table(shape | {k: v for k, v in optional.items() if v is not None}, vocab, tp)
    if as_json:
        emit(document)
        return
    print_parameters(console(), document)


@app.command()
@verb
def flops(
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    seq: int = SEQ,
    batch: int = typer.Option(..., "--batch", min=1, help="Global batch size in sequences."),
    recompute: bool = RECOMPUTE,
    gpus: int = typer.Option(None, "--gpus", min=1, help="Devices that ran the iteration."),
    seconds: float = typer.Option(None, "--seconds", help="Measured seconds per iteration."),
    peak: float = typer.Option(None, "--peak", help="Peak TFLOP/s of one device, of the dtype that ran."),
    device: str = typer.Option(None, "--device", help="Exact device name; its peak comes from the datasheet table."),
    dtype: str = typer.Option("bf16", "--dtype", help="The dtype that ran, for --device."),
    as_json: bool = JSON_OPTION,
) -> None:
    """FLOPs of one iteration (Megatron's 72 and 96 forms); with --gpus and --seconds the achieved rate, MFU and HFU."""
    from ridgeline.plan.resolve import iteration

    document = iteration(batch, seq, layers, hidden, vocab, recompute, gpus, seconds, peak, device, dtype)
    if as_json:
        emit(document)
        return
    print_iteration(console(), document)


@app.command()
@verb
def time(
    parameters: str = typer.Option(..., "--params", help="Parameters, such as 18.4B."),
    tokens: str = typer.Option(..., "--tokens", help="Training tokens, such as 300B."),
    gpus: int = typer.Option(..., "--gpus", min=1, help="Devices."),
    rate: float = typer.Option(..., "--rate", help="Achieved TFLOP/s of one device (not its peak)."),
    recompute: bool = RECOMPUTE,
    as_json: bool = JSON_OPTION,
) -> None:
    """Days a training takes, and whether the coefficient was 6 or 8."""
    from ridgeline.plan.estimates import SECONDS_PER_DAY, coefficient, training_seconds

    size, amount = parse_count(parameters, "--params"), parse_count(tokens, "--tokens")
    spent = training_seconds(size, amount, gpus, rate * 1e12, recompute)
    other = training_seconds(size, amount, gpus, rate * 1e12, not recompute)
    used = coefficient(recompute)
    formula = f"{used} T P / (n X), T = {human_count(amount)} tokens, P = {human_count(size)}, n = {gpus}, X = {rate:g} TFLOP/s"
    document = {
        "seconds": spent,
        "days": spent / SECONDS_PER_DAY,
        "coefficient": used,
        "formula": formula,
        "days_with_the_other_coefficient": other / SECONDS_PER_DAY,
    }
    if as_json:
        emit(document)
        return
    why = "full recomputation: forward, backward, forward again" if recompute else "no recomputation"
    console().print(f"{document['days']:.1f} days   coefficient {used} ({why})\n{formula}")
    console().print(
        f"with coefficient {coefficient(not recompute)}: {document['days_with_the_other_coefficient']:.1f} days"
    )


@app.command()
@verb
def spec(
    accept: float = typer.Option(..., "--accept", help="Probability that a drafted token is accepted."),
    cost_ratio: float = typer.Option(
        ..., "--cost-ratio", help="Seconds of a draft step over seconds of a target step."
    ),
    k: int = typer.Option(5, "--k", help="Tokens drafted per round."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Whether speculative decoding gains or loses, before trying it."""
    from ridgeline.plan.estimates import speculation

    result = speculation(accept, cost_ratio, k)
    if as_json:
        emit(result.to_dict())
        return
    out = console()
    even = "no acceptance is enough" if result.break_even_accept is None else f"{result.break_even_accept:.3f}"
    out.print(
        f"{result.speedup:.2f}x   {result.verdict}   (1 - a^(k+1)) / ((1 - a)(k c + 1)), a = {accept:g}, c = {cost_ratio:g}, k = {k}"
    )
    out.print(f"ceiling (every token accepted) {result.ceiling:.2f}x; break-even acceptance {even}")
    out.print(f"best k here: {result.best_k} ({result.best_speedup:.2f}x)")


def print_parameters(out: Console, document: dict[str, Any]) -> None:
    """Closed form, exact count and differences, for each vocabulary."""
    table = Table(title=f"Parameters, family {document['family']}", title_justify="left")
    for title in ("vocabulary", "", "closed formula", "exact", "difference"):
        table.add_column(title, justify="left" if not title else "right")
    for row in document["rows"]:
        report = row["report"]
        difference = report["exact"] - report["closed"]
        cells = (f"{row['vocab']:,}", row["note"], f"{report['closed']:,}", f"{report['exact']:,}", f"{difference:+,}")
        table.add_row(*cells)
    out.print(table)
    report = document["rows"][0]["report"]
    out.print(f"closed formula: {report['formula']}")
    for item in report["differences"]:
        out.print(f"  {item['parameters']:+,}  {item['name']}")
    for warning in report["warnings"]:
        out.print(f"warning: {warning}")


def print_iteration(out: Console, document: dict[str, Any]) -> None:
    """Both forms, and the rates when there was a time."""
    for form in document["forms"]:
        used = "  <- what ran" if form["ran"] else ""
        out.print(f"{human_rate(form['flops'], 'FLOP')} per iteration  {form['formula']}{used}")
    if document["achieved_flops_per_second"] is None:
        return
    out.print(f"achieved per device  {document['achieved_flops_per_second'] / 1e12:.2f} TFLOP/s (executed FLOPs)")
    out.print(f"model FLOPs only     {document['model_flops_per_second'] / 1e12:.2f} TFLOP/s (72 form, whatever ran)")
    if document["hfu"] is not None:
        peak = f"{document['peak_flops_per_second'] / 1e12:g} TFLOP/s, {document['peak_source']}"
        out.print(f"HFU {document['hfu']:.2%}   MFU {document['mfu']:.2%}   of {peak}")
    for warning in document["warnings"]:
        out.print(f"warning: {warning}")


def print_plan(out: Console, document: dict[str, Any]) -> None:
    """The tables of ``plan show``."""
    report, flop = document["parameter_report"], document["flops"]
    out.print(f"parameters  {report['exact']:,} exact; {report['closed']:,} by {report['formula']}")
    for item in report["differences"]:
        out.print(f"            {item['parameters']:+,}  {item['name']}")
    table = Table("FLOPs (training)", title_justify="left")
    for title in ("per token", "per step", "share"):
        table.add_column(title, justify="right")
    rows = [
        ("6N", flop["six_n"]),
        ("causal attention", flop["attention"]),
        ("recomputation", flop["recompute"]),
        ("total", flop["total"]),
    ]
    for name, count in rows:
        step = human_rate(count * document["tokens_per_step"], "FLOP")
        table.add_row(name, human_rate(count, "FLOP"), step, f"{count / flop['total']:.1%}")
    out.print(table)
    out.print(flop["formula"])
    print_memory(out, document["memory"])
    print_time(out, document)


def print_memory(out: Console, memory: dict[str, Any]) -> None:
    """Categories by moment; the peak's column is marked."""
    moments = memory["moments"]
    table = Table("bytes per rank", title_justify="left")
    for name in moments:
        table.add_column(f"{name} (peak)" if name == memory["peak_moment"] else name, justify="right")
    for category in dict.fromkeys(category for moment in moments.values() for category in moment):
        table.add_row(category.replace("_", " "), *(human_bytes(moment.get(category)) for moment in moments.values()))
    table.add_section()
    table.add_row("sum", *(human_bytes(sum(moment.values())) for moment in moments.values()))
    out.print(table)


def print_time(out: Console, document: dict[str, Any]) -> None:
    """Predicted step by part, with each formula, and what follows from it."""
    table = Table("predicted step", title_justify="left")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    table.add_column("formula")
    for name, seconds in document["step_seconds_by_part"].items():
        share = f"{seconds / document['step_seconds']:.1%}"
        table.add_row(name, human_seconds(seconds), share, document["time"]["formulas"][name])
    table.add_section()
    table.add_row("step", human_seconds(document["step_seconds"]), "100.0%", "sum of the parts")
    out.print(table)
    inputs, calibration = document["time"]["inputs"], document["calibration"]
    out.print(f"on {inputs['device']} ({inputs['kind']}), ceilings of {inputs['measured_at']}")
    if calibration:
        runs = ", ".join(calibration["runs"])
        out.print(f"calibrated: every part x {calibration['factor']:.3f}, the median measured/predicted of {runs}")
    else:
        out.print("not calibrated: no finished run of this kind on this device yet")
    out.print(
        f"{document['tokens_per_second']:,.0f} tokens/s   MFU {document['mfu']:.1%}   = {document['mfu_formula']}"
    )
    for note in document["notes"]:
        out.print(f"note: {note}")
