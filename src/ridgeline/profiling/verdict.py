"""One line on a profile: what bounds the step, the evidence, one knob to try and the seconds it should save.

A rule looks at the breakdown (and at the configuration when the job was ours) and returns findings; a finding
names one reversible knob and predicts its gain from times measured in this very trace, saying how. The finding
with the largest gain is the advice. Near the measured ceiling, or when nothing is predicted to help, it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ridgeline.profiling.results import StepBreakdown

NEAR_CEILING_MFU = 0.6
"""Model FLOPs utilisation, against the measured GEMM ceiling, from which a step counts as near it."""
WORTH_TRYING = 0.02
"""A knob predicted to save less than this share of the step is not proposed."""
NO_KNOB = "No knob we know is predicted to save 2 % of it."

SENTENCE = {
    "compute": "compute bounds the step",
    "communication": "communication bounds the step",
    "data": "data loading bounds the step",
    "optimizer": "the optimiser bounds the step",
    "host": "host overhead bounds the step",
    "memory_copies": "memory copies bound the step",
    "idle": "waiting without any recorded event bounds the step",
    "unknown": "device work of an unknown kind bounds the step",
    "balanced": "the step is near the device's ceiling",
}
WHAT = {
    "compute": "computing",
    "communication": "exposed communication",
    "data": "loading data",
    "optimizer": "in the optimiser",
    "host": "host overhead",
    "memory_copies": "memory copies",
    "idle": "no recorded event",
    "unknown": "unknown device work",
}


@dataclass(frozen=True)
class Finding:
    """Time that could be saved: ``gain_seconds`` per step by setting ``knob``, predicted as ``how`` says. ``part`` is the
    part of the step that the knob acts on, or ``straggler``.

    ``at_most`` marks a bound: the whole of what the knob acts on, of which it may leave a part.
    """

    part: str
    knob: str
    gain_seconds: float
    how: str
    at_most: bool = False


@dataclass(frozen=True)
class Verdict:
    """The answer. ``predicted_gain_seconds`` is per step and 0 when no knob is proposed."""

    bound_by: str
    evidence: str
    knob: str | None
    predicted_gain_seconds: float
    line: str
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    breakdown: StepBreakdown
    parts: dict[str, float]
    config: Mapping[str, Any]
    ceilings: Mapping[str, Any]

    def set_to(self, key: str) -> Any:
        """The configured value of ``section.key``, None for a foreign trace."""
        section, _, name = key.partition(".")
        return (self.config.get(section) or {}).get(name)

    @property
    def ours(self) -> bool:
        """Whether the knobs of our configuration apply."""
        return bool(self.config)

    @property
    def per(self) -> str:
        """What a figure is counted over."""
        return "per step" if self.breakdown.ranks[0].window == "step" else "of the capture"

    @property
    def accumulates(self) -> bool:
        """Whether a step is made of several passes per rank that a doubled micro batch would halve."""
        micro, batch = self.set_to("train.micro_batch_size"), self.set_to("train.global_batch_size")
        procs = self.set_to("parallel.procs") or self.breakdown.world
        return bool(micro and batch) and batch % (2 * micro * procs) == 0

    def by_phase(self, part: str, *phases: str) -> float:
        """Seconds of ``part`` that fell in these phases."""
        found = self.breakdown.seconds_by_phase(part)
        return sum(found.get(phase, 0.0) for phase in phases)


def verdict(
    breakdown: StepBreakdown,
    *,
    config: Mapping[str, Any] | None = None,
    mfu: float | None = None,
    ceilings: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judge a breakdown.

    Args:
        breakdown: from :func:`ridgeline.profiling.analyze`.
        config: the job's configuration as JSON types, when it is one of ours; a foreign trace gets PyTorch's knobs.
        mfu: model FLOPs utilisation against the measured ceiling, when known.
        ceilings: ``Ceilings.to_dict()`` of this device, when known.
    """
    case = Case(breakdown, breakdown.parts_seconds(), config or {}, ceilings or {})
    findings = sorted((one for rule in RULES for one in rule(case)), key=lambda one: -one.gain_seconds)
    step = breakdown.step_seconds
    findings = [one for one in findings if one.gain_seconds >= WORTH_TRYING * step]
    bound = max(case.parts, key=lambda part: case.parts[part])
    evidence = _evidence(case, bound, mfu)
    if bound == "compute" and mfu is not None and mfu >= NEAR_CEILING_MFU:
        bound = "balanced"
    best = findings[0] if findings else None
    if best is None:
        return Verdict(bound, evidence, None, 0.0, f"{SENTENCE[bound]}: {evidence}. {NO_KNOB}", [])
    amount = "up to" if best.at_most else "about"
    advice = f"Try {best.knob}: saves {amount} {best.gain_seconds:.4f} s {case.per} ({best.how})"
    return Verdict(bound, evidence, best.knob, best.gain_seconds, f"{SENTENCE[bound]}: {evidence}. {advice}.", findings)


