"""From a baseline to findings: what costs how many seconds of a step, where, which knob, and what it should save.

A rule is a generator over the baseline. Its prediction is an interval of seconds per step derived from what was
measured; ``how`` says from what. A finding without a knob still names the place and what to edit there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ridgeline.profiling.improve import findings_memory, findings_ranks, knobs
from ridgeline.profiling.improve.evidence import SYNCHRONISING, Baseline
from ridgeline.profiling.improve.finding import SMALL_SECONDS, WORTH_NAMING, Finding, cores_per_rank, make, ranked
from ridgeline.profiling.improve.habits import habits
from ridgeline.profiling.results import StepBreakdown
from ridgeline.profiling.verdict import verdict

MANY_OPERATORS = 100
CONVOLUTIONS = ("conv", "fprop", "dgrad", "wgrad", "winograd")
"""Parts of the names of cuDNN's kernels."""
BUSY = 0.2
"""A loader that computes for this share of its wait is busy (on a shared core it cannot for much more), else it waits."""


def of_user_job(base: Baseline) -> list[Finding]:
    """Findings of a user's job, most seconds saved first."""
    found = [one for rule in RULES for one in rule(base)]
    named = {one.where for one in found if one.name != "idle"}
    return ranked([one for one in found if one.name != "idle" or one.where not in named], base.step_seconds)


def of_own_job(breakdown: StepBreakdown, step_seconds: float, config: Mapping[str, Any], trace: str) -> list[Finding]:
    """Findings of a configuration of ours: the profile's, whose knobs are overrides."""
    traced = breakdown.step_seconds
    scale = min(1.0, step_seconds / traced) if traced else 1.0
    found = []
    for one in verdict(breakdown, config=config).findings:
        knob, gain = knobs.override(one.knob), one.gain_seconds * scale
        interval = (0.0, gain) if one.at_most else (0.5 * gain, 1.25 * gain)
        advice = knob.permanent if knob else f"{one.knob} (not tried: it is no knob that leaves the training the same)"
        text = f"{one.part}: {one.how}"
        found.append(Finding(one.part, text, gain, interval, one.how, knob, advice, trace=trace))
    return ranked(found, step_seconds)


def _loader(base: Baseline) -> Iterator[Finding]:
    """With W workers a batch takes 1/W of its time, and the rest of the step hides it: max(rest, wait / W)."""
    wait, cpu = base.data_seconds("wait"), base.data_seconds("cpu")
    loaders = list(base.facts["loaders"])
    if wait < WORTH_NAMING * base.step_seconds or not loaders:
        return
    loader = _main_loader(base, loaders)
    rest, cores = max(base.step_seconds - wait, 0.0), cores_per_rank(base)
    busy = cpu > BUSY * wait
    kind = "preprocessing each item in Python" if busy else "waiting in the dataset"
    where = _line_of(base, loader) or loader["item"]
    text = f"the step waits {wait:.4f} s for its batch: {kind} ({loader['dataset']}, {loader['workers']} workers)"
    if loader["workers"]:
        count, high = 2 * loader["workers"], wait / 2
        how = f"twice the workers halve the {wait:.4f} s at best"
    else:
        count = _workers(wait, rest, cores, busy)
        high = base.step_seconds - max(rest, wait / count)
        how = f"{count} workers prepare a batch in {wait / count:.4f} s under the other {rest:.4f} s of the step"
    knob = None if loader["iterable"] else knobs.workers(count, base.facts["cuda"], loader["where"])
    advice = knob.permanent if knob else _iterable_advice(loader, count)
    # Workers that compute share the cores with the step and with whatever else runs: a machine may allow little or none.
    full = base.facts["load_average"] > base.facts["cores"] - 0.5
    low = (0.5 if not busy else 0.0 if full else 0.2) * high
    yield make(base, "loader", text, wait, (low, high), how, knob, advice, where)


def _main_loader(base: Baseline, loaders: list[dict[str, Any]]) -> dict[str, Any]:
    """The loader whose dataset the sampler saw, else the first."""
    seen = {where.rpartition(":")[0] for where in base.seconds_at(0)}
    return next((one for one in loaders if one["item"].rpartition(":")[0] in seen), loaders[0])


