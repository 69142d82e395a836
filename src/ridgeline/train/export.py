"""The artefact: a Hugging Face-layout folder with weights, configuration and the dataset's tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ridgeline.data import Dataset
from ridgeline.models import save
from ridgeline.parallel.fsdp import full_state
from ridgeline.parallel.mesh import Layout
from ridgeline.train.state import TrainState


def export(state: TrainState, dataset: Dataset, target: Path, layout: Layout) -> None:
    """Gather the fp32 masters and write ``target`` atomically. A collective; rank 0 writes."""
    weights = full_state(state.decoder)
    if layout.is_main:
        tokenizer = json.loads(Path(dataset.tokenizer_path).read_text(encoding="utf-8"))
        end = end_of_text(tokenizer)
        config = state.config if end is None else state.config.replace(eos_token_ids=(end[0],), bos_token_id=end[0])
        with tempfile.TemporaryDirectory() as folder:
            settings = Path(folder) / "tokenizer_config.json"
            settings.write_text(json.dumps(tokenizer_config(end, state.config.context_length), indent=1) + "\n")
            save(weights, config, target, tokenizer_files=[dataset.tokenizer_path, settings])
    dist.barrier()


def end_of_text(tokenizer: dict[str, Any]) -> tuple[int, str] | None:
    """``(id, text)`` of the token that ends a document: the first special token of a ``tokenizer.json``."""
    special = [token for token in tokenizer.get("added_tokens", []) if token.get("special")]
    return (int(special[0]["id"]), str(special[0]["content"])) if special else None


def tokenizer_config(end: tuple[int, str] | None, context_length: int) -> dict[str, Any]:
    """What transformers needs beside ``tokenizer.json`` to load it as a fast tokenizer."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    return config if end is None else {**config, "eos_token": end[1], "bos_token": end[1]}
