"""Rules about ranks: who is late, whose cores are whose, how gradients are reduced."""

from __future__ import annotations

from collections.abc import Iterator

from ridgeline.profiling.analyses.ranks import find_stragglers
from ridgeline.profiling.improve import knobs
from ridgeline.profiling.improve.evidence import Baseline
from ridgeline.profiling.improve.finding import SMALL_SECONDS, Finding, cores_per_rank, make

MIGRATION_SECONDS = 100e-6
"""What it costs to go on after another process had the core: about 1 MiB of cache read again at 10 GB/s."""


def straggler(base: Baseline) -> Iterator[Finding]:
    """Ranks that make the others wait in more than half of the steps: what they cost in a typical one."""
    if len(base.ranks) < 2:
        return
    for row in find_stragglers(base.tables).frame.iter_rows(named=True):
        late, seconds = int(row["rank"]), row["per_step_ns"] / 1e9 * base.scale
        where = _excess(base, late)
        share = row["count"] / max(row["matched"], 1)
        text = (
            f"rank {late} arrives last at {share:.0%} of the collectives; the others wait {seconds:.4f} s a step for it"
        )
        how = f"the {seconds:.4f} s it arrives after the next latest rank in a typical step; before: {row['operator']}"
        advice = f"{where or f'rank {late}'}: give this rank the work of the others"
        yield make(base, "straggler", text, seconds, (0.5 * seconds, seconds), how, None, advice, where, rank=late)


def _excess(base: Baseline, late: int) -> str:
    """The line on which a rank spends more than the mean of the others, most."""
    others = [one["rank"] for one in base.ranks if one["rank"] != late]
    mean: dict[str, float] = {}
    for rank in others:
        for where, seconds in base.seconds_at(rank).items():
            mean[where] = mean.get(where, 0.0) + seconds / len(others)
    mine = base.seconds_at(late)
    return max(mine, key=lambda where: mine[where] - mean.get(where, 0.0), default="")


def threads(base: Baseline) -> Iterator[Finding]:
    """Ranks of a machine should use its cores once: not fewer, not more."""
    if base.facts["cuda"]:
        return
    used, fair = int(base.facts["threads"]), cores_per_rank(base)
    compute = base.part("compute") + base.part("optimizer")
    if used == fair or base.leaves.mean_seconds < SMALL_SECONDS / 2:
        return
    share = 1 - used / fair if used < fair else 1 - fair / used
    text = f"{used} threads per process and {fair} cores for each"
    how = f"{compute:.4f} s of operators with {fair} threads instead of {used}"
    knob = knobs.threads(fair)
    yield make(base, "threads", text, compute, (0.0, compute * share), how, knob, knob.permanent)


def pinning(base: Baseline) -> Iterator[Finding]:
    """Ranks that may all run on the same cores push each other off them."""
    allowed = [tuple(one["facts"]["affinity"]) for one in base.ranks]
    if base.facts["cuda"] or len(allowed) < 2 or len(set(allowed)) > 1 or len(allowed[0]) < len(allowed):
        return
    switches = max(one["switches"] / (len(one["stamps"]) - 1) for one in base.ranks)
    seconds = switches * MIGRATION_SECONDS
    text = f"{len(allowed)} ranks share the cores {_cores(allowed[0])}; one is pushed off {switches:.1f} times a step"
    how = f"{MIGRATION_SECONDS * 1e6:.0f} us of cold cache each time"
    knob = knobs.pin_cores()
    yield make(base, "pinning", text, seconds, (0.0, seconds), how, knob, knob.permanent)


def _cores(numbers: tuple[int, ...]) -> str:
    whole = numbers == tuple(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))


def reduction(base: Baseline) -> Iterator[Finding]:
    """DDP's all-reduces in fewer and larger buckets, without copies between gradients and buckets."""
    ddp, seconds = base.facts["ddp"], base.part("communication")
    if not ddp or ddp["view"] or next(straggler(base), None) is not None:
        return
    knob = knobs.buckets(max(100, 4 * int(ddp["bucket_cap_mb"])), ddp["where"])
    text = f"{seconds:.4f} s of exposed communication per step in buckets of {ddp['bucket_cap_mb']} MB"
    how = f"fewer starts and no copies, of {seconds:.4f} s"
    yield make(base, "reduction", text, seconds, (0.0, 0.5 * seconds), how, knob, knob.permanent, ddp["where"])
