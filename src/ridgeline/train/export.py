"""The artefact: a Hugging Face-layout folder with weights, configuration and the dataset's tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ridgeline.data import Dataset
from ridgeline.models import save
from ridgeline.parallel.fsdp import full_state
from ridgeline.parallel.mesh import Layout
from ridgeline.train.state import TrainState


def export(state: TrainState, dataset: Dataset, target: Path, layout: Layout) -> None:
    """Gather the fp32 masters and write ``target`` atomically. A collective; rank 0 writes.

    The token that ends every document of the dataset becomes the model's end (and beginning) of sequence.
    """
    weights = full_state(state.decoder)
    if layout.is_main:
        end = dataset.end_token_id
        config = state.config.replace(eos_token_ids=(end,), bos_token_id=end)
        save(weights, config, target, tokenizer_files=dataset.tokenizer_files)
    dist.barrier()
