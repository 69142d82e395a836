"""The backend against eager and against Inductor's default, on five small models and on decode steps, with compile time.

Every case is a process of its own in which eager, ``torch.compile(model)`` twice (its A/A) and
``torch.compile(model, backend="ridgeline")`` take turns (A B C D, D C B A, ...); a figure is the median over rounds of the
median call. Ratios are seconds of Inductor over ours: above 1 is faster. Cold compile times are of processes with an
empty cache each, in alternating order: seconds of the first call, ours over Inductor's.

    python benchmarks/compiler.py --out compiler.json
    python benchmarks/compiler.py --quick --only decode
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ridgeline.bench import interleave
from ridgeline.runs import environment

MODELS = ("llama", "gpt2", "bert", "vit", "t5")
DTYPES = ("bf16", "fp32")
WAYS = ("forward", "training")
CONTENDERS = ("eager", "inductor", "inductor again", "ridgeline")
DECODE_BATCHES = (1, 2, 4, 8)
BAR, DECODE_BAR, COMPILE_BAR = 0.98, 1.15, 1.10  # of Inductor
SAMPLE_SECONDS = 0.6  # a contender's turn in one round

Case = dict[str, Any]


def main() -> None:
    """Measure, print the table, keep the JSON."""
    options = _arguments()
    if options.worker:
        print(json.dumps(_work(json.loads(options.worker))))
        return
    console = Console(stderr=True, highlight=False)
    rows = []
    for case in _cases(options):
        console.print(f"measuring {_name(case)}")
        rows.append(_measure(case, options, console))
    document = {
        "rows": rows,
        "settings": {"rounds": options.rounds, "quick": options.quick},
        "environment": environment(),
    }
    Console(highlight=False, width=120).print(_table(rows))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile-rounds", type=int, default=2, help="cold compiles of each contender; 0 for none")
    parser.add_argument(
        "--quick", action="store_true", help="three rounds, bf16 forward and decode only, no cold compiles"
    )
    parser.add_argument("--only", action="append", help="cases whose name holds this (may be repeated)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.compile_rounds = 3, 0
    return options


def _cases(options: argparse.Namespace) -> list[Case]:
    cases: list[Case] = [
        {"model": model, "way": way, "dtype": dtype} for model in MODELS for way in WAYS for dtype in DTYPES
    ]
    if options.quick:
        cases = [case for case in cases if case["way"] == "forward" and case["dtype"] == "bf16"]
    cases += [{"model": "decode", "way": "forward", "dtype": "bf16", "batch": batch} for batch in DECODE_BATCHES]
    return [case for case in cases if any(word in _name(case) for word in options.only or [""])]


def _name(case: Case) -> str:
    return f"{case['model']} {case['way']} {case['dtype']}" + (f" batch {case['batch']}" if "batch" in case else "")


def _measure(case: Case, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One row: seconds of each contender, ratios, floors; cold compile times of bf16 cases."""
    try:
        row = _process({**case, "rounds": options.rounds})
        if options.compile_rounds and case["dtype"] == "bf16" and case.get("batch", 1) == 1:
            row["compile"] = _cold(case, options.compile_rounds)
    except RuntimeError as error:
        console.print(f"{_name(case)}: {error}")
        return {"name": _name(case), "failure": str(error)}
    return {"name": _name(case), "case": case, **row}


