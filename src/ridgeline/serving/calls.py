"""A request body of either dialect, read into one `Call`. Field names, ranges and defaults follow OpenAI's reference.

Extensions, named as in vLLM: ``top_k``, ``repetition_penalty``, ``ignore_eos``. Fields OpenAI knows and this server
does not support stand in the tables with ``only(neutral values)``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ridgeline.serving import fields as f
from ridgeline.serving.problems import ApiError, invalid

MOST_TOP_LOGPROBS = 20
MOST_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat runs to the end of the context

_SAMPLING: dict[str, f.Check] = {
    "model": f.string,
    "max_tokens": f.integer(1, 2**31),
    "temperature": f.number(0.0, 2.0),
    "top_p": f.number(0.0, 1.0, above=True),
    "top_k": f.integer(-1, 2**31),
    "repetition_penalty": f.number(0.0, 10.0, above=True),
    "ignore_eos": f.boolean,
    "n": f.integer(1, MOST_CHOICES),
    "seed": f.integer(-(2**63), 2**63 - 1),
    "stop": f.stops,
    "stream": f.boolean,
    "stream_options": f.stream_options,
    "user": f.ignored,
    "frequency_penalty": f.only(0.0),
    "presence_penalty": f.only(0.0),
    "logit_bias": f.only({}),
    "min_p": f.only(0.0),
    "min_tokens": f.only(0),
}

_COMPLETION: dict[str, f.Check] = {
    **_SAMPLING,
    "prompt": lambda name, value: value,
    "echo": f.boolean,
    "logprobs": f.integer(0, MOST_TOP_LOGPROBS),
    "best_of": f.only(1),
    "suffix": f.only(""),
}

_CHAT: dict[str, f.Check] = {
    **_SAMPLING,
    "messages": lambda name, value: value,
    "max_completion_tokens": f.integer(1, 2**31),
    "logprobs": f.boolean,
    "top_logprobs": f.integer(0, MOST_TOP_LOGPROBS),
    "response_format": f.only({"type": "text"}),
    "tools": f.only([]),
    "tool_choice": f.only("none", "auto"),
    "parallel_tool_calls": f.only(True, False),
    "functions": f.only([]),
    "function_call": f.only("none", "auto"),
    "modalities": f.only(["text"]),
    "audio": f.only(),
    "prediction": f.only(),
    "reasoning_effort": f.only(),
    "verbosity": f.only(),
    "service_tier": f.only("auto", "default"),
    "store": f.only(False),
    "metadata": f.only({}),
    "web_search_options": f.only(),
    "moderation": f.only(),
    "prompt_cache_key": f.only(),
    "prompt_cache_options": f.only(),
    "prompt_cache_retention": f.only(),
    "safety_identifier": f.ignored,
}

_MESSAGE: dict[str, f.Check] = {
    "role": f.string,
    "content": lambda name, value: value,
    "name": f.only(),
    "refusal": f.only(),
    "audio": f.only(),
    "annotations": f.only([]),
    "tool_calls": f.only([]),
    "tool_call_id": f.only(),
    "function_call": f.only(),
}

_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Call:
    """What a client asked for, in the server's terms. ``prompts`` are texts or token ids, ``sampling`` the
    arguments of `SamplingParams` but for ``max_tokens``."""

    id: str
    created: int
    chat: bool
    prompts: tuple[str | list[int], ...]
    max_tokens: int | None
    max_tokens_field: str
    sampling: Mapping[str, Any]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    seed: int | None = None
    user: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def prompt_field(self) -> str:
        """The name of the field that holds the prompt."""
        return "messages" if self.chat else "prompt"


def completion_call(body: Mapping[str, Any], model: str) -> Call:
    """Read a body of ``/v1/completions`` for the served ``model``."""
    values = f.read_fields(body, _COMPLETION)
    _check_model(values, model)
    if "prompt" not in values:
        raise invalid("prompt: required", "prompt", "missing_field")
    if values.get("echo") and "logprobs" in values:
        message = "echo: not supported together with logprobs (the engine gives none for prompt tokens)"
        raise invalid(message, "echo", "unsupported")
    return Call(
        id=f"cmpl-{uuid.uuid4().hex[:24]}",
        chat=False,
        prompts=_prompts(values["prompt"]),
        max_tokens=values.get("max_tokens", COMPLETION_TOKENS),
        max_tokens_field="max_tokens",
        echo=values.get("echo", False),
        logprobs=values.get("logprobs"),
        **_shared(values),
    )


def chat_call(body: Mapping[str, Any], model: str) -> Call:
    """Read a body of ``/v1/chat/completions`` for the served ``model``; the template is applied later."""
    values = f.read_fields(body, _CHAT)
    _check_model(values, model)
    if "messages" not in values:
        raise invalid("messages: required", "messages", "missing_field")
    if "top_logprobs" in values and not values.get("logprobs"):
        raise invalid("top_logprobs: needs logprobs to be true", "top_logprobs", "out_of_range")
    limit = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
    if values.get("max_tokens", values.get(limit)) != values.get(limit):
        raise invalid("max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    return Call(
        id=f"chatcmpl-{uuid.uuid4().hex[:24]}",
        chat=True,
        prompts=(),
        messages=_messages(values["messages"]),
        max_tokens=values.get(limit),
        max_tokens_field=limit,
        logprobs=values.get("top_logprobs", 0) if values.get("logprobs") else None,
        **_shared(values),
    )


def _shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields both dialects have in common, as arguments of `Call`."""
    stream = values.get("stream", False)
    if "stream_options" in values and not stream:
        raise invalid("stream_options: needs stream to be true", "stream_options", "out_of_range")
    sampling = {name: values[name] for name in _ENGINE_FIELDS if name in values}
    if sampling.get("top_k") == -1:  # vLLM's way to say "off"
        sampling["top_k"] = 0
    return {
        "created": int(time.time()),
        "sampling": sampling,
        "n": values.get("n", 1),
        "seed": values.get("seed"),
        "stream": stream,
        "include_usage": values.get("stream_options", {}).get("include_usage", False),
        "user": values.get("user") or values.get("safety_identifier", ""),
    }


