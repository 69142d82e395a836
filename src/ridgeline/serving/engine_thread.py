"""The one owner of the engine: a thread that takes requests and cancellations and runs ``engine.step()``.

The engine is not thread-safe and a step may last seconds, so nothing else touches it. HTTP handlers submit a
`Ticket` (one or more sequences that live and die together) and read its events on their own asyncio loop. The
thread fails loudly: an exception in a step ends every open ticket with an error and `health` says why from then on.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

logger = logging.getLogger("ridgeline.serving")


class EngineFailed(RuntimeError):
    """The engine can give no (more) answers: its step raised, it never loaded, or it was stopped."""


class QueueFull(RuntimeError):
    """The sequences asked for do not fit beside the open ones."""


@dataclass(frozen=True)
class Arrival:
    """One token event of a ticket. ``at`` is the end of the step that made it, `time.monotonic` seconds."""

    sequence: int
    event: Any
    at: float


class Ticket:
    """Sequences submitted together, and the events they produce, read on the loop that submitted them."""

    def __init__(self, requests: Sequence[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.requests = requests
        self.loop = loop
        self.open = len(requests)
        self.cancelled = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._arrivals: asyncio.Queue[Arrival | Exception] = asyncio.Queue()

    async def next(self, timeout: float) -> Arrival | None:
        """The next event, or None after ``timeout`` seconds without one.

        Raises:
            EngineFailed: the ticket was ended by a failure or a shutdown.
        """
        try:
            item = self._arrivals.get_nowait()
        except asyncio.QueueEmpty:
            try:
                item = await asyncio.wait_for(self._arrivals.get(), timeout)
            except TimeoutError:
                return None
        if isinstance(item, Exception):
            raise item
        return item

    def deliver(self, item: Arrival | Exception) -> None:
        """Hand over an event. On the ticket's loop only."""
        if isinstance(item, Exception) and not self.accepted.done():
            self.accepted.set_exception(item)
            self.accepted.exception()  # mark as seen: the client may be gone
        self._arrivals.put_nowait(item)

    def accept(self) -> None:
        """The engine has taken every sequence. On the ticket's loop only."""
        if not self.accepted.done():
            self.accepted.set_result(None)


