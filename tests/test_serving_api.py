"""The OpenAI dialect: the real `openai` client and raw HTTP against a scripted engine behind a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from serving_fake import FakeEngine, Running, answer, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(max_context=4096)) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as made:
        yield made


def said(prompt: str, count: int, seed: int | None = None) -> str:
    return answer(list(prompt.encode()), count, seed)


def data_lines(text: str) -> list[str]:
    return [line[6:] for line in text.split("\n") if line.startswith("data: ")]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fake", prompt="hello", max_tokens=5)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert reply.choices[0].text == said("hello", 5)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 5, 10)


def test_completion_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="hello").choices[0].text == said("hello", 16)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99, 100]], ["ab", "cd"]),
    ],
)
def test_four_forms_of_prompt(client: openai.OpenAI, prompt: object, texts: list[str]) -> None:
    reply = client.completions.create(model="fake", prompt=prompt, max_tokens=3, echo=True)  # type: ignore[call-overload]
    assert [choice.text for choice in reply.choices] == [text + said(text, 3) for text in texts]
    assert [choice.index for choice in reply.choices] == list(range(len(texts)))
    assert reply.usage.prompt_tokens == 2 * len(texts)


def test_n_and_seed(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fake", prompt=["x", "y"], max_tokens=4, n=3, seed=7)
    expected = [said("x", 4, 7 + i) for i in range(3)] + [said("y", 4, 10 + i) for i in range(3)]
    assert [choice.text for choice in reply.choices] == expected
    assert reply.usage is not None and reply.usage.prompt_tokens == 2 and reply.usage.completion_tokens == 24
    again = client.completions.create(model="fake", prompt=["x", "y"], max_tokens=4, n=3, seed=7)
    assert [choice.text for choice in again.choices] == expected


def test_stop(client: openai.OpenAI) -> None:
    whole = said("hello", 10)
    for stop in (whole[4], [whole[4], "#"]):
        reply = client.completions.create(model="fake", prompt="hello", max_tokens=10, stop=stop)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (whole[:4], "stop")


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="fake", prompt=["a", "b"], max_tokens=6, stream=True, echo=True, stream_options={"include_usage": True}
    )
    texts = {0: "", 1: ""}
    finishes = {}
    chunks = list(stream)
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason
    assert texts == {0: "a" + said("a", 6), 1: "b" + said("b", 6)}
    assert finishes == {0: "length", 1: "length"}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (2, 12)


def test_stream_equals_whole_and_ends_with_done(http: httpx.Client) -> None:
    body = {"prompt": "same", "max_tokens": 9}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    reply = http.post("/v1/completions", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = data_lines(reply.text)
    assert lines[-1] == "[DONE]"
    documents = [json.loads(line) for line in lines[:-1]]
    assert "".join(document["choices"][0]["text"] for document in documents) == whole
    assert all("usage" not in document for document in documents)
    assert {document["id"] for document in documents} == {documents[0]["id"]}


def rendered(text: str) -> str:
    return f"<user>{text}<assistant>"


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    reply = client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=5)  # type: ignore[arg-type]
    choice = reply.choices[0]
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.message.content) == ("assistant", said(rendered("hi"), 5))
    assert choice.finish_reason == "length"
    assert reply.usage is not None and reply.usage.prompt_tokens == len(rendered("hi"))


def test_chat_takes_its_own_answers_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    history = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "go on"},
    ]
    reply = client.chat.completions.create(model="fake", messages=history, max_tokens=4)  # type: ignore[arg-type]
    text = f"<system>be brief<user>hi<assistant>{first.choices[0].message.content}<user>go on<assistant>"
    assert reply.choices[0].message.content == said(text, 4)


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=5,
        n=2,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    roles = [chunk.choices[0].delta.role for chunk in chunks if chunk.choices]
    assert roles[:2] == ["assistant", "assistant"] and not any(roles[2:])
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [said(rendered("hi"), 5, 3), said(rendered("hi"), 5, 4)]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 10


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "logprobs": 2, "echo": False, "stream": stream}
    reply = http.post("/v1/completions", json=body)
    if stream:
        pieces = [json.loads(line)["choices"][0]["logprobs"] for line in data_lines(reply.text)[:-1]]
        got: dict[str, list] = {key: [] for key in pieces[0]}
        for piece in pieces:
            for key, values in piece.items():
                got[key] += values
    else:
        got = reply.json()["choices"][0]["logprobs"]
    assert got["tokens"] == list(said("hello", 4))
    assert got["token_logprobs"] == [-0.5] * 4
    assert got["text_offset"] == [0, 1, 2, 3]
    for token, top in zip(got["tokens"], got["top_logprobs"], strict=True):
        assert len(top) == 2 and top[token] == max(top.values()) == -0.5


def test_completion_logprobs_zero_holds_the_sampled_token(client: openai.OpenAI) -> None:
    logprobs = client.completions.create(model="fake", prompt="q", max_tokens=2, logprobs=0).choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs == [{letter: -0.5} for letter in said("q", 2)]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    ask = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True}
    plain = client.chat.completions.create(**ask).choices[0].logprobs
    assert plain is not None and plain.content is not None
    assert [entry.token for entry in plain.content] == list(said(rendered("hi"), 3))
    assert plain.content[0].bytes == list(plain.content[0].token.encode()) and plain.content[0].top_logprobs == []
    top = client.chat.completions.create(**ask, top_logprobs=2).choices[0].logprobs
    assert top is not None and top.content is not None and len(top.content[0].top_logprobs) == 2


REFUSED = [
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "suffix": "end"}, "suffix"),
    ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
    ({"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
    ({"prompt": "x", "frequency_penalty": -1}, "frequency_penalty"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "x", "max_token": 5}, "max_token"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 3.0}, "max_tokens"),
    ({"prompt": "x", "temperature": 2.1}, "temperature"),
    ({"prompt": "x", "temperature": "1"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "seed": 1.5}, "seed"),
    ({"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop[0]"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[json.dumps(body)[:50] for body, _ in REFUSED])
def test_completion_refusals_name_the_field(http: httpx.Client, body: dict, param: str) -> None:
    reply = http.post("/v1/completions", json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"]


def test_unknown_field_has_the_nearest_name(http: httpx.Client) -> None:
    error = http.post("/v1/completions", json={"prompt": "x", "max_token": 5}).json()["error"]
    assert error["message"] == "max_token: unknown field (did you mean 'max_tokens'?)"


USER = {"role": "user", "content": "hi"}
CHAT_REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"prompt": "x"}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [USER, {"role": "user", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),  # the fake's template refuses it
]


@pytest.mark.parametrize(("body", "param"), CHAT_REFUSED, ids=[json.dumps(body)[:50] for body, _ in CHAT_REFUSED])
def test_chat_refusals_name_the_field(http: httpx.Client, body: dict, param: str) -> None:
    reply = http.post("/v1/chat/completions", json={"messages": [USER], **body})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_neutral_values_of_unsupported_fields_pass(http: httpx.Client) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "seed": None}
    completion = {"prompt": "x", "best_of": 1, "suffix": None, "stop": None, "logprobs": None, **neutral}
    assert http.post("/v1/completions", json=completion).status_code == 200
    chat = {
        "messages": [USER],
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "store": False,
        "parallel_tool_calls": True,
        "max_tokens": 3,
        "service_tier": "auto",
        **neutral,
    }
    assert http.post("/v1/chat/completions", json=chat).status_code == 200


def test_model_without_template_refuses_chat() -> None:
    engine = FakeEngine()
    engine.tokenizer.has_chat_template = False
    with running(engine) as live:
        reply = httpx.post(f"{live.url}/v1/chat/completions", json={"messages": [USER]})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "no_chat_template"


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        tool = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="fake", messages=[USER], tools=[tool])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("response_format", {"type": "json_object"}, '{"type": "text"} or null'),
        ("modalities", ["audio"], '["text"] or null'),
        ("tool_choice", "required", '"none" or "auto" or null'),
        ("store", True, "false or null"),
    ],
)
def test_an_unsupported_value_is_told_what_is_allowed(http: httpx.Client, field: str, value: Any, allowed: str) -> None:
    reply = http.post("/v1/chat/completions", json={"messages": [USER], field: value})
    told = f"{field}: not supported by this server (leave it out, or give {allowed})"
    assert reply.status_code == 400 and reply.json()["error"]["message"] == told


def test_one_failed_request_is_its_own_problem(client: openai.OpenAI, http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={"prompt": "FAIL", "max_tokens": 5})
    assert reply.status_code == 500 and "this request failed" in reply.json()["error"]["message"]
    with pytest.raises(openai.APIError, match="this request failed"):
        list(client.completions.create(model="fake", prompt="FAIL", max_tokens=5, stream=True))
    assert client.completions.create(model="fake", prompt="ok", max_tokens=2).choices[0].text == said("ok", 2)
    assert http.get("/health/live").status_code == 200


def test_tokenize_and_back(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "héllo", "add_special_tokens": False}).json()
    assert tokens == {"tokens": list("héllo".encode()), "count": 6, "max_model_len": 4096}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    assert http.post("/detokenize", json={"tokens": [999]}).json()["error"]["param"] == "tokens"


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    missing = http.post("/v1/completion", json={})
    assert missing.status_code == 404
    assert "did you mean '/v1/completions'" in missing.json()["error"]["message"]
    method = http.get("/v1/completions")
    assert method.status_code == 405 and method.json()["error"]["code"] == "method_not_allowed"
    assert http.get("/version").json()["version"]


def test_api_key() -> None:
    with running(FakeEngine(), api_key="sesame") as live:
        for path in ("/v1/models", "/metrics", "/version"):
            assert httpx.get(live.url + path).status_code == 401
            assert httpx.get(live.url + path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(live.url + path, headers={"authorization": "Bearer sesame"}).status_code == 200
        assert (
            httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"}).json()["error"]["code"] == "invalid_api_key"
        )
        assert httpx.get(f"{live.url}/health/ready").status_code == 200
