"""The small routes: models, health, metrics, version, and the tokenizer for clients that count tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ridgeline import __version__
from ridgeline.serving import fields as f
from ridgeline.serving.body import read_json
from ridgeline.serving.endpoint import Endpoint
from ridgeline.serving.generation import CLIENT_GONE
from ridgeline.serving.problems import ApiError, invalid, json_response


def _endpoint(request: Request) -> Endpoint:
    endpoint: Endpoint = request.app.state.endpoint
    return endpoint


def _model(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.settings.name,
        "object": "model",
        "created": endpoint.created,
        "owned_by": "ridgeline",
        "max_model_len": endpoint.context if endpoint.engine is not None else None,
    }


async def models(request: Request) -> Response:
    """``GET /v1/models``."""
    return json_response({"object": "list", "data": [_model(_endpoint(request))]})


async def model(request: Request) -> Response:
    """``GET /v1/models/NAME``."""
    endpoint = _endpoint(request)
    asked = request.path_params["name"]
    if asked != endpoint.settings.name:
        message = f"model: '{asked[:80]}' is not served here (served: '{endpoint.settings.name}')"
        raise ApiError(404, message, param="model", code="model_not_found")
    return json_response(_model(endpoint))


async def health(request: Request) -> Response:
    """``GET /health``: 200 while the endpoint takes requests, else 503 with the reason."""
    endpoint = _endpoint(request)
    return _report(endpoint, endpoint.ready)


async def live(request: Request) -> Response:
    """``GET /health/live``: 503 when only a restart helps (the engine failed or a step is overdue)."""
    endpoint = _endpoint(request)
    return _report(endpoint, endpoint.thread.health()["alive"])


async def ready(request: Request) -> Response:
    """``GET /health/ready``: 503 while loading and from the first SIGTERM on."""
    endpoint = _endpoint(request)
    return _report(endpoint, endpoint.ready)


def _report(endpoint: Endpoint, good: bool) -> Response:
    health = endpoint.thread.health()
    state = "draining" if endpoint.draining and health["state"] == "running" else health["state"]
    body = {
        "status": "ok" if good else "unavailable",
        "state": state,
        "reason": health["reason"],
        "step_age_seconds": round(endpoint.thread.last_step_age(), 3),
        "open_sequences": endpoint.thread.open_sequences,
    }
    return json_response(body, 200 if good else 503, None if good else {"retry-after": "1"})


async def metrics(request: Request) -> Response:
    """``GET /metrics``: Prometheus text."""
    content, kind = _endpoint(request).metrics.render()
    return Response(content, headers={"content-type": kind})


async def version(request: Request) -> Response:
    """``GET /version``."""
    return json_response({"version": __version__})


async def tokenize(request: Request) -> Response:
    """``POST /tokenize`` ``{prompt, add_special_tokens}`` -> ``{tokens, count, max_model_len}`` (vLLM's shape)."""
    endpoint = _endpoint(request)
    checks = {"model": f.string, "prompt": f.string, "add_special_tokens": f.boolean}
    values = await _read(request, checks)
    if values is None:
        return Response(status_code=CLIENT_GONE)
    if "prompt" not in values:
        raise invalid("prompt: required", "prompt", "missing_field")
    special = values.get("add_special_tokens", True)
    tokens = await asyncio.to_thread(endpoint.engine.tokenizer.encode, values["prompt"], special)
    return json_response({"tokens": list(tokens), "count": len(tokens), "max_model_len": endpoint.context})


async def detokenize(request: Request) -> Response:
    """``POST /detokenize`` ``{tokens}`` -> ``{prompt}``."""
    endpoint = _endpoint(request)
    values = await _read(request, {"model": f.string, "tokens": _token_ids})
    if values is None:
        return Response(status_code=CLIENT_GONE)
    if "tokens" not in values:
        raise invalid("tokens: required", "tokens", "missing_field")
    vocab = int(endpoint.engine.vocab_size)
    bad = next((token for token in values["tokens"] if not 0 <= token < vocab), None)
    if bad is not None:
        raise invalid(f"tokens: token id {bad} is outside 0 to {vocab - 1}", "tokens", "out_of_range")
    text = await asyncio.to_thread(endpoint.engine.tokenizer.decode, values["tokens"])
    return json_response({"prompt": text})


async def _read(request: Request, checks: Mapping[str, f.Check]) -> dict[str, Any] | None:
    endpoint = _endpoint(request)
    endpoint.require_ready()
    settings = endpoint.settings
    try:
        return f.read_fields(await read_json(request, settings.max_body_bytes, settings.body_seconds), checks)
    except ClientDisconnect:
        return None


def _token_ids(name: str, value: Any) -> list[int]:
    if type(value) is not list or any(type(item) is not int for item in value):
        raise f.wrong(name, "an array of token ids", value)
    return value
