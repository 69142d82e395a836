"""Activations kept, computed again or taken in parts of the batch, against the plain model; and the rules of memory and ranks
on baselines made by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from ridgeline.profiling.improve import BY_NAME, findings_memory, findings_ranks
from ridgeline.profiling.improve.findings import RULES
from ridgeline.profiling.improve.injection import hooks, memory
from test_profiling_ranks import job


class Block(torch.nn.Module):
    """Counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = torch.nn.Linear(6, 6), torch.nn.Dropout(0.2)
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        out: torch.Tensor = x + self.drop(torch.tanh(self.linear(x)))
        return out


class Model(torch.nn.Module):
    """Three blocks between two linears; ``checkpointed`` calls them as a script would."""

    def __init__(self, checkpointed: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(4, 6)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(3)])
        for block in self.blocks:
            block.drop.p = dropout  # type: ignore[union-attr]
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> dict[str, Any]:
        x = self.first(x if shift is None else x + shift)
        for block in self.blocks:
            if self.checkpointed:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)  # the place
            else:
                x = block(x)
        return {"out": x, "name": "kept as it is"}


def recorder() -> SimpleNamespace:
    """What the hooks need of a recorder; ``seen`` counts what was noted."""
    noted: list[tuple[str, float]] = []
    return SimpleNamespace(
        facts={"checkpoint": None, "compiled": False},
        applied=set(),
        in_backward=False,
        seen=noted,
        data=lambda kind, seconds: noted.append((kind, seconds)),
    )


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def restored() -> Iterator[None]:
    """The real ``checkpoint`` again afterwards."""
    yield
    torch.utils.checkpoint.checkpoint = memory.CHECKPOINT


def gradients(model: Model, data: torch.Tensor, note: SimpleNamespace | None = None) -> list[torch.Tensor]:
    """Of the mean square, under a fixed seed."""
    torch.manual_seed(7)
    loss = model(data)["out"].square().mean()
    if note is not None:
        note.in_backward = True
    loss.backward()
    if note is not None:
        note.in_backward = False
    return [p.grad for p in model.parameters() if p.grad is not None]


def forwards(model: Model) -> list[int]:
    """How often each block ran."""
    return [block.forwards for block in model.blocks]  # type: ignore[misc]


def test_checkpointing_is_seen_and_taken_out(data: torch.Tensor, restored: None) -> None:
    """Seen: every block runs twice, the second time counted as recomputation, at the script's line. Taken out: once, and the
    gradients are the same to the bit, dropout included."""
    expected = gradients(Model(), data)
    note = recorder()
    memory.hook_checkpoint(None, note)
    seen = Model(checkpointed=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(seen, data, note), expected, strict=True))
    assert forwards(seen) == [2, 2, 2] and [kind for kind, _ in note.seen] == ["recompute"] * 3 and not note.applied
    lines = Path(__file__).read_text().splitlines()
    assert (
        note.facts["checkpoint"]["where"]
        == f"{__file__}:{next(n for n, x in enumerate(lines, 1) if '# the place' in x)}"
    )
    note = recorder()
    memory.hook_checkpoint("off", note)
    off = Model(checkpointed=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(off, data, note), expected, strict=True))
    assert forwards(off) == [1, 1, 1] and note.applied == {"checkpoint"} and not note.seen


def test_checkpointing_is_put_around_repeated_blocks(data: torch.Tensor) -> None:
    """The three blocks and nothing else run twice; the gradients are the same to the bit; not while evaluating, and not in a
    job that checkpoints itself."""
    expected, note, model = gradients(Model(), data), recorder(), Model()
    assert memory.repeated(model) == list(model.blocks)
    assert memory.repeated(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())) == []
    hooks.change_modules([model], {"checkpoint": "blocks"}, note)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, data), expected, strict=True))
    assert forwards(model) == [2, 2, 2] and note.applied == {"checkpoint"}
    model.eval()(data)["out"].sum().backward()
    assert forwards(model) == [3, 3, 3]
    note.facts["checkpoint"] = {"where": "train.py:3"}
    with pytest.raises(RuntimeError, match="checkpoints its activations itself"):
        hooks.change_modules([model], {"checkpoint": "blocks"}, note)  # type: ignore[arg-type]
    note.facts["compiled"] = True
    with pytest.raises(RuntimeError, match="compiles its model itself"):
        hooks.change_modules([model], {"parts": 2}, note)  # type: ignore[arg-type]


