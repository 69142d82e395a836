"""The same program on several ranks: who compiled what the others did not, and which guard made it.

In a collective job all ranks wait for the slowest. A rank that compiles once more, for a batch of another size, holds
up the others for the length of that compilation, at worst beyond the timeout of the collective.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ridgeline.compiler.doctor.breaks import code_line
from ridgeline.compiler.doctor.model import Finding, Frame, Observation


def compare_ranks(observations: Sequence[Observation], guards: Sequence[dict[str, list[str]]]) -> list[Finding]:
    """Findings of kind ``rank_divergence``, none for a single rank.

    ``lost_seconds`` is what the rank compiled longer than the fastest one, per function.
    """
    if len({one.rank for one in observations}) < 2:
        return []
    places: dict[tuple[str, int, str], dict[int, list[Frame]]] = defaultdict(dict)
    for one in observations:
        for frame in one.frames:
            if frame.forward and frame.file:
                by_rank = places[frame.file, frame.line, frame.function]
                by_rank.setdefault(one.rank, []).append(frame)
    ranks = sorted({one.rank for one in observations})
    found = []
    for place, by_rank in places.items():
        finding = _compiled_differently(place, by_rank, ranks, observations) or _guarded_differently(
            place, by_rank, ranks, dict(zip((one.rank for one in observations), guards, strict=True))
        )
        if finding is not None:
            found.append(finding)
    return found


def _compiled_differently(
    place: tuple[str, int, str],
    by_rank: dict[int, list[Frame]],
    ranks: Sequence[int],
    observations: Sequence[Observation],
) -> Finding | None:
    """Another number of compilations, or of operators in one of them."""
    shapes = {rank: [(one.compile_id, one.operators) for one in by_rank.get(rank, [])] for rank in ranks}
    if len({tuple(one) for one in shapes.values()}) == 1:
        return None
    usual = min(shapes.values(), key=lambda one: (-_votes(one, shapes.values()), len(one)))
    rank = max((one for one in ranks if shapes[one] != usual), key=lambda one: (len(shapes[one]), -one))
    seconds = {one: sum(frame.seconds for frame in by_rank.get(one, [])) for one in ranks}
    file, line, function = place
    cause = _recompile_of(next(one for one in observations if one.rank == rank), file, function)
    counts = ", ".join(f"rank {one} {len(shapes[one])}" for one in ranks[:8])
    what = f"compiled by {counts} times" if len(shapes[rank]) != len(usual) else f"another graph on rank {rank}"
    guard = cause.detail["guard"] if cause else ""
    why = f"; rank {rank}: {cause.reason}" if cause else ""
    return Finding(
        "rank_divergence",
        cause.file if cause else file,
        cause.line if cause else line,
        cause.code if cause else code_line(file, line),
        f"{what}: the others wait{why}",
        function,
        count=abs(len(shapes[rank]) - len(usual)) or 1,
        lost_seconds=max(seconds.values()) - min(seconds.values()),
        detail={
            "rank": rank,
            "guard": guard,
            "compile_ids": {str(one): [compile_id for compile_id, _ in shapes[one]] for one in ranks},
            "compile_seconds": {str(one): seconds[one] for one in ranks},
        },
    )


def _votes(shape: list[tuple[str, int]], shapes: Iterable[list[tuple[str, int]]]) -> int:
    return sum(one == shape for one in shapes)


def _recompile_of(observation: Observation, file: str, function: str) -> Finding | None:
    """The costliest recompilation of this function, or of its file, on that rank."""
    seen = [one for one in observation.findings if one.kind == "recompile" and one.file == file]
    return next((one for one in seen if one.function == function), None)


def _guarded_differently(
    place: tuple[str, int, str],
    by_rank: dict[int, list[Frame]],
    ranks: Sequence[int],
    guards: dict[int, dict[str, list[str]]],
) -> Finding | None:
    """The same compilations under other guards: no wait yet, but the next change may hit one rank alone."""
    file, line, function = place
    base = ranks[0]
    for frame in by_rank.get(base, []):
        own = guards[base].get(frame.compile_id, [])
        for rank in ranks[1:]:
            other = guards[rank].get(frame.compile_id, [])
            different = next(((a, b) for a, b in zip(own, other, strict=False) if a != b), None)
            if different is None:
                continue
            return Finding(
                "rank_divergence",
                file,
                line,
                code_line(file, line),
                f"guards differ: rank {base} has {different[0]}, rank {rank} {different[1]}",
                function,
                detail={"rank": rank, "guard": different[1], "compile_ids": {str(base): [frame.compile_id]}},
            )
    return None
