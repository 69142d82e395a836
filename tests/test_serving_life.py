"""What happens when things go wrong around a request: clients vanish, the engine fails or hangs, prefills take long."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ridgeline.serving.engine_thread import EngineFailed, EngineThread
from serving_fake import FakeEngine, Running, answer, running, wait_for


def post(server: Running, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def open_request(server: Running, path: str = "/v1/completions", **body: Any) -> socket.socket:
    """A request sent over a raw socket, to be dropped at will."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_in_decode_frees_the_place_within_one_step(stream: bool) -> None:
    engine = FakeEngine(step_seconds=0.05)
    with running(engine) as live, ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(post, live, prompt="neighbour", max_tokens=20)
        connection = open_request(live, prompt="x", max_tokens=2000, stream=stream)
        wait_for(lambda: live.thread.stats.get("running") == 2)
        connection.close()
        wait_for(lambda: live.thread.open_sequences == 1)
        steps = live.thread.steps
        wait_for(lambda: live.thread.stats["running"] == 1)
        assert live.thread.steps - steps <= 1
        assert len(engine.cancelled) == 1
        assert neighbour.result().json()["choices"][0]["text"] == answer(list(b"neighbour"), 20)
        wait_for(lambda: len(live.records) == 2)
        assert live.records[0].finish == "cancelled" and live.records[0].status == 499


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_in_the_queue_never_runs(stream: bool) -> None:
    engine = FakeEngine(max_batch=1, step_seconds=0.03)
    with running(engine) as live, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, live, prompt="x", max_tokens=20)
        wait_for(lambda: live.thread.stats.get("running") == 1)
        connection = open_request(live, prompt="queued", max_tokens=2000, stream=stream)
        wait_for(lambda: live.thread.stats["waiting"] == 1)
        connection.close()
        wait_for(lambda: live.thread.stats["waiting"] == 0)
        assert first.result().status_code == 200
        assert live.thread.stats["running"] == 0 and live.thread.open_sequences == 0


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_in_prefill(stream: bool) -> None:
    engine = FakeEngine(prefill_seconds=0.3, step_seconds=0.01)
    with running(engine) as live:
        connection = open_request(live, prompt="p" * 1500, max_tokens=2000, stream=stream)
        wait_for(lambda: live.thread.last_step_age() > 0.02)
        connection.close()
        wait_for(lambda: live.thread.open_sequences == 0)
        wait_for(lambda: live.thread.stats["running"] == 0)
        assert live.thread.steps <= 2


def test_health_answers_during_a_long_prefill() -> None:
    with running(FakeEngine(prefill_seconds=1.0)) as live, ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        client.get(f"{live.url}/health")
        busy = pool.submit(post, live, prompt="p" * 2000, max_tokens=1)
        wait_for(lambda: live.thread.last_step_age() > 0)
        slowest = 0.0
        for _ in range(20):
            began = time.perf_counter()
            assert client.get(f"{live.url}/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - began)
        assert live.thread.last_step_age() > 0, "the prefill was over before health was asked"
        assert slowest < 0.1
        assert busy.result().status_code == 200


def test_a_step_that_raises_fails_the_requests_and_liveness() -> None:
    with running(FakeEngine(step_seconds=0.02)) as live, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, live, prompt="x", max_tokens=2000)
        stream = pool.submit(post, live, prompt="y", max_tokens=2000, stream=True)
        wait_for(lambda: live.thread.stats.get("running") == 2)
        bad = post(live, prompt="BOOM", max_tokens=2)
        assert bad.status_code == 500 and "boom" in bad.json()["error"]["message"]
        assert whole.result().status_code == 500
        lines = [line for line in stream.result().text.split("\n") if line.startswith("data: ")]
        assert "boom" in json.loads(lines[-2][6:])["error"]["message"] and lines[-1] == "data: [DONE]"
        for path in ("/health", "/health/live", "/health/ready"):
            reply = httpx.get(live.url + path)
            assert reply.status_code == 503 and "boom" in reply.json()["reason"]
        after = post(live, prompt="z")
        assert after.status_code == 503 and after.json()["error"]["code"] == "engine_failed"
        assert live.thread.open_sequences == 0


def test_a_step_that_hangs_is_noticed() -> None:
    with running(FakeEngine(), stall_seconds=0.5, ping_seconds=0.1) as live, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(post, live, prompt="HANG", max_tokens=2)
        wait_for(lambda: live.thread.last_step_age() > 0)
        behind = post(live, prompt="x", max_tokens=2)  # not even taken by the engine
        assert behind.status_code == 503 and "a step has run for" in behind.json()["error"]["message"]
        assert stuck.result().status_code == 500
        assert "a step has run for" in stuck.result().json()["error"]["message"]
        reply = httpx.get(f"{live.url}/health/live")
        assert reply.status_code == 503 and reply.json()["state"] == "stalled"
        assert post(live, prompt="late").status_code == 503
        live.engine.release.set()
        wait_for(lambda: live.thread.state == "running")
        assert httpx.get(f"{live.url}/health/live").status_code == 200
        wait_for(lambda: live.thread.open_sequences == 0)


def test_streams_are_kept_alive_while_waiting() -> None:
    with running(FakeEngine(prefill_seconds=0.5), ping_seconds=0.1) as live:
        reply = post(live, prompt="p" * 1500, max_tokens=1, stream=True)
        # The first events wait for the engine to take the request; pings fill the prefill.
        assert reply.text.count(": ping\n\n") >= 2
        assert reply.text.endswith("data: [DONE]\n\n")


