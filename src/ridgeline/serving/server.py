"""``serve``: bind, load, answer, drain. uvicorn runs the sockets; signals, readiness and the run are ours."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ridgeline.errors import JobError, UserError
from ridgeline.runs import Run
from ridgeline.serving.app import create_app
from ridgeline.serving.endpoint import Endpoint
from ridgeline.serving.engine_thread import EngineThread
from ridgeline.serving.journal import Journal
from ridgeline.serving.settings import ServeSettings

logger = logging.getLogger("ridgeline.serving")

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Serving:
    """A server that has just become ready."""

    url: str
    run: Run
    settings: ServeSettings
    context: int


@dataclass(frozen=True)
class Outcome:
    """How a server ended. ``stuck``: a step never came back, the process must be left without waiting for it."""

    run: Run
    aborted: bool
    stuck: bool
    error: BaseException | None


def serve(
    load: Callable[[], Any],
    settings: ServeSettings,
    *,
    config: dict[str, Any] | None = None,
    ceilings: Any | None = None,
    runs_root: str | Path | None = None,
    on_ready: Callable[[Serving], None] | None = None,
) -> Outcome:
    """Serve the engine that ``load`` makes until SIGTERM or SIGINT. Blocks; call it on the main thread.

    The port is bound before the model is loaded and answers 503 until it is. The first signal drains: not ready at
    once, new requests 503, open ones finish. The second aborts them. ``ceilings`` (of `ridgeline.hardware`) are what
    the engine's bandwidth is held against.

    Raises:
        UserError: the port or host cannot be used.
    """
    listener = bind(settings.host, settings.port)
    public = {key: value for key, value in asdict(settings).items() if key != "api_key"}
    with listener, Run.create("serve", settings.name, config={**public, **(config or {})}, root=runs_root) as run:
        journal = Journal(run)
        thread = EngineThread(load=load, capacity=settings.capacity, stall_seconds=settings.stall_seconds)
        if ceilings is not None:
            run.save_json("ceilings.json", ceilings.to_dict())
            thread.read_ceiling = ceilings.read_bytes_per_second
        app = create_app(thread, settings, journal.record)
        endpoint: Endpoint = app.state.endpoint
        server = _Server(_uvicorn_config(app, settings), endpoint)
        thread.start()
        supervisor = _Supervisor(server, endpoint, listener, run, on_ready)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(supervisor.main())
        stuck = not thread.stop()
        outcome = Outcome(run, server.aborted, stuck, thread.error)
        journal.finish(*_status(outcome), thread)
    return outcome


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket, so that a busy port is known before a model is loaded.

    Raises:
        UserError: busy, not allowed, or no such address.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        hint = "already in use; choose another, or 0 for any free one"
        why = hint if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        raise UserError(f"--port {port} on {host}: {why}") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn with our meaning of signals: the first drains, the second aborts."""

    def __init__(self, config: uvicorn.Config, endpoint: Endpoint) -> None:
        super().__init__(config)
        self.endpoint = endpoint
        self.drain_began: float | None = None
        self.aborted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn's handlers for SIGTERM and SIGINT."""
        name = signal.Signals(sig).name
        if self.drain_began is None:
            self.drain_began = time.monotonic()
            self.endpoint.draining = True
            count = self.endpoint.thread.open_sequences
            logger.warning("%s: draining, %d sequences to finish (again to abort)", name, count)
        else:
            logger.warning("%s again: aborting", name)
            self.abort()

    def abort(self) -> None:
        """Stop now; open requests get an error."""
        self.aborted = True
        self.should_exit = True
        self.force_exit = True


class _Supervisor:
    """Watches loading and draining beside uvicorn's own loop."""

    def __init__(
        self,
        server: _Server,
        endpoint: Endpoint,
        listener: socket.socket,
        run: Run,
        on_ready: Callable[[Serving], None] | None,
    ) -> None:
        self._server = server
        self._endpoint = endpoint
        self._listener = listener
        self._run = run
        self._on_ready = on_ready

    async def main(self) -> None:
        """Run uvicorn until it is told to stop."""
        watch = asyncio.create_task(self._watch())
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _watch(self) -> None:
        server, thread = self._server, self._endpoint.thread
        while not server.should_exit:
            await asyncio.sleep(POLL_SECONDS)
            if thread.state == "running" and self._on_ready is not None and not self._endpoint.draining:
                on_ready, self._on_ready = self._on_ready, None
                on_ready(self._announcement())
            if thread.error is not None and thread.engine is None:
                server.should_exit = True  # the model could not be loaded: nothing to stay up for
            if server.drain_began is not None:
                self._drain(server.drain_began)
        if server.aborted:
            await asyncio.to_thread(thread.stop)

    def _drain(self, began: float) -> None:
        """Leave once the open sequences are done; uvicorn then waits for their last bytes."""
        seconds = self._endpoint.settings.drain_seconds
        if self._endpoint.thread.open_sequences == 0 or not self._endpoint.thread.health()["alive"]:
            self._server.should_exit = True
        elif time.monotonic() - began > seconds:
            logger.warning("not drained within %g s: aborting", seconds)
            self._server.abort()

    def _announcement(self) -> Serving:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return Serving(f"http://{shown}:{port}", self._run, self._endpoint.settings, self._endpoint.context)


def _uvicorn_config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop, but where it does not exist (Windows) asyncio's own."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _status(outcome: Outcome) -> tuple[str, str | None]:
    if outcome.error is not None:
        return "failed", f"{type(outcome.error).__name__}: {outcome.error}"[:500]
    return ("interrupted", "aborted by a second signal") if outcome.aborted else ("done", None)


def raise_for(outcome: Outcome) -> None:
    """Turn a bad ending into the error of the verb.

    Raises:
        UserError: the model was refused at loading. JobError: the engine failed, or requests were aborted.
    """
    if isinstance(outcome.error, UserError):
        raise outcome.error
    if outcome.error is not None:
        raise JobError(f"the engine failed: {type(outcome.error).__name__}: {outcome.error}")
    if outcome.aborted:
        raise JobError("aborted: open requests were not finished")
