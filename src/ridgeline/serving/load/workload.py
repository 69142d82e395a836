"""What is sent, and when: settings of a load test, prompts, arrival times."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ridgeline.errors import UserError

# fmt: off
WORDS = (
    "river", "mountain", "engine", "window", "garden", "silver", "winter", "library", "station", "morning", "copper",
    "island", "forest", "bridge", "signal", "paper", "ocean", "market", "candle", "thunder", "valley", "harbor",
    "mirror", "ladder", "castle", "meadow", "lantern", "compass",
)
# fmt: on
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class LoadSettings:
    """A load test. ``rate`` None is a closed loop of ``concurrency`` clients sending ``requests`` in all; a rate is an
    open loop of Poisson arrivals for ``duration`` seconds, whatever the server does.

    Bounded in every direction: ``requests`` (also of an open loop), ``max_in_flight`` connections, ``timeout`` seconds
    per request, ``max_seconds`` in all.
    """

    url: str
    model: str | None = None
    chat: bool = False
    concurrency: int = 8
    requests: int = 64
    rate: float | None = None
    duration: float = 30.0
    max_tokens: int = 64
    prompt_words: int = 64
    prompts: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    stream: bool = True
    seed: int = 0
    timeout: float = 120.0
    max_seconds: float = 600.0
    max_in_flight: int = 512
    slo_ttft: float | None = None
    slo_itl: float | None = None
    api_key: str | None = None
    allow_remote: bool = False

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests", "max_tokens", "prompt_words", "max_in_flight"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: at least 1")
        for name in ("rate", "duration", "timeout", "max_seconds", "slo_ttft", "slo_itl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # also false for NaN
                raise UserError(f"--{name.replace('_', '-')} is {value}: a finite number above 0 is needed")
        self._check_url()

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self.url)
            host = parts.hostname
            _ = parts.port
        except ValueError as error:
            raise UserError(f"URL '{self.url}': {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise UserError(f"URL '{self.url}': needs http://HOST:PORT, such as http://127.0.0.1:8000")
        if host not in LOOPBACK and not self.allow_remote:
            raise UserError(f"URL '{self.url}': {host} is not this machine; --yes-remote if it may be loaded")


@dataclass
class Exchange:
    """One request and its answer, as the client saw it. Times are seconds; ``sent`` counts from the test's start."""

    index: int
    sent: float
    ttft: float | None = None
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    detail: str = ""

    def row(self) -> dict[str, Any]:
        """For ``metrics.jsonl``."""
        return {
            "request": self.index,
            "sent": self.sent,
            "ttft_seconds": self.ttft,
            "total_seconds": self.total,
            "itl_mean_seconds": sum(self.gaps) / len(self.gaps) if self.gaps else None,
            "itl_max_seconds": max(self.gaps, default=None),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": self.finish_reason,
            "error": self.error,
            "detail": self.detail or None,
        }


def arrivals(settings: LoadSettings) -> Iterator[float]:
    """Send times of an open loop, seconds from the start: a Poisson process, at most ``requests``-bounded by caller."""
    assert settings.rate is not None
    generator = random.Random(settings.seed)
    at = 0.0
    while True:
        at += generator.expovariate(settings.rate)
        if at >= settings.duration:
            return
        yield at


def prompts(settings: LoadSettings) -> list[str]:
    """The prompts of ``settings.prompts``, read once; empty without a file.

    Raises:
        UserError: the file cannot be read, or a line of it is no prompt.
    """
    return [] if settings.prompts is None else _from_file(Path(settings.prompts))


def bodies(settings: LoadSettings, model: str, texts: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Request bodies without end: ``texts`` in turn, or synthetic ones that differ from the first word on
    (no shared prefix that a cache could answer)."""
    for index in itertools.count():
        text = texts[index % len(texts)] if texts else _synthetic(settings, index)
        yield _body(settings, model, text)


def _synthetic(settings: LoadSettings, index: int) -> str:
    generator = random.Random(f"{settings.seed}/{index}")
    return " ".join(generator.choice(WORDS) for _ in range(settings.prompt_words))


def _body(settings: LoadSettings, model: str, text: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "max_tokens": settings.max_tokens, "temperature": settings.temperature}
    if settings.chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if settings.stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    if settings.ignore_eos:
        body["ignore_eos"] = True  # an extension; only sent when asked for
    return body


def _from_file(path: Path) -> list[str]:
    """Prompts of a jsonl file: strings, or objects with ``prompt`` (or ``text``)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, or a name that no file can have
        raise UserError(f"--prompts {path}: {error}") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"--prompts {path}, line {number}: not JSON ({error})") from None
        text = item.get("prompt", item.get("text")) if isinstance(item, dict) else item
        if not isinstance(text, str) or not text:
            raise UserError(f"--prompts {path}, line {number}: needs a string, or an object with 'prompt' or 'text'")
        texts.append(text)
    if not texts:
        raise UserError(f"--prompts {path}: holds no prompt")
    return texts
