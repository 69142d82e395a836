"""A small HTTP/1.1 client for load tests: one connection per client, timestamps at the socket, little work per event.

httpx spends about a millisecond of Python per streamed event on a slow core; at 8 streams that is a load of its own
beside the server under test. Parsing is httptools', as in the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from ridgeline.serving.load.workload import Exchange


@dataclass(frozen=True)
class Target:
    """Where requests go: address, TLS, path prefix and headers."""

    host: str
    port: int
    tls: bool
    prefix: str
    headers: str

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> Target:
        """From a base URL; a trailing ``/v1`` is accepted, as OpenAI clients are configured with it."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        host = parts.hostname or "127.0.0.1"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        headers = f"host: {parts.netloc}\r\naccept: */*\r\n"
        if api_key:
            headers += f"authorization: Bearer {api_key}\r\n"
        return cls(host, parts.port or (443 if tls else 80), tls, prefix, headers)


class Reply:
    """The answer being parsed: httptools' callbacks. ``on_body(status, piece)`` gets each piece as it arrives."""

    def __init__(self, on_body: Callable[[int, bytes], None]) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.done = False
        self.keep_alive = False
        self.status = 0
        self._on_body = on_body

    def on_headers_complete(self) -> None:
        """httptools callback."""
        self.status = int(self.parser.get_status_code())

    def on_body(self, piece: bytes) -> None:
        """httptools callback."""
        self._on_body(self.status, piece)

    def on_message_complete(self) -> None:
        """httptools callback. Only here does the parser still know whether the connection stays open."""
        self.keep_alive = bool(self.parser.should_keep_alive())
        self.done = True


class Connection:
    """One keep-alive connection; `post` and `get` reopen it when the server closed it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._answered = False  # a byte of the present request's answer has come

    async def request(self, method: str, path: str, body: bytes, on_body: Callable[[int, bytes], None]) -> int:
        """Send one request; ``on_body(status, piece)`` is called as the answer comes in. Returns the status.

        Raises:
            OSError: could not connect, or the connection broke. EOFError: closed in the middle of the answer.
        """
        head = f"{method} {self._target.prefix}{path} HTTP/1.1\r\n{self._target.headers}"
        if body:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        data = head.encode("latin-1") + b"\r\n" + body
        reused = await self._open()
        try:
            try:
                return await self._exchange(data, on_body)
            except (EOFError, ConnectionError):
                if not reused or self._answered:
                    raise
                # An idle connection that the server closed as we wrote (its end is read, or a reset): nothing was
                # answered, so send it afresh.
                self.close()
                await self._open()
                return await self._exchange(data, on_body)
        except BaseException:
            self.close()
            raise

    async def _exchange(self, data: bytes, on_body: Callable[[int, bytes], None]) -> int:
        assert self._reader is not None and self._writer is not None
        self._writer.write(data)
        reply = Reply(on_body)
        self._answered = False
        while not reply.done:
            piece = await self._reader.read(65536)
            if not piece:
                raise EOFError(f"connection closed {'in the middle of' if self._answered else 'before'} an answer")
            self._answered = True
            reply.parser.feed_data(piece)
        if not reply.keep_alive:
            self.close()
        return reply.status

    async def _open(self) -> bool:
        """Connect unless connected; True when an open connection is used again."""
        if self._writer is not None and not self._writer.is_closing() and not self._at_eof():
            return True
        context = ssl.create_default_context() if self._target.tls else None
        self._reader, self._writer = await asyncio.open_connection(self._target.host, self._target.port, ssl=context)
        return False

    def _at_eof(self) -> bool:
        return self._reader is None or self._reader.at_eof()

    def close(self) -> None:
        """Close the socket; a request in progress is thereby abandoned."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
        self._writer = self._reader = None


async def exchange(connection: Connection, path: str, body: dict[str, Any], index: int, start: float) -> Exchange:
    """Send one generation request and time its answer. Never raises but for cancellation: errors are recorded."""
    sent = time.perf_counter()
    result = Exchange(index, sent - start)
    reader = _EventReader(result, sent)
    try:
        status = await connection.request("POST", path, msgspec.json.encode(body), reader.feed)
        reader.end(status)
    except ConnectionRefusedError as error:
        _fail(result, "refused", str(error))
    except EOFError as error:
        _fail(result, "closed", str(error))
    except OSError as error:
        _fail(result, "connection", f"{type(error).__name__}: {error}")
    except (httptools.HttpParserError, ValueError, KeyError, TypeError) as error:
        connection.close()
        _fail(result, "protocol", f"{type(error).__name__}: {error}")
    result.total = time.perf_counter() - sent
    return result


def _fail(result: Exchange, kind: str, detail: str) -> None:
    result.error = kind
    result.detail = " ".join(detail.split())[:200]


class _EventReader:
    """Splits an answer into server-sent events (or one document) and notes when text arrived."""

    def __init__(self, result: Exchange, sent: float) -> None:
        self._result = result
        self._sent = sent
        self._rest = b""
        self._last: float | None = None
        self._ended = False
        self._streamed = False

    def feed(self, status: int, piece: bytes) -> None:
        """Take one piece of the body as it arrives."""
        self._rest += piece
        if status != 200 or not (self._streamed or self._rest.startswith((b"data:", b":"))):
            return
        self._streamed = True
        now = time.perf_counter()
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def end(self, status: int) -> None:
        """The answer is complete: read what is left, and judge it."""
        if status != 200:
            _fail(self._result, f"http_{status}", _message(self._rest))
        elif not self._streamed:
            self._document(msgspec.json.decode(self._rest))
        elif not self._ended and self._result.error is None:
            _fail(self._result, "truncated", "the stream ended without [DONE]")

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        document = msgspec.json.decode(data)
        if document.get("error"):
            _fail(self._result, "stream_error", str(document["error"].get("message", "")))
            return
        self._usage(document)
        for choice in document.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if text:
                self._text(now)
            self._result.finish_reason = choice.get("finish_reason") or self._result.finish_reason

    def _text(self, now: float) -> None:
        if self._last is None:
            self._result.ttft = now - self._sent
        else:
            self._result.gaps.append(now - self._last)
        self._last = now

    def _document(self, document: dict[str, Any]) -> None:
        self._usage(document)
        self._result.finish_reason = document["choices"][0]["finish_reason"]

    def _usage(self, document: dict[str, Any]) -> None:
        usage = document.get("usage") or {}
        self._result.prompt_tokens = usage.get("prompt_tokens", self._result.prompt_tokens)
        self._result.completion_tokens = usage.get("completion_tokens", self._result.completion_tokens)


def _message(body: bytes) -> str:
    """The error's message, or the beginning of whatever was sent instead."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