def _cold(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of the first call with an empty cache, of Inductor and of ours."""
    contenders = {name: partial(_process, {**case, "cold": name}) for name in ("inductor", "ridgeline")}
    session = interleave(contenders, rounds)
    if session.failures:
        raise RuntimeError(str(session.failures))
    medians = {name: session.median(name, "seconds") for name in contenders}
    return {**medians, "ratio": medians["ridgeline"] / medians["inductor"], "samples": session.samples}


def _process(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        folder = cache if "cold" in job or not kept else kept
        done = subprocess.run(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            capture_output=True,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# In a worker


def _work(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    step = STEPS[job["model"]](job)
    if "cold" in job:
        started = time.perf_counter()
        _contender(job["cold"], step, job)()
        return {"seconds": time.perf_counter() - started}
    calls = {name: _contender(name, step, job) for name in CONTENDERS}
    for call in calls.values():
        call()
    turns = {name: partial(_turn, call) for name, call in calls.items()}
    session = interleave(turns, job["rounds"])
    if session.failures:
        raise RuntimeError(str(session.failures))
    medians = {name: session.median(name, "seconds") for name in CONTENDERS}
    again = medians["inductor"] / medians["inductor again"]
    return {
        "seconds": medians,
        "over_inductor": statistics.median((medians["inductor"], medians["inductor again"])) / medians["ridgeline"],
        "over_eager": medians["eager"] / medians["ridgeline"],
        "aa_floor": max(abs(again - 1), *(session.floor(name, "seconds") for name in CONTENDERS[1:])),
        "threads": torch.get_num_threads(),
        "samples": session.samples,
    }


def _turn(call: Callable[[], Any]) -> dict[str, float]:
    """The median call of one turn, after one that is not counted."""
    call()
    samples: list[float] = []
    until = time.perf_counter() + SAMPLE_SECONDS
    while time.perf_counter() < until or len(samples) < 3:
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return {"seconds": statistics.median(samples)}


def _contender(name: str, step: tuple[Any, tuple[Any, ...]], job: dict[str, Any]) -> Callable[[], Any]:
    import torch

    module, inputs = step
    run = {
        "eager": lambda: module,
        "inductor": lambda: torch.compile(module),
        "inductor again": lambda: torch.compile(module),
        "ridgeline": lambda: torch.compile(module, backend="ridgeline"),
    }[name]()

    def forward() -> Any:
        with torch.no_grad():
            return run(*inputs)

    def training() -> None:
        run(*inputs).float().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return training if job["way"] == "training" else forward


def _dtype(job: dict[str, Any]) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[job["dtype"]]


def _first_output(job: dict[str, Any], model: Any, inputs: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    """A module whose forward returns one tensor, so that every model has the same loss."""
    import torch

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            return self.model(**dict(zip(names, values, strict=True)), return_dict=False)[0]

    return First().to(_dtype(job)).train(job["way"] == "training"), inputs


def _llama(job: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=2048, use_cache=False,
    )  # fmt: skip
    return _first_output(job, LlamaModel(config), (_tokens(2048, 2, 128),), ("input_ids",))


def _gpt2(job: dict[str, Any]) -> Any:
    from transformers import GPT2Config, GPT2Model

    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_embd=512, n_layer=2, n_head=8, vocab_size=2048, use_cache=False, **rates)
    return _first_output(job, GPT2Model(config), (_tokens(2048, 2, 128),), ("input_ids",))


def _bert(job: dict[str, Any]) -> Any:
    from transformers import BertConfig, BertModel

    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = BertConfig(
        hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=2048, vocab_size=2048, **rates
    )
    return _first_output(job, BertModel(config), (_tokens(2048, 2, 128),), ("input_ids",))


def _vit(job: dict[str, Any]) -> Any:
    import torch
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=2048, image_size=128
    )
    return _first_output(job, ViTModel(config), (torch.randn(2, 3, 128, 128, dtype=_dtype(job)),), ("pixel_values",))


def _t5(job: dict[str, Any]) -> Any:
    from transformers import T5Config, T5Model

    config = T5Config(
        d_model=512, d_kv=64, d_ff=1024, num_layers=2, num_heads=8, vocab_size=2048, dropout_rate=0.0, use_cache=False
    )
    inputs = (_tokens(2048, 2, 128), _tokens(2048, 2, 64))
    return _first_output(job, T5Model(config), inputs, ("input_ids", "decoder_input_ids"))


def _decode(job: dict[str, Any]) -> Any:
    """One decode step of a Llama of SmolLM2-135M's widths, six layers, 256 positions in the cache."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    dim, wide, heads, groups, width, context, layers = 576, 1536, 9, 3, 64, 256, 6

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))

        def forward(self, x: Any) -> Any:
            high = x.float()
            return self.weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Norm(), Norm()
            self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.k, self.v = nn.Linear(dim, groups * width, bias=False), nn.Linear(dim, groups * width, bias=False)
            self.gate, self.up = nn.Linear(dim, wide, bias=False), nn.Linear(dim, wide, bias=False)
            self.down = nn.Linear(wide, dim, bias=False)
            self.register_buffer("keys", torch.randn(job["batch"], groups, context, width))
            self.register_buffer("values", torch.randn(job["batch"], groups, context, width))

        def forward(self, x: Any, place: Any) -> Any:
            normed = self.first(x)
            q, k, v = (f(normed).unflatten(-1, (-1, width)).transpose(1, 2) for f in (self.q, self.k, self.v))
            self.keys.index_copy_(2, place, k)
            self.values.index_copy_(2, place, v)
            mixed = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
            x = x + self.o(mixed.transpose(1, 2).flatten(2))
            normed = self.second(x)
            return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(layers))

        def forward(self, x: Any, place: Any) -> Any:
            for block in self.blocks:
                x = block(x, place)
            return x

    assert heads * width == dim
    step = Step().to(torch.bfloat16).eval()
    return step, (torch.randn(job["batch"], 1, dim, dtype=torch.bfloat16), torch.tensor([200]))


def _tokens(vocab: int, *shape: int) -> Any:
    import torch

    return torch.randint(0, vocab, shape)


STEPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": _llama, "gpt2": _gpt2, "bert": _bert, "vit": _vit, "t5": _t5, "decode": _decode
}  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> Table:
    title = f"seconds over ours; bars: {BAR} of Inductor, {DECODE_BAR} on decode, compile time at most {COMPILE_BAR}"
    shown = Table(title=title)
    for column in ("case", "ours ms", "x eager", "x Inductor", "A/A floor", "bar", "compile s", "x Inductor's"):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        if "failure" in row:
            shown.add_row(row["name"], row["failure"])
            continue
        bar = DECODE_BAR if row["case"]["model"] == "decode" else BAR
        cold = row.get("compile")
        shown.add_row(
            row["name"],
            f"{row['seconds']['ridgeline'] * 1e3:.2f}",
            f"{row['over_eager']:.2f}",
            f"{row['over_inductor']:.2f}",
            f"{row['aa_floor']:.1%}",
            "met" if row["over_inductor"] >= bar else f"below {bar}",
            "" if cold is None else f"{cold['ridgeline']:.1f}",
            "" if cold is None else f"{cold['ratio']:.2f}",
        )
    return shown


if __name__ == "__main__":
    main()
