"""``ridgeline generate MODEL "prompt"``: text from a model, streamed, with its speed beside the device's limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.cli.units import human_rate, human_seconds
from ridgeline.errors import UserError

if TYPE_CHECKING:
    from ridgeline.inference import Engine, Generation, SamplingParams
    from ridgeline.runs import Run

app = new_app("Generate text from a model.")
COMPILE_PAYS = 2000  # tokens from which compiling (some seconds) is earned back


@app.command()
@verb
def generate(
    model: str = typer.Argument(..., help="Model folder, training run, .gguf file, or hub id."),
    prompt: str = typer.Argument(None, help="The prompt; - reads it from standard input."),
    chat: bool = typer.Option(False, "--chat", help="Put the prompt through the model's chat template."),
    system: str = typer.Option(None, "--system", help="System message before the prompt (with --chat)."),
    max_tokens: int = typer.Option(128, "--max-tokens", help="Tokens to generate at most."),
    temperature: float = typer.Option(1.0, "--temperature", help="0 takes the likeliest token."),
    top_k: int = typer.Option(0, "--top-k", help="Only the k likeliest tokens; 0 is off."),
    top_p: float = typer.Option(1.0, "--top-p", help="Only the likeliest tokens that hold this probability."),
    penalty: float = typer.Option(1.0, "--repetition-penalty", help="Above 1 makes seen tokens less likely."),
    seed: int = typer.Option(None, "--seed", help="The same seed gives the same text [default: a fresh one]."),
    stop: list[str] = typer.Option([], "--stop", help="Text that ends the generation; may be repeated."),
    logprobs: int = typer.Option(None, "--logprobs", help="Log-probability of each token and of the n likeliest."),
    few_shot: str = typer.Option(None, "--few-shot", metavar="FILE", help="Examples and queries (jsonl), or en-fr."),
    dtype: str = typer.Option("bf16", "--dtype", help="bf16, fp16 or fp32."),
    compiled: bool = typer.Option(None, "--compile/--no-compile", help="[default: when enough tokens are asked for]"),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Generate text from a model; leave a run of kind ``generate``."""
    from ridgeline.inference.request import SamplingParams
    from ridgeline.runs import Run

    params = SamplingParams(max_tokens, temperature, top_k, top_p, penalty, seed, tuple(stop), logprobs)
    if (prompt is None) == (few_shot is None):
        raise UserError(
            "give a prompt or --few-shot FILE" if prompt is None else "give a prompt or --few-shot, not both"
        )
    if system is not None and not chat:
        raise UserError("--system needs --chat")
    config = {"model": model, "prompt": prompt, "chat": chat, "system": system, "few_shot": few_shot, "dtype": dtype}
    config |= {"sampling": vars(params), "compile": compiled}
    with Run.create("generate", config=config, root=runs) as run:
        if few_shot is not None:
            answer_queries(run, model, few_shot, params, chat, dtype, compiled, runs, as_json)
        else:
            text = sys.stdin.read() if prompt == "-" else prompt
            given: Any = ([{"role": "system", "content": system}] if system else []) + [
                {"role": "user", "content": text}
            ]
            continue_prompt(run, model, given if chat else text, params, dtype, compiled, runs, as_json)


def continue_prompt(
    run: Run,
    model: str,
    prompt: Any,
    params: SamplingParams,
    dtype: str,
    compiled: bool | None,
    runs: Path | None,
    as_json: bool,
) -> None:
    """One prompt, streamed to stdout as it comes (not with ``--json``)."""
    from ridgeline.inference.api import Generation, stream

    engine = load_engine(model, 1, params.max_tokens, dtype, compiled, runs)
    before, made = engine.stats(), Generation()
    for event in stream(engine, prompt, params):
        made.take(event)
        if not as_json:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
    figures = conclude(run, engine, before, model)
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    run.save_json("samples.json", [{"model": model, "prompt": shown, "text": made.text}])
    if as_json:
        emit({"run": run.id, "model": model, **made.to_dict(), "summary": figures})
        return
    if params.logprobs is not None:
        console(as_json=True).print(logprob_table(engine, made))
    tell_speed(run, engine, figures, made.finish_reason)


