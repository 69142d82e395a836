"""What runs in the process of a serving trial: ``python -m ridgeline.profiling.improve.serving.child SPEC.json``.

::

    load the engine -> one pass (warm) -> timed passes -> one pass with log-probabilities -> (baseline) a trace of decode steps
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

from ridgeline.errors import JobError, UserError
from ridgeline.inference import Engine, Generation, Request, SamplingParams, generate
from ridgeline.serving.load.workload import WORDS

BEST = 5
TRACED_STEPS = 8
LEAST_PASSES = 3


def main(file: str) -> None:
    """Measure and write ``result.json``; a failure ends with one line on stderr."""
    spec = json.loads(Path(file).read_text(encoding="utf-8"))
    try:
        document = measure(spec)
    except (UserError, JobError) as error:
        sys.exit(str(error))
    target = Path(spec["folder"]) / "result.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    os.replace(temporary, target)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """The engine of ``spec["served"]`` under ``spec["load"]``: seconds of each pass, answers, facts for the rules."""
    import torch

    served, load = spec["served"], spec["load"]
    options = {key: served[key] for key in ("dtype", "max_batch", "max_context", "compile")}
    engine = Engine.load(served["model"], chunk=served["prefill_chunk"], **options)
    asked = prompts(engine, load)
    one_pass(engine, asked, load["new_tokens"])
    before, passes = engine.stats(), list[float]()
    while len(passes) < LEAST_PASSES or (sum(passes) < spec["seconds"] and len(passes) < spec["passes"]):
        passes.append(one_pass(engine, asked, load["new_tokens"])[0])
    after = engine.stats()
    answers = one_pass(engine, asked, load["new_tokens"], BEST)[1]
    counts = ("prefill_seconds", "decode_seconds", "decode_steps", "decode_tokens", "prompt_tokens")
    facts = {name: (after[name] - before[name]) / len(passes) for name in counts}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts |= {"threads": torch.get_num_threads(), "cores": cores, "context": after["context"]}
    facts |= {"cuda": torch.cuda.is_available(), "compiled": after["compiled"], "linears": after["linears"]["reason"]}
    if spec["profile"]:
        facts |= trace_decode(engine, asked, load["new_tokens"], Path(spec["folder"]) / "traces" / "rank0.json.gz")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "passes": passes,
        "tokens": [one.tokens for one in answers],
        "best": [[[(token, value) for token, _, value in step] for step in one.top_logprobs] for one in answers],
        "dtype": served["dtype"],
        "facts": facts,
        "peak": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def prompts(engine: Any, load: dict[str, int]) -> list[list[int]]:
    """Token ids of ``streams`` prompts that differ from the first word on: words, or numbers without a tokenizer."""
    out = []
    for number in range(load["streams"]):
        draw = random.Random(number)
        if engine.tokenizer is None:
            ids = [draw.randrange(engine.vocab_size) for _ in range(load["prompt_tokens"])]
        else:
            ids = list(engine.tokenizer.encode(" ".join(draw.choice(WORDS) for _ in range(load["prompt_tokens"]))))
        out.append(list(itertools.islice(itertools.cycle(ids), load["prompt_tokens"])))
    return out


def one_pass(
    engine: Any, asked: list[list[int]], new_tokens: int, logprobs: int | None = None
) -> tuple[float, list[Generation]]:
    """Wall seconds from the first request's submission to the last one's last token, and the answers."""
    params = _params(new_tokens, logprobs)
    began = time.perf_counter()
    answers = generate(engine, asked, params)
    return time.perf_counter() - began, answers


def _params(new_tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs)


def trace_decode(engine: Any, asked: list[list[int]], new_tokens: int, file: Path) -> dict[str, Any]:
    """A trace of a few decode steps, without prefill; seconds per step inside matrix products and attention."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    first = asked[: engine.max_batch]
    for number, prompt in enumerate(first):
        engine.submit(Request(f"traced-{number}", prompt, _params(new_tokens)))
    prompt_tokens = engine.totals.prompt_tokens + sum(map(len, first))
    while engine.totals.prompt_tokens < prompt_tokens and engine.has_work():
        engine.step()
    steps, cuda = 0, torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        while engine.has_work() and steps < TRACED_STEPS:
            engine.step()
            steps += 1
    for number in range(len(first)):
        engine.cancel(f"traced-{number}")
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = file.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    file.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=3))
    plain.unlink()
    spent = sum(_self_seconds(one, cuda) for one in profiler.key_averages() if is_product(one.key))
    return {"traced_steps": steps, "product_seconds": spent / max(steps, 1)}


def is_product(name: str) -> bool:
    """Whether an operator is a matrix product or attention, which no fusion shortens."""
    short = name.rpartition("::")[2]
    return short in ("mm", "addmm", "bmm", "baddbmm") or "linear" in short or "attention" in short


def _self_seconds(event: Any, cuda: bool) -> float:
    return float(event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6


if __name__ == "__main__":
    main(sys.argv[1])
