"""Limits and hostile input: each is answered with its own 4xx that names the field, and the server lives on."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ridgeline.errors import UserError
from ridgeline.serving.settings import ServeSettings
from serving_fake import FakeEngine, Running, running, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(max_context=64), max_body_bytes=20_000, max_tokens=40, body_seconds=0.5) as live:
        yield live


def post(server: Running, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)


def test_prompt_and_completion_beyond_the_context(server: Running) -> None:
    error = post(server, prompt="x" * 30, max_tokens=35).json()["error"]
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "35" in error["message"] and "30 tokens" in error["message"] and "64" in error["message"]
    assert post(server, prompt="x" * 30, max_tokens=34).status_code == 200


def test_prompt_longer_than_the_context(server: Running) -> None:
    error = post(server, prompt=["ok", "x" * 64], max_tokens=1).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "prompt[1]: 64 tokens" in error["message"]


def test_tokens_per_request(server: Running) -> None:
    error = post(server, prompt="x", max_tokens=41).json()["error"]
    assert error["param"] == "max_tokens" and "41" in error["message"] and "40" in error["message"]


def test_a_chat_without_max_tokens_gets_what_is_allowed(server: Running) -> None:
    def ask(text: str) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]})

    assert ask("x").json()["usage"]["completion_tokens"] == 40  # the server's limit
    assert ask("x" * 30).json()["usage"]["total_tokens"] == 64  # the context


def test_more_sequences_than_places(server: Running) -> None:
    error = post(server, prompt="x", n=100).json()["error"]
    assert (error["param"], error["code"]) == ("n", "too_many_sequences")
    assert post(server, prompt=["x"] * 100).json()["error"]["param"] == "prompt"


def test_full_queue_is_429_and_frees_up() -> None:
    engine = FakeEngine(max_batch=1, step_seconds=0.01)
    with running(engine, max_queue=1) as live, ThreadPoolExecutor(2) as pool:
        long = [pool.submit(post, live, prompt="x", max_tokens=60) for _ in range(2)]
        wait_for(lambda: live.thread.open_sequences == 2)
        refused = post(live, prompt="y", max_tokens=1)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["param"] == "max_queue"
        assert httpx.get(f"{live.url}/health").status_code == 200
        assert [done.result().status_code for done in long] == [200, 200]
        assert post(live, prompt="y", max_tokens=1).status_code == 200
        assert 'vllm:admission_rejections_total{model_name="fake"} 1.0' in httpx.get(f"{live.url}/metrics").text


def test_body_size_with_content_length(server: Running) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", content=b"x" * 20_001)
    assert reply.status_code == 413 and "20000" in reply.json()["error"]["message"]
    big = httpx.post(f"{server.url}/v1/completions", content=b"x" * 8_000_000)  # sent whole before reading
    assert big.status_code == 413


def test_a_request_refused_before_it_is_read_is_written_down(server: Running) -> None:
    before = len(server.records)
    chat = f"{server.url}/v1/chat/completions"
    assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 400
    assert httpx.post(chat, json={"model": "other", "messages": []}).status_code == 404
    assert httpx.post(chat, content=b"x" * 20_001).status_code == 413
    rows = [record.row() for record in server.records[before:]]
    assert [(row["status"], row["finish_reason"]) for row in rows] == [(code, "rejected") for code in (400, 404, 413)]
    assert [row["route"] for row in rows] == ["/v1/completions"] + ["/v1/chat/completions"] * 2
    assert all(row["total_seconds"] is not None and row["prompt_tokens"] == 0 for row in rows)


@pytest.mark.parametrize("field", ["drain_seconds", "stall_seconds", "body_seconds", "ping_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_spans_of_time_are_finite_and_above_zero(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} is {value}: a finite number above 0"):
        ServeSettings(**{field: value})


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name is empty"):
        ServeSettings(name=name)


def test_body_size_without_content_length(server: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(300):
            yield b"x" * 1000

    reply = httpx.post(f"{server.url}/v1/completions", content=pieces())
    assert reply.status_code == 413 and reply.json()["error"]["param"] == "body"
    exactly = b'{"prompt": "x", "max_tokens": 1}'.ljust(20_000)
    reply = httpx.post(f"{server.url}/v1/completions", content=iter([exactly[:9000], exactly[9000:]]))
    assert reply.status_code == 200


def test_expect_100_continue_is_refused_before_the_body(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999\r\n\r\n"
    assert raw(server, head).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_comes_is_408(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"
    assert raw(server, head).startswith(b"HTTP/1.1 408")


def raw(server: Running, data: bytes) -> bytes:
    """Send bytes, read what comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(data)
        reply = b""
        try:
            while piece := connection.recv(65536):
                reply += piece
                if b"\r\n\r\n" in reply and b"}}" in reply:
                    break
        except TimeoutError:
            pass
    return reply


