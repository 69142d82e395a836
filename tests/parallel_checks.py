"""Checks that need two real processes, all in one launch: run by test_parallel.py under torch.distributed.run.

Each check returns plain data; rank 0 writes everything to the file named on the command line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ridgeline.config import ModelSection, OptimizerSection
from ridgeline.errors import JobError
from ridgeline.models import Decoder, DecoderConfig, config_from_section
from ridgeline.parallel import fsdp, norm
from ridgeline.parallel.collectives import Collectives
from ridgeline.parallel.mesh import Layout, joined
from ridgeline.train import checkpoint
from ridgeline.train.optimizer import build_optimizer, set_applied_steps
from ridgeline.train.state import TrainState, draw_parameters

LAYERS = 2
ROWS, SEQ = 8, 16


def odd_config() -> DecoderConfig:
    """Dims that do not divide by two processes: 97 rows of embedding, 60 wide."""
    section = ModelSection(layers=LAYERS, hidden=60, heads=2, intermediate=93, context_length=SEQ, tie_embeddings=True)
    return config_from_section(section, 97)


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 97, (ROWS, SEQ + 1), generator=generator)


def single(seed: int = 5) -> Decoder:
    """The same decoder in one process, without sharding."""
    decoder = Decoder(odd_config())
    draw_parameters(decoder, odd_config(), seed)
    return decoder


def sharded(layout: Layout, dtype: torch.dtype = torch.float32, seed: int = 5, **options: Any) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(odd_config())
    fsdp.parallelize(decoder, layout, dtype=dtype, **options)
    fsdp.sum_gradients(decoder)
    decoder.to_empty(device="cpu")
    decoder.init_buffers("cpu")
    draw_parameters(decoder, odd_config(), seed)
    return decoder


def gradient_pass(decoder: Decoder, data: torch.Tensor, micro_steps: int) -> float:
    parts = data.chunk(micro_steps)
    total = 0.0
    for index, part in enumerate(parts):
        fsdp.accumulate(decoder, last=index == micro_steps - 1)
        loss = decoder.loss(part[:, :-1], part[:, 1:].contiguous(), reduction="sum") / (ROWS * SEQ)
        loss.backward()
        total += loss.item()
    return total


def check_initialisation(layout: Layout) -> dict[str, str]:
    """SHA-256 of every whole parameter, and that the shards of one weight differ."""
    decoder = sharded(layout)
    whole = fsdp.full_state(decoder)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in whole.items()}


def check_gradients(layout: Layout) -> list[dict[str, Any]]:
    """Loss and each parameter's gradient against one process, for each layout."""
    reference = single()
    expected_loss = gradient_pass(reference, tokens(), 1)
    expected = {name: p.grad for name, p in reference.named_parameters()}
    scale = float(norm.global_norm(norm.gradients(reference.parameters())))
    mine = tokens()[layout.rows(ROWS).start : layout.rows(ROWS).stop]
    rows = []
    for reshard, micro, recompute, dtype in product(
        (True, False), (1, 4), (False, True), (torch.float32, torch.bfloat16)
    ):
        decoder = sharded(layout, dtype, reshard_after_forward=reshard, activation_checkpointing=recompute)
        loss = Collectives().all_reduce(torch.tensor(gradient_pass(decoder, mine, micro)))
        worst = 0.0
        for name, parameter in fsdp.named_parameters(decoder):
            assert parameter.grad is not None and expected[name] is not None
            whole = parameter.grad.full_tensor()
            floor = 1e-3 * scale  # gradients far below the global norm are rounding noise
            worst = max(worst, float((whole - expected[name]).norm() / (expected[name].norm() + floor)))
        measured = float(norm.global_norm(norm.gradients(decoder.parameters())))
        rows.append(
            {
                "layout": f"reshard={reshard} micro={micro} recompute={recompute} {dtype}",
                "fp32": dtype == torch.float32,
                "loss": abs(float(loss) - expected_loss) / expected_loss,
                "gradient": worst,
                "norm": abs(measured - scale) / scale,
            }
        )
    return rows


def check_collective_counts(layout: Layout) -> list[dict[str, Any]]:
    """Calls per step, counted by torch, against the closed form."""
    groups, mine, out = LAYERS + 1, tokens()[layout.rows(ROWS).start : layout.rows(ROWS).stop], []
    for reshard, micro in product((True, False), (1, 2)):
        decoder = sharded(layout, reshard_after_forward=reshard)
        gathers = scatters = 0
        for index, part in enumerate(mine.chunk(micro)):
            fsdp.accumulate(decoder, last=index == micro - 1)
            with CommDebugMode() as counted:  # takes one forward at a time
                loss = decoder.loss(part[:, :-1], part[:, 1:].contiguous(), reduction="sum")
                loss.backward()
            for name, calls in counted.get_comm_counts().items():
                gathers += calls if "allgather" in str(name) or "all_gather" in str(name) else 0
                scatters += calls if "reduce_scatter" in str(name) else 0
        predicted = fsdp.collectives_per_step(groups, micro, reshard)
        out.append({"reshard": reshard, "micro": micro, "counted": [gathers, scatters], "predicted": list(predicted)})
    return out


