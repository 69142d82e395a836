"""Continuous batching as a pure state machine: who is prefilled and who decodes in the next step. No torch.

The rules, each a property test:

* First come, first admitted, as soon as a slot is free. A slot holds ``capacity`` tokens and a request is taken only
  if its prompt and all the tokens it may generate fit: nothing that runs is ever evicted or computed twice.
* Running sequences sit in slots ``0 .. n-1`` without holes, so that a decode step reads the first n rows of the cache
  as they lie. When one leaves, the last moves into its place.
* Every step decodes all sequences whose prompt is done, and spends at most ``prefill_budget`` prompt tokens on the
  others, oldest first, in chunks: a long prompt delays running requests by a bounded amount per step.
* Chunks start at multiples of ``chunk`` within their prompt, whatever else runs: a prompt is always computed in the
  same pieces, and so to the same bits.
* `cancel` frees the slot at once, waiting, in prefill or while decoding.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from ridgeline.errors import UserError


@dataclass
class Sequence:
    """A request's place in the schedule. ``computed`` of its tokens are in the cache."""

    id: str
    prompt_tokens: int
    max_tokens: int
    slot: int = -1
    computed: int = 0

    @property
    def decoding(self) -> bool:
        """Whether the prompt is done."""
        return self.computed >= self.prompt_tokens

    @property
    def reserved(self) -> int:
        """Cache positions it may come to need."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens ``start .. end-1`` of a sequence; ``last`` when its first token can be sampled afterwards."""

    id: str
    slot: int
    start: int
    end: int
    last: bool


@dataclass(frozen=True)
class Row:
    """One row of a decode step: the slot, and the position its next token is written to.

    ``id`` is None for a slot whose prompt is still being computed: its row is there only because rows are slots, its
    write lands where the next chunk will write anyway, and its result is thrown away.
    """

    id: str | None
    slot: int
    position: int


@dataclass
class StepPlan:
    """One step: first the moves (from slot, to slot, tokens to keep), then the decode rows, then the chunks."""

    moves: list[tuple[int, int, int]] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Nothing to compute."""
        return not self.decode and not self.prefill


class Scheduler:
    """Decides steps. The owner runs each plan, then calls `advance`, and `finish` for what has ended."""

    def __init__(self, slots: int, capacity: int, chunk: int = 128, prefill_budget: int = 256) -> None:
        if slots < 1 or capacity < 2 or chunk < 1 or prefill_budget < chunk:
            raise ValueError(f"slots {slots}, capacity {capacity}, chunk {chunk}, prefill_budget {prefill_budget}")
        self.slots, self.capacity = slots, capacity
        self.chunk, self.prefill_budget = chunk, prefill_budget
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: list[Sequence] = []  # index = slot, once `plan` has closed the holes
        self._order: OrderedDict[str, Sequence] = OrderedDict()  # running, oldest first

    def add(self, request_id: str, prompt_tokens: int, max_tokens: int) -> None:
        """Queue a request.

        Raises:
            UserError: an empty prompt, or it could never fit a slot (the limit is named).
        """
        if request_id in self.waiting or request_id in self._order:
            raise UserError(f"request '{request_id}': an unfinished request has the same id")
        if prompt_tokens < 1:
            raise UserError(f"request '{request_id}': the prompt has no tokens")
        if prompt_tokens >= self.capacity:
            raise UserError(f"the prompt has {prompt_tokens} tokens, more than fit the context of {self.capacity}")
        if prompt_tokens + max_tokens > self.capacity:
            raise UserError(
                f"the prompt's {prompt_tokens} tokens and max_tokens = {max_tokens} make {prompt_tokens + max_tokens}, "
                f"more than the context of {self.capacity}; at most {self.capacity - prompt_tokens} can be generated"
            )
        self.waiting[request_id] = Sequence(request_id, prompt_tokens, max_tokens)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its slot at once. False when it is not here (finished, or never was)."""
        return self.waiting.pop(request_id, None) is not None or self._release(request_id)

    def finish(self, request_id: str) -> None:
        """A running sequence has ended; its slot is free for the next plan."""
        if not self._release(request_id):
            raise KeyError(request_id)

    def plan(self) -> StepPlan:
        """Close holes, admit, and lay out the next step. Pure bookkeeping: sequences advance in `advance`."""
        plan = StepPlan(moves=self._close_holes())
        while self.waiting and len(self.running) < self.slots:
            _, sequence = self.waiting.popitem(last=False)
            sequence.slot = len(self.running)
            self.running.append(sequence)
            self._order[sequence.id] = sequence
        if any(sequence.decoding for sequence in self.running):
            last = max(sequence.slot for sequence in self.running if sequence.decoding)
            plan.decode = [
                Row(sequence.id if sequence.decoding else None, sequence.slot, sequence.computed)
                for sequence in self.running[: last + 1]
            ]
        plan.prefill = self._chunks()
        return plan

    def advance(self, plan: StepPlan) -> None:
        """Record that ``plan`` was computed: one more token per decode row, and its chunks."""
        for row in plan.decode:
            if row.id is not None and row.id in self._order:
                self._order[row.id].computed += 1
        for chunk in plan.prefill:
            if chunk.id in self._order:
                self._order[chunk.id].computed = chunk.end

    @property
    def reserved_tokens(self) -> int:
        """Cache positions promised to running sequences."""
        return sum(sequence.reserved for sequence in self._order.values())

    def _chunks(self) -> list[Chunk]:
        """Prompt pieces for one step, oldest sequence first, within the budget."""
        chunks: list[Chunk] = []
        left = self.prefill_budget
        for sequence in self._order.values():
            start = sequence.computed
            while start < sequence.prompt_tokens:
                end = min(start + self.chunk, sequence.prompt_tokens)
                if end - start > left:
                    return chunks
                chunks.append(Chunk(sequence.id, sequence.slot, start, end, end == sequence.prompt_tokens))
                left -= end - start
                start = end
        return chunks

    def _release(self, request_id: str) -> bool:
        sequence = self._order.pop(request_id, None)
        if sequence is None:
            return False
        self.running.remove(sequence)
        return True

    def _close_holes(self) -> list[tuple[int, int, int]]:
        """Move sequences from the highest slots into holes below, so that slots 0 .. n-1 are the ones in use."""
        used = {sequence.slot for sequence in self.running}
        holes = [slot for slot in range(len(self.running)) if slot not in used]
        movers = sorted((s for s in self.running if s.slot >= len(self.running)), key=lambda s: s.slot)
        moves = []
        for hole, sequence in zip(holes, movers, strict=True):
            moves.append((sequence.slot, hole, sequence.computed))
            sequence.slot = hole
        self.running.sort(key=lambda sequence: sequence.slot)
        return moves
