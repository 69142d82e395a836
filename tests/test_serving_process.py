"""A whole server process: readiness while loading, draining on SIGTERM, aborting on the second, the run it leaves."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ridgeline.runs import list_runs
from ridgeline.serving.server import bind
from serving_fake import answer, wait_for

FAKE = Path(__file__).with_name("serving_fake.py")


class Process:
    """The fake server as a child process; ``url`` is known before it is ready."""

    def __init__(self, runs: Path, **options: Any) -> None:
        with bind("127.0.0.1", 0) as probe:
            port = probe.getsockname()[1]
        self.runs = runs
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(FAKE), str(runs), json.dumps({"port": port, **options})]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def signal(self) -> None:
        self.child.send_signal(signal.SIGTERM)

    def end(self, timeout: float = 15) -> tuple[int, str]:
        _, errors = self.child.communicate(timeout=timeout)
        return self.child.returncode, errors

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)

    def health(self, which: str = "/ready") -> int:
        try:
            return httpx.get(f"{self.url}/health{which}", timeout=5).status_code
        except httpx.TransportError:
            return 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def begin(**options: Any) -> Process:
        started.append(Process(tmp_path / "runs", **options))
        return started[-1]

    yield begin
    for process in started:
        if process.child.poll() is None:
            process.child.kill()
        process.child.communicate()


def test_not_ready_while_loading(start: Any) -> None:
    process = start(load_seconds=1.5)
    wait_for(lambda: process.health("/live") == 200, 10)
    assert process.health("/ready") == process.health("") == 503
    early = process.post(prompt="x")
    assert early.status_code == 503 and early.headers["retry-after"]
    assert early.json()["error"]["code"] == "loading"
    assert process.ready() == process.url
    assert process.health("/ready") == 200 and process.post(prompt="x", max_tokens=1).status_code == 200


def test_sigterm_drains(start: Any) -> None:
    process = start(step_seconds=0.02)
    assert process.ready() == process.url
    assert process.post(prompt="x", model="other").status_code == 404
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(process.post, prompt="whole", max_tokens=60)
        stream = pool.submit(process.post, prompt="stream", max_tokens=60, stream=True)
        wait_for(lambda: 'vllm:num_requests_running{model_name="fake"} 2.0' in httpx.get(process.url + "/metrics").text)
        process.signal()
        wait_for(lambda: process.health("/ready") == 503, 1)
        refused = process.post(prompt="late", max_tokens=1)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "draining"
        assert process.health("/live") == 200
        assert whole.result().json()["choices"][0]["text"] == answer(list(b"whole"), 60)
        assert stream.result().text.endswith("data: [DONE]\n\n")
    code, errors = process.end()
    assert code == 0, errors
    run = list_runs(process.runs, "serve")[0]
    assert run.info["status"] == "done"
    rows = run.metrics()
    assert [row["status"] for row in rows] == [404, 200, 200]
    assert [row["completion_tokens"] for row in rows] == [0, 60, 60]
    assert run.summary["requests"] == 3 and run.summary["completion_tokens"] == 120
    assert run.summary["statuses"] == {"200": 2, "404": 1}
    assert run.summary["e2e_p50"] > 60 * 0.02


def test_sigterm_when_idle_leaves_at_once(start: Any) -> None:
    process = start()
    process.ready()
    with httpx.Client(base_url=process.url) as keep_alive:
        keep_alive.get("/health")  # an idle connection does not hold the server
        began = time.monotonic()
        process.signal()
        code, _ = process.end()
    assert code == 0 and time.monotonic() - began < 3


def test_second_sigterm_aborts(start: Any) -> None:
    process = start(step_seconds=0.05)
    process.ready()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(process.post, prompt="x", max_tokens=2000, stream=True)
        wait_for(
            lambda: (
                'vllm:generation_tokens_total{model_name="fake"} 0.0' not in httpx.get(process.url + "/metrics").text
            )
        )
        process.signal()
        wait_for(lambda: process.health("/ready") == 503, 1)
        began = time.monotonic()
        process.signal()
        code, errors = process.end()
        assert code == 1 and "aborted" in errors.splitlines()[-1]
        assert time.monotonic() - began < 3
        assert "shutting down" in stream.result().text
    assert list_runs(process.runs)[0].info["status"] == "interrupted"


def test_sigterm_while_loading(start: Any) -> None:
    process = start(load_seconds=2)
    wait_for(lambda: process.health("/live") == 200, 10)
    process.signal()
    code, errors = process.end()
    assert code == 0, errors


def test_a_model_that_does_not_load(start: Any) -> None:
    process = start(load_error="config.json: model_type 'mystery' is not supported")
    code, errors = process.end()
    assert code == 2 and errors.splitlines()[-1] == "error: config.json: model_type 'mystery' is not supported"
    assert list_runs(process.runs)[0].info["status"] == "failed"


def test_busy_port_is_one_line(start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(port=port, load_seconds=60)
        code, errors = process.end()
    assert code == 2
    assert errors.strip() == f"error: --port {port} on 127.0.0.1: already in use; choose another, or 0 for any free one"
    assert not list_runs(process.runs)


def test_a_full_disk_does_not_stop_serving(start: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    process = start()
    process.ready()
    run = list_runs(process.runs)[0]
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    replies: list[int] = []
    threads = [threading.Thread(target=lambda: replies.append(process.post(prompt="x").status_code)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 3
    process.signal()
    code, errors = process.end()
    assert code == 0 and errors.count("the run cannot be written any more") == 1