def test_continuous_batching_a_new_request_joins_the_running_batch() -> None:
    with running(FakeEngine(step_seconds=0.02)) as live, ThreadPoolExecutor(1) as pool:
        long = pool.submit(post, live, prompt="x", max_tokens=150)
        wait_for(lambda: live.thread.steps > 2)
        assert post(live, prompt="y", max_tokens=3).status_code == 200
        assert not long.done(), "the short request waited for the long one"
        assert [record.completion_tokens for record in live.records] == [3]
        assert long.result().json()["choices"][0]["text"] == answer(list(b"x"), 150)


def test_one_thread_owns_the_engine() -> None:
    with running(FakeEngine()) as live, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: post(live, prompt=f"{i}", max_tokens=4), range(40)))
        assert [reply.json()["choices"][0]["text"] for reply in replies] == [
            answer(list(f"{i}".encode()), 4) for i in range(40)
        ]
        assert len(live.engine.threads) == 1 and threading.get_ident() not in live.engine.threads


def test_log_line_and_metrics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ridgeline.serving")
    with running(FakeEngine(step_seconds=0.01)) as live:
        post(live, prompt="hello", max_tokens=5, user="me")
        post(live, prompt="bye", max_tokens=3, stream=True)
        assert httpx.get(f"{live.url}/nowhere").status_code == 404
        text = httpx.get(f"{live.url}/metrics").text
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request id=")]
    assert len(lines) == 2
    assert re.fullmatch(
        r"request id=cmpl-\w+ prompt_tokens=5 completion_tokens=5 queue_ms=[\d.]+ ttft_ms=[\d.]+ "
        r"total_ms=[\d.]+ finish=length status=200 user='me'",
        lines[0],
    )
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in values, f"{key} is exported twice"
            values[key] = sample.value
    model = ("model_name", "fake")
    assert values["vllm:prompt_tokens_total", model] == 8
    assert values["vllm:generation_tokens_total", model] == 8
    assert values["vllm:request_success_total", ("finished_reason", "length"), model] == 2
    assert values["vllm:request_success_total", ("finished_reason", "abort"), model] == 0
    assert values["vllm:time_to_first_token_seconds_count", model] == 2
    assert values["vllm:inter_token_latency_seconds_count", model] == 4 + 2
    assert values["vllm:inter_token_latency_seconds_sum", model] >= 6 * 0.009
    assert values["vllm:e2e_request_latency_seconds_count", model] == 2
    assert values["vllm:num_requests_running", model] == 0
    assert values["ridgeline_http_responses_total", ("route", "/v1/completions"), ("status", "200")] == 2
    assert values["ridgeline_http_responses_total", ("route", "other"), ("status", "404")] == 1


# ---- the thread alone -----------------------------------------------------------------------------------------------


def request(prompt: str, count: int = 3, name: str = "r") -> Any:
    from ridgeline.inference import Request, SamplingParams

    return Request(id=name, prompt=list(prompt.encode()), params=SamplingParams(max_tokens=count))


def test_stream_of_the_thread() -> None:
    async def collect(thread: EngineThread) -> str:
        return "".join([event.text async for event in thread.stream(request("hello", 5))])

    thread = EngineThread(FakeEngine()).start()
    wait_for(lambda: thread.state == "running")
    assert asyncio.run(collect(thread)) == answer(list(b"hello"), 5)
    assert thread.stop() and thread.state == "stopped"


def test_leaving_a_stream_early_cancels() -> None:
    async def peek(thread: EngineThread) -> None:
        stream = thread.stream(request("x", 4000))
        await anext(stream)
        await stream.aclose()

    engine = FakeEngine(step_seconds=0.01)
    thread = EngineThread(engine).start()
    wait_for(lambda: thread.state == "running")
    asyncio.run(peek(thread))
    wait_for(lambda: engine.cancelled == ["r"])
    assert thread.open_sequences == 0
    thread.stop()


def test_the_engines_own_refusal_reaches_the_caller() -> None:
    async def ask(thread: EngineThread) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            await thread.submit([request("x", 10_000)]).accepted

    thread = EngineThread(FakeEngine()).start()
    wait_for(lambda: thread.state == "running")
    asyncio.run(ask(thread))
    assert thread.open_sequences == 0 and thread.state == "running"
    thread.stop()


def test_a_load_that_fails_is_said() -> None:
    def broken() -> Any:
        raise OSError("no such weights")

    async def ask(thread: EngineThread) -> None:
        with pytest.raises(EngineFailed, match="no such weights"):
            thread.submit([request("x")])

    thread = EngineThread(load=broken).start()
    wait_for(lambda: thread.state == "failed")
    assert not thread.health()["alive"] and "no such weights" in thread.health()["reason"]
    asyncio.run(ask(thread))


def test_stopping_ends_open_requests() -> None:
    async def ask(thread: EngineThread) -> None:
        ticket = thread.submit([request("x", 4000)])
        await ticket.accepted
        thread.stop()
        with pytest.raises(EngineFailed, match="shutting down"):
            while True:
                await ticket.next(1.0)

    thread = EngineThread(FakeEngine(step_seconds=0.01)).start()
    wait_for(lambda: thread.state == "running")
    asyncio.run(ask(thread))