def test_not_http_at_all(server: Running) -> None:
    assert raw(server, b"\x16\x03\x01\x02\x00 hello\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{server.url}/health").status_code == 200


# ---- 1,000 malformed bodies -----------------------------------------------------------------------------------------

VALID = {"prompt": "hello", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "seed": 1, "n": 1, "stream": False}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    -1e308,
    "",
    "text",
    "\x00",
    [],
    {},
    [[]],
    [{}],
    {"a": {}},
    [None],
    "é" * 50,
]


def bad_value(rng: random.Random) -> bytes:
    """One field replaced by a value of a type or range it never has."""
    wrong: dict[str, list[Any]] = {
        "prompt": [True, -1, 5, {}, [], [[]], [{}], [None], 1.5, [1, "a"], [10**9]],
        "max_tokens": [True, -1, 0, "5", [], {}, 1.5, 2**40],
        "temperature": [True, -1, 3, "hot", [], {}],
        "stop": [5, {}, [5], [""], ["a"] * 5, True],
        "seed": [True, "x", 1.5, [], 2**64],
        "n": [0, -1, 1.5, "2", [], 10**6],
        "stream": [1, "true", [], {}],
    }
    field = rng.choice(list(wrong))
    return json.dumps({**VALID, field: rng.choice(wrong[field])}).encode()


def truncated(rng: random.Random) -> bytes:
    body = json.dumps(VALID).encode()
    return body[: rng.randrange(len(body))]


def corrupted(rng: random.Random) -> bytes:
    """A byte that no JSON in UTF-8 can hold, somewhere inside."""
    body = bytearray(json.dumps(VALID).encode())
    body[rng.randrange(len(body))] = rng.choice((0x00, 0x01, 0x80, 0xC0, 0xF5, 0xFF))
    return bytes(body)


def noise(rng: random.Random) -> bytes:
    return b"\xff" + rng.randbytes(rng.randrange(0, 300))


def nested(rng: random.Random) -> bytes:
    depth = rng.randrange(50, 9000)
    return rng.choice((b"[" * depth, b'{"a":' * depth, b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"))


def unknown(rng: random.Random) -> bytes:
    name = "".join(rng.choice("abcdefghij_-.\u00e9\u4e2d") for _ in range(rng.randrange(1, 200))) + "_"
    return json.dumps({**VALID, name: rng.choice(JUNK)}).encode()


def not_an_object(rng: random.Random) -> bytes:
    return json.dumps(rng.choice([item for item in JUNK if not isinstance(item, dict)])).encode()


def odd_numbers(rng: random.Random) -> bytes:
    number = rng.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"01", b"+1", b"0x10", b"1.", b"9" * 5000))
    field = rng.choice((b"max_tokens", b"temperature", b"seed", b"n"))
    return b'{"prompt": "x", "' + field + b'": ' + number + b"}"


def odd_text(rng: random.Random) -> bytes:
    text = rng.choice((rb"\ud800", rb"\udfff\ud800", rb"\x41", rb"\u12", b"\xed\xa0\x80", b"a\nb", b"\xc3\x28"))
    return b'{"prompt": "' + text + b'", "max_tokens": 1}'


def other_encodings(rng: random.Random) -> bytes:
    return json.dumps(VALID).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))


def appended(rng: random.Random) -> bytes:
    return json.dumps(VALID).encode() + rng.choice((b"}", b"x", b"{}", b",", b"\x00", b"[1]"))


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    bad_value,
    truncated,
    corrupted,
    noise,
    nested,
    unknown,
    not_an_object,
    odd_numbers,
    odd_text,
    other_encodings,
    appended,
)


def test_a_thousand_malformed_bodies(server: Running) -> None:
    rng = random.Random(20261121)
    paths = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
    steps = server.thread.steps
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for number in range(1000):
            kind = KINDS[number % len(KINDS)]
            body = kind(rng)
            path = "/v1/completions" if kind in (bad_value, odd_numbers) else rng.choice(paths)
            chunked = rng.random() < 0.2
            reply = client.post(path, content=iter([body]) if chunked else body)
            told = f"body {number} ({kind.__name__}) {body[:80]!r} -> {reply.status_code} {reply.text[:200]}"
            assert 400 <= reply.status_code < 500, told
            error = reply.json()["error"]
            assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 1500, told
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=VALID).status_code == 200
    assert server.thread.open_sequences == 0
    assert server.thread.steps - steps <= 2, "a malformed body reached the engine"


def test_malformed_http_from_many_connections_at_once(server: Running) -> None:
    rng = random.Random(3)
    replies = []

    def attack() -> None:
        body = noise(rng)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        replies.append(raw(server, head + body))

    threads = [threading.Thread(target=attack) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(reply.startswith(b"HTTP/1.1 400") for reply in replies) and len(replies) == 20
