"""The doctor on ten architectures of `transformers`, unmodified, with random weights and tiny sizes: before and after.

Two programs per architecture, written to a temporary folder and run as a user's script is:

- training: batches of several lengths, loss, backward, optimiser step; the whole model compiled;
- generation: `generate` with the model's forward compiled (where the architecture generates).

For each: breaks, recompilations, silent events and compile seconds before and after the kept fixes, the gain over the
whole run with its floor, the errors against float64, and every fix that was tried with its reason.

    python benchmarks/doctor.py --out doctor.json --only llama,gpt2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ridgeline.compiler.doctor.fixes import Trials, try_fixes
from ridgeline.compiler.doctor.model import Target
from ridgeline.compiler.doctor.session import Plan, observe_target
from ridgeline.errors import JobError, UserError
from ridgeline.runs import environment

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64}
GPT = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "num_mel_bins": 16, "max_source_positions": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
OPT = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "ffn_dim": 64}
TEXT = "input_ids = torch.randint(3, 64, ({batch}, {length}))\ninputs = dict(input_ids=input_ids, labels=input_ids)"
IMAGE = "inputs = dict(pixel_values=torch.randn({batch}, 3, 32, 32), labels=torch.randint(0, 2, ({batch},)))"
SOUND = "inputs = dict(input_features=torch.randn({batch}, 16, 32), labels=torch.randint(3, 64, ({batch}, {length})))"

# name: configuration, model, sizes, how a batch is made, whether it generates
MODELS: dict[str, tuple[str, str, dict[str, Any], str, bool]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 1}, TEXT, True),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, "num_key_value_heads": 1}, TEXT, True),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, TEXT, True),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES, TEXT, True),
    "opt": ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}, TEXT, True),
    "phi": ("PhiConfig", "PhiForCausalLM", SIZES, TEXT, True),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, TEXT, True),
    "bert": ("BertConfig", "BertForMaskedLM", SIZES, TEXT, False),
    "vit": ("ViTConfig", "ViTForImageClassification", {**SIZES, "image_size": 32, "patch_size": 8}, IMAGE, False),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", WHISPER, SOUND, False),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SIZES, "num_local_experts": 4}, TEXT, True),
}

HEAD = """import torch
from transformers import {config}, {model}

torch.manual_seed(0)
sizes = {sizes!r}
for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    sizes.setdefault(name, 0)
model = {model}({config}(**sizes))
"""
TRAIN = """compiled = torch.compile(model, backend={backend!r})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range({steps}):
    length = 8 + 2 * (step % 3)
    {batch}
    loss = compiled(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
GENERATE = """model.eval()
model.forward = torch.compile(model.forward, backend={backend!r})
for length in (5, 7, 9):
    input_ids = torch.randint(3, 64, (2, length))
    model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens={steps}, do_sample=False)
"""


def main() -> None:
    """Measure, print, keep the JSON."""
    options = _arguments()
    names = options.only.split(",") if options.only else list(MODELS)
    rows = {}
    for name in names:
        for job, text in programs(name, options).items():
            rows[f"{name} {job}"] = measure(f"{name} {job}", text, options)
            if options.out:  # hours on a small machine: what is done is kept
                options.out.write_text(json.dumps(document(rows, options), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document(rows, options), indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {','.join(MODELS)}")
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--steps", type=int, default=12, help="training steps, and tokens generated three times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=4, help="fixes tried per program")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def programs(name: str, options: argparse.Namespace) -> dict[str, str]:
    """The two scripts of an architecture."""
    config, model, sizes, batch, generates = MODELS[name]
    head = HEAD.format(config=config, model=model, sizes=sizes)
    lines = batch.format(batch=4, length="length").replace("\n", "\n    ")
    out = {"training": head + TRAIN.format(backend=options.backend, steps=options.steps, batch=lines)}
    if generates:
        out["generation"] = head + GENERATE.format(backend=options.backend, steps=options.steps)
    return out


def measure(name: str, text: str, options: argparse.Namespace) -> dict[str, Any]:
    """Observe one program, try its fixes; a program that fails is a row with the reason."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        script = Path(place) / "program.py"
        script.write_text(text, encoding="utf-8")
        target = Target((sys.executable, script.name), Path(place), name, script)
        _say(f"{name}: observing")
        try:
            observed = observe_target(target, Path(place) / "observed", Plan(timeout=600)).observations[0]
            trials = try_fixes(
                target,
                observed,
                progress=lambda line: _say(f"{name}: {line}"),
                rounds=options.rounds,
                most=options.most,
                timeout=600,
                preload=("transformers.models.auto.modeling_auto",),
            )
        except (JobError, UserError) as error:
            return {"failure": str(error)}
    return {**row(observed, trials), "doctor_seconds": time.perf_counter() - began}


def row(observed: Any, trials: Trials) -> dict[str, Any]:
    """Headline figures before and after, what was kept, what was tried."""
    names = ("graphs", "breaks", "recompiles", "fallbacks", "compile_seconds")
    before = trials.before or observed
    after = trials.after or before
    return {
        "before": {name: getattr(before, name) for name in names},
        "after": {name: getattr(after, name) for name in names},
        "kept": sorted({one.fix for one in trials if one.kept}),
        "gain": trials.gain.to_dict() if trials.gain else None,
        "error": trials.error,
        "error_eager": trials.error_eager,
        "findings": [{"kind": one.kind, "where": one.where, "reason": one.reason} for one in observed.findings],
        "tried": [{"fix": one.fix, "kept": one.kept, "why": one.why, "gain": one.gain_seconds} for one in trials],
    }


def document(rows: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Rows and totals: how many programs have something to fix, and what is left of it."""
    done = [one for one in rows.values() if "failure" not in one]
    total = {
        side: {name: sum(one[side][name] for one in done) for name in ("breaks", "recompiles", "fallbacks")}
        for side in ("before", "after")
    }
    return {
        "rows": rows,
        "programs": len(rows),
        "failed": len(rows) - len(done),
        "with_findings": sum(bool(one["findings"]) for one in done),
        "with_kept_fixes": sum(bool(one["kept"]) for one in done),
        "total": total,
        "settings": {"backend": options.backend, "rounds": options.rounds, "cores": len(os.sched_getaffinity(0))},
        "environment": environment(),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