def _evidence(case: Case, bound: str, mfu: float | None) -> str:
    """The largest part, the runner-up, and what qualifies them."""
    step = case.breakdown.step_seconds or 1.0
    second = max((part for part in case.parts if part != bound), key=lambda part: case.parts[part])
    text = f"{_share(case, bound, step)} of {step:.4f} s {case.per}"
    if bound == "compute" and case.breakdown.matmul_seconds():
        text += f", {min(case.breakdown.matmul_seconds() / case.parts[bound], 1):.0%} of it in matrix multiplications"
    if case.parts[second] >= 0.05 * step:
        text += f", then {_share(case, second, step)}"
    hidden = case.breakdown.hidden_seconds()
    if hidden > 0.01 * step:
        text += f", {hidden:.4f} s of communication hidden under other work"
    if mfu is not None:
        text += f", MFU {mfu:.1%}"
    late = case.breakdown.straggler
    if late:
        text += f"; rank {late['rank']} spends {late['idle_seconds'] * 1e3:.1f} ms of every step without any event"
    return text


def _share(case: Case, part: str, step: float) -> str:
    return f"{case.parts[part] / step:.0%} {WHAT[part]} ({case.parts[part]:.4f} s)"


def _compile(case: Case) -> Iterator[Finding]:
    """Eager blocks: compiled ones need less of the host and fuse what is not a matmul. Half of both is a guess
    that the trace cannot check."""
    if case.breakdown.compiled or case.set_to("train.compile"):
        return
    overhead = case.by_phase("host", "forward", "backward", "other")
    compute = case.parts["compute"]
    elementwise = max(compute - case.breakdown.matmul_seconds(), 0.0) if compute else 0.0
    how = f"half of {overhead:.4f} s of host overhead and of {elementwise:.4f} s in ops that are not matmuls"
    knob = "train.compile=true" if case.ours else "torch.compile on the model's blocks"
    yield Finding("host", knob, (overhead + elementwise) / 2, how)


def _graphs(case: Case) -> Iterator[Finding]:
    """A compiled model whose launches still starve the device: replay them as one graph."""
    if case.ours or case.breakdown.device != "gpu" or not case.breakdown.compiled:
        return
    seconds = case.by_phase("host", "forward", "backward", "other")
    knob = "torch.compile(mode='reduce-overhead')"
    yield Finding("host", knob, seconds, f"{seconds:.4f} s the device waits for launches", at_most=True)


def _late_rank(case: Case) -> Iterator[Finding]:
    """A rank that does something else in every step makes the others wait that long."""
    late = case.breakdown.straggler
    if late:
        what = f"removing what rank {late['rank']} does outside every op"
        yield Finding(
            "straggler", what, late["idle_seconds"], "its median time per step without any event", at_most=True
        )


def _larger_micro_batch(case: Case) -> Iterator[Finding]:
    """Gradient accumulation pays the host's overhead and the gathers of parameters once per pass."""
    if not case.accumulates:
        return
    overhead = case.by_phase("host", "forward", "backward")
    gathers = sum(seconds for name, seconds in _gathers(case) if not name.endswith("@optimizer"))
    micro = 2 * case.set_to("train.micro_batch_size")
    how = f"half as many passes halve {overhead:.4f} s of host overhead and {gathers:.4f} s of exposed gathers"
    yield Finding("host", f"train.micro_batch_size={micro}", (overhead + gathers) / 2, how)


def _gathers(case: Case) -> list[tuple[str, float]]:
    exposed = case.breakdown.exposed_seconds_by_collective()
    return [(name, seconds) for name, seconds in exposed.items() if "all_gather" in name]