def check_norm(layout: Layout) -> dict[str, float]:
    """Plain and sharded tensors together, one of a single row so that rank 1 holds nothing of it."""
    generator = torch.Generator().manual_seed(9)
    whole = [torch.randn(shape, generator=generator) for shape in ((97, 5), (1, 7), (4, 4), (3,))]
    parts = [distribute_tensor(t, layout.mesh, [Shard(0)]) for t in whole[:2]]
    grads = [*parts, *whole[2:]]
    empty = min(part.to_local().numel() for part in parts)
    empties = Collectives().all_reduce(torch.tensor(float(empty == 0)))
    before = float(norm.global_norm(grads))
    norm.scale_(grads, 0.5)
    expected = float(
        torch.cat([t.flatten() for t in [t.clone() for t in whole[:2]] + [2 * t for t in whole[2:]]]).norm()
    )
    return {"norm": before, "expected": expected, "halved": float(norm.global_norm(grads)), "empty": float(empties)}


def check_collectives(layout: Layout) -> dict[str, Any]:
    """Right values, counts and bytes; and what is refused."""
    world, rank = Collectives(), layout.rank
    reduced = world.all_reduce(torch.full((2, 3), float(rank + 1)))
    gathered = world.all_gather(torch.tensor([[rank, rank]]))
    scattered = world.reduce_scatter(torch.arange(4.0))
    sent = world.all_to_all(torch.arange(3) + 10 * rank, *(([1, 2], [1, 3]) if rank == 0 else ([3, 0], [2, 0])))
    cast = world.broadcast(torch.tensor([rank + 7]), source=1)
    refused = []
    for call in (
        lambda: world.all_reduce(torch.zeros(4, 4).t()),
        lambda: world.broadcast(torch.zeros(4, 4)[:, 1]),
        lambda: world.all_reduce(torch.zeros(4, dtype=torch.float8_e4m3fn)),
        lambda: world.reduce_scatter(torch.zeros(3)),
        lambda: world.all_to_all(torch.zeros(3), [1, 1], [1, 1]),
    ):
        try:
            call()
            refused.append("")
        except JobError as error:
            refused.append(str(error))
    return {
        "reduced": reduced.tolist(),
        "gathered": gathered.tolist(),
        "scattered": scattered.tolist(),
        "sent": sent.tolist(),
        "cast": cast.tolist(),
        "refused": refused,
        "counts": {kind: [traffic.calls, traffic.bytes] for kind, traffic in world.counts.items()},
    }


def check_checkpoint(layout: Layout, folder: Path) -> dict[str, Any]:
    """Train a little, save on two processes; the parent loads on one. Also load here again, bit for bit."""
    decoder = sharded(layout)
    state = TrainState(decoder, odd_config(), build_optimizer(decoder, OptimizerSection()))
    mine = tokens()[layout.rows(ROWS).start : layout.rows(ROWS).stop]
    for _ in range(2):
        gradient_pass(decoder, mine, 1)
        state.optimizer.step()
        state.optimizer.zero_grad()
    checkpoint.save(state.tensors(), folder, 2, {"applied": 2}, keep=2)
    before = {name: _whole(tensor).clone() for name, tensor in state.tensors().items()}
    other = sharded(layout, seed=6)
    copy = TrainState(other, odd_config(), build_optimizer(other, OptimizerSection()))
    found = checkpoint.find_agreed(folder)
    assert found is not None
    checkpoint.load(copy.tensors(), found)
    set_applied_steps(copy.optimizer, 2)
    after = {name: _whole(tensor) for name, tensor in copy.tensors().items()}
    if layout.is_main:
        torch.save(before, folder / "expected.pt")
    return {"equal": all(torch.equal(before[name], after[name]) for name in before), "tensors": len(before)}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(target: Path) -> None:
    torch.set_num_threads(1)
    checks: dict[str, Callable[[Layout], Any]] = {
        "initialisation": check_initialisation,
        "gradients": check_gradients,
        "collective_counts": check_collective_counts,
        "norm": check_norm,
        "collectives": check_collectives,
        "checkpoint": lambda layout: check_checkpoint(layout, target.parent / "checkpoints"),
    }
    results: dict[str, Any] = {}
    with joined(timeout_seconds=60) as layout:
        results["world"] = layout.world_size
        for name, check in checks.items():
            try:
                results[name] = check(layout)
            except Exception:
                results[name] = {"error": traceback.format_exc()}
        if layout.is_main:
            target.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