def _line_of(base: Baseline, loader: dict[str, Any]) -> str:
    """The hottest line of the dataset's ``__getitem__``, while it runs in this process, or nothing.

    Only of its own lines: the sampler gets its turn most easily where torch lets go of the interpreter, which is in the
    training loop even when the time goes to Python's arithmetic.
    """
    file, _, first = loader["item"].rpartition(":")
    if not file or loader["workers"]:
        return ""

    def inside(where: str) -> bool:
        path, _, line = where.rpartition(":")
        return path == file and int(first) <= int(line) <= int(loader["item_end"])

    return base.hottest(0, inside)


def _workers(wait: float, rest: float, cores: int, busy: bool) -> int:
    """As many as hide the wait under the rest of the step; those that compute need a core each."""
    wanted = math.ceil(wait / max(rest, wait / 8))
    return max(2, min(wanted, max(cores, 2) if busy else 8))


def _iterable_advice(loader: dict[str, Any], count: int) -> str:
    split = "split the stream by torch.utils.data.get_worker_info() first"
    return f"{loader['where']}: {split}, then DataLoader(num_workers={count}); not tried: workers would repeat samples"


def _small_operators(base: Baseline) -> Iterator[Finding]:
    """Many short operators cost their dispatch; a compiler fuses them. Matrix products stay what they are."""
    small = base.leaves
    modules = base.facts["modules"]
    if base.facts["compiled"] or small.count < MANY_OPERATORS or small.mean_seconds > SMALL_SECONDS or not modules:
        return
    compute, host = (base.phase(part, "forward", "backward") for part in ("compute", "host"))
    matmul = base.breakdown.matmul_seconds() * base.scale
    seconds = max(compute + host - matmul, 0.0)
    calls = base.calls(lambda name: name not in SYNCHRONISING)
    where = next(iter(calls), "")
    text = f"{small.count:.0f} operators of {small.mean_seconds * 1e6:.1f} us per step in {', '.join(modules)}"
    how = f"{seconds:.4f} s of host overhead and of operators that are no matrix products: fusion leaves a part of it"
    interval = (0.25 * seconds, 0.95 * seconds)
    knob = knobs.compiled()
    yield make(base, "small operators", text, seconds, interval, how, knob, knob.permanent, where)


def _launches(base: Baseline) -> Iterator[Finding]:
    """A device that waits for launches replays them as one CUDA graph."""
    if base.breakdown.device != "gpu" or base.facts["compiled"]:
        return
    seconds = base.phase("host", "forward", "backward", "other")
    how = f"{seconds:.4f} s the device waits for the host"
    knob = knobs.compiled(cuda_graphs=True)
    yield make(base, "launches", how, seconds, (0.2 * seconds, seconds), how, knob, knob.permanent)


def _optimizer(base: Baseline) -> Iterator[Finding]:
    """One fused kernel instead of several operators per tensor."""
    plain = [one for one in base.facts["optimizers"] if one["fusable"] and not one["fused"]]
    seconds = base.part("optimizer") + base.phase("host", "optimizer")
    if not plain or seconds < WORTH_NAMING * base.step_seconds:
        return
    one = plain[0]
    text = f"{one['name']} takes {seconds:.4f} s per step over {one['tensors']} tensors, not fused"
    how = f"a fused step reads and writes the same {one['bytes'] / 1e6:.1f} MB without an operator per tensor"
    knob = knobs.fused(one["name"], one["where"])
    yield make(
        base, "optimizer", text, seconds, (0.2 * seconds, 0.95 * seconds), how, knob, knob.permanent, one["where"]
    )


def _synchronisation(base: Baseline) -> Iterator[Finding]:
    """``.item()`` and its like: the line's own time is the most that removing it saves."""
    sites = base.calls(SYNCHRONISING.__contains__)
    spent = base.seconds_at(0)
    inside = base.operator_seconds("aten::item", "aten::_local_scalar_dense")
    for where, count in list(sites.items())[:3]:
        seconds = max(spent.get(where, 0.0), inside if len(sites) == 1 else 0.0)
        names = sorted({name for at, name, _ in base.ranks[0]["sites"] if at == where and name in SYNCHRONISING})
        text = (
            f"{count} calls of .{'(), .'.join(names)}() per step: each waits for the device and makes a Python number"
        )
        advice = f"{where}: keep it a tensor, add up on the device, and read it every N steps"
        how = f"at most all {seconds:.4f} s of the line, at least the {inside:.4f} s inside aten::item"
        low = min(inside, seconds) if len(sites) == 1 else 0.0
        yield make(base, "synchronisation", text, seconds, (low, seconds), how, None, advice, where)


