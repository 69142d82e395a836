"""One training contender of Hugging Face transformers: N steps of the demo's shapes, one JSON line of step seconds.

Run by benchmarks/train.py, each in a process of its own, with the peers' environment (needs torch, transformers, and
accelerate for ``trainer``):

    python transformers_train.py CONTENDER --steps 10

CONTENDER: ``trainer`` (the Trainer itself, bf16=True), ``autocast``, ``autocast-compiled``, ``pure-bf16``,
``pure-bf16-compiled`` (no fp32 masters), ``fsdp2``, ``fsdp2-compiled`` (bf16 compute over fp32 masters).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS, HEADS, WIDE, SEQ, BATCH = 8192, 384, 6, 6, 1024, 512, 8
CONTENDERS = ("trainer", "autocast", "autocast-compiled", "pure-bf16", "pure-bf16-compiled", "fsdp2", "fsdp2-compiled")


def main() -> None:
    """Print ``{"seconds": [...], "loss": ...}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    seconds, loss = by_trainer(options.steps) if options.contender == "trainer" else by_loop(options)
    print(json.dumps({"seconds": seconds, "loss": loss}))


def llama() -> LlamaForCausalLM:
    """13.8 M parameters, as examples/demo.toml."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def by_loop(options: argparse.Namespace) -> tuple[list[float], float]:
    """The usual loop: fused AdamW, clipping at 1, as the Trainer does."""
    name, model = options.contender, llama()
    if name.startswith("pure-bf16"):
        model = model.bfloat16()
    if name.startswith("fsdp2"):
        shard(model, compiled=name.endswith("compiled"))
    elif name.endswith("compiled"):
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    seconds, loss = [], torch.zeros(())
    for _ in range(options.steps):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=name.startswith("autocast")):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        float(loss)
        seconds.append(time.perf_counter() - began)
    return seconds, float(loss)


def shard(model: Any, compiled: bool) -> None:
    """FSDP2 on one process, each decoder layer a group, layers compiled if asked."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def by_trainer(steps: int) -> tuple[list[float], float]:
    """The Trainer's own way: bf16=True (autocast), eager, its default optimizer (fused AdamW)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began, self.seconds = 0.0, []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    rows = torch.randint(0, VOCAB, (BATCH * steps, SEQ))
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=llama(), args=arguments, train_dataset=dataset, callbacks=[clock])
        result = trainer.train()
    return clock.seconds, float(result.training_loss)


if __name__ == "__main__":
    main()
