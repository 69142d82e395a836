"""A step whose loss or gradient is not finite: name the batch that caused it, keep it, then stop or skip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.runs import Run
from ridgeline.train.source import Batches
from ridgeline.train.step import Outcome

NAMED = 4  # documents in the line of error; the file beside the batch has them all


def keep_batch(run: Run, batches: Batches, step: int, outcome: Outcome) -> str:
    """Save the step's global batch below the run and return the line that names it. Rank 0 only."""
    whole = range(batches.section.global_batch_size)
    samples = batches.describe(step)
    file = run.artifact(f"nonfinite/step-{step:08d}.npy")
    np.save(file, batches.step(step, whole).numpy(), allow_pickle=False)
    run.save_json(f"artifacts/nonfinite/step-{step:08d}.json", {"step": step, **_values(outcome), "samples": samples})
    return f"{_what(outcome)} at step {step}; {_name(samples)}; batch saved to {_relative(file)}"


def _what(outcome: Outcome) -> str:
    if outcome.loss != outcome.loss or abs(outcome.loss) == float("inf"):
        return f"loss is {outcome.loss}"
    return f"gradient norm is {outcome.grad_norm} (loss {outcome.loss:.4f})"


def _values(outcome: Outcome) -> dict[str, str]:
    return {"loss": str(outcome.loss), "grad_norm": str(outcome.grad_norm)}


def _name(samples: list[dict[str, Any]]) -> str:
    indices = ", ".join(str(sample["sample"]) for sample in samples)
    documents = sorted({document for sample in samples for document in sample["documents"]})
    shown = ", ".join(documents[:NAMED])
    more = f" and {len(documents) - NAMED} more" if len(documents) > NAMED else ""
    return f"samples {indices} (documents {shown}{more})"


def _relative(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)
