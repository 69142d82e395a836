"""Runs a load test: closed or open loop, bounded, into a run of kind "load"."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from ridgeline.errors import JobError
from ridgeline.runs import Run
from ridgeline.serving.load.client import Connection, Target, exchange
from ridgeline.serving.load.server_side import account, scrape
from ridgeline.serving.load.stats import samples, summarize
from ridgeline.serving.load.workload import Exchange, LoadSettings, arrivals, bodies, prompts

Progress = Callable[[int], None]


def load_test(settings: LoadSettings, *, runs_root: str | Path | None = None, progress: Progress | None = None) -> Run:
    """Load ``settings.url`` and leave a run of kind "load": ``summary.json``, one metrics row per request, a plot.

    Raises:
        UserError: the file of prompts cannot be used; no run is made and nothing is sent.
        JobError: the server cannot be reached, or no request at all was answered.
    """
    from ridgeline.serving.load.plot import write_plot

    texts = prompts(settings)
    public = {key: value for key, value in asdict(settings).items() if key != "api_key"}
    with Run.create("load", settings.model or "", config=public, root=runs_root) as run:
        model, exchanges, seconds, server = asyncio.run(_observed(settings, texts, progress))
        for item in sorted(exchanges, key=lambda item: item.sent):
            run.log(**item.row())
        described = {"url": settings.url, "model": model, "description": describe(settings)}
        summary = {**described, **summarize(exchanges, seconds, settings), **server}
        run.summarize(**summary)
        run.save_json("latencies.json", samples(exchanges))
        write_plot(run.artifact("latency.html"), exchanges, summary)
        if not summary["completed"]:
            first = next((f"{e.error}: {e.detail}" for e in exchanges if e.error), "no request was sent")
            raise JobError(f"{settings.url}: none of {len(exchanges)} requests was answered ({first})")
    return run


async def _observed(
    settings: LoadSettings, texts: Sequence[str], progress: Progress | None
) -> tuple[str, list[Exchange], float, dict[str, Any]]:
    """`measure`, between two looks at the server's own counters."""
    target = Target.parse(settings.url, settings.api_key)
    before = await scrape(target, settings.timeout)
    model, exchanges, seconds = await measure(settings, progress, texts)
    return model, exchanges, seconds, account(before, await scrape(target, settings.timeout))


def describe(settings: LoadSettings) -> str:
    """One line: what was sent, and how."""
    loop = f"{settings.concurrency} clients" if settings.rate is None else f"{settings.rate:g} arrivals/s (Poisson)"
    what = f"{'chat' if settings.chat else 'completion'} requests of up to {settings.max_tokens} tokens"
    return f"{loop}, {what}{'' if settings.stream else ', not streamed'}"


async def measure(
    settings: LoadSettings, progress: Progress | None = None, texts: Sequence[str] = ()
) -> tuple[str, list[Exchange], float]:
    """The served model's name, every exchange, and the wall seconds from the first request to the last answer."""
    target = Target.parse(settings.url, settings.api_key)
    model = settings.model or await served_model(target, settings.timeout)
    work = _Work(settings, target, bodies(settings, model, texts), progress or (lambda count: None))
    start = time.perf_counter()
    try:
        async with asyncio.timeout(settings.max_seconds):
            await (work.closed_loop() if settings.rate is None else work.open_loop())
    except TimeoutError:
        work.stop()
    return model, work.exchanges, time.perf_counter() - start


async def served_model(target: Target, timeout: float) -> str:
    """The id of the first model the server lists.

    Raises:
        JobError: no server there, or it lists none.
    """
    content: list[bytes] = []
    connection = Connection(target)
    where = f"http{'s' * target.tls}://{target.host}:{target.port}"
    try:
        async with asyncio.timeout(timeout):
            status = await connection.request("GET", "/v1/models", b"", lambda status, piece: content.append(piece))
    except (OSError, EOFError, TimeoutError) as error:
        raise JobError(f"{where}: no server answers there ({error or type(error).__name__})") from None
    finally:
        connection.close()
    try:
        return str(msgspec.json.decode(b"".join(content))["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise JobError(f"{where}/v1/models answered {status} without a model; name one with --model") from None


class _Work:
    """The clients of one test and what they have collected."""

    def __init__(
        self, settings: LoadSettings, target: Target, stream: Iterator[dict[str, Any]], progress: Progress
    ) -> None:
        self.exchanges: list[Exchange] = []
        self._settings = settings
        self._target = target
        self._bodies = stream
        self._progress = progress
        self._path = "/v1/chat/completions" if settings.chat else "/v1/completions"
        self._sent = 0
        self._start = time.perf_counter()
        self._idle: list[Connection] = []
        self._pending: dict[int, float] = {}

    async def closed_loop(self) -> None:
        """``concurrency`` clients, each sending its next request when the last one is answered."""
        clients = min(self._settings.concurrency, self._settings.requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client())

    async def _client(self) -> None:
        connection = Connection(self._target)
        try:
            while self._sent < self._settings.requests:
                await self._send(connection)
        finally:
            connection.close()

    async def open_loop(self) -> None:
        """Requests at Poisson times, whatever the answers do."""
        try:
            async with asyncio.TaskGroup() as group:
                for at in arrivals(self._settings):
                    if self._sent >= self._settings.requests:
                        break
                    await asyncio.sleep(max(0.0, self._start + at - time.perf_counter()))
                    if len(self._pending) >= self._settings.max_in_flight:
                        self._add(Exchange(self._next(), self._now(), error="client_limit"))
                        continue
                    group.create_task(self._pooled(self._idle.pop() if self._idle else Connection(self._target)))
                    await asyncio.sleep(0)  # let it take its number before the next one is counted
        finally:
            for connection in self._idle:
                connection.close()

    async def _pooled(self, connection: Connection) -> None:
        await self._send(connection)
        self._idle.append(connection)

    async def _send(self, connection: Connection) -> None:
        index = self._next()
        self._pending[index] = self._now()
        body = next(self._bodies)
        try:
            async with asyncio.timeout(self._settings.timeout):
                result = await exchange(connection, self._path, body, index, self._start)
        except TimeoutError:
            sent = self._pending[index]
            result = Exchange(index, sent, total=self._now() - sent, error="timeout")
        del self._pending[index]
        self._add(result)

    def stop(self) -> None:
        """Record what was still open when the whole test ran out of time."""
        for index, sent in self._pending.items():
            self._add(Exchange(index, sent, total=self._now() - sent, error="stopped", detail="--max-seconds reached"))

    def _next(self) -> int:
        self._sent += 1
        return self._sent - 1

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _add(self, result: Exchange) -> None:
        self.exchanges.append(result)
        self._progress(len(self.exchanges))