def test_a_forward_in_parts_is_the_same_forward(data: torch.Tensor) -> None:
    """Ten rows in three parts (4, 4, 2): the same outputs and gradients as one batch but for the order of sums, keyword
    tensors are cut alike, and what is no tensor stays. Without gradients nothing is cut."""
    whole, cut, note = Model(dropout=0.0).double(), Model(dropout=0.0).double(), recorder()
    hooks.change_modules([cut], {"parts": 3}, note)  # type: ignore[arg-type]
    rows = data.double()
    a, b = whole(rows, shift=rows), cut(rows, shift=rows)
    assert torch.allclose(a["out"], b["out"], rtol=1e-12) and b["name"] == "kept as it is"
    assert forwards(cut) == [3, 3, 3] and note.applied == {"parts"}
    for mine, theirs in zip(gradients(whole, rows), gradients(cut, rows), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-15)
    before = forwards(cut)
    with torch.no_grad():
        cut(rows)
    assert forwards(cut) == [one + 1 for one in before]


def test_a_forward_that_has_no_parts_is_refused(data: torch.Tensor) -> None:
    """Batch norm, a returned loss, inputs without a common batch or with too few rows."""

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, *more: torch.Tensor) -> Any:
            out = self.linear(x)
            return out.mean() if not more else out

    with pytest.raises(RuntimeError, match="normalises over its batch"):
        memory.split_forward(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), 2, recorder())  # type: ignore[arg-type]
    model = Loss()
    memory.split_forward(model, 2, recorder())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="without the batch"):
        model(data)
    with pytest.raises(RuntimeError, match=r"sizes \[3, 10\] have no batch"):
        model(data, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"sizes \[1\] have no batch"):
        model(data[:1])


def baseline(**changes: Any) -> Any:
    """A job of two ranks on four cores: a step of 1 s, 0.4 s compute of which 0.1 s matrix products, 0.1 s host overhead."""
    facts = {"cuda": False, "compiled": False, "cudnn_benchmark": False, "checkpoint": None, "alloc_retries": 0}
    facts |= {"local_world": 2, "free_bytes": 10_000, "modules": ["Model"], "affinity": [0, 1, 2, 3], "cores": 4}
    facts |= changes.pop("facts", {})
    rank = {"facts": facts, "switches": 0, "stamps": [0.0] * 11, "passes": [1], "peak_memory_bytes": 2_000}
    ranks = [{**rank, "rank": number, **changes.pop("rank", {})} for number in range(changes.pop("world", 2))]
    known = {
        "step_seconds": 1.0,
        "scale": 0.5,
        "ranks": ranks,
        "facts": facts,
        "traces": Path("traces"),
        "leaves": SimpleNamespace(mean_seconds=1e-3, count=10),
        "breakdown": SimpleNamespace(matmul_seconds=lambda: 0.2),
        "part": lambda name: 0.25,
        "phase": lambda name, *phases: {"compute": 0.4, "host": 0.1}[name],
        "data_seconds": lambda kind: 0.3,
        "kernel_seconds": lambda wanted: 0.2 if wanted("sm90_xmma_fprop_implicit_gemm") and not wanted("gemm") else 0.0,
        "seconds_at": lambda rank: {"train.py:3": 0.9 if rank == 2 else 0.1, "train.py:9": 0.1 if rank == 2 else 0.9},
    }
    return SimpleNamespace(**{**known, **changes})


def test_recomputation_is_undone_only_where_there_is_memory() -> None:
    """0.3 s computed again. 10,000 bytes are free: enough for twice the peaks of 2,000 of two ranks, not for peaks of 3,000."""
    used = {"checkpoint": {"where": "train.py:7"}}
    assert list(findings_memory.recomputation(baseline())) == []
    (found,) = findings_memory.recomputation(baseline(facts=used))
    assert found.knob is not None and found.knob.inject == {"checkpoint": "off"} and found.where == "train.py:7"
    assert found.predicted == pytest.approx((0.15, 0.375)) and found.seconds == pytest.approx(0.3)
    (short,) = findings_memory.recomputation(baseline(facts=used, rank={"peak_memory_bytes": 3_000}))
    assert short.knob is None and "not tried: less than 2 times the peak is free" in short.advice
    (unknown,) = findings_memory.recomputation(baseline(facts={**used, "free_bytes": None}))
    assert unknown.knob is None


