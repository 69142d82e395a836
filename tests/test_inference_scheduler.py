"""The scheduler against a simulated cache: whatever arrives and is cancelled, everyone reads their own tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.inference.scheduler import Scheduler

CAPACITY = 40
GARBAGE = ("garbage", -1)


class Simulation:
    """Runs plans on a cache whose entries are (request, position), and checks the promises at every step."""

    def __init__(self, slots: int, chunk: int, budget: int) -> None:
        self.scheduler = Scheduler(slots, CAPACITY, chunk, budget)
        self.cache = [[GARBAGE] * CAPACITY for _ in range(slots)]
        self.asked: dict[str, tuple[int, int]] = {}
        self.made: dict[str, int] = {}
        self.prefilled: dict[str, list[tuple[int, int]]] = {}
        self.admitted: list[str] = []
        self.ended: set[str] = set()

    def submit(self, name: str, prompt: int, tokens: int) -> None:
        self.scheduler.add(name, prompt, tokens)
        self.asked[name], self.made[name], self.prefilled[name] = (prompt, tokens), 0, []

    def cancel(self, name: str) -> None:
        assert self.scheduler.cancel(name) == (name in self.asked and name not in self.ended)
        assert all(sequence.id != name for sequence in self.scheduler.running)
        if name in self.asked:
            self.ended.add(name)

    def step(self) -> None:
        decoding = {s.id for s in self.scheduler.running if s.decoding}
        plan = self.scheduler.plan()
        for source, target, count in plan.moves:
            self.cache[target][:count] = self.cache[source][:count]
        running = self.scheduler.running
        assert [sequence.slot for sequence in running] == list(range(len(running)))
        self.admitted += [
            s.id for s in sorted(running, key=lambda s: list(self.asked).index(s.id)) if s.id not in self.admitted
        ]
        assert {row.id for row in plan.decode if row.id} == decoding, "a running request was made to wait"
        assert [row.slot for row in plan.decode] == list(range(len(plan.decode)))
        assert sum(chunk.end - chunk.start for chunk in plan.prefill) <= self.scheduler.prefill_budget
        self.scheduler.advance(plan)
        for row in plan.decode:
            self.decode(row.id, row.slot, row.position)
        for chunk in plan.prefill:
            for position in range(chunk.start, chunk.end):
                self.cache[chunk.slot][position] = (chunk.id, position)
            assert self.cache[chunk.slot][: chunk.end] == [(chunk.id, p) for p in range(chunk.end)]
            self.prefilled[chunk.id].append((chunk.start, chunk.end))
            assert chunk.last == (chunk.end == self.asked[chunk.id][0])
            if chunk.last:
                self.emit(chunk.id)

    def decode(self, name: str | None, slot: int, position: int) -> None:
        self.cache[slot][position] = GARBAGE if name is None else (name, position)
        if name is not None:
            assert self.cache[slot][: position + 1] == [(name, p) for p in range(position + 1)]
            self.emit(name)

    def emit(self, name: str) -> None:
        self.made[name] += 1
        if self.made[name] == self.asked[name][1]:
            self.scheduler.finish(name)
            self.ended.add(name)


REQUEST = st.tuples(st.integers(1, 30), st.integers(1, 10))
ACTION = st.one_of(REQUEST, st.just("step"), st.integers(0, 11))


@settings(max_examples=120, deadline=None)
@given(st.lists(ACTION, max_size=40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
def test_any_traffic(actions, slots, chunk, extra):
    """Submissions, steps and cancellations in any order; then all that is left runs to its end in bounded steps."""
    simulation = Simulation(slots, chunk, chunk + extra)
    for action in actions:
        if action == "step":
            simulation.step()
        elif isinstance(action, tuple):
            simulation.submit(f"r{len(simulation.asked)}", *action)
        else:
            simulation.cancel(f"r{action}")
    order = [name for name in simulation.asked if name not in simulation.ended]
    bound = sum(-(-prompt // chunk) + tokens for prompt, tokens in (simulation.asked[name] for name in order))
    for _ in range(bound):
        simulation.step()
    assert simulation.ended >= set(simulation.asked)
    assert not simulation.scheduler.running and not simulation.scheduler.waiting
    assert simulation.admitted == [name for name in simulation.asked if name in set(simulation.admitted)], "FIFO"
    assert simulation.scheduler.plan().empty
    for name, (prompt, tokens) in simulation.asked.items():
        if simulation.made[name] == tokens:
            starts = range(0, prompt, chunk)
            assert simulation.prefilled[name] == [(s, min(s + chunk, prompt)) for s in starts], "computed once, aligned"


def test_a_long_prompt_does_not_stop_those_who_run():
    scheduler = Scheduler(4, 10_000, chunk=128, prefill_budget=256)
    scheduler.add("short", 5, 200)
    scheduler.advance(scheduler.plan())
    scheduler.add("long", 8_192, 10)
    for step in range(32):
        plan = scheduler.plan()
        assert [row.id for row in plan.decode if row.id] == ["short"], step
        assert sum(chunk.end - chunk.start for chunk in plan.prefill) == 256
        scheduler.advance(plan)
    assert all(sequence.decoding for sequence in scheduler.running)


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "prefill", "decode"])
def test_cancel_frees_the_slot_for_the_next_step(steps):
    scheduler = Scheduler(1, 100, chunk=4, prefill_budget=4)
    scheduler.add("a", 8, 20)
    scheduler.add("b", 8, 20)
    for _ in range(steps):
        scheduler.advance(scheduler.plan())
    assert scheduler.cancel("a") and not scheduler.cancel("a")
    assert [chunk.id for chunk in scheduler.plan().prefill] == ["b"]


@pytest.mark.parametrize(
    ("prompt", "tokens", "words"),
    [
        (0, 1, ["no tokens"]),
        (100, 1, ["100", "context of 100"]),
        (90, 20, ["90", "110", "context of 100", "at most 10"]),
    ],
)
def test_what_cannot_fit_is_refused_with_the_limit(prompt, tokens, words):
    scheduler = Scheduler(2, 100)
    with pytest.raises(UserError) as error:
        scheduler.add("x", prompt, tokens)
    assert all(word in str(error.value) for word in words)
    assert not scheduler.waiting


def test_torch_free():
    code = "import sys, ridgeline.inference.scheduler, ridgeline.inference.request, ridgeline.inference.detokenize"
    code += "; import ridgeline.inference.locate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
