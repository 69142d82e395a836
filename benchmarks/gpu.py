"""Everything that has a GPU path, checked and measured in one visit of under ten minutes.

Runs on a bare machine with torch 2.11 and Triton 3.6, nothing to install: it imports only rooms that need torch,
numpy, safetensors and tokenizers. Every check compares with the CPU in fp32 or float64; every rate stands beside the
ceiling measured in the same run. A failed check is reported with its reason and makes the exit code 1; the others
still run.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.json          (one NVIDIA GPU)
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --quick    (the same code on a CPU, as the test suite does)
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.compiler.blocks import compile_blocks
from ridgeline.hardware import Ceilings, ceilings
from ridgeline.kernels import attention, cross_entropy, layer_norm, rms_norm, swiglu
from ridgeline.models import Decoder, DecoderConfig
from ridgeline.plan import flops_per_token

LLAMA_160M = {
    "layers": 12,
    "hidden": 768,
    "heads": 12,
    "intermediate": 2048,
    "context": 1024,
    "vocab": 32_000,
    "batch": 16,
}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "intermediate": 128, "context": 32, "vocab": 512, "batch": 2}


def main() -> int:
    """Run all checks; print and keep one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="toy shapes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU is visible to torch; --device cpu --quick runs the same code on the CPU")
    started = time.perf_counter()
    limits = ceilings(quick=options.quick)
    shape = TINY if options.quick else LLAMA_160M
    results: dict[str, Any] = {}
    checks = CHECKS | ({"captures": partial(captures, options.out.parent / "captures")} if options.out else {})
    for name, check in checks.items():
        results[name] = run_check(check, options.device, shape, limits)
        print(f"{name}: {results[name]}", flush=True)
    document = {
        "device": limits.device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started, 1),
        "ceilings": limits.to_dict(),
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, result in results.items() if not result["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} checks passed in {document['seconds']} s {failed or ''}")
    return 1 if failed else 0


Check = Callable[[str, dict[str, int], Ceilings], dict[str, Any]]