def _idle(base: Baseline) -> Iterator[Finding]:
    """Time in which nothing was recorded, beyond the loader's: Python, or something outside torch."""
    seconds = base.part("idle") if len(base.ranks) == 1 else 0.0
    if seconds < 0.1 * base.step_seconds:
        return
    known = {loader["item"].rpartition(":")[0] for loader in base.facts["loaders"]}
    where = base.hottest()
    if base.data_seconds("wait") > 0.5 * seconds and where.rpartition(":")[0] in known:
        return
    text = f"{seconds:.4f} s per step without any recorded event"
    yield make(base, "idle", text, seconds, (0.0, seconds), text, None, f"{where}: look here first", where)


def _precision(base: Baseline) -> Iterator[Finding]:
    """bf16 matrix products, where the processor or the GPU has them."""
    plain = all(one["dtypes"] == ["float32"] for one in base.facts["optimizers"])
    bf16_seen = any("bf16" in name or "bfloat16" in name for name in base.table.names)
    matmul = base.breakdown.matmul_seconds() * base.scale
    if not plain or bf16_seen or not (base.facts["cuda"] or processor_has_bf16()):
        return
    knob = knobs.autocast()
    text = f"{matmul:.4f} s of matrix products in fp32"
    how = f"half of {text} with bf16 units"
    interval = (0.2 * matmul if base.facts["cuda"] else 0.0, 0.6 * matmul)
    yield make(base, "precision", text, matmul, interval, how, knob, knob.permanent)


def processor_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    return "amx_bf16" in text or "avx512_bf16" in text


def _convolutions(base: Baseline) -> Iterator[Finding]:
    """cuDNN chooses convolution algorithms by rules of thumb unless it may time them."""
    if not base.facts["cuda"] or base.facts["cudnn_benchmark"]:
        return
    seconds = base.kernel_seconds(lambda name: any(part in name.lower() for part in CONVOLUTIONS))
    knob = knobs.cudnn_benchmark()
    text = f"{seconds:.4f} s of convolutions with algorithms that nothing has timed"
    yield make(base, "convolutions", text, seconds, (0.0, 0.3 * seconds), text, knob, knob.permanent)


def _copies(base: Baseline) -> Iterator[Finding]:
    """Copies from pinned memory overlap with compute."""
    seconds, loaders = base.part("memory_copies"), base.facts["loaders"]
    if not loaders or any(one["pin_memory"] for one in loaders):
        return
    knob = knobs.pin_memory(loaders[0]["where"])
    how = f"the {seconds:.4f} s of exposed copies"
    yield make(base, "copies", how, seconds, (0.0, seconds), how, knob, knob.permanent, loaders[0]["where"])


def _habits(base: Baseline) -> Iterator[Finding]:
    """What the trace analysis names; its cost is the most that the cure saves."""
    for name, seconds, where, cure, knob in habits(base):
        text = f"{name}: {seconds:.4f} s per step"
        advice = knob.permanent if knob else f"{where}: {cure}"
        yield make(base, name, text, seconds, (0.0, seconds), f"all {seconds:.4f} s of it", knob, advice, where)


RULES: tuple[Callable[[Baseline], Iterator[Finding]], ...] = (
    _loader,
    _small_operators,
    _launches,
    _optimizer,
    _synchronisation,
    findings_ranks.straggler,
    _idle,
    findings_ranks.threads,
    findings_ranks.pinning,
    findings_memory.recomputation,
    findings_memory.out_of_cache,
    findings_memory.accumulation,
    findings_memory.allocator,
    _precision,
    _convolutions,
    findings_ranks.reduction,
    _copies,
    _habits,
)
