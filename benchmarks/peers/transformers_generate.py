"""Hugging Face transformers' ``generate``, timed: one prompt, greedy, a fixed number of new tokens. Prints JSON.

Imports nothing of Ridgeline: it can run in an environment of its own (``benchmarks/peers/make transformers``).
``--way static`` is its own recipe for speed: a static KV cache and a compiled forward.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers


def main() -> None:
    """Load, warm up (timed apart), measure ``--repeats`` generations, print the fastest and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--way", choices=["default", "static"], default="default")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    prompt = torch.arange(1000, 1000 + options.prompt_tokens)[None]
    arguments = {"do_sample": False, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    if options.way == "static":
        arguments["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)
    started = time.perf_counter()
    run(model, prompt, arguments)
    warm = time.perf_counter() - started
    seconds = sorted(run(model, prompt, arguments) for _ in range(options.repeats))
    figures = {
        "tokens_per_second": options.tokens / seconds[len(seconds) // 2],
        "warm_seconds": warm,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


def run(model: transformers.PreTrainedModel, prompt: torch.Tensor, arguments: dict) -> float:
    """Seconds of one generation."""
    started = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **arguments)
    seconds = time.perf_counter() - started
    assert out.shape[1] == prompt.shape[1] + arguments["max_new_tokens"]
    return seconds


if __name__ == "__main__":
    main()
