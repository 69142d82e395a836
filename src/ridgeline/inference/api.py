"""Generation as a function call: prompts in, texts out, with the speed beside its limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.errors import JobError, UserError
from ridgeline.inference.engine import Engine
from ridgeline.inference.request import FinishReason, Request, SamplingParams, TokenEvent

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass
class Generation:
    """What was generated for one prompt."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, str, float]]] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        """Add one event. Raises `JobError` for an error event."""
        if event.finish_reason == "error":
            raise JobError(f"generation failed: {event.text}")
        self.text += event.text
        if event.token_id is not None:
            self.tokens.append(event.token_id)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs or [])
        self.finish_reason, self.prompt_tokens = event.finish_reason, event.prompt_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def generate(
    model: str | Path | Engine,
    prompts: str | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    **options: Any,
) -> list[Generation]:
    """Generate for every prompt, batched; the results are in the order of the prompts.

    A prompt is a text, token ids, or chat messages (``role``, ``content``). ``params`` is one for all or one each;
    without it the default sampling. ``model`` is an engine, or anything `resolve_model` takes; ``options`` then go to
    `Engine.load`.
    """
    engine = as_engine(model, **options)
    given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
    every = [params or SamplingParams()] * len(given) if not isinstance(params, Sequence) else list(params)
    if len(every) != len(given):
        raise UserError(f"{len(given)} prompts but {len(every)} sampling parameters")
    results = [Generation() for _ in given]
    requests = [
        Request(f"generate-{number}", encode(engine, prompt), every[number]) for number, prompt in enumerate(given)
    ]
    for event in run(engine, requests):
        results[int(event.request_id.rpartition("-")[2])].take(event)
    return results


def stream(
    model: str | Path | Engine, prompt: Prompt, params: SamplingParams | None = None, **options: Any
) -> Iterator[TokenEvent]:
    """Token events of one prompt as they come. Closing the iterator early frees its place."""
    engine = as_engine(model, **options)
    request = Request("stream", encode(engine, prompt), params or SamplingParams())
    return run(engine, [request])


def run(engine: Engine, requests: Sequence[Request]) -> Iterator[TokenEvent]:
    """Submit ``requests`` and step until they have ended; what is left is cancelled when the iterator is closed."""
    taken: list[Request] = []
    try:
        for request in requests:
            engine.submit(request)
            taken.append(request)
        left = {request.id for request in requests}
        while left:
            for event in engine.step():
                if event.finish_reason is not None:
                    left.discard(event.request_id)
                yield event
    finally:
        for request in taken:
            engine.cancel(request.id)


def encode(engine: Engine, prompt: Prompt) -> list[int]:
    """Token ids of a text, of chat messages, or as given. Raises `UserError` without a tokenizer for texts."""
    ids = [item for item in prompt if isinstance(item, int)]
    if not isinstance(prompt, str) and len(ids) == len(prompt):
        return ids
    if engine.tokenizer is None:
        raise UserError("the model folder has no tokenizer.json: give token ids instead of text")
    if isinstance(prompt, str):
        return list(engine.tokenizer.encode(prompt))
    return list(engine.tokenizer.encode_chat(prompt))


def as_engine(model: str | Path | Engine, **options: Any) -> Engine:
    """The engine itself, or one loaded from a model reference."""
    if isinstance(model, Engine):
        return model
    from ridgeline.inference.locate import resolve_model

    return Engine.load(resolve_model(model), **options)


@dataclass(frozen=True)
class Speed:
    """Decode speed of an engine since ``before``. MBU = bytes read / seconds / measured read bandwidth."""

    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float
    tokens_per_second: float | None
    bytes_per_second: float | None
    mbu: float | None
    ceiling_bytes_per_second: float | None
    formula: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure(before: Mapping[str, Any], after: Mapping[str, Any], ceiling: float | None) -> Speed:
    """The difference of two ``engine.stats()``, beside the device's measured read bandwidth (bytes per second)."""
    seconds = after["decode_seconds"] - before["decode_seconds"]
    tokens = after["decode_tokens"] - before["decode_tokens"]
    moved = after["decode_bytes"] - before["decode_bytes"]
    rate = moved / seconds if tokens else None
    formula = (
        f"({after['weight_bytes']} weight bytes per step + {after['kv_bytes_per_token']} cache bytes per resident token)"
        " x steps / decode seconds / read bandwidth"
    )
    return Speed(
        prompt_tokens=after["prompt_tokens"] - before["prompt_tokens"],
        prompt_seconds=after["prefill_seconds"] - before["prefill_seconds"],
        decode_tokens=tokens,
        decode_seconds=seconds,
        tokens_per_second=tokens / seconds if tokens else None,
        bytes_per_second=rate,
        mbu=rate / ceiling if rate and ceiling else None,
        ceiling_bytes_per_second=ceiling,
        formula=formula,
    )
