"""The whole way with the real engine: `ridgeline serve FOLDER` in a process, the `openai` client, transformers as oracle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ridgeline.runs import Run
from ridgeline.serving.loading import served_name
from serving_fake import wait_for

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["The river", "mountain", "a", "été 中文", "one two three four five six seven", "0123456789" * 8]


def write_model(folder: Path) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from ridgeline.models import Decoder, DecoderConfig, save

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    source = folder.with_name("tokenizer")
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = DecoderConfig(
        family="llama",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_dim=16,
        intermediate_size=128,
        context_length=512,
        tie_embeddings=False,
        eos_token_ids=(258,),
    )
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # far from flat, so that greedy choices are not ties
    save(decoder, config, folder, tokenizer_files=source)
    return folder


class Server:
    """``ridgeline serve`` as a process."""

    def __init__(self, folder: Path, runs: Path, *options: str) -> None:
        command = [sys.executable, "-m", "ridgeline", "serve", str(folder), "--port", "0", "--dtype", "fp32"]
        command += ["--no-compile", "--max-batch", "4", "--name", "tiny", "--runs", str(runs), "--json", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.child = subprocess.Popen(command, env=environment, **pipes)
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line, self.child.communicate()[1]
        self.document = json.loads(line)
        self.url = self.document["url"]
        self.runs = runs

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith(name + "{")).split()[-1])

    def end(self) -> tuple[int, str]:
        self.child.send_signal(signal.SIGTERM)
        _, errors = self.child.communicate(timeout=30)
        return self.child.returncode, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(folder, tmp_path_factory.mktemp("runs"))
    yield made
    if made.child.poll() is None:
        made.child.kill()
    made.child.communicate()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


class Oracle:
    """transformers on the same folder."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: str, count: int) -> tuple[list[int], list[float]]:
        """Greedy continuation and the log-probabilities of its tokens, one full forward per token."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        values = []
        start = len(ids)
        with self.torch.no_grad():
            for _ in range(count):
                scores = self.model(self.torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(scores.argmax()))
                values.append(float(scores.max()))
                if ids[-1] == 258:
                    break
        return ids[start:], values

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def test_greedy_equals_transformers(client: openai.OpenAI, oracle: Oracle) -> None:
    for prompt in PROMPTS:
        ids, values = oracle.greedy(prompt, 12)
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, logprobs=3)
        choice = reply.choices[0]
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(values, abs=1e-3)
        for value, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs or [], strict=True):
            assert top is not None and value == max(top.values())  # exact floats: lm-eval calls this greedy
        if "�" not in oracle.text(ids):
            assert choice.text == oracle.text(ids)
        assert reply.usage is not None and reply.usage.completion_tokens == len(ids)


def test_many_at_once_equal_each_alone(client: openai.OpenAI) -> None:
    def ask(prompt: str) -> str:
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0).choices[0].text

    alone = [ask(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, PROMPTS * 2)) == alone * 2
    together = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=24, temperature=0)
    assert [choice.text for choice in together.choices] == alone


def test_streamed_equals_whole_at_a_temperature(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "été 中文", "max_tokens": 40, "seed": 11, "temperature": 1.2}
    whole = client.completions.create(**ask, n=2)
    texts = ["", ""]
    for chunk in client.completions.create(**ask, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1], "n choices of one seed are the same text"


def test_chat_is_the_template_on_a_completion(client: openai.OpenAI, oracle: Oracle) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = oracle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10, temperature=0)
    plain = client.completions.create(model="tiny", prompt=rendered, max_tokens=10, temperature=0)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage is not None and plain.usage is not None
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens == len(oracle.tokenizer(rendered)["input_ids"])


def test_stop_string(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "The river", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[5:7]
    cut = client.completions.create(**ask, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_tokenize(server: Server, oracle: Oracle) -> None:
    text = "été <|im_end|> x"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert tokens == oracle.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_context_is_enforced(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"max_tokens: 500 with the 80 tokens .* 580, .* context of 512"):
        client.completions.create(model="tiny", prompt=PROMPTS[-1], max_tokens=500)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_place(server: Server, stream: bool) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": stream, "n": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head + body)
        wait_for(lambda: server.metric("vllm:num_requests_running") == 3)
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 1)
    assert server.metric("ridgeline_open_sequences") == 0
    wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, 1)


def test_health_answers_during_prefill(server: Server) -> None:
    body = {"prompt": ["x" * 500] * 24, "max_tokens": 8, "ignore_eos": True}
    slowest = []
    with ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        client.get(f"{server.url}/health")
        busy = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        while not busy.done():
            began = time.perf_counter()
            assert client.get(f"{server.url}/health").status_code == 200
            slowest.append(time.perf_counter() - began)
        assert busy.result().status_code == 200
    assert len(slowest) > 3 and max(slowest) < 0.5


def test_it_drains_and_leaves_a_run(server: Server) -> None:
    code, errors = server.end()
    assert code == 0, errors
    assert errors.count("request id=") > 20 and "draining" in errors
    assert f"run {server.document['run']}" in errors
    run = Run.open(server.document["run"], server.runs)
    assert run.kind == "serve" and run.info["status"] == "done" and run.summary["model"] == "tiny"
    assert run.summary["decode_bytes_per_second"] > 0 and run.summary["decode_batch_mean"] > 1
    assert run.summary["statuses"]["499"] == 2 and run.summary["statuses"]["400"] == 1


def test_the_name_clients_use(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "20260101-train-x-1f" / "artifacts" / "model"
    folder.mkdir(parents=True)
    assert served_name("latest:train", folder) == "20260101-train-x-1f"
    assert served_name(str(tmp_path), tmp_path) == tmp_path.name
    assert served_name("a/Smol.Q4_1.gguf", Path("/cache/Smol.Q4_1-0123456789ab")) == "Smol.Q4_1"
    assert served_name("org/name", Path("org/name")) == "org/name"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ridgeline", "serve", str(tmp_path / "nothing"), "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nothing" in done.stderr
