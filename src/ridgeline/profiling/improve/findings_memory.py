"""Rules about memory and batches: activations computed twice, activations beyond the cache, passes per step."""

from __future__ import annotations

from collections.abc import Iterator

from ridgeline.profiling.improve import knobs
from ridgeline.profiling.improve.evidence import Baseline
from ridgeline.profiling.improve.finding import Finding, make

ROOM = 2.0
"""Free memory, in peaks of the job, from which activations may be kept: keeping them more than doubles hardly any."""
LARGE_SECONDS = 500e-6
"""Operators that are no matrix products and take longer than this on average read and write memory, not cache."""
PARTS = 8


def recomputation(base: Baseline) -> Iterator[Finding]:
    """The job checkpoints activations, and the backward computes them again, though there is memory to keep them."""
    used = base.facts["checkpoint"]
    if not used:
        return
    seconds = base.phase("compute", "forward") if base.facts["cuda"] else base.data_seconds("recompute")
    free, peak = base.facts["free_bytes"], max(one["peak_memory_bytes"] for one in base.ranks)
    sharing = 1 if base.facts["cuda"] else int(base.facts["local_world"])
    room = free is not None and free >= ROOM * peak * sharing
    text = f"the backward computes checkpointed activations again: {seconds:.4f} s"
    how = f"all {seconds:.4f} s of it, more or less what keeping activations costs or saves"
    knob = knobs.keep_activations(used["where"]) if room else None
    short = f"{used['where']}: checkpoint fewer blocks; not tried: less than {ROOM:g} times the peak is free"
    advice = knob.permanent if knob else short
    interval = (0.5 * seconds, 1.25 * seconds)
    yield make(base, "recomputation", text, seconds, interval, how, knob, advice, used["where"])


def out_of_cache(base: Baseline) -> Iterator[Finding]:
    """Element-wise operators over activations larger than the cache: in parts of the batch they stay in it."""
    modules = base.facts["modules"]
    if base.facts["cuda"] or base.facts["compiled"] or not modules or base.leaves.mean_seconds < LARGE_SECONDS:
        return
    seconds = max(base.phase("compute", "forward", "backward") - base.breakdown.matmul_seconds() * base.scale, 0.0)
    text = (
        f"operators of {base.leaves.mean_seconds * 1e3:.1f} ms on average over the whole batch in {', '.join(modules)}"
    )
    how = f"up to 0.3 of {seconds:.4f} s that is no matrix product, when {PARTS} parts of the batch stay in the cache"
    knob = knobs.micro_batches(PARTS)
    yield make(base, "out of cache", text, seconds, (0.0, 0.3 * seconds), how, knob, knob.permanent)


def accumulation(base: Baseline) -> Iterator[Finding]:
    """Several passes per step each cost their launches. The loop over them is the script's own: no knob from outside."""
    passes = max(base.ranks[0]["passes"], default=1)
    if passes < 2:
        return
    seconds = base.phase("host", "forward", "backward") * (1 - 1 / passes)
    text = f"{passes} backward passes per step: all but one could do without {seconds:.4f} s of host overhead"
    advice = f"fewer passes over larger micro-batches, if they fit: the loop that accumulates {passes} passes is the script's own"
    how = f"host overhead of the passes, {1 - 1 / passes:.0%} of it"
    yield make(base, "accumulation", text, seconds, (0.0, seconds), how, None, advice)


def allocator(base: Baseline) -> Iterator[Finding]:
    """The GPU is so full that the allocator gives memory back and asks again, which stops everything."""
    retries = int(base.facts["alloc_retries"])
    if not retries or base.facts["checkpoint"]:
        return
    seconds = base.part("idle") + base.phase("host", "forward", "backward", "optimizer", "other")
    text = f"the allocator ran out of memory and retried {retries} times"
    how = f"at most the {seconds:.4f} s in which the device waits"
    knob = knobs.checkpoint_blocks()
    yield make(base, "allocator", text, seconds, (0.0, seconds), how, knob, knob.permanent)