def test_rules_of_batches_by_hand() -> None:
    """Out of cache: 0.4 s less 0.2 s * 0.5 of products is 0.3 s. Four passes: three quarters of 0.1 s host. A full GPU asks for
    checkpointing, unless the job does that already."""
    (found,) = findings_memory.out_of_cache(baseline())
    assert (
        found.knob is not None and found.knob.inject == {"parts": 8} and found.predicted == pytest.approx((0.0, 0.09))
    )
    small = SimpleNamespace(mean_seconds=1e-4, count=10)
    for other in (baseline(leaves=small), baseline(facts={"compiled": True}), baseline(facts={"cuda": True})):
        assert list(findings_memory.out_of_cache(other)) == []
    (passes,) = findings_memory.accumulation(baseline(rank={"passes": [4, 4]}))
    assert passes.knob is None and passes.predicted == pytest.approx((0.0, 0.075)) and "script's own" in passes.advice
    assert list(findings_memory.accumulation(baseline())) == []
    (full,) = findings_memory.allocator(baseline(facts={"cuda": True, "alloc_retries": 3}))
    assert full.knob is not None and full.knob.inject == {"checkpoint": "blocks"} and "retried 3 times" in full.text
    assert list(findings_memory.allocator(baseline(facts={"alloc_retries": 3, "checkpoint": {"where": "x"}}))) == []


def test_rules_of_cores_and_convolutions_by_hand() -> None:
    """500 switches in ten steps are 5 ms of cold cache a step; ranks with cores of their own, or one rank alone, are left. 0.2 s
    of convolution kernels that cuDNN did not time."""
    (found,) = findings_ranks.pinning(baseline(rank={"switches": 500}))
    assert found.knob is not None and found.knob.name == "pin" and found.predicted == pytest.approx((0.0, 0.005))
    assert "2 ranks share the cores 0-3; one is pushed off 50.0 times a step" in found.text
    assert list(findings_ranks.pinning(baseline(world=1, rank={"switches": 500}))) == []
    apart = baseline(rank={"switches": 500})
    apart.ranks[1] = {**apart.ranks[1], "facts": {**apart.facts, "affinity": [2, 3]}}
    assert list(findings_ranks.pinning(apart)) == []
    (convolutions,) = (rule for rule in RULES if rule.__name__ == "_convolutions")
    (one,) = convolutions(baseline(facts={"cuda": True}))
    assert one.knob == BY_NAME["cudnn-benchmark"] and one.predicted == pytest.approx((0.0, 0.06))
    for facts in ({"cuda": False}, {"cuda": True, "cudnn_benchmark": True}):
        assert list(convolutions(baseline(facts=facts))) == []


def test_a_straggler_costs_what_it_comes_later_than_the_next_latest() -> None:
    """Rank 2 comes 300, 500 and 400 us after rank 1: 400 us in a typical step, half of that without tracing, at the line on
    which it spends more than the others. Ranks late in turn are none."""
    arrivals = [[1000, 1000, 1000], [1100, 1100, 1100], [1400, 1600, 1500]]
    (found,) = findings_ranks.straggler(baseline(world=3, tables=job(arrivals)))
    assert (found.rank, found.where, found.knob) == (2, "train.py:3", None)
    assert found.seconds == pytest.approx(200e-6) and found.predicted == pytest.approx((100e-6, 200e-6))
    assert "arrives last at 100% of the collectives" in found.text and "mine::work" in found.how
    in_turn = [[500, 900, 500, 500], [500, 500, 900, 500], [900, 500, 500, 500]]
    assert list(findings_ranks.straggler(baseline(world=3, tables=job(in_turn)))) == []
    assert list(findings_ranks.straggler(baseline(world=1))) == []


def test_ranks_are_pinned_to_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on five cores: 0 and 1, then 2 and 3."""
    taken: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: taken.append(list(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local)
        hooks._threads({"pin": True}, recorder())  # type: ignore[arg-type]
    assert taken == [[0, 1], [2, 3]]