def _keep_parameters(case: Case) -> Iterator[Finding]:
    """Without resharding after forward, backward needs no gathers: exactly their exposed time is saved."""
    if case.ours and not case.set_to("parallel.reshard_after_forward"):
        return
    seconds = sum(one for name, one in _gathers(case) if name.endswith("@backward"))
    knob = "parallel.reshard_after_forward=false" if case.ours else "fully_shard(..., reshard_after_forward=False)"
    if seconds > 0:
        how = f"the {seconds:.4f} s of exposed all-gathers measured in backward, for the memory of the whole parameters"
        yield Finding("communication", knob, seconds, how)


def _one_process(case: Case) -> Iterator[Finding]:
    """CPU ranks of one host share its cores: one process with all of them has the same compute and no collectives."""
    ranks = case.breakdown.ranks
    one_host = len({rank.meta.get("host") for rank in ranks}) == 1
    if not case.ours or case.breakdown.device != "cpu" or len(ranks) < 2 or not one_host:
        return
    seconds = case.parts["communication"]
    how = "all exposed communication; one process with the threads of all keeps the compute"
    yield Finding("communication", "parallel.procs=1", seconds, how)


def _accumulate(case: Case) -> Iterator[Finding]:
    """A foreign job that reduces gradients after every pass can reduce them after every second one."""
    seconds = case.parts["communication"]
    if case.ours or seconds < 0.2 * case.breakdown.step_seconds:
        return
    how = f"half of {seconds:.4f} s of exposed communication per pass; doubles the batch of an update"
    yield Finding("communication", "accumulating gradients over two passes (no_sync)", seconds / 2, how)


def _faster_data(case: Case) -> Iterator[Finding]:
    """Data time is exposed by definition: it can at best fall to nothing."""
    seconds = case.parts["data"]
    knob = "data.path=FOLDER on a faster disk" if case.ours else "DataLoader(num_workers=N, prefetch_factor=2)"
    yield Finding("data", knob, seconds, f"all {seconds:.4f} s the step waits for data", at_most=True)


def _no_recompute(case: Case) -> Iterator[Finding]:
    """Activation checkpointing runs every block's forward once more in backward."""
    if case.set_to("parallel.activation_checkpointing") != "full":
        return
    forward = case.by_phase("compute", "forward")
    how = f"one forward of {forward:.4f} s is recomputed in backward; costs the memory of the activations"
    yield Finding("compute", "parallel.activation_checkpointing=none", forward, how)


def _low_precision(case: Case) -> Iterator[Finding]:
    """fp32 matmuls against the measured GEMM ceilings of fp32 and bf16."""
    rates = case.ceilings.get("gemm_flops_per_second") or {}
    if case.set_to("train.dtype") != "fp32" or not rates.get("fp32") or not rates.get("bf16"):
        return
    ratio, matmul = rates["fp32"] / rates["bf16"], case.breakdown.matmul_seconds()
    how = f"{matmul:.4f} s of matmuls, of which bf16 needs {ratio:.0%} by the measured ceilings"
    yield Finding("compute", "train.dtype=bf16", matmul * (1 - ratio), how)


def _fewer_updates(case: Case) -> Iterator[Finding]:
    """The optimiser's cost does not depend on the batch: more tokens per step dilute it. Changes the training."""
    seconds, batch = case.parts["optimizer"], case.set_to("train.global_batch_size")
    if not batch or seconds < 0.2 * case.breakdown.step_seconds:
        return
    how = f"{seconds:.4f} s of optimiser spread over twice the tokens, per step's worth of tokens; halves the updates"
    yield Finding("optimizer", f"train.global_batch_size={2 * batch}", seconds / 2, how)


def _pinned_copies(case: Case) -> Iterator[Finding]:
    """Exposed copies overlap with compute when they come from pinned memory and do not block."""
    if case.ours or case.breakdown.device != "gpu":
        return
    seconds = case.parts["memory_copies"]
    how = f"all {seconds:.4f} s of exposed copies move under compute"
    yield Finding("memory_copies", "pin_memory=True with non_blocking copies", seconds, how, at_most=True)


RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    _compile,
    _graphs,
    _late_rank,
    _larger_micro_batch,
    _keep_parameters,
    _one_process,
    _accumulate,
    _faster_data,
    _no_recompute,
    _low_precision,
    _fewer_updates,
    _pinned_copies,
)
