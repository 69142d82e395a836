"""The engine: requests in, token events out, one step at a time. Not thread-safe: one owner calls everything."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ridgeline.errors import JobError, UserError
from ridgeline.inference.cache import KVCache, fit_context, memory_limit
from ridgeline.inference.detokenize import TextStream
from ridgeline.inference.request import FinishReason, Request, TokenEvent
from ridgeline.inference.runner import ModelRunner, Segment
from ridgeline.inference.sampler import Choice, Sampled, sample
from ridgeline.inference.scheduler import Chunk, Row, Scheduler
from ridgeline.inference.tokenizer import Tokenizer
from ridgeline.models.decoder import Decoder
from ridgeline.models.folder import DTYPES, find_folder, load
from ridgeline.optimize.prepack import PackDecision, decide, pack_decoder

CHUNK = {"cpu": 128, "cuda": 512}  # prompt tokens computed in one piece
BUDGET_CHUNKS = 2  # and pieces per step
BROKEN = "the model gave logits that are not finite"


@dataclass
class _Live:
    """A request inside the engine."""

    request: Request
    choice: Choice
    text: TextStream
    emitted: int = 0
    last: int = -1


@dataclass
class Totals:
    """What the engine has done since it was made. Seconds are of the steps' two parts, sampling included."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_bytes: int = 0  # weights and cache that the decode steps had to read
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Continuous batching over one model. Make it with `Engine.load`, or of parts for tests.

    ``max_batch`` sequences run at once, each with room for ``max_context`` tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        max_batch: int = 8,
        max_context: int | None = None,
        compile: bool = False,
        kv_memory_bytes: int | None = None,
        chunk: int | None = None,
        pack: bool | None = None,
    ) -> None:
        """``pack`` None measures whether prepacked linears pay (see `ridgeline.optimize.prepack`)."""
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise UserError(f"max_batch = {max_batch!r}: must be an integer of at least 1")
        weight = decoder.embed.weight
        limit = kv_memory_bytes if kv_memory_bytes is not None else memory_limit(weight.device)
        self.max_batch = max_batch
        self.max_context = fit_context(decoder.config, max_batch, max_context, weight.dtype, limit)
        self.config, self.dtype, self.device = decoder.config, weight.dtype, weight.device
        self.vocab_size = decoder.config.vocab_size
        self.tokenizer: Any = tokenizer
        self.totals = Totals()
        self._weight_bytes = read_bytes(decoder)
        self.linears = decide(decoder) if pack is None else PackDecision(pack, "chosen by the caller")
        head = pack_decoder(decoder) if self.linears.packed else decoder.logits
        self._cache = KVCache(decoder.config, max_batch, self.max_context, weight.dtype, weight.device)
        size = chunk or CHUNK[weight.device.type]
        self._scheduler = Scheduler(max_batch, self.max_context, size, size * BUDGET_CHUNKS)
        self._runner = ModelRunner(decoder, head, self._cache, compile)
        self._live: dict[str, _Live] = {}
        started = time.perf_counter()
        if compile:
            _require_compiler(weight.device)
            self._runner.warm_up()
        self.compile_seconds = time.perf_counter() - started if compile else 0.0
        self._graphs = self._runner.graphs

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "bf16",
        max_batch: int = 8,
        max_context: int | None = None,
        compile: bool = True,
        device: str | None = None,
        kv_memory_bytes: int | None = None,
        chunk: int | None = None,
    ) -> Engine:
        """Load a model folder (or hub id). With ``compile`` everything is compiled before this returns.

        ``max_context`` None takes the model's own, less when memory is short (see ``stats()["context"]``);
        ``kv_memory_bytes`` None lets the cache take half of the free memory; ``chunk`` prompt tokens are computed in one
        piece (None: see `CHUNK`).

        Raises:
            UserError: a value is not valid, or the model cannot be read.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is not supported (valid: {', '.join(DTYPES)})")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = find_folder(path)
        decoder = load(folder, dtype, place)
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        return cls(
            decoder,
            tokenizer,
            max_batch=max_batch,
            max_context=max_context,
            compile=compile,
            kv_memory_bytes=kv_memory_bytes,
            chunk=chunk,
        )

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: it can never run: too long for the context, a token outside the vocabulary, an id in use.
        """
        bad = next((token for token in request.prompt if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise UserError(f"request '{request.id}': token id {bad} is outside 0 to {self.vocab_size - 1}")
        if request.params.stop and self.tokenizer is None:
            raise UserError("stop: the model folder has no tokenizer.json, so stop strings cannot be looked for")
        self._scheduler.add(request.id, len(request.prompt), request.params.max_tokens)
        choice = Choice(request.params)
        choice.watch(request.prompt, self.vocab_size, self.device)
        self._live[request.id] = _Live(request, choice, TextStream(self._decode, request.params.stop))
        self.totals.requests += 1

    def cancel(self, request_id: str) -> bool:
        """Drop a request, wherever it is; its slot is free for the next step. False when there is none such."""
        self._live.pop(request_id, None)
        found = self._scheduler.cancel(request_id)
        if found:
            self._count("cancelled")
        return found

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._live)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Run one step: a token for every sequence whose prompt is done, and a bounded piece of the other prompts."""
        plan = self._scheduler.plan()
        for source, target, tokens in plan.moves:
            self._cache.move(source, target, tokens)
        events: list[TokenEvent] = []
        self._scheduler.advance(plan)
        if plan.decode:
            events += self._decode_rows(plan.decode)
        if plan.prefill:
            events += self._prefill(plan.prefill)
        return events

    def stats(self) -> dict[str, Any]:
        """Counts, rates and choices, as plain data."""
        totals = self.totals
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "kv_usage": self._scheduler.reserved_tokens / (self.max_batch * self.max_context),
            "kv_bytes": self._cache.bytes,
            "kv_bytes_per_token": self._cache.bytes_per_token,
            "context": self.max_context,
            "preemptions": 0,
            "requests": totals.requests,
            "prompt_tokens": totals.prompt_tokens,
            "generated_tokens": totals.generated_tokens,
            "decode_steps": totals.decode_steps,
            "decode_tokens": totals.decode_tokens,
            "decode_seconds": totals.decode_seconds,
            "prefill_seconds": totals.prefill_seconds,
            "decode_bytes": totals.decode_bytes,
            "weight_bytes": self._weight_bytes,
            "finished": dict(totals.finished),
            "compiled": self._runner.compiled,
            "compile_seconds": self.compile_seconds,
            "recompiles": self._runner.graphs - self._graphs,
            "linears": self.linears.to_dict(),
        }

    def _decode_rows(self, rows: Sequence[Row]) -> list[TokenEvent]:
        started = time.perf_counter()
        wanted = [row for row in rows if row.id is not None]
        tokens = [self._live[row.id].last if row.id is not None else 0 for row in rows]
        reach = max(row.position for row in wanted)
        out = self._runner.decode(tokens, [row.position for row in rows], reach)
        index = [row.slot for row in wanted]
        lives = [self._live[row.id] for row in wanted if row.id is not None]
        broken = [not math.isfinite(out.peak[slot]) for slot in index]
        sampled = self._sample(out.logits, index, lives, [out.best[slot] for slot in index], broken)
        totals = self.totals
        totals.decode_steps += 1
        totals.decode_tokens += len(wanted)
        totals.decode_bytes += (
            self._weight_bytes + sum(row.position + 1 for row in wanted) * self._cache.bytes_per_token
        )
        totals.decode_seconds += time.perf_counter() - started
        return [self._emit(*item) for item in zip(lives, index, sampled, strict=True)]

    def _prefill(self, chunks: Sequence[Chunk]) -> list[TokenEvent]:
        started = time.perf_counter()
        segments = [
            Segment(chunk.slot, chunk.start, self._live[chunk.id].request.prompt[chunk.start : chunk.end], chunk.last)
            for chunk in chunks
        ]
        logits = self._runner.prefill(segments)
        ended = [chunk for chunk in chunks if chunk.last]
        events = []
        if logits is not None:
            lives = [self._live[chunk.id] for chunk in ended]
            peak, best = logits.max(-1)
            broken = [not math.isfinite(value) for value in peak.tolist()]
            sampled = self._sample(logits, list(range(len(lives))), lives, best.tolist(), broken)
            slots = [chunk.slot for chunk in ended]
            events = [self._emit(*item) for item in zip(lives, slots, sampled, strict=True)]
        self.totals.prompt_tokens += sum(chunk.end - chunk.start for chunk in chunks)
        self.totals.prefill_seconds += time.perf_counter() - started
        return events

    def _sample(
        self, logits: Tensor, index: list[int], lives: list[_Live], best: list[int], broken: list[bool]
    ) -> list[Sampled | None]:
        """A token for each of ``lives``, whose logits are rows ``index``; None where they are broken."""
        sampled: list[Sampled | None] = [None if bad else Sampled(t) for t, bad in zip(best, broken, strict=True)]
        asking = [i for i, live in enumerate(lives) if not broken[i] and not live.choice.plain]
        if asking:
            rows = torch.tensor([index[i] for i in asking], device=logits.device)
            for i, result in zip(asking, sample(logits[rows], [lives[i].choice for i in asking]), strict=True):
                sampled[i] = result
        return sampled

    def _emit(self, live: _Live, slot: int, sampled: Sampled | None) -> TokenEvent:
        """Book one token: its text, and whether the request ends with it."""
        request, length = live.request, len(live.request.prompt)
        if sampled is None:
            self._cache.clear(slot)
            self._end(live, "error")
            return TokenEvent(request.id, None, BROKEN, None, None, "error", length, live.emitted)
        live.emitted += 1
        live.last = sampled.token
        live.choice.watch([sampled.token], self.vocab_size, self.device)
        self.totals.generated_tokens += 1
        text, stopped = live.text.add(sampled.token)
        reason: FinishReason | None = None
        if stopped or (sampled.token in self.config.eos_token_ids and not request.params.ignore_eos):
            reason = "stop"
        elif live.emitted >= request.params.max_tokens:
            reason = "length"
        if reason is not None:
            if not stopped:
                rest, found = live.text.flush()
                text, reason = text + rest, "stop" if found else reason
            self._end(live, reason)
        top = None
        if sampled.top is not None:
            top = [(token, self._decode([token]), value) for token, value in sampled.top]
        return TokenEvent(request.id, sampled.token, text, sampled.logprob, top, reason, length, live.emitted)

    def _end(self, live: _Live, reason: str) -> None:
        del self._live[live.request.id]
        self._scheduler.finish(live.request.id)
        self._count(reason)

    def _count(self, reason: str) -> None:
        self.totals.finished[reason] = self.totals.finished.get(reason, 0) + 1

    def _decode(self, ids: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)


def read_bytes(decoder: Decoder) -> int:
    """Weight bytes a decode step reads: everything but the embedding table, unless it is also the head."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in decoder.parameters())
    tables = [] if decoder.head is None else [decoder.embed.weight]
    if decoder.positions is not None:
        tables.append(decoder.positions.weight)
    return total - sum(table.numel() * table.element_size() for table in tables)


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise JobError("compiling needs a C++ compiler (g++ or clang++), and none is installed; use --no-compile")
