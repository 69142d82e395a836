"""From what a user gives (a configuration, a few numbers) to what the planner needs, and the hand estimates as records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.config import parse_config
from ridgeline.errors import UserError
from ridgeline.hardware.peaks import peak_flops
from ridgeline.models.config import DecoderConfig, config_from_section
from ridgeline.plan.estimates import megatron_flops, positive, utilisation_warning
from ridgeline.plan.parameters import padded_vocab, parameter_report

if TYPE_CHECKING:
    from ridgeline.config import JobConfig


def resolve_model(job: JobConfig) -> tuple[DecoderConfig, list[str]]:
    """The model of ``job`` and notes on where its vocabulary comes from: ``model.init``, the dataset, the configuration.

    Raises:
        UserError: ``model.init`` holds no model that can be read.
    """
    if job.model.init is not None:
        from ridgeline.models import load_config

        return load_config(job.model.init), [f"shape taken from model.init = {job.model.init}"]
    if job.model.vocab_size is not None:
        return config_from_section(job.model), []
    built = dataset_vocab(Path(job.data.folder))
    if built is not None:
        return config_from_section(job.model, built), []
    wanted = job.data.tokenizer.vocab_size
    note = f"vocabulary {wanted:,} assumed from data.tokenizer.vocab_size: dataset {job.data.folder} is not built yet"
    return config_from_section(job.model, wanted), [note]


def dataset_vocab(folder: Path) -> int | None:
    """The vocabulary of a built dataset, from its manifest; None when it is not built."""
    try:
        return int(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["vocab_size"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"dataset {folder}: manifest.json cannot be read ({type(error).__name__})") from None


def parameter_table(shape: dict[str, Any], vocab: int, tp: int) -> dict[str, Any]:
    """Reports for the vocabulary as given, padded for one rank, and padded for ``tp`` ranks.

    ``shape`` are keys of the ``[model]`` table.

    Raises:
        UserError: a key or a value of ``shape`` is not valid.
    """
    section = parse_config({"model": shape, "train": {"seq_len": 8}}, where="plan params").model
    vocabs = {vocab: "as given"}
    for ranks in dict.fromkeys((1, tp)):
        size = padded_vocab(vocab, ranks)
        vocabs[size] = f"{vocabs[size]}, padded for tp {ranks}" if size in vocabs else f"padded for tp {ranks}"
    rows = []
    for size, note in vocabs.items():
        report = parameter_report(config_from_section(section, size))
        rows.append({"vocab": size, "note": note, "report": report.to_dict()})
    return {"family": section.family, "rows": rows}


def iteration(
    batch: int,
    seq: int,
    layers: int,
    hidden: int,
    vocab: int,
    recompute: bool,
    devices: int | None = None,
    seconds: float | None = None,
    peak_tflops: float | None = None,
    device: str | None = None,
    dtype: str = "bf16",
) -> dict[str, Any]:
    """FLOPs of an iteration in both of Megatron's forms; the achieved rate, MFU and HFU when its time is known.

    HFU divides the form that ran by the peak, MFU always the 72 form.

    Raises:
        UserError: half of a pair of options, or a device or dtype that the peak table does not have.
    """
    if (devices is None) != (seconds is None):
        raise UserError("plan flops: give --gpus and --seconds together, or neither")
    if peak_tflops is not None and device is not None:
        raise UserError("plan flops: give --peak or --device, not both")
    peak = peak_flops(device, dtype) if device else peak_tflops * 1e12 if peak_tflops else None
    full = megatron_flops(batch, seq, layers, hidden, vocab, recompute=True)
    model = megatron_flops(batch, seq, layers, hidden, vocab, recompute=False)
    document: dict[str, Any] = {
        "forms": [
            {"formula": "96 B s l h^2 (1 + s/(6h) + V/(16 l h)), full recomputation", "flops": full, "ran": recompute},
            {"formula": "72 B s l h^2 (1 + s/(6h) + V/(12 l h)), none", "flops": model, "ran": not recompute},
        ],
        "achieved_flops_per_second": None,
        "model_flops_per_second": None,
        "peak_flops_per_second": peak,
        "peak_source": f"{dtype} datasheet of {device}" if device else "as given",
        "hfu": None,
        "mfu": None,
        "warnings": [],
    }
    if devices is None or seconds is None:
        return document
    positive(seconds=seconds)
    achieved, useful = (full if recompute else model) / (devices * seconds), model / (devices * seconds)
    document |= {"achieved_flops_per_second": achieved, "model_flops_per_second": useful}
    if peak:
        document |= {"hfu": achieved / peak, "mfu": useful / peak}
        document["warnings"] = [warning] if (warning := utilisation_warning(achieved / peak)) else []
    return document
