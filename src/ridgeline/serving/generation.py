"""``/v1/completions`` and ``/v1/chat/completions``: one flow, two dialects, streamed or whole.

A client that goes away is noticed at any point (queue, prefill, decode; streaming or not) because one task always
listens on the connection; the request then leaves the engine before its next step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ridgeline.serving.body import read_json
from ridgeline.serving.calls import Call, chat_call, completion_call
from ridgeline.serving.endpoint import Endpoint
from ridgeline.serving.engine_thread import EngineFailed
from ridgeline.serving.problems import ApiError, json_response
from ridgeline.serving.records import Record
from ridgeline.serving.session import Session
from ridgeline.serving.shapes import ChatShape, CompletionShape, Shape

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's code for a client that closed the connection; never sent, only logged


async def completions(request: Request) -> Response:
    """``POST /v1/completions``."""
    return await _generate(request, completion_call, CompletionShape)


async def chat_completions(request: Request) -> Response:
    """``POST /v1/chat/completions``."""
    return await _generate(request, chat_call, ChatShape)


async def _generate(request: Request, read: Callable[..., Call], shape_type: type[Shape]) -> Response:
    endpoint: Endpoint = request.app.state.endpoint
    settings = endpoint.settings
    record = Record(id="-", route=request.url.path, stream=False)  # what is refused before it is read has no id
    endpoint.require_ready()
    try:
        call = read(await read_json(request, settings.max_body_bytes, settings.body_seconds), settings.name)
    except ClientDisconnect:
        _refused(endpoint, record, CLIENT_GONE, "cancelled")
        return Response(status_code=CLIENT_GONE)
    except ApiError as error:
        _refused(endpoint, record, error.status, "rejected")
        raise
    record.id, record.stream, record.user = call.id, call.stream, call.user
    session = Session(endpoint, call, shape_type(call, settings.name, endpoint.engine.tokenizer), record)
    gone = asyncio.create_task(_disconnected(request.receive))
    handed_over = False
    try:
        await _unless(gone, session.open())
        if call.stream:
            handed_over = True
            return EventStream(session, gone)
        return await _unless(gone, _whole(session))
    except ClientDisconnect:
        session.close(CLIENT_GONE, "cancelled")
        return Response(status_code=CLIENT_GONE)
    except ApiError as error:
        session.close(error.status, "rejected")
        raise
    finally:
        if not handed_over:
            gone.cancel()
            session.close(500, "error")


def _refused(endpoint: Endpoint, record: Record, status: int, finish: str) -> None:
    """Write the books of a request that a ready server ended before it had a session."""
    record.status, record.finish = status, finish
    endpoint.finished(record, accepted=False)


async def _whole(session: Session) -> Response:
    """Run to the end and answer with one document."""
    try:
        async for _ in session.arrivals():
            pass
    except EngineFailed as error:
        session.close(500, "error")
        raise ApiError(500, str(error), code="engine_failed") from None
    document = session.shape.document(session.choices, session.prompt_tokens)
    session.close(200)
    return json_response(document)


class EventStream(Response):
    """Server-sent events of one session. Owns the session and the disconnect listener from construction on."""

    media_type = "text/event-stream"

    def __init__(self, session: Session, gone: asyncio.Task[None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # the length of a stream is not known
        self._session = session
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = self._session
        try:
            await _unless(self._gone, self._write(send))
            session.close(200)
        except (ClientDisconnect, OSError):
            session.close(CLIENT_GONE, "cancelled")
        finally:
            self._gone.cancel()
            session.close(500, "error")

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in _events(self._session):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except EngineFailed as error:
            self._session.close(500, "error")
            problem = ApiError(500, str(error), code="engine_failed").body()
            await send({"type": "http.response.body", "body": _data(problem), "more_body": True})
        # The books are closed before the last byte, so that a client which saw the end finds them written.
        self._session.close(200)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _events(session: Session) -> AsyncIterator[bytes]:
    """The stream's data lines but for the final ``[DONE]``."""
    shape = session.shape
    for choice in session.choices:
        opening = shape.opening(choice)
        if opening is not None:
            yield _data(opening)
    async for arrived in session.arrivals():
        if arrived is None:
            yield b": ping\n\n"
            continue
        chunk = shape.delta(*arrived)
        if chunk is not None:
            yield _data(chunk)
    if session.call.include_usage:
        yield _data(shape.usage_chunk(session.choices, session.prompt_tokens))


def _data(document: Any) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, or ClientDisconnect as soon as ``gone`` is done; ``work`` is cancelled then."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
