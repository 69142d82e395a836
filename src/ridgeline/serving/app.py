"""The application: every route with its access class, and the gate in front of them."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ridgeline.errors import nearest
from ridgeline.serving import generation, operations
from ridgeline.serving.endpoint import Endpoint
from ridgeline.serving.engine_thread import EngineThread
from ridgeline.serving.problems import ApiError
from ridgeline.serving.records import Record
from ridgeline.serving.settings import ServeSettings

logger = logging.getLogger("ridgeline.serving")

# (method, path, handler, open): "open" routes answer without the API key, because orchestrators probe them.
ROUTES: tuple[tuple[str, str, Any, bool], ...] = (
    ("GET", "/v1/models", operations.models, False),
    ("GET", "/v1/models/{name:path}", operations.model, False),
    ("POST", "/v1/completions", generation.completions, False),
    ("POST", "/v1/chat/completions", generation.chat_completions, False),
    ("POST", "/tokenize", operations.tokenize, False),
    ("POST", "/detokenize", operations.detokenize, False),
    ("GET", "/metrics", operations.metrics, False),
    ("GET", "/version", operations.version, False),
    ("GET", "/health", operations.health, True),
    ("GET", "/health/live", operations.live, True),
    ("GET", "/health/ready", operations.ready, True),
)
OPEN_PATHS = frozenset(path for _, path, _, is_open in ROUTES if is_open)


def create_app(
    thread: EngineThread, settings: ServeSettings, on_record: Callable[[Record], None] | None = None
) -> Starlette:
    """The ASGI application over a started (or starting) engine thread. ``app.state.endpoint`` is its shared state."""
    app = Starlette(
        routes=[Route(path, handler, methods=[method]) for method, path, handler, _ in ROUTES],
        middleware=[Middleware(Gate, settings=settings)],
        exception_handlers={ApiError: _refused, HTTPException: _http_error, Exception: _crashed},
    )
    app.state.endpoint = Endpoint(thread, settings, on_record)
    return app


class Gate:
    """Checks the API key and counts answers. Plain ASGI: it must not stand between a stream and its client."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._key = settings.api_key.encode("utf-8") if settings.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint: Endpoint = scope["app"].state.endpoint
        route = _label(scope["path"])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint.metrics.answered(route, message["status"])
            await send(message)

        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._allowed(scope):
            error = ApiError(401, "Authorization: a valid API key is needed (Bearer KEY)", code="invalid_api_key")
            await error.response()(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key or b"")


def _label(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models"
    known = any(path == route for _, route, _, _ in ROUTES)
    return path if known else "other"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the same shape as every other refusal."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    if error.status_code == 404:
        paths = [route for _, route, _, _ in ROUTES if "{" not in route]
        refusal = ApiError(404, f"{path}: no such route{nearest(path, paths)}", code="not_found")
    elif error.status_code == 405:
        refusal = ApiError(405, f"{path}: {request.method} is not allowed here", code="method_not_allowed")
    else:
        refusal = ApiError(error.status_code, str(error.detail))
    refusal.headers.update(error.headers or {})
    return refusal.response()


async def _crashed(request: Request, error: Exception) -> Response:
    """Our own bug: Starlette raises it on, and uvicorn logs the traceback."""
    return ApiError(500, f"internal error ({type(error).__name__})", code="internal_error").response()