_ENGINE_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos", "stop")


def _check_model(values: Mapping[str, Any], model: str) -> None:
    asked = values.get("model", model)
    if asked != model:
        message = f"model: '{asked[:80]}' is not served here (served: '{model}')"
        raise ApiError(404, message, param="model", code="model_not_found")


def _prompts(value: Any) -> tuple[str | list[int], ...]:
    """A string, token ids, or a list of either, as a tuple of prompts."""
    if type(value) is str:
        return (f.string("prompt", value),)
    if type(value) is not list:
        raise f.wrong("prompt", "a string, an array of strings, of token ids or of arrays of token ids", value)
    if not value:
        raise invalid("prompt: the array is empty", "prompt", "out_of_range")
    if type(value[0]) is int:
        return (_ids("prompt", value),)
    if type(value[0]) is str:
        return tuple(f.string(f"prompt[{index}]", item) for index, item in enumerate(value))
    return tuple(_ids(f"prompt[{index}]", item) for index, item in enumerate(value))


def _ids(name: str, value: Any) -> list[int]:
    if type(value) is not list or any(type(item) is not int for item in value):
        raise f.wrong(name, "an array of token ids", value)
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages with plain text content, checked one by one."""
    if type(value) is not list or not value:
        raise f.wrong("messages", "a non-empty array of messages", value)
    out = []
    for index, item in enumerate(value):
        name = f"messages[{index}]"
        if type(item) is not dict:
            raise f.wrong(name, "an object with role and content", item)
        message = f.read_fields(item, _MESSAGE, f"{name}.")
        role = message.get("role")
        if role not in _ROLES:
            raise invalid(f"{name}.role: {role!r:.60} is not one of {', '.join(_ROLES)}", f"{name}.role")
        if "content" not in message:
            raise invalid(f"{name}.content: required", f"{name}.content", "missing_field")
        # Templates know "system"; OpenAI's newer name for it means the same to a model of ours.
        out.append({"role": "system" if role == "developer" else role, "content": _content(name, message["content"])})
    return out


def _content(name: str, value: Any) -> str:
    """Text, or a list of text parts joined."""
    if type(value) is str:
        return f.string(f"{name}.content", value)
    if type(value) is not list:
        raise f.wrong(f"{name}.content", "a string or an array of text parts", value)
    texts = []
    for index, part in enumerate(value):
        where = f"{name}.content[{index}]"
        if type(part) is not dict:
            raise f.wrong(where, "an object with type and text", part)
        kind = part.get("type")
        if kind != "text":
            raise invalid(f"{where}.type: {kind!r:.60} is not supported, only 'text'", f"{where}.type", "unsupported")
        fields = f.read_fields(part, {"type": f.string, "text": f.string}, f"{where}.")
        if "text" not in fields:
            raise invalid(f"{where}.text: required", f"{where}.text", "missing_field")
        texts.append(fields["text"])
    return "".join(texts)
