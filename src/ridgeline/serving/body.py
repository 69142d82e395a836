"""Request bodies: read within a size and a time, decoded strictly."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from ridgeline.serving.problems import ApiError, invalid

# After a refusal for size, this much more is read and thrown away so that a client which sends its whole body
# before it reads gets the 413 instead of a connection reset.
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 5.0


async def read_json(request: Request, max_bytes: int, seconds: float) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        ApiError: 413 larger than ``max_bytes``, 408 slower than ``seconds``, 400 not a JSON object in UTF-8.
        ClientDisconnect: the client went away first.
    """
    raw = await read_body(request, max_bytes, seconds)
    try:
        document = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise invalid(f"body: not valid UTF-8 at byte {error.start} of a string", code="invalid_utf8") from None
    except RecursionError:
        raise invalid("body: JSON is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise invalid(f"body: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise invalid(f"body: a JSON object is needed, got {_kind(document)}", code="invalid_json")
    return document


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The request's body of at most ``max_bytes``, with or without a Content-Length."""
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > max_bytes:
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(request)
        raise _too_large(f"{int(declared)} bytes", max_bytes)
    try:
        return await asyncio.wait_for(_collect(request, max_bytes), seconds)
    except TimeoutError:
        message = f"body: not received within {seconds:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None


async def _collect(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        if size > max_bytes:
            if more:
                await _discard(request)
            raise _too_large(f"more than {max_bytes} bytes", max_bytes)
        parts.append(part)
        if not more:
            return b"".join(parts)


async def _discard(request: Request) -> None:
    """Read on without keeping anything, within a size and a time."""
    deadline = time.monotonic() + DISCARD_SECONDS
    size = 0
    while size < DISCARD_BYTES:
        try:
            message = await asyncio.wait_for(request.receive(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _too_large(what: str, max_bytes: int) -> ApiError:
    message = f"body: {what}, the limit is {max_bytes} (--max-body-bytes)"
    return ApiError(413, message, param="body", code="body_too_large", headers={"connection": "close"})


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
