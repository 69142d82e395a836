"""The verb ``generate`` as processes: its text against transformers, its one line on bad input, the run it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ridgeline.runs import list_runs
from train_tools import pretend_ceilings

PROMPT = "the cat sat"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
FEW = [
    {"input": "one", "output": "un"},
    {"query": "two", "answers": ["deux"]},
    {"query": "three", "answers": ["trois"]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ceilings, and ``model``: a Llama of random weights with a tokenizer and a chat template."""
    place = tmp_path_factory.mktemp("generate")
    pretend_ceilings(place)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(["the cat sat on the mat, and the dog ran"], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(place / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    return place


def ridgeline(place: Path, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ridgeline", "generate", str(place / "model"), *arguments]
    environment = {**os.environ, "RIDGELINE_CACHE": str(place), "OMP_NUM_THREADS": "1"}
    options = ["--runs", str(place / "runs"), "--dtype", "fp32"]
    return subprocess.run([*command, *options], capture_output=True, text=True, input=given, env=environment)


def document(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_greedy_text_is_that_of_transformers_and_the_run_keeps_it(place: Path) -> None:
    made = document(ridgeline(place, PROMPT, "--temperature", "0", "--max-tokens", "12", "--json"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(place / "model").float()
    reader = transformers.AutoTokenizer.from_pretrained(place / "model")
    ids = torch.tensor([reader(PROMPT, add_special_tokens=False).input_ids])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=1)
    assert made["tokens"] == out[0, ids.shape[1] :].tolist()
    assert made["text"] == reader.decode(made["tokens"], skip_special_tokens=True) and made["finish_reason"] == "length"
    run = next(run for run in list_runs(place / "runs") if run.id == made["run"])
    assert run.load_json("samples.json")[0]["text"] == made["text"] and run.summary["tokens_per_second"] > 0


def test_text_streams_to_stdout_and_speed_to_stderr(place: Path) -> None:
    shown = ridgeline(place, "-", "--temperature", "0", "--max-tokens", "12", given=PROMPT)
    made = document(ridgeline(place, PROMPT, "--temperature", "0", "--max-tokens", "12", "--json"))
    assert shown.stdout == made["text"] + "\n"
    assert "tokens/s" in shown.stderr and "MBU" in shown.stderr and "GB/s" in shown.stderr


def test_a_seed_repeats_and_a_stop_string_ends(place: Path) -> None:
    sampled = ["--temperature", "1.5", "--top-k", "50", "--max-tokens", "24", "--seed", "7", "--json"]
    first, second = (document(ridgeline(place, PROMPT, *sampled)) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    stop = first["text"][4:6]
    cut = document(ridgeline(place, PROMPT, *sampled, "--stop", stop))
    assert cut["text"] == first["text"][: first["text"].index(stop)] and cut["finish_reason"] == "stop"


def test_chat_goes_through_the_template(place: Path) -> None:
    chatted = ridgeline(
        place, "hi", "--chat", "--system", "be brief", "--temperature", "0", "--max-tokens", "6", "--json"
    )
    written = ridgeline(
        place, "<|system|>be brief<|user|>hi<|assistant|>", "--temperature", "0", "--max-tokens", "6", "--json"
    )
    assert document(chatted)["tokens"] == document(written)["tokens"]


def test_few_shot_prints_answers_and_scores(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in FEW))
    made = document(ridgeline(place, "--few-shot", str(file), "--temperature", "0", "--max-tokens", "4", "--json"))
    assert [row["query"] for row in made["answers"]] == ["two", "three"]
    assert made["exact_match"] == 0 and 0 <= made["chrf"] <= 100


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["word " * 100], ["prompt", "64"]),
        ([PROMPT, "--temperature", "-1"], ["temperature"]),
        ([PROMPT, "--few-shot", "en-fr"], ["not both"]),
        ([PROMPT, "--system", "x"], ["--system needs --chat"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(place: Path, arguments: list[str], words: list[str]) -> None:
    done = ridgeline(place, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ridgeline:")]
    assert all(word in line for word in words) and "Traceback" not in done.stderr
