"""What goes back to the client: OpenAI's documents and stream chunks, made from token events.

A `Choice` gathers one sequence; `CompletionShape` and `ChatShape` know the two dialects. Log-probabilities keep
one invariant: one entry per generated token, in both dialects, streamed or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ridgeline import __version__
from ridgeline.serving.calls import Call

FINGERPRINT = f"ridgeline-{__version__}"


@dataclass
class Choice:
    """One sequence of a request as it grows. ``events`` carry the tokens, ``offset`` the visible characters."""

    index: int
    prompt_tokens: int
    echo: str = ""
    texts: list[str] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0
    offset: int = 0

    def add(self, event: Any) -> None:
        """Take one token event."""
        if event.text:
            self.texts.append(event.text)
        if event.token_id is not None:
            self.events.append(event)
        self.completion_tokens = event.completion_tokens
        self.finish_reason = event.finish_reason


def usage(choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
    """Token counts of a request; a prompt with several choices counts once."""
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }


class Shape:
    """What both dialects share: the envelope of documents and chunks. ``tokenizer`` names tokens in log-probs."""

    document_object = ""
    chunk_object = ""

    def __init__(self, call: Call, model: str, tokenizer: Any) -> None:
        self.call = call
        self.model = model
        self.tokenizer = tokenizer

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """id, object, created, model, choices."""
        return {
            "id": self.call.id,
            "object": kind,
            "created": self.call.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }

    def document(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """The whole answer of a request that is not streamed."""
        bodies = [self.whole(choice) for choice in choices]
        return {**self.envelope(self.document_object, bodies), "usage": usage(choices, prompt_tokens)}

    def chunk(self, body: dict[str, Any]) -> dict[str, Any]:
        """One streamed chunk around one choice."""
        chunk = self.envelope(self.chunk_object, [body])
        if self.call.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """The last chunk when ``stream_options.include_usage`` is set: no choices, the counts."""
        return {**self.envelope(self.chunk_object, []), "usage": usage(choices, prompt_tokens)}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """A chunk before the first token, if the dialect has one."""
        raise NotImplementedError

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The finished choice."""
        raise NotImplementedError

    def delta(self, choice: Choice, event: Any) -> dict[str, Any] | None:
        """The chunk for one event, None when it shows nothing new."""
        raise NotImplementedError

    def token_text(self, token_id: int) -> str:
        """How a token is named in log-probs: its text alone (U+FFFD where it is part of a character)."""
        return str(self.tokenizer.decode([token_id]))

    def alternatives(self, event: Any) -> list[tuple[int, str, float]]:
        """The top log-probs of one step, the sampled token included, best first, all from the engine's values."""
        wanted = self.call.logprobs or 0
        top = [(token, self.token_text(token), value) for token, _, value in (event.top_logprobs or [])[:wanted]]
        if all(token != event.token_id for token, _, _ in top):
            top.append((event.token_id, self.token_text(event.token_id), event.logprob))
        return top


class CompletionShape(Shape):
    """``/v1/completions``."""

    document_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        choice.offset = len(choice.echo)
        return self.chunk(self._body(choice, choice.echo, None)) if choice.echo else None

    def whole(self, choice: Choice) -> dict[str, Any]:
        choice.offset = len(choice.echo)
        logprobs = self._logprobs(choice, choice.events)
        return self._body(choice, choice.echo + "".join(choice.texts), logprobs, choice.finish_reason)

    def delta(self, choice: Choice, event: Any) -> dict[str, Any] | None:
        tokens = [event] if event.token_id is not None else []
        logprobs = self._logprobs(choice, tokens)
        if not event.text and logprobs is None and event.finish_reason is None:
            return None
        return self.chunk(self._body(choice, event.text, logprobs, event.finish_reason))

    def _body(self, choice: Choice, text: str, logprobs: Any, finish: str | None = None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, choice: Choice, events: Sequence[Any]) -> dict[str, Any] | None:
        """The four parallel arrays of the legacy dialect."""
        if self.call.logprobs is None or not events:
            return None
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            text = self.token_text(event.token_id)
            named: dict[str, float] = {}
            for _, name, value in self.alternatives(event):
                named[name] = max(value, named.get(name, value))  # two tokens may show the same text
            out["tokens"].append(text)
            out["token_logprobs"].append(event.logprob)
            out["top_logprobs"].append(named)
            out["text_offset"].append(choice.offset)
            choice.offset += len(text)
        return out


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    document_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return self.chunk(self._body(choice, {"role": "assistant", "content": ""}, None, None))

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.events),
            "finish_reason": choice.finish_reason,
        }

    def delta(self, choice: Choice, event: Any) -> dict[str, Any] | None:
        logprobs = self._logprobs([event] if event.token_id is not None else [])
        if not event.text and logprobs is None and event.finish_reason is None:
            return None
        delta = {"content": event.text} if event.text else {}
        return self.chunk(self._body(choice, delta, logprobs, event.finish_reason))

    def _body(self, choice: Choice, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, events: Sequence[Any]) -> dict[str, Any] | None:
        if self.call.logprobs is None or not events:
            return None
        return {"content": [self._entry(event) for event in events], "refusal": None}

    def _entry(self, event: Any) -> dict[str, Any]:
        top = self.alternatives(event)[: self.call.logprobs] if self.call.logprobs else []
        return {
            **_named(self.token_text(event.token_id), event.logprob),
            "top_logprobs": [_named(text, value) for _, text, value in top],
        }


def _named(text: str, logprob: float) -> dict[str, Any]:
    whole = "�" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8")) if whole else None}
