"""From a serving baseline to findings. Seconds are per pass over the load.

A decode step reads all weights whatever its batch, so more slots mean fewer steps; what is no matrix product shrinks by fusion;
a prompt in larger pieces fills the matrix products better.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ridgeline.profiling.improve import knobs
from ridgeline.profiling.improve.finding import Finding, ranked
from ridgeline.profiling.improve.findings import processor_has_bf16
from ridgeline.profiling.improve.knobs import Knob
from ridgeline.profiling.improve.serving.job import Load, Served
from ridgeline.profiling.improve.trial import Trial

CHUNK = {False: 128, True: 512}
"""The engine's own prefill chunk, without and with CUDA."""


class Baseline:
    """The unchanged server under its load."""

    def __init__(self, trial: Trial, served: Served, load: Load) -> None:
        assert trial.traces is not None
        self.seconds, self.served, self.load = trial.step_seconds, served, load
        self.facts: dict[str, Any] = trial.ranks[0]
        self.trace = str(Path(trial.traces) / "rank0.json.gz")


def of_served(trial: Trial, served: Served, load: Load) -> list[Finding]:
    """Findings of a served model, most seconds saved first."""
    base = Baseline(trial, served, load)
    return ranked([one for rule in RULES for one in rule(base)], base.seconds)


def by_name(served: Served, load: Load) -> dict[str, Knob]:
    """What ``--knob NAME`` means for this server."""
    return {
        "compile": _compile(not served.compile),
        "slots": _slots(max(2 * served.max_batch, load.streams)),
        "prefill-chunk": _prefill_chunk(4 * (served.prefill_chunk or CHUNK[False])),
        "dtype": _dtype("bf16" if served.dtype == "fp32" else "fp32"),
        "threads": _thread_count(1),
    }


def _knob(name: str, key: str, value: Any, result: knobs.Result, permanent: str) -> Knob:
    setting = f"{key}={json.dumps(value)}"
    return Knob(name, setting, result, permanent, {}, (setting,))


def _compile(on: bool) -> Knob:
    return _knob("compile", "compile", on, "reordered", f"ridgeline serve {'without' if on else 'with'} --no-compile")


def _slots(count: int) -> Knob:
    return _knob("slots", "max_batch", count, "reordered", f"ridgeline serve --max-batch {count}")


def _prefill_chunk(tokens: int) -> Knob:
    return _knob("prefill-chunk", "prefill_chunk", tokens, "reordered", f"ridgeline serve --prefill-chunk {tokens}")


def _dtype(name: str) -> Knob:
    return _knob("dtype", "dtype", name, "precision", f"ridgeline serve --dtype {name}")


def _thread_count(count: int) -> Knob:
    return replace(
        knobs.threads(count), setting=f"{count} threads", permanent=f"OMP_NUM_THREADS={count} ridgeline serve"
    )


def _not_compiled(base: Baseline) -> Iterator[Finding]:
    """Small operators around the matrix products: fusion and fewer dispatches leave a part of them."""
    if base.facts["compiled"]:
        return
    products = base.facts["product_seconds"] * base.facts["decode_steps"]
    seconds = max(base.facts["decode_seconds"] - products, 0.0)
    text = f"decode is not compiled: {seconds:.4f} s per pass outside of matrix products and attention"
    how = (
        f"{base.facts['decode_seconds']:.4f} s of decode less {products:.4f} s of products: fusion leaves a part of it"
    )
    yield _finding(base, "not compiled", text, seconds, (0.25 * seconds, 0.95 * seconds), how, _compile(True))


def _few_slots(base: Baseline) -> Iterator[Finding]:
    """Requests beyond the slots wait; their tokens cost decode steps of their own, their prompts prefill steps."""
    slots, streams = base.served.max_batch, base.load.streams
    seconds = base.facts["decode_seconds"] + base.facts["prefill_seconds"]
    if streams <= slots:
        return
    wanted = min(streams, 8 * slots)
    rounds = -(-streams // slots), -(-streams // wanted)
    high = seconds * (1 - rounds[1] / rounds[0])
    text = f"{streams} requests at once and {slots} slots: {streams - slots} wait for a slot"
    how = f"{rounds[1]} instead of {rounds[0]} rounds of {seconds:.4f} s of prefill and decode; larger steps cost more each"
    yield _finding(base, "slots", text, seconds, (0.1 * high, high), how, _slots(wanted))


def _small_chunks(base: Baseline) -> Iterator[Finding]:
    """A prompt cut into pieces reads the weights once for each."""
    chunk, prefill = base.served.prefill_chunk or CHUNK[base.facts["cuda"]], base.facts["prefill_seconds"]
    pieces = -(-base.load.prompt_tokens // chunk)
    if pieces < 2:
        return
    wanted = min(4 * chunk, base.load.prompt_tokens)
    high = prefill * 0.5 * (1 - chunk / wanted)
    text = f"prompts are computed in {pieces} pieces of at most {chunk} tokens, {prefill:.4f} s per pass"
    how = f"pieces of {wanted} tokens: at most half of that, by the share of pieces saved"
    yield _finding(base, "prefill", text, prefill, (0.0, high), how, _prefill_chunk(wanted))


def _threads(base: Baseline) -> Iterator[Finding]:
    """One server uses the cores once: not fewer, not more."""
    used, cores = int(base.facts["threads"]), int(base.facts["cores"])
    if base.facts["cuda"] or used == cores:
        return
    share = 1 - used / cores if used < cores else 1 - cores / used
    text = f"{used} threads and {cores} cores"
    how = f"{base.seconds:.4f} s with {cores} threads instead of {used}"
    yield _finding(base, "threads", text, base.seconds, (0.0, base.seconds * share), how, _thread_count(cores))


def _precision(base: Baseline) -> Iterator[Finding]:
    """Half the bytes of every weight, where the processor or the GPU has bf16 units."""
    if base.served.dtype != "fp32" or not (base.facts["cuda"] or processor_has_bf16()):
        return
    seconds = base.facts["decode_seconds"] + base.facts["prefill_seconds"]
    how = f"half the weight bytes of {seconds:.4f} s of prefill and decode"
    yield _finding(base, "precision", "weights in fp32", seconds, (0.0, 0.6 * seconds), how, _dtype("bf16"))


def _finding(
    base: Baseline, name: str, text: str, seconds: float, interval: tuple[float, float], how: str, knob: Knob
) -> Finding:
    low, high = (min(max(one, 0.0), base.seconds) for one in interval)
    return Finding(name, text, seconds, (low, high), how, knob, knob.permanent, trace=base.trace)


RULES: tuple[Callable[[Baseline], Iterator[Finding]], ...] = (
    _not_compiled,
    _few_slots,
    _small_chunks,
    _threads,
    _precision,
)