class EngineThread:
    """Owns an engine made by ``load`` (called on the thread) or given ready. At most ``capacity`` open sequences.

    ``on_step(seconds)``, when set, is called on the thread after every step; keep it short.
    """

    def __init__(
        self,
        engine: Any = None,
        *,
        load: Callable[[], Any] | None = None,
        capacity: int = 72,
        stall_seconds: float = 120.0,
    ) -> None:
        if (engine is None) == (load is None):
            raise ValueError("EngineThread: give an engine or a load function")
        self.engine = engine
        self.capacity = capacity
        self.stall_seconds = stall_seconds
        self.stats: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.first_stats: dict[str, Any] = {}  # before the first request
        self.read_ceiling: float | None = None  # the device's measured read bandwidth, bytes per second
        self.steps = 0
        self.on_step: Callable[[float], None] | None = None
        self._load = load
        self._state = "loading"
        self._commands: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _owners and the change of _state to failed or stopped
        self._owners: dict[str, tuple[Ticket, int]] = {}
        self._in_engine: set[str] = set()  # this and the next are touched by the engine's thread only
        self._not_begun: dict[str, Ticket] = {}
        self._step_began: float | None = None
        self._last_step = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ridgeline-engine", daemon=True)

    # ---- any thread -------------------------------------------------------------------------------------------

    def start(self) -> EngineThread:
        """Start the thread; it loads the engine first."""
        self._thread.start()
        return self

    def stop(self, timeout: float = 10.0) -> bool:
        """End every open ticket and the thread; False when a step does not come back within ``timeout``."""
        self._end("stopped", EngineFailed("the server is shutting down"))
        self._commands.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def state(self) -> str:
        """loading, running, stalled (a step is overdue), failed or stopped."""
        began = self._step_began
        if self._state == "running" and began is not None and time.monotonic() - began > self.stall_seconds:
            return "stalled"
        return self._state

    @property
    def open_sequences(self) -> int:
        """Sequences submitted and not finished."""
        return len(self._owners)

    def last_step_age(self) -> float:
        """Seconds since the last step ended, 0 while there is nothing to do."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def health(self) -> dict[str, Any]:
        """``state``, ``alive`` (False when restarting is the only cure) and ``reason``."""
        state = self.state
        reason = None
        if state == "stalled":
            reason = f"a step has run for {self.last_step_age():.0f} s (limit {self.stall_seconds:g} s)"
        elif self.error is not None:
            reason = f"{type(self.error).__name__}: {self.error}"
        return {"state": state, "alive": state in ("loading", "running"), "reason": reason}

    def cancel(self, ticket: Ticket) -> None:
        """Give up a ticket: its sequences leave the engine before the next step. Safe to call twice."""
        ticket.cancelled = True
        self._commands.put(("cancel", ticket))

    # ---- the loop of the caller -------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Any]) -> Ticket:
        """Queue ``requests`` as one ticket. Call it on a running asyncio loop; never blocks.

        Raises:
            QueueFull: they do not fit beside the open sequences.
            EngineFailed: the engine is not running.
        """
        ticket = Ticket(requests, asyncio.get_running_loop())
        with self._lock:
            if self._state in ("failed", "stopped"):
                raise EngineFailed(str(self.health()["reason"] or "the server is shutting down"))
            if len(self._owners) + len(requests) > self.capacity:
                raise QueueFull(f"{len(self._owners)} sequences are open, {self.capacity} fit")
            for index, request in enumerate(requests):
                self._owners[request.id] = (ticket, index)
        self._commands.put(("submit", ticket))
        return ticket

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        """Submit one request and yield its token events; leaving early cancels it."""
        ticket = self.submit([request])
        try:
            await ticket.accepted
            while True:
                arrival = await ticket.next(1.0)
                if arrival is None:
                    self.check()
                    continue
                yield arrival.event
                if arrival.event.finish_reason is not None:
                    return
        finally:
            self.cancel(ticket)

    def check(self) -> None:
        """Raise `EngineFailed` when a step is overdue: who waits for it should not wait on."""
        if self.state == "stalled":
            raise EngineFailed(str(self.health()["reason"]))

    # ---- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._load is not None:
                self.engine = self._load()
            self._refresh()
            self.first_stats = self.stats
        except BaseException as error:
            self._fail(error)
            return
        with self._lock:
            if self._state == "loading":
                self._state = "running"
        while self._state == "running":
            try:
                self._take_commands()
                if self._state == "running" and self.engine.has_work():
                    self._step()
            except Exception as error:
                self._fail(error)

    def _take_commands(self) -> None:
        """Apply what has been asked since the last step; wait when there is nothing else to do."""
        block = not self.engine.has_work()
        took = False
        while True:
            try:
                kind, ticket = self._commands.get(block=block)
            except queue.Empty:
                break
            block = False
            took = True
            if kind == "stop" or ticket is None:
                break
            if kind == "submit":
                self._submit(ticket)
            else:
                self._cancel(ticket)
        if took:
            self._refresh()

    def _submit(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return  # the cancel command that follows clears its place
        try:
            for request in ticket.requests:
                self.engine.submit(request)
                self._in_engine.add(request.id)
                self._not_begun[request.id] = ticket
        except ValueError as error:  # the engine's own refusal of this request; the others are not concerned
            self._cancel(ticket)
            self._tell(ticket, partial(ticket.deliver, error))
            return
        self._tell(ticket, ticket.accept)

    def _cancel(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            with self._lock:
                self._owners.pop(request.id, None)
            self._not_begun.pop(request.id, None)
            if request.id in self._in_engine:
                self._in_engine.remove(request.id)
                self.engine.cancel(request.id)

    def _step(self) -> None:
        began = time.monotonic()
        self._step_began = began
        events = self.engine.step()
        self._last_step = time.monotonic()
        self._step_began = None
        self.steps += 1
        self._refresh()
        self._note_begun(began)
        self._dispatch(events, self._last_step)
        if self.on_step is not None:
            self.on_step(self._last_step - began)

    def _note_begun(self, at: float) -> None:
        """Note which tickets had their first step at ``at``: the engine admits in order of arrival, so all but the
        last ``waiting`` submitted ones have begun."""
        begun = len(self._not_begun) - int(self.stats.get("waiting", 0))
        for request_id in list(self._not_begun)[: max(0, begun)]:
            ticket = self._not_begun.pop(request_id)
            if ticket.started is None:
                ticket.started = at

    def _dispatch(self, events: Sequence[Any], at: float) -> None:
        """Send one step's events to their tickets, one wake-up per loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Arrival]]] = defaultdict(list)
        for event in events:
            owner = self._owners.get(event.request_id)
            if event.finish_reason is not None:
                self._in_engine.discard(event.request_id)
                with self._lock:
                    self._owners.pop(event.request_id, None)
            if owner is None:
                continue  # cancelled meanwhile
            ticket, sequence = owner
            batches[ticket.loop].append((ticket, Arrival(sequence, event, at)))
        for loop, batch in batches.items():
            _call(loop, partial(_deliver_all, batch))

    def _refresh(self) -> None:
        self.stats = dict(self.engine.stats())

    def _fail(self, error: BaseException) -> None:
        logger.error("engine failed: %s: %s", type(error).__name__, error, exc_info=error)
        self.error = error
        self._step_began = None
        self._end("failed", EngineFailed(f"the engine failed: {type(error).__name__}: {error}"))

    def _end(self, state: str, error: EngineFailed) -> None:
        """Take no more tickets and end the open ones with ``error``."""
        with self._lock:
            if self._state != "failed":
                self._state = state
            tickets = {id(ticket): ticket for ticket, _ in self._owners.values()}
            self._owners.clear()
        for ticket in tickets.values():
            self._tell(ticket, partial(ticket.deliver, error))

    def _tell(self, ticket: Ticket, what: Callable[[], None]) -> None:
        _call(ticket.loop, what)


def _deliver_all(batch: Sequence[tuple[Ticket, Arrival]]) -> None:
    for ticket, arrival in batch:
        ticket.deliver(arrival)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(what)
    except RuntimeError:  # the loop is closed: nobody waits for this any more
        logger.debug("a loop closed before its events arrived")
