"""One generation request from checked body to its end: prompts to tokens, limits, tokens to choices, the books."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

from ridgeline.errors import UserError
from ridgeline.inference import Request, SamplingParams
from ridgeline.serving.calls import Call
from ridgeline.serving.endpoint import Endpoint
from ridgeline.serving.engine_thread import Arrival, EngineFailed, QueueFull, Ticket
from ridgeline.serving.problems import ApiError, invalid
from ridgeline.serving.records import Record
from ridgeline.serving.shapes import Choice, Shape

INLINE_CHARACTERS = 4096  # longer texts are tokenised off the event loop, so that /health stays quick


class Session:
    """The life of one call. `open` it, read `arrivals`, and always `close` it."""

    def __init__(self, endpoint: Endpoint, call: Call, shape: Shape, record: Record) -> None:
        self.endpoint = endpoint
        self.call = call
        self.shape = shape
        self.record = record
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self._ticket: Ticket | None = None
        self._last: dict[int, float] = {}
        self._accepted = False
        self._closed = False

    async def open(self) -> None:
        """Tokenise, check the limits, and get every sequence accepted by the engine.

        Raises:
            ApiError: 400 for a limit (naming the field), 429 queue full, 503 engine down.
        """
        call = dataclasses.replace(self.call, prompts=(self._templated(),)) if self.call.chat else self.call
        prompts = [await self._tokens(prompt) for prompt in call.prompts]
        self._check_count(len(prompts))
        limits = [self._completion_limit(index, tokens) for index, tokens in enumerate(prompts)]
        self.prompt_tokens = self.record.prompt_tokens = sum(len(tokens) for tokens in prompts)
        requests = [
            request
            for index, tokens in enumerate(prompts)
            for request in await self._requests(index, tokens, limits[index], call.prompts[index])
        ]
        await self._submit(requests)

    def _templated(self) -> str:
        """The chat rendered by the model's own template."""
        tokenizer = self.endpoint.engine.tokenizer
        if not tokenizer.has_chat_template:
            message = f"messages: model '{self.shape.model}' has no chat template; use /v1/completions"
            raise invalid(message, "messages", "no_chat_template")
        try:
            return str(tokenizer.apply_chat_template(self.call.messages, add_generation_prompt=True))
        except Exception as error:  # a template is the model's own program; what it refuses is the client's input
            raise invalid(f"messages: {error}", "messages", "template_refused") from None

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        """Token ids of one prompt."""
        field = self.call.prompt_field
        if isinstance(prompt, str):
            tokens = await self._encode(prompt)
        else:
            tokens = prompt
            vocab = int(self.endpoint.engine.vocab_size)
            bad = next((token for token in tokens if not 0 <= token < vocab), None)
            if bad is not None:
                raise invalid(f"{field}: token id {bad} is outside 0 to {vocab - 1}", field, "out_of_range")
        if not tokens:
            raise invalid(f"{field}: no tokens", field, "empty_prompt")
        return tokens

    async def _encode(self, text: str) -> list[int]:
        encode = self.endpoint.engine.tokenizer.encode
        special = not self.call.chat  # a rendered template holds its own special tokens
        if len(text) <= INLINE_CHARACTERS:
            return list(encode(text, special))
        return list(await asyncio.to_thread(encode, text, special))

    def _check_count(self, prompts: int) -> None:
        """Refuse what could never fit, even on an idle server."""
        capacity = self.endpoint.thread.capacity
        if prompts * self.call.n > capacity:
            field = "n" if self.call.n > 1 else "prompt"
            message = (
                f"{field}: {prompts} prompts x n={self.call.n} need {prompts * self.call.n} places, {capacity} exist"
            )
            raise invalid(message, field, "too_many_sequences")

    def _completion_limit(self, index: int, tokens: list[int]) -> int:
        """The tokens this prompt may be continued by; the context and the server's limit are both enforced."""
        call, context = self.call, self.endpoint.context
        field = call.prompt_field if len(call.prompts) <= 1 else f"{call.prompt_field}[{index}]"
        most = self.endpoint.settings.max_tokens
        if len(tokens) >= context:
            message = f"{field}: {len(tokens)} tokens leave no room in the context of {context}"
            raise invalid(message, call.prompt_field, "context_length_exceeded")
        room = context - len(tokens)
        if call.max_tokens is None:
            return min(room, most or room)
        name = call.max_tokens_field
        if most is not None and call.max_tokens > most:
            raise invalid(f"{name}: {call.max_tokens} is more than this server's limit of {most}", name, "out_of_range")
        if call.max_tokens > room:
            total = len(tokens) + call.max_tokens
            message = (
                f"{name}: {call.max_tokens} with the {len(tokens)} tokens of {field} "
                f"makes {total}, more than the context of {context}"
            )
            raise invalid(message, name, "context_length_exceeded")
        return call.max_tokens

    async def _requests(self, index: int, tokens: list[int], limit: int, prompt: str | list[int]) -> list[Any]:
        """The engine requests of one prompt, and their empty choices."""
        call = self.call
        echo = ""
        if call.echo:
            echo = prompt if isinstance(prompt, str) else str(self.endpoint.engine.tokenizer.decode(tokens))
        out = []
        for copy in range(call.n):
            number = index * call.n + copy
            # Every choice gets a seed of its own, or n > 1 would return n times the same text.
            seed = None if call.seed is None else (call.seed + number) % 2**63
            try:
                params = SamplingParams(max_tokens=limit, seed=seed, logprobs=call.logprobs, **call.sampling)
            except UserError as error:
                raise invalid(str(error)) from None
            out.append(Request(id=f"{call.id}-{number}", prompt=tokens, params=params))
            self.choices.append(Choice(number, len(tokens), echo))
        return out

    async def _submit(self, requests: list[Any]) -> None:
        endpoint = self.endpoint
        try:
            self._ticket = endpoint.thread.submit(requests)
            await self._taken(self._ticket)
            self._accepted = True
        except QueueFull as error:
            endpoint.metrics.rejections.inc()
            message = f"the queue is full: {error} (--max-queue)"
            headers = {"retry-after": str(endpoint.settings.retry_after_seconds)}
            raise ApiError(429, message, param="max_queue", code="queue_full", headers=headers) from None
        except EngineFailed as error:
            raise ApiError(503, str(error), code="engine_failed") from None
        except ValueError as error:
            raise invalid(str(error), self.call.prompt_field) from None

    async def _taken(self, ticket: Ticket) -> None:
        """Wait for the engine to take the ticket: until the step in progress ends, and no longer than a step may last."""
        while not ticket.accepted.done():
            self.endpoint.thread.check()
            await asyncio.wait({ticket.accepted}, timeout=self.endpoint.settings.ping_seconds)
        ticket.accepted.result()

    async def arrivals(self) -> AsyncIterator[tuple[Choice, Any] | None]:
        """Token events in order of arrival; None when nothing came for a while (a moment for a keep-alive).

        Raises:
            EngineFailed: the engine gave up.
        """
        assert self._ticket is not None
        open_choices = len(self.choices)
        while open_choices:
            arrival = await self._ticket.next(self.endpoint.settings.ping_seconds)
            if arrival is None:
                self.endpoint.thread.check()
                yield None
                continue
            choice = self.choices[arrival.sequence]
            self._note(choice, arrival)
            if arrival.event.finish_reason in ("error", "cancelled"):
                raise EngineFailed(
                    arrival.event.text or f"the engine ended this request ({arrival.event.finish_reason})"
                )
            choice.add(arrival.event)
            yield choice, arrival.event
            if choice.finish_reason is not None:
                self.endpoint.metrics.finished(choice.finish_reason)
                open_choices -= 1

    def _note(self, choice: Choice, arrival: Arrival) -> None:
        """Times and counts of one event."""
        if arrival.event.token_id is None:
            return
        metrics, record = self.endpoint.metrics, self.record
        metrics.generation_tokens.inc()
        if record.first_token is None:
            record.first_token = time.monotonic()
            record.scheduled = self._ticket.started if self._ticket is not None else None
            metrics.first_token.observe(record.first_token - record.arrived)
        before = self._last.get(choice.index)
        if before is not None:
            metrics.gap.observe(arrival.at - before)
        self._last[choice.index] = record.last_token = arrival.at

    def close(self, status: int, finish: str | None = None) -> None:
        """Free the places and write the books, once. ``finish`` overrides the choices' own reasons."""
        if self._closed:
            return
        self._closed = True
        if self._ticket is not None:
            self.endpoint.thread.cancel(self._ticket)
        record = self.record
        record.completion_tokens = sum(choice.completion_tokens for choice in self.choices)
        record.status = status
        record.finish = finish or ",".join(dict.fromkeys(str(choice.finish_reason) for choice in self.choices))
        if self._accepted:
            for choice in self.choices:
                if choice.finish_reason is None:
                    self.endpoint.metrics.finished(finish or "error")
        self.endpoint.finished(record, self._accepted)
