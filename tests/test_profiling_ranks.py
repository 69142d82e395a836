"""Matching across ranks, clocks, waiting, stragglers: by hand, by brute force, and the planted one of the gloo pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.profiling.analyses.matching import clock_offsets, match_collectives, unmatched
from ridgeline.profiling.analyses.ranks import COLUMNS, find_stragglers, stragglers, wait_matrix
from ridgeline.profiling.load import load_table, parse_table
from ridgeline.profiling.table import TraceTable
from test_profiling_synthetic import COMM_STREAM, WORKER, event, kernel, launch, step, text

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
with_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
STEP, TRANSFER = 10_000, 200  # us
NAME = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def gpu_rank(
    rank: int, arrivals: list[list[int]], world: int, clock: int = 0, work: str = "mine::work", **top: Any
) -> TraceTable:
    """A rank whose all-reduces begin at ``arrivals[rank][n]`` us of step n; each ends when the last has come."""
    events: list[dict] = []
    for number, arrival in enumerate(arrivals[rank]):
        base = number * STEP + clock
        end = max(one[number] for one in arrivals) + TRANSFER
        events += [
            step(number, base, STEP),
            event(work, "cpu_op", base + 10, 20),
            launch(base + 12, 10 * number + 1),
            kernel("gemm", base + 40, arrival - 40, 10 * number + 1),
            event("c10d::allreduce_", "cpu_op", base + 32, 6),
            event("nccl:all_reduce", "user_annotation", base + 33, 4),
            launch(base + 34, 10 * number + 2),
            kernel(NAME, base + arrival, end - arrival, 10 * number + 2, COMM_STREAM),
        ]
    return parse_table(text(events, rank, world, **{"host_name": f"node{rank}", **top}), f"rank{rank}.json")


def job(arrivals: list[list[int]], **more: Any) -> dict[int, TraceTable]:
    """All ranks."""
    return {rank: gpu_rank(rank, arrivals, len(arrivals), **more) for rank in range(len(arrivals))}


def test_the_late_rank_is_named_with_what_it_cost() -> None:
    """Rank 2 comes 300, 500 and 400 us after the next latest (rank 1, at 1,100): 1.2 ms; it is last in all three."""
    arrivals = [[1000, 1000, 1000], [1100, 1100, 1100], [1400, 1600, 1500]]
    answer = find_stragglers(job(arrivals))
    assert answer.possible
    assert answer.threshold_ns == 100_000  # 1 % of a 10 ms step
    (row,) = answer.frame.rows(named=True)
    assert (row["rank"], row["caused_wait_ns"], row["count"], row["matched"]) == (2, 1_200_000, 3, 3)
    assert (row["per_step_ns"], row["op"], row["evidence"]) == (400_000, "c10d::allreduce_", "arrivals")
    assert row["operator"] == "mine::work"
    assert "rank 2" in answer.verdict


def test_no_straggler_is_an_answer() -> None:
    """Equal arrivals, and ranks that are late in turn: empty, with the columns and the threshold."""
    for arrivals in (
        [[500] * 4] * 3,
        [[500, 500], [500, 900]],
        [[500, 900, 500, 500], [500, 500, 900, 500], [900, 500, 500, 500]],
    ):
        answer = find_stragglers(job(arrivals))
        assert answer.frame.is_empty()
        assert answer.possible
        assert list(answer.frame.columns) == list(COLUMNS["stragglers"])
        assert answer.verdict.startswith("no straggler") and "0.1 ms" in answer.verdict
    late = job([[500] * 3, [550] * 3])
    assert stragglers(late).is_empty()
    assert stragglers(late, threshold_ns=50_000)["rank"].to_list() == [1]


def test_without_steps_a_rank_must_cost_more_than_the_others() -> None:
    """Rank 0 late by 400 us once and rank 1 by 450 once is noise; a second time rank 1 is late makes it the one."""

    def capture(starts: list[list[int]]) -> dict[int, TraceTable]:
        ends = [max(one) + TRANSFER for one in zip(*starts, strict=True)]
        return {
            rank: parse_table(
                text([kernel(NAME, at, end - at, 1) for at, end in zip(mine, ends, strict=True)], rank, 2), "r.json"
            )
            for rank, mine in enumerate(starts)
        }

    assert stragglers(capture([[500, 2000], [100, 2450]])).is_empty()
    frame = stragglers(capture([[500, 2000, 4000], [100, 2450, 4300]]))
    assert frame.select("rank", "caused_wait_ns", "count", "matched").rows() == [(1, 750_000, 2, 3)]


def test_one_rank_missing_ranks_and_nothing_in_common() -> None:
    """Each says why there is no verdict."""
    tables = job([[500] * 3, [900] * 3, [500] * 3])
    one = find_stragglers({0: tables[0]})
    assert not one.possible and "only one rank" in one.verdict
    two = find_stragglers({0: tables[0], 1: tables[1]})
    assert not two.possible and "2 of 3 ranks" in two.verdict and two.frame.is_empty()
    quiet = parse_table(text([kernel("gemm", 0, 5, 1)], 1, 2), "rank1.json")
    none = find_stragglers({0: gpu_rank(0, [[500]], 1), 1: quiet})
    assert not none.possible and "no collective" in none.verdict
    assert wait_matrix({0: tables[0]}).is_empty()
    assert clock_offsets({}).is_empty() and match_collectives({}).is_empty() and stragglers({}).is_empty()


def test_a_subgroup_whose_ranks_are_all_here_counts() -> None:
    """Two ranks of a job of eight, in a process group of their own."""
    group = {"Process Group Name": "3", "Group size": 2, "Collective name": "allreduce", "dtype": "Float"}
    tables = {
        rank: parse_table(
            text([kernel(NAME, start, 2_000 - start, 1, **group, **{"In msg nelems": 8})], rank, 8), f"rank{rank}.json"
        )
        for rank, start in ((4, 100), (5, 700))
    }
    assert stragglers(tables).select("rank", "caused_wait_ns").rows() == [(5, 600_000)]


@pytest.mark.parametrize("shift", [0, 3_000_000, -77])
def test_clocks_are_aligned_on_ends(shift: int) -> None:
    """A clock of another host that is seconds off changes nothing but the offset."""
    arrivals = [[1000, 1000, 1000], [1400, 1600, 1500]]
    tables = {0: gpu_rank(0, arrivals, 2), 1: gpu_rank(1, arrivals, 2, clock=shift)}
    assert clock_offsets(tables).rows() == [
        (0, 0, 0, 0, "reference"),
        (1, 1000 * shift, 0, 3, "collective ends"),
    ]
    assert stragglers(tables)["caused_wait_ns"].to_list() == [1_500_000]
    assert match_collectives(tables).filter(pl.col("rank") == 1)["aligned_arrival_ns"].to_list() == [
        1000 * (STEP * at + arrival) for at, arrival in enumerate(arrivals[1])
    ]


def test_ranks_of_one_host_are_not_shifted() -> None:
    """Their ends differ by 70 us for a reason of the host's: no offset, an uncertainty. A name that several nodes share
    proves nothing: where one clock would be absurd the ends speak."""
    arrivals = [[1000, 1000, 1000], [1400, 1600, 1500]]
    near = {rank: gpu_rank(rank, arrivals, 2, clock=70 * rank, host_name="h") for rank in (0, 1)}
    assert clock_offsets(near).rows()[1] == (1, 0, 70_000, 3, "same host")
    assert stragglers(near)["caused_wait_ns"].to_list() == [1_500_000 + 3 * 70_000]
    far = {rank: gpu_rank(rank, arrivals, 2, clock=5_000_000 * rank, host_name="h") for rank in (0, 1)}
    assert clock_offsets(far).rows()[1] == (1, 5_000_000_000, 0, 3, "collective ends")


def test_a_lost_collective_spoils_its_step_alone() -> None:
    """Rank 1's trace lacks the second step's: an index in that step would mean another collective."""
    tables = job([[1000, 1000, 1000], [1400, 1600, 1500]])
    keep = np.array([not (name == NAME and 10**7 < start < 2 * 10**7) for name, start in _events(tables[1])])
    tables[1] = _select(tables[1], keep)
    assert match_collectives(tables)["step"].unique().sort().to_list() == [0, 2]
    assert unmatched(tables) == {0: (1, 3), 1: (0, 2)}
    two = [step(0, 0, STEP), *(launch(at, at) for at in (1, 2))]  # two at once: times cannot tell which one is lost
    two += [kernel(NAME, 900 + 100 * at, 2000, at, (0, 20 + at)) for at in (1, 2)]
    pair = {rank: parse_table(text(two[:3] + two[3 + rank :], rank, 2), f"rank{rank}.json") for rank in (0, 1)}
    assert match_collectives(pair).is_empty()


def test_the_backends_own_numbers_match_whatever_is_lost() -> None:
    """``Seq`` says which collective it is, so that a capture that began one later loses that one alone; and one step
    can be asked for."""
    arrivals = [[1000, 1000, 1000, 1000], [1200, 1300, 1600, 1500]]
    tables = {}
    for rank in (0, 1):
        events: list[dict] = []
        for number, arrival in enumerate(arrivals[rank]):
            if rank == 0 or number:
                base, end = number * STEP, max(one[number] for one in arrivals) + TRANSFER
                facts = {"Collective name": "allreduce", "Seq": 40 + number, "Process Group Name": "0", "Group size": 2}
                events += [
                    step(number, base, STEP),
                    event("nccl:all_reduce", "user_annotation", base + 5, 20),
                    launch(base + 10, number + 1),
                    kernel(NAME, base + arrival, end - arrival, number + 1, COMM_STREAM, **facts),
                ]
        tables[rank] = parse_table(text(events, rank, 2), f"rank{rank}.json")
    frame = match_collectives(tables)
    assert frame.filter("last").select("sequence", "step", "caused_wait_ns").rows() == [
        (41, 1, 300_000),
        (42, 2, 600_000),
        (43, 3, 500_000),
    ]
    assert stragglers(tables).select("rank", "caused_wait_ns", "per_step_ns").rows() == [(1, 1_400_000, 500_000)]
    assert stragglers(tables, step=2).select("rank", "caused_wait_ns").rows() == [(1, 600_000)]
    assert wait_matrix(tables, step=3)["wait_ns"].to_list() == [500_000]
    assert find_stragglers(tables, step=0).verdict.startswith("no verdict")


def test_false_matches_are_dropped() -> None:
    """Nobody leaves an all-reduce before the last has come; and one of other sizes is another one."""
    arrivals = [[1000] * 4, [1100] * 4]
    tables = job(arrivals)
    late = {
        rank: parse_table(
            text([kernel(NAME, start, 100, 1, **{"Collective name": "allreduce"}) for start in starts], rank, 2),
            "r.json",
        )
        for rank, starts in ((0, [0, 1000, 2000, 9000]), (1, [50, 1050, 2050, 50_000]))
    }
    assert len(match_collectives(tables)) == 8
    assert match_collectives(late)["match"].n_unique() == 3
    sized = {
        rank: parse_table(
            text(
                [kernel(NAME, 0, 9, 1, **{"Collective name": "allreduce", "In msg nelems": n, "dtype": "Half"})],
                rank,
                2,
            ),
            "r.json",
        )
        for rank, n in ((0, 8), (1, 9))
    }
    assert match_collectives(sized).is_empty()
    typed = {
        rank: parse_table(
            text([kernel(NAME, 0, 9, 1, **{"Collective name": "alltoall", "dtype": dtype})], rank, 2), "r.json"
        )
        for rank, dtype in ((0, "Half"), (1, "Long"))
    }
    assert match_collectives(typed).is_empty()


ranks_arrivals = st.integers(2, 4).flatmap(
    lambda ranks: st.lists(st.lists(st.integers(100, 2000), min_size=ranks, max_size=ranks), min_size=1, max_size=4)
)


@settings(max_examples=40, deadline=None)
@given(ranks_arrivals, st.randoms(use_true_random=False))
def test_waiting_against_brute_force(by_step: list[list[int]], shuffle: Any) -> None:
    """Sums over ranks by hand; transfer + waiting = the time inside; nothing depends on the order of ranks."""
    arrivals = [list(one) for one in zip(*by_step, strict=True)]
    tables = job(arrivals)
    frame = match_collectives(tables)
    assert (frame["transfer_ns"] + frame["waiting_ns"] == frame["end_ns"] - frame["arrival_ns"]).all()
    assert (frame["waiting_ns"] >= 0).all()
    assert frame["transfer_ns"].unique().to_list() == [1000 * TRANSFER]
    expected = [0] * len(arrivals)
    for one in by_step:
        *_, second, last = sorted(one)
        if last > second:
            expected[one.index(last)] += 1000 * (last - second)
    assert (
        frame.group_by("rank").agg(pl.col("caused_wait_ns").sum()).sort("rank")["caused_wait_ns"].to_list() == expected
    )
    matrix = wait_matrix(tables)
    waited = sum(1000 * (max(one) - arrival) for one in by_step if one.count(max(one)) == 1 for arrival in one)
    assert matrix["wait_ns"].sum() == waited
    order = list(tables)
    shuffle.shuffle(order)
    assert match_collectives({rank: tables[rank] for rank in order}).equals(frame)


def cpu_rank(rank: int, sleeps: int, slow: int, stuck: int = 0) -> TraceTable:
    """Three steps on a CPU backend: ``sleeps`` us of nothing, a forward op (``slow`` us longer), an all-reduce. The call of
    the first one lasts ``stuck`` us into the second step."""
    events: list[dict] = []
    for number in range(3):
        late = sleeps + (stuck if number == 1 else 0)
        base, called = number * STEP, number * STEP + late + 1000 + slow
        in_call = STEP + stuck - called if stuck and number == 0 else 10
        events += [
            step(number, base, 9_000),
            event("mine::forward", "cpu_op", base + late, 500 + slow),
            event("mine::backward", "cpu_op", base + late + 500 + slow, 500),
            event("c10d::allreduce_", "cpu_op", called, in_call),
            event("gloo:all_reduce", "user_annotation", called + 20, base + 8_800 - called, WORKER),
            event("mine::optimizer", "cpu_op", base + 8_850, 100),
        ]
    return parse_table(text(events, rank, 2), f"rank{rank}.json")


def test_the_cause_is_what_the_late_rank_did_longer() -> None:
    """Not the longest operator, which everybody runs: a sleep is "no recorded event", a slow operator is named. Idle in a
    step: the sleep, 30 us between the transfer and the optimizer, 50 us after it."""
    asleep = find_stragglers({0: cpu_rank(0, 0, 0), 1: cpu_rank(1, 3000, 0)}).frame.row(0, named=True)
    assert (asleep["rank"], asleep["caused_wait_ns"], asleep["idle_ns"]) == (1, 9_000_000, 3_080_000)
    assert (asleep["operator"], asleep["evidence"]) == ("no recorded event", "arrivals and idle steps")
    slow = {0: cpu_rank(0, 0, 0), 1: cpu_rank(1, 0, 2000)}
    assert stragglers(slow).select("rank", "operator", "evidence").rows() == [(1, "mine::forward", "arrivals")]
    assert wait_matrix(slow).rows() == [(1, 0, "c10d::allreduce_", "mine::forward", 3, 6_000_000)]


def test_what_comes_again_is_blamed_before_what_was_longer_once() -> None:
    """A forward op 2 ms longer in every step; in the second the thread also lies 5 ms in the call of the first's
    collective before it goes on. Alone, with nothing that comes again, the call is to blame."""

    def pair(slow: int) -> dict[int, TraceTable]:
        return {0: cpu_rank(0, 0, 0), 1: cpu_rank(1, 0, slow, stuck=5000)}

    for slow, named in ((2000, "mine::forward"), (0, "c10d::allreduce_")):
        waits = wait_matrix(pair(slow)).filter(pl.col("late_rank") == 1)
        assert waits["operator"].unique().to_list() == [named]
    (row,) = stragglers(pair(2000)).rows(named=True)
    assert (row["rank"], row["operator"], row["caused_wait_ns"]) == (1, "mine::forward", 3 * 2_000_000 + 5_000_000)


@with_traces
def test_the_planted_straggler_of_the_gloo_pair() -> None:
    """Rank 1 sleeps 3 ms a step. It arrives last in 2 of 3 collectives, by 6.7 and 11.5 ms (noise of a busy machine
    included); its steps have 3.1 ms without any event; ends on one host shift nothing and tell 0.11 ms."""
    pair = {rank: load_table(TRACES / f"gloo/gloo_straggler_rank{rank}.json.gz") for rank in (0, 1)}
    (row,) = stragglers(pair).rows(named=True)
    assert (row["rank"], row["count"], row["matched"], row["op"]) == (1, 2, 3, "c10d::allreduce_")
    assert row["caused_wait_ns"] == 6_697_338 + 11_527_670
    assert row["idle_ns"] == pytest.approx(3.1e6, abs=5e4)
    assert row["operator"] == "no recorded event"
    # Of the waits: rank 1's are its sleeps, though once AccumulateGrad and twice the return from the collective before
    # took longer (18 and 7.6 ms); rank 0 was late once, in its backward pass.
    assert wait_matrix(pair).select("late_rank", "operator", "count").rows() == [
        (1, "no recorded event", 2),
        (0, "autograd::engine::evaluate_function: AddmmBackward0", 1),
    ]
    offset = clock_offsets(pair).row(1, named=True)
    assert (offset["offset_ns"], offset["evidence"]) == (0, "same host")
    assert offset["uncertainty_ns"] == pytest.approx(110_000, abs=5_000)


@with_traces
def test_two_of_128_ranks_give_no_verdict() -> None:
    """The late one may be any of the others; what can be matched still tells the clocks apart."""
    pair = {rank: load_table(TRACES / f"hta/trace_filter/sampled_rank-{rank}.json.gz") for rank in (0, 1)}
    answer = find_stragglers(pair)
    assert not answer.possible and answer.frame.is_empty()
    assert "2 of 128 ranks" in answer.verdict
    matched = match_collectives(pair)
    assert len(matched) and not matched["complete"].any()
    assert clock_offsets(pair)["offset_ns"].abs().max() < 1_000_000


def _events(table: TraceTable) -> list[tuple[str, int]]:
    return [(table.names[code], start) for code, start in zip(table.name.tolist(), table.start.tolist(), strict=True)]


def _select(table: TraceTable, keep: np.ndarray) -> TraceTable:
    """The table without some rows."""
    rows = np.flatnonzero(keep)
    columns = ("kind", "name", "thread", "start", "end", "correlation", "device", "stream")
    return replace(table, args=[table.args[row] for row in rows], **{one: getattr(table, one)[rows] for one in columns})
