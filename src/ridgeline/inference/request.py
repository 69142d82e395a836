"""What a caller asks of the engine and what it gets back. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ridgeline.errors import UserError

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_LOGPROBS = 20
MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to end. Raises `UserError` naming the field and its valid range.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off. ``seed`` None draws a fresh one. ``logprobs``
    None is off, 0 the chosen token's alone, n the best n beside it; they are the model's own (before penalty and
    temperature). The order is that of transformers: penalty, temperature, top-k, top-p.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(stop) > MAX_STOPS:
            raise UserError(f"stop: {len(stop)} strings; at most {MAX_STOPS} are valid")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop: {text!r} is not a text of one character or more")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) to continue. ``id`` is unique among the engine's unfinished requests."""

    id: str
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request. ``text`` is what became visible with it: whole characters only, stop strings removed.

    ``top_logprobs`` holds (token id, text, log-probability), best first, the chosen token always among them. The last
    event of a request has a ``finish_reason``; with "error", ``text`` says what happened and ``token_id`` is None.
    """

    request_id: str
    token_id: int | None
    text: str
    logprob: float | None = None
    top_logprobs: list[tuple[int, str, float]] | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name} = {value!r}: must be an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not low <= value <= high or (above and value == low):
        start = f"above {low:g}" if above else f"from {low:g}"
        raise UserError(f"{name} = {value!r}: must be a number {start} to {high:g}")