def answer_queries(
    run: Run,
    model: str,
    few_shot: str,
    params: SamplingParams,
    chat: bool,
    dtype: str,
    compiled: bool | None,
    runs: Path | None,
    as_json: bool,
) -> None:
    """All queries of a few-shot file, batched; answers and their score."""
    import dataclasses

    from ridgeline.inference.api import generate as generate_all
    from ridgeline.inference.fewshot import read, score

    task = read(few_shot)
    params = dataclasses.replace(params, stop=(*params.stop, "\n"))
    engine = load_engine(model, 8, params.max_tokens * len(task.queries), dtype, compiled, runs)
    before = engine.stats()
    prompts = [task.messages(query) if chat else task.prompt(query) for query, _ in task.queries]
    result = score(task, [made.text for made in generate_all(engine, prompts, params)])
    figures = conclude(run, engine, before, model)
    scores = {"exact_match": result.exact_match, "chrf": result.chrf, "queries": len(task.queries)}
    run.summarize(**scores, examples=len(task.examples))
    run.save_json("answers.json", result.to_dict())
    if as_json:
        emit({"run": run.id, "model": model, **result.to_dict(), "summary": figures | scores})
        return
    table = Table("query", "answer", "reference", "exact", "chrF")
    for row in result.answers:
        table.add_row(row.query, row.answer, row.accepted[0], "yes" if row.exact else "no", f"{row.chrf:.0f}")
    console().print(table)
    console().print(
        f"exact match {result.exact_match:.0%}, chrF {result.chrf:.1f} over {len(task.queries)} queries "
        f"after {len(task.examples)} examples"
    )
    tell_speed(run, engine, figures, None)


def load_engine(model: str, batch: int, tokens: int, dtype: str, compiled: bool | None, runs: Path | None) -> Engine:
    """The engine for a model reference; says on stderr what takes time."""
    from ridgeline.inference import resolve_model

    err = console(as_json=True)
    folder = resolve_model(model, runs, say=lambda line: err.print(line, soft_wrap=True))
    pays = tokens >= COMPILE_PAYS if compiled is None else compiled
    with err.status("loading and compiling" if pays else "loading"):
        from ridgeline.inference import Engine

        return Engine.load(folder, dtype=dtype, max_batch=batch, compile=pays)


def conclude(run: Run, engine: Engine, before: dict[str, Any], model: str) -> dict[str, Any]:
    """Speed beside the limit, into the run and back."""
    from ridgeline.cli.env import measure_with_progress
    from ridgeline.inference.api import measure

    limits = measure_with_progress(False, True, engine.device.type)
    after = engine.stats()
    figures: dict[str, Any] = measure(before, after, limits.read_bytes_per_second).to_dict()
    figures |= {name: after[name] for name in ("compiled", "compile_seconds", "context", "weight_bytes")}
    figures |= {"dtype": str(engine.dtype).removeprefix("torch."), "linears": after["linears"], "model": model}
    run.save_json("ceilings.json", limits.to_dict())
    run.summarize(**figures)
    return figures


def logprob_table(engine: Engine, made: Generation) -> Table:
    """One row per token: its text, its log-probability, the likeliest beside it."""
    table = Table("token", "log-probability", "likeliest")
    for token, value, top in zip(made.tokens, made.logprobs, made.top_logprobs, strict=True):
        others = "  ".join(f"{text!r} {logprob:.3f}" for _, text, logprob in top)
        table.add_row(repr(engine.tokenizer.decode([token], skip_special_tokens=False)), f"{value:.4f}", others)
    return table


def tell_speed(run: Run, engine: Engine, figures: dict[str, Any], reason: str | None) -> None:
    """The account on stderr: speed, bytes, MBU with its formula, how the linears were run, where the run is."""
    err = console(as_json=True)
    ended = f", ended by {reason}" if reason else ""
    prompt = f"prompt {figures['prompt_tokens']} tokens in {human_seconds(figures['prompt_seconds'])}"
    if figures["tokens_per_second"] is None:
        err.print(f"{prompt}; no decode step{ended}", highlight=False)
    else:
        mbu = f", MBU {figures['mbu']:.0%}" if figures["mbu"] is not None else ""
        rate, ceiling = figures["bytes_per_second"], figures["ceiling_bytes_per_second"]
        err.print(
            f"{prompt}; decode {figures['tokens_per_second']:.1f} tokens/s, {human_rate(rate, 'B/s')} "
            f"of {human_rate(ceiling, 'B/s')} measured{mbu}{ended}"
        )
        err.print(f"MBU = {figures['formula']}", soft_wrap=True)
    how = "compiled in {:.1f} s".format(figures["compile_seconds"]) if figures["compiled"] else "eager"
    kind = "prepacked" if figures["linears"]["packed"] else "plain"
    err.print(f"{figures['dtype']}, {how}, {kind} linears ({figures['linears']['reason']})", soft_wrap=True)
    err.print(f"run {run.path}", soft_wrap=True)
