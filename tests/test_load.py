"""The load client against a scripted server whose delays, failures and byte boundaries are known."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest

from ridgeline.errors import JobError, UserError
from ridgeline.runs import list_runs
from ridgeline.serving.load.runner import load_test, measure
from ridgeline.serving.load.server_side import account, parse
from ridgeline.serving.load.stats import percentile, percentiles, summarize
from ridgeline.serving.load.workload import Exchange, LoadSettings, arrivals, bodies, prompts
from serving_fake import FakeEngine, running

# ---- a server that does exactly what its script says --------------------------------------------------------------


@dataclass
class Script:
    """Delays in seconds; ``fail`` maps a request's number to what goes wrong with it."""

    first: float = 0.0
    gap: float = 0.0
    tokens: int = 4
    fail: dict[int, str] = field(default_factory=dict)
    dribble: bool = False
    text: str = "ab"
    close_after: int = 0  # answers on one connection, after which it is closed without notice
    reset: bool = False  # close it by a reset as soon as the next request has come


class ScriptedServer:
    """Answers `/v1/models` and streams; notes when it received and sent what (`time.perf_counter`)."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.connections = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(10)
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        self._loop.run_until_complete(self._start())
        self._loop.call_soon(self._ready.set)  # only once it runs forever does `stop` end it
        self._loop.run_forever()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        answered = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not answered or answered != self.script.close_after:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith(b"GET /v1/models "):
                    await self._plain(writer, 200, {"data": [{"id": "scripted"}]})
                else:
                    await self._generate(writer, json.loads(body))
                    answered += 1
        if self.script.reset and answered:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writer.close()

    async def _plain(self, writer: asyncio.StreamWriter, status: int, document: Any) -> None:
        content = json.dumps(document).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content)
        await writer.drain()

    async def _generate(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        number = len(self.requests)
        self.requests.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self._answer(writer, number, body, self.script.fail.get(number, ""))
        finally:
            self.in_flight -= 1

    async def _answer(self, writer: asyncio.StreamWriter, number: int, body: dict[str, Any], fail: str) -> None:
        script, times = self.script, {"received": time.perf_counter(), "sent": []}
        self.times.append(times)
        usage = {"prompt_tokens": 7, "completion_tokens": script.tokens}
        if fail.isdigit():
            await self._plain(writer, int(fail), {"error": {"message": f"scripted {fail}"}})
            return
        await asyncio.sleep(script.first)
        if not body.get("stream"):
            choice = {"index": 0, "text": script.text, "finish_reason": "length"}
            await self._plain(writer, 200, {"choices": [choice], "usage": usage})
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await self._event(writer, b": ping")
        for index in range(script.tokens):
            if index:
                await asyncio.sleep(script.gap)
            if fail == "cut" and index == 2:
                writer.close()
                raise ConnectionError
            if fail == "error" and index == 2:
                await self._event(writer, b'data: {"error": {"message": "scripted failure"}}')
                break
            times["sent"].append(time.perf_counter())
            finish = "length" if index == script.tokens - 1 else None
            choice = {"index": 0, "text": script.text, "finish_reason": finish}
            await self._event(writer, b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode())
        await self._event(writer, b"data: " + json.dumps({"choices": [], "usage": usage}).encode())
        if fail != "no_done":
            await self._event(writer, b"data: [DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _event(self, writer: asyncio.StreamWriter, line: bytes) -> None:
        data = line + b"\n\n"
        pieces = [data[i : i + 3] for i in range(0, len(data), 3)] if self.script.dribble else [data]
        for piece in pieces:
            writer.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
            await writer.drain()


@contextlib.contextmanager
def scripted(**script: Any) -> Iterator[ScriptedServer]:
    server = ScriptedServer(Script(**script))
    try:
        yield server
    finally:
        server.close()


def run(server: ScriptedServer, **settings: Any) -> tuple[list[Exchange], float, LoadSettings]:
    made = LoadSettings(server.url, **settings)
    _, exchanges, seconds = asyncio.run(measure(made))
    return sorted(exchanges, key=lambda item: item.index), seconds, made


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_times_agree_with_the_servers_own() -> None:
    with scripted(first=0.15, gap=0.04, tokens=5) as server:
        exchanges, _, _ = run(server, requests=6, concurrency=2)
    assert [item.error for item in exchanges] == [None] * 6
    for item, times in zip(exchanges, server.times, strict=True):
        sent = times["sent"]
        assert item.ttft is not None and len(item.gaps) == 4
        # never less than the server's own interval (but for the clock's grain), and close to it
        assert -0.002 < item.ttft - (sent[0] - times["received"]) < 0.05
        assert abs(sum(item.gaps) - (sent[-1] - sent[0])) < 0.05
        assert item.total >= item.ttft + sum(item.gaps)
        assert (item.prompt_tokens, item.completion_tokens, item.finish_reason) == (7, 5, "length")
    middle = numpy.median([gap for item in exchanges for gap in item.gaps])
    assert 0.039 < middle < 0.06


def test_events_cut_at_any_byte() -> None:
    with scripted(dribble=True, text="né中", tokens=6) as server:
        exchanges, _, _ = run(server, requests=4, concurrency=2)
    assert [(item.error, item.completion_tokens, len(item.gaps)) for item in exchanges] == [(None, 6, 5)] * 4


def test_closed_loop_keeps_its_concurrency_and_its_connections() -> None:
    with scripted(first=0.03) as server:
        exchanges, seconds, _ = run(server, requests=23, concurrency=5)
    assert len(exchanges) == len(server.requests) == 23
    assert server.most_in_flight == 5
    assert server.connections == 5 + 1  # one more asked for the model
    assert seconds >= 5 * 0.03


def test_open_loop_sends_on_time_whatever_the_answers_do() -> None:
    with scripted(first=0.4) as server:
        exchanges, _, settings = run(server, rate=60.0, duration=0.5, requests=1000)
    planned = list(arrivals(settings))
    assert len(exchanges) == len(planned) > 10
    late = [item.sent - at for item, at in zip(exchanges, planned, strict=True)]
    assert min(late) > -0.002 and numpy.median(late) < 0.03
    assert server.most_in_flight > 10


def test_arrivals_are_poisson() -> None:
    settings = LoadSettings("http://localhost:1", rate=200.0, duration=50.0, seed=5)
    times = list(arrivals(settings))
    assert times == list(arrivals(settings)) and max(times) < 50
    assert abs(len(times) - 10_000) < 4 * 100  # four standard deviations of the count
    gaps = numpy.diff([0.0, *times])
    # Kolmogorov-Smirnov distance to the exponential law, 0.1 % level
    ordered = numpy.sort(gaps)
    law = 1 - numpy.exp(-200.0 * ordered)
    assert numpy.max(numpy.abs(law - (numpy.arange(len(ordered)) + 0.5) / len(ordered))) < 1.95 / len(ordered) ** 0.5


def test_errors_by_kind() -> None:
    fail = {1: "500", 2: "429", 3: "cut", 4: "error", 5: "no_done"}
    with scripted(fail=fail) as server:
        exchanges, seconds, settings = run(server, requests=8, concurrency=1)
    summary = summarize(exchanges, seconds, settings)
    kinds = {"http_500": 1, "http_429": 1, "closed": 1, "stream_error": 1, "truncated": 1}
    assert summary["errors_by_kind"] == kinds
    assert (summary["requests"], summary["completed"], summary["errors"]) == (8, 3, 5)
    assert summary["completion_tokens"] == 3 * 4
    assert exchanges[1].detail == "scripted 500" and exchanges[4].detail == "scripted failure"


def test_a_server_that_closes_idle_connections_costs_no_request() -> None:
    with scripted(close_after=3) as server:
        exchanges, _, _ = run(server, requests=10, concurrency=1)
    assert [item.error for item in exchanges] == [None] * 10
    assert server.connections == 1 + 4


def test_an_idle_connection_that_is_reset_costs_no_request() -> None:
    """Whether the end of an idle connection is read or a reset depends on who is faster; both cost nothing."""
    with scripted(close_after=3, reset=True) as server:
        exchanges, _, _ = run(server, requests=10, concurrency=1)
    assert [item.error for item in exchanges] == [None] * 10
    assert server.connections == 1 + 4


def test_a_request_that_takes_too_long() -> None:
    with scripted(first=5.0) as server:
        exchanges, seconds, _ = run(server, requests=2, concurrency=2, timeout=0.2)
    assert [item.error for item in exchanges] == ["timeout"] * 2 and seconds < 2


def test_the_whole_test_is_bounded_in_time() -> None:
    with scripted(first=0.1) as server:
        exchanges, seconds, _ = run(server, requests=10_000, concurrency=2, max_seconds=0.55)
    assert 0.5 < seconds < 1.5
    kinds = {item.error for item in exchanges}
    assert kinds == {None, "stopped"} and sum(item.error == "stopped" for item in exchanges) <= 2


def test_too_many_in_flight_is_the_clients_own_limit() -> None:
    with scripted(first=1.0) as server:
        exchanges, _, _ = run(server, rate=100.0, duration=0.3, requests=1000, max_in_flight=3)
    assert server.most_in_flight == 3
    assert sum(item.error is None for item in exchanges) == 3
    assert {item.error for item in exchanges} == {None, "client_limit"}


def test_without_streaming() -> None:
    with scripted(first=0.05) as server:
        exchanges, _, _ = run(server, requests=2, stream=False)
    assert all(item.ttft is None and item.gaps == [] and item.total >= 0.05 for item in exchanges)
    assert [item.completion_tokens for item in exchanges] == [4, 4]


def test_nobody_listens() -> None:
    with scripted() as server:
        url = server.url
    with pytest.raises(JobError, match="no server answers there"):
        asyncio.run(measure(LoadSettings(url)))


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_percentiles_agree_with_numpy() -> None:
    rng = random.Random(1)
    for size in (1, 2, 3, 7, 10, 99, 100, 101, 1000):
        values = [rng.expovariate(3.0) for _ in range(size)]
        for level in (0, 1, 50, 90, 99, 99.9, 100):
            assert percentile(values, level) == pytest.approx(numpy.percentile(values, level), rel=1e-12)
    assert percentiles([], "x") == {"x_p50": None, "x_p90": None, "x_p99": None}


def test_summary_by_hand() -> None:
    exchanges = [
        Exchange(0, 0.0, ttft=0.1, total=1.0, gaps=[0.1, 0.3], prompt_tokens=5, completion_tokens=3),
        Exchange(1, 0.1, ttft=0.3, total=2.0, gaps=[0.2, 0.4], prompt_tokens=6, completion_tokens=3),
        Exchange(2, 0.2, ttft=0.9, total=3.0, gaps=[], prompt_tokens=7, completion_tokens=1),
        Exchange(3, 0.3, error="timeout"),
    ]
    settings = LoadSettings("http://localhost:1", slo_ttft=0.5, slo_itl=0.25)
    summary = summarize(exchanges, 4.0, settings)
    assert summary["tokens_per_second"] == 7 / 4 and summary["requests_per_second"] == 3 / 4
    assert (summary["ttft_p50"], summary["e2e_p50"]) == (0.3, 2.0)
    assert summary["itl_p50"] == pytest.approx(0.25) and summary["itl_p99"] == pytest.approx(0.397)
    assert (summary["slo_met"], summary["goodput"]) == (1, 0.25)  # the second's mean gap is 0.3, the third's TTFT 0.9
    assert "goodput" not in summarize(exchanges, 4.0, LoadSettings("http://localhost:1"))


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n{"prompt": "two"}\n\n{"text": "three"}\n')
    settings = LoadSettings("http://localhost:1", prompts=str(file), chat=True)
    sent = [body["messages"][0]["content"] for body in islice(bodies(settings, "m", prompts(settings)), 4)]
    assert sent == ["one", "two", "three", "one"]
    file.write_text('"one"\n{"prompt": 5}\n')
    with pytest.raises(UserError, match="line 2"):
        prompts(settings)
    with pytest.raises(UserError, match=r"^--prompts \S+none: No such file or directory$"):
        prompts(LoadSettings("http://localhost:1", prompts=str(tmp_path / "none")))


def test_synthetic_prompts_differ_and_repeat_with_the_seed() -> None:
    settings = LoadSettings("http://localhost:1", prompt_words=20, ignore_eos=True)
    first, second = islice(bodies(settings, "m"), 2)
    assert first["prompt"] != second["prompt"] and len(first["prompt"].split()) == 20
    assert next(bodies(settings, "m")) == first and first["ignore_eos"] is True


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "http://example.com"}, "--yes-remote"),
        ({"url": "localhost:8000"}, "http://HOST:PORT"),
        ({"url": "http://127.0.0.1:99999"}, "Port out of range"),
        ({"url": "http://127.0.0.1:1", "concurrency": 0}, "--concurrency"),
        ({"url": "http://127.0.0.1:1", "rate": 0.0}, "--rate"),
        ({"url": "http://127.0.0.1:1", "rate": float("inf")}, "--rate"),
        ({"url": "http://127.0.0.1:1", "max_seconds": float("nan")}, "--max-seconds"),
        ({"url": "http://127.0.0.1:1", "slo_itl": -1.0}, "--slo-itl"),
    ],
)
def test_wrong_settings_are_named(settings: dict, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        LoadSettings(**settings)


# ---- the run and the verb -------------------------------------------------------------------------------------------


def test_the_run_it_leaves(tmp_path: Path) -> None:
    with scripted(fail={1: "500"}) as server:
        made = load_test(LoadSettings(server.url, requests=5, concurrency=1, api_key="secret"), runs_root=tmp_path)
    assert made.kind == "load" and made.info["status"] == "done"
    assert len(made.metrics()) == 5 and made.metrics()[1]["error"] == "http_500"
    assert made.summary["model"] == "scripted" and made.summary["errors"] == 1
    times = made.load_json("latencies.json")
    assert times and [len(times[key]) for key in ("ttft", "itl", "e2e")] == [4, 12, 4] and times["ttft"][0] < 1
    assert "secret" not in (made.path / "config.json").read_text()
    page = (made.path / "artifacts" / "latency.html").read_text()
    assert "Time to first token" in page and not re.search(r'<script[^>]+src="?http', page)


def test_the_servers_own_account(tmp_path: Path) -> None:
    with running(FakeEngine(max_batch=4)) as live:
        live.thread.read_ceiling = 8000.0
        settings = LoadSettings(live.url, requests=8, concurrency=4, max_tokens=50)
        summary = load_test(settings, runs_root=tmp_path).summary
    assert summary["decode_bytes_per_second"] == 2000.0 and summary["mbu"] == 0.25  # 1000 bytes per half second
    assert 1 < summary["decode_batch_mean"] <= 4
    assert account({}, {}) == {}
    assert parse('vllm:x{model_name="m"} 3.0\nridgeline_decode_steps_total{model_name="m"} 5.0\n') == {
        "decode_steps": 5.0
    }


def test_a_test_without_any_answer_is_a_failed_job(tmp_path: Path) -> None:
    with scripted(fail=dict.fromkeys(range(9), "503")) as server, pytest.raises(JobError, match="scripted 503"):
        load_test(LoadSettings(server.url, requests=3), runs_root=tmp_path)
    assert list_runs(tmp_path)[0].info["status"] == "failed" and list_runs(tmp_path)[0].summary["errors"] == 3


def test_the_verb_against_the_real_server(tmp_path: Path) -> None:
    with running(FakeEngine(step_seconds=0.005)) as live:
        command = [sys.executable, "-m", "ridgeline", "load", live.url, "--requests", "12", "--concurrency", "4"]
        options = ["--chat", "--max-tokens", "9", "--slo-ttft", "5", "--runs", str(tmp_path)]
        done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        shown = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    document = json.loads(done.stdout)["summary"]
    assert (document["requests"], document["completed"], document["errors"]) == (12, 12, 0)
    assert document["completion_tokens"] == 12 * 9 and document["goodput"] > 0
    assert document["itl_p50"] >= 0.004
    assert "time to first token" in shown.stdout and "12 of 12 requests" in shown.stdout


def test_the_verb_refuses_in_one_line(tmp_path: Path) -> None:
    def lines(*arguments: str) -> tuple[int, list[str]]:
        command = [sys.executable, "-m", "ridgeline", "load", *arguments, "--runs", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr.splitlines()

    code, errors = lines("http://192.0.2.1:8000")
    assert code == 2 and len(errors) == 1 and "--yes-remote" in errors[0]
    code, errors = lines("http://127.0.0.1:9", "--requests", "1")
    assert code == 1 and len(errors) == 1 and "no server answers there" in errors[0]


def test_a_wrong_file_of_prompts_is_one_line_and_sends_nothing(tmp_path: Path) -> None:
    with scripted() as server:
        command = [sys.executable, "-m", "ridgeline", "load", server.url, "--prompts", "missing.txt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert not server.requests
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--prompts missing.txt: No such file or directory" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["serve", "load"])
def test_help_imports_no_torch(verb: str) -> None:
    code = (
        f"import sys; from ridgeline.cli.main import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