def run_check(check: Check, device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """The check's figures with ``ok``, or why it failed."""
    try:
        return {"ok": True, **check(device, shape, limits)}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def kernels_are_as_exact_as_torch(device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """Each operation in bf16 on the device: error against float64 at most twice torch's own."""
    torch.manual_seed(0)
    rows, dim = shape["batch"] * shape["context"], shape["hidden"]
    x, weight = torch.randn(rows, dim, dtype=torch.float64), torch.rand(dim, dtype=torch.float64) + 0.5
    bias, gate_up = torch.randn(dim, dtype=torch.float64), torch.randn(rows, 2 * dim, dtype=torch.float64)
    half = gate_up.shape[-1] // 2
    pairs = {
        "rms_norm": (
            lambda a, w: rms_norm.rms_norm(a, w, 1e-5),
            lambda a, w: F.rms_norm(a, (dim,), w, 1e-5),
            (x, weight),
        ),
        "layer_norm": (
            lambda a, w, b: layer_norm.layer_norm(a, w, b, 1e-5),
            lambda a, w, b: F.layer_norm(a, (dim,), w, b, 1e-5),
            (x, weight, bias),
        ),
        "swiglu": (swiglu.swiglu, lambda g: F.silu(g[..., :half]) * g[..., half:], (gate_up,)),
    }
    errors = {}
    for name, (ours, torchs, inputs) in pairs.items():
        low = [tensor.to(device, torch.bfloat16) for tensor in inputs]
        exact = torchs(*[tensor.double() for tensor in low]).cpu()
        mine, theirs = ((f(*low).double().cpu() - exact).norm() / exact.norm() for f in (ours, torchs))
        require(mine <= 2 * theirs + 1e-12, f"{name}: error {mine:.2e}, torch's own {theirs:.2e}")
        errors[name] = {"ours": float(mine), "torch": float(theirs)}
    return {"relative_error": errors}


def attention_and_loss_match_float64(device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """Attention (plain and windowed) and the memory-lean loss with gradients, fp32 on the device against float64."""
    torch.manual_seed(1)
    seq, heads = shape["context"], shape["heads"]
    q, k, v = (torch.randn(1, seq, h, 32, dtype=torch.float64) for h in (heads, heads // 2, heads // 2))
    worst = 0.0
    for window in (None, seq // 3):
        exact = attention.reference(q, k, v, window)
        made = attention.attention(*(t.to(device, torch.float32) for t in (q, k, v)), window).double().cpu()
        worst = max(worst, float((made - exact).abs().max()))
    hidden = torch.randn(seq, 64, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape["vocab"], 64, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, shape["vocab"], (seq,))
    exact_grads = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), (hidden, weight))
    low = [t.detach().to(device, torch.float32).requires_grad_() for t in (hidden, weight)]
    loss = cross_entropy.linear_cross_entropy(low[0], low[1], targets.to(device))
    grads = torch.autograd.grad(loss, low)
    gap = max(float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(grads, exact_grads, strict=True))
    require(worst < 1e-4 and gap < 1e-4, f"attention differs by {worst:.2e}, loss gradients by {gap:.2e}")
    return {"attention_max_difference": worst, "loss_gradient_difference": gap}


def decoder_agrees_with_cpu(device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """The decoder's logits in fp32 on the device against the CPU."""
    model = decoder(shape)
    tokens = torch.randint(0, shape["vocab"], (2, shape["context"]))
    with torch.no_grad():
        expected = model.logits(model(tokens))
        made = model.to(device).logits(model(tokens.to(device))).cpu()
    gap = float((made - expected).abs().max())
    require(gap < 1e-3, f"logits differ by {gap:.2e}")
    return {"max_difference": gap}


def training_step(device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """bf16 training steps, eager and with compiled blocks: tokens/s and MFU against the measured GEMM ceiling."""
    figures: dict[str, Any] = {}
    tokens = torch.randint(0, shape["vocab"], (shape["batch"], shape["context"] + 1), device=device)
    work = flops_per_token(config_of(shape), shape["context"])
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model = decoder(shape).to(device, torch.bfloat16)
        if name == "compiled":
            compile_blocks(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        losses = [_step(model, optimizer, tokens) for _ in range(5)]
        require(losses[-1] < losses[0], f"{name}: the loss does not fall: {losses}")
        seconds = median_seconds(lambda model=model, optimizer=optimizer: _step(model, optimizer, tokens), device)
        rate = shape["batch"] * shape["context"] / seconds
        mfu = rate * work.total / limits.gemm_flops_per_second["bf16"]
        figures[name] = {"tokens_per_second": rate, "mfu_of_measured_bf16_gemm": mfu}
    return {**figures, "formula": work.formula}


def decode_step(device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """One token through the whole model in bf16 (no cache yet on this path): share of the measured read bandwidth."""
    model = decoder(shape).to(device, torch.bfloat16)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        seconds = median_seconds(lambda: model.logits(model(token)), device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "mbu_of_measured_read": weights / seconds / limits.read_bytes_per_second}


def captures(folder: Path, device: str, shape: dict[str, int], limits: Ceilings) -> dict[str, Any]:
    """Three profiled training steps, and on a GPU a memory snapshot, left beside ``--out``: what `ridgeline trace`
    reads. They are read elsewhere, because reading needs packages that this machine may lack."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(0, shape["vocab"], (shape["batch"], shape["context"] + 1), device=device)
    model = decoder(shape).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    if device == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python")
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=3)
    keep = lambda made: made.export_chrome_trace(str(folder / "trace.json.gz"))
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=keep, record_shapes=True, profile_memory=True, with_stack=True
    ) as profiler:
        for _ in range(5):
            _step(model, optimizer, tokens)
            profiler.step()
    if device == "cuda":
        torch.cuda.memory._dump_snapshot(str(folder / "snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        kernels_are_as_exact_as_torch,
        attention_and_loss_match_float64,
        decoder_agrees_with_cpu,
        training_step,
        decode_step,
    )
}


def config_of(shape: dict[str, int]) -> DecoderConfig:
    """A Llama-style configuration of the given sizes."""
    head_dim = shape["hidden"] // shape["heads"]
    return DecoderConfig(
        family="llama",
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["heads"],
        head_dim=head_dim,
        intermediate_size=shape["intermediate"],
        context_length=shape["context"],
        rope_dim=head_dim,
    )


def decoder(shape: dict[str, int]) -> Decoder:
    """A decoder with seeded random weights of ordinary size."""
    torch.manual_seed(0)
    model = Decoder(config_of(shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
    return model


def _step(model: Decoder, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], reduction="mean")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def median_seconds(work: Callable[[], Any], device: str, repeats: int = 9) -> float:
    """Median of ``repeats`` after two warm-up calls, the device waited for each time."""
    samples = []
    for index in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if index >= 2:
            samples.append(time.perf_counter() - start)
    return sorted(samples)[len(samples) // 2]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def require(condition: Any, message: str) -> None:
    """Raise ``ValueError`` with ``message`` unless ``condition``."""
    if not bool(condition):
        raise ValueError(message)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
