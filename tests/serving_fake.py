"""A deterministic engine without torch for the serving tests: same interface, scripted speed and failures.

Its vocabulary is the 256 bytes and an end token. It answers with the alphabet, starting at a letter that depends on
the prompt and the seed, so that two requests can be told apart and one can be predicted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn

from ridgeline.errors import JobError, UserError
from ridgeline.serving.app import create_app
from ridgeline.serving.endpoint import Endpoint
from ridgeline.serving.engine_thread import EngineThread
from ridgeline.serving.server import _loop_factory, bind
from ridgeline.serving.settings import ServeSettings

END = 256
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


class FakeTokenizer:
    """Bytes."""

    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < END).decode("utf-8", "replace")

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if messages[0]["role"] == "assistant":
            raise UserError("a chat starts with a user")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def answer(prompt: list[int], count: int, seed: int | None = None) -> str:
    """What the fake engine says."""
    first = sum(prompt) + (seed or 0)
    return "".join(chr(LETTERS[(first + index) % 26]) for index in range(count))


class FakeEngine:
    """``step_seconds`` per step; a step that admits a prompt of more than 1,000 tokens takes ``prefill_seconds`` more.

    A prompt holding BOOM makes the step raise; one holding FAIL ends with an error event; HANG blocks until released.
    """

    def __init__(
        self, max_batch: int = 4, max_context: int = 4096, step_seconds: float = 0.0, prefill_seconds: float = 0.0
    ) -> None:
        self.tokenizer = FakeTokenizer()
        self.max_batch, self.max_context, self.vocab_size = max_batch, max_context, END + 1
        self.step_seconds, self.prefill_seconds = step_seconds, prefill_seconds
        self.waiting: deque[Any] = deque()
        self.running: dict[str, Any] = {}
        self.cancelled: list[str] = []
        self.release = threading.Event()
        self.threads: set[int] = set()
        self.decode = {"decode_steps": 0, "decode_tokens": 0, "decode_bytes": 0, "decode_seconds": 0.0}

    def submit(self, request: Any) -> None:
        self.threads.add(threading.get_ident())
        if len(request.prompt) + request.params.max_tokens > self.max_context:
            raise ValueError("does not fit")
        self.waiting.append(SimpleNamespace(request=request, made=0, text=""))

    def cancel(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(request_id)
        self.running.pop(request_id, None)
        self.waiting = deque(entry for entry in self.waiting if entry.request.id != request_id)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def stats(self) -> dict[str, Any]:
        share = len(self.running) / self.max_batch
        counts = {"running": len(self.running), "waiting": len(self.waiting), "kv_usage": share, "preemptions": 0}
        return {**counts, **self.decode}

    def step(self) -> list[Any]:
        self.threads.add(threading.get_ident())
        seconds = self.step_seconds
        while self.waiting and len(self.running) < self.max_batch:
            entry = self.waiting.popleft()
            self.running[entry.request.id] = entry
            if len(entry.request.prompt) > 1000:
                seconds += self.prefill_seconds
        time.sleep(seconds)
        self.decode["decode_steps"] += 1
        self.decode["decode_tokens"] += len(self.running)
        self.decode["decode_bytes"] += 1000
        self.decode["decode_seconds"] += 0.5
        return [self._advance(entry) for entry in list(self.running.values())]

    def _advance(self, entry: Any) -> Any:
        request, prompt = entry.request, bytes(token for token in entry.request.prompt if token < END)
        if b"BOOM" in prompt:
            raise RuntimeError("boom")
        if b"HANG" in prompt:
            self.release.wait(30)
        entry.made += 1
        said = answer(request.prompt, entry.made, request.params.seed)
        finish = "length" if entry.made == request.params.max_tokens else None
        text = said[len(entry.text) :]
        for stop in request.params.stop:
            if stop in said:
                text, finish = said[len(entry.text) : said.index(stop)], "stop"
        if b"FAIL" in prompt and entry.made == 2:
            text, finish = "this request failed", "error"
        entry.text = said
        if finish is not None:
            del self.running[request.id]
        return _event(request, entry.made, said[-1], text, finish)


def _event(request: Any, made: int, letter: str, text: str, finish: str | None) -> Any:
    top = None
    if request.params.logprobs is not None:
        others = [(token, chr(token), -1.0 - rank) for rank, token in enumerate(LETTERS) if chr(token) != letter]
        top = [(ord(letter), letter, -0.5), *others][: request.params.logprobs]
    return SimpleNamespace(
        request_id=request.id,
        token_id=ord(letter),
        text=text,
        logprob=-0.5,
        top_logprobs=top,
        finish_reason=finish,
        prompt_tokens=len(request.prompt),
        completion_tokens=made,
    )


class Running:
    """An app over an engine on a real socket, in threads of this process."""

    def __init__(self, engine: Any, **settings: Any) -> None:
        settings = {"name": "fake", "max_batch": engine.max_batch, "ping_seconds": 0.5, **settings}
        self.settings = ServeSettings(port=0, **settings)
        self.engine = engine
        capacity, stall = self.settings.capacity, self.settings.stall_seconds
        self.thread = EngineThread(engine, capacity=capacity, stall_seconds=stall).start()
        self.records: list[Any] = []
        self.app = create_app(self.thread, self.settings, self.records.append)
        self.endpoint: Endpoint = self.app.state.endpoint
        self._listener = bind("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = {"http": "httptools", "lifespan": "off", "log_config": None, "access_log": False}
        self._server = uvicorn.Server(uvicorn.Config(self.app, timeout_graceful_shutdown=1, **options))
        self._http = threading.Thread(target=self._serve, daemon=True)
        self._http.start()
        wait_for(lambda: self._server.started)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._server.serve(sockets=[self._listener]))

    def close(self) -> None:
        if hasattr(self.engine, "release"):
            self.engine.release.set()
        self.thread.stop()
        self._server.should_exit = True
        self._http.join(10)
        self._listener.close()


@contextlib.contextmanager
def running(engine: Any, **settings: Any) -> Iterator[Running]:
    """A `Running` server, closed at the end."""
    server = Running(engine, **settings)
    try:
        yield server
    finally:
        server.close()


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    """Poll until ``condition()`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("condition not met in time")
        time.sleep(0.005)


def main() -> int:
    """A whole server process: ``serving_fake.py RUNS '{"port": 0, "step_seconds": 0.1, "load_seconds": 1}'``."""
    from ridgeline.serving.server import raise_for, serve

    runs, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    speed = {key: options.pop(key) for key in ("step_seconds", "prefill_seconds") if key in options}
    load_seconds, load_error = options.pop("load_seconds", 0), options.pop("load_error", None)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def load() -> FakeEngine:
        time.sleep(load_seconds)
        if load_error:
            raise UserError(load_error)
        return FakeEngine(**speed)

    try:
        ready = lambda serving: print(serving.url, flush=True)
        raise_for(serve(load, ServeSettings(name="fake", **options), runs_root=runs, on_ready=ready))
    except (UserError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
