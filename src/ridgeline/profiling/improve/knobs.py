"""Knobs: reversible changes of a job that leave its global batch, its data and its seeds alone.

A knob of a user's job is a change that the injection makes; a knob of our own job is a configuration override. Both say
how to make the change permanent and what the losses may do:

=============  ==========================================================================================
``same``       only the schedule changes: losses equal to 1e-5
``reordered``  the same arithmetic in another order (fusion, threads, buckets): losses equal to 1e-4
``precision``  fewer bits: losses within twice the noise between two seeds
=============  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Result = Literal["same", "reordered", "precision"]
TOLERANCE: dict[Result, float] = {"same": 1e-5, "reordered": 1e-4}


@dataclass(frozen=True)
class Knob:
    """One change. ``inject`` is merged into the injection's ``knobs``, ``overrides`` are of our configuration,
    ``variables`` of the environment; ``permanent`` tells the user what to edit. ``burst`` batches arrive together, so
    that a run must be timed over multiples of it, and only once what was prefetched before is used up."""

    name: str
    setting: str
    result: Result
    permanent: str
    inject: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    burst: int = 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "setting": self.setting, "result": self.result, "permanent": self.permanent}


def merged(knobs: Iterable[Knob]) -> dict[str, Any]:
    """The injection's table of several knobs; a later one wins where two set the same key."""
    out: dict[str, Any] = {}
    for knob in knobs:
        for section, value in knob.inject.items():
            out[section] = {**out.get(section, {}), **value} if isinstance(value, dict) else value
    return out


def workers(count: int, pin_memory: bool = False, where: str = "") -> Knob:
    """Loader workers that live as long as the loader and prefetch two batches each."""
    change: dict[str, Any] = {"num_workers": count, "prefetch_factor": 2, "persistent_workers": True}
    if pin_memory:
        change["pin_memory"] = True
    text = ", ".join(f"{key}={value}" for key, value in change.items())
    permanent = _at(where, f"DataLoader({text})")
    return Knob("workers", f"DataLoader({text})", "same", permanent, {"loader": change}, burst=count)


def pin_memory(where: str = "") -> Knob:
    """Pinned batches, which copies to a GPU can overlap with."""
    text = "DataLoader(pin_memory=True)"
    return Knob("pin-memory", text, "same", _at(where, text), {"loader": {"pin_memory": True}})


def fused(name: str = "AdamW", where: str = "") -> Knob:
    """One kernel for all parameters instead of several per tensor."""
    text = f"{name}(..., fused=True)"
    return Knob("fused", text, "reordered", _at(where, text), {"optimizer": {"fused": True}})


def compiled(cuda_graphs: bool = False) -> Knob:
    """``torch.compile`` of the outermost trained modules, in place; with CUDA graphs, fewer launches too."""
    if cuda_graphs:
        text, mode = "model.compile(mode='reduce-overhead')", {"mode": "reduce-overhead"}
        return Knob("cuda-graphs", text, "reordered", f"{text} before the loop", {"compile": mode})
    return Knob("compile", "model.compile()", "reordered", "model.compile() before the loop", {"compile": {}})


def autocast(dtype: str = "bfloat16") -> Knob:
    """Lower precision in the model's forward; master weights and loss stay as they are."""
    text = f"torch.autocast(device, dtype=torch.{dtype})"
    return Knob("autocast", text, "precision", f"with {text}: around the model's forward", {"autocast": dtype})


def tf32() -> Knob:
    """TF32 tensor cores for fp32 matrix multiplications and convolutions."""
    text = "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = True"
    return Knob("tf32", text, "precision", f"{text} at the start", {"backends": {"tf32": True}})


def cudnn_benchmark() -> Knob:
    """Let cuDNN time its convolution algorithms for these shapes."""
    text = "torch.backends.cudnn.benchmark = True"
    return Knob("cudnn-benchmark", text, "reordered", f"{text} at the start", {"backends": {"cudnn_benchmark": True}})


def threads(count: int) -> Knob:
    """Threads of one process's operators."""
    text = f"torch.set_num_threads({count})"
    permanent = f"{text} at the start, or OMP_NUM_THREADS={count}"
    return Knob("threads", text, "reordered", permanent, {"threads": count}, (), {"OMP_NUM_THREADS": str(count)})


def pin_cores() -> Knob:
    """Each rank of a machine on cores of its own."""
    text = "one set of cores per rank"
    return Knob("pin", text, "same", "os.sched_setaffinity(0, cores of LOCAL_RANK), or taskset per rank", {"pin": True})


def buckets(megabytes: int = 100, where: str = "") -> Knob:
    """Fewer, larger all-reduces, on gradients that live in the buckets."""
    text = f"DistributedDataParallel(bucket_cap_mb={megabytes}, gradient_as_bucket_view=True)"
    change = {"bucket_cap_mb": megabytes, "gradient_as_bucket_view": True}
    return Knob("buckets", text, "reordered", _at(where, text), {"ddp": change})


def keep_activations(where: str = "") -> Knob:
    """``torch.utils.checkpoint`` calls its function and keeps what the backward needs, instead of computing it again."""
    text = "no torch.utils.checkpoint"
    permanent = _at(where, "call the function itself instead of checkpoint(function, ...)")
    return Knob("keep-activations", text, "same", permanent, {"checkpoint": "off"})


def checkpoint_blocks() -> Knob:
    """Activation checkpointing of every repeated block: less memory for a second forward."""
    text = "torch.utils.checkpoint around every repeated block"
    permanent = "torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) for every block"
    return Knob("checkpointing", text, "same", permanent, {"checkpoint": "blocks"})


def micro_batches(parts: int = 8) -> Knob:
    """The model's forward over ``parts`` of the batch one after the other; loss and backward see the whole batch."""
    text = f"the forward in {parts} parts of the batch"
    permanent = f"torch.cat([model(part) for part in batch.chunk({parts})]) instead of model(batch)"
    return Knob("micro-batches", text, "reordered", permanent, {"parts": parts})


def _at(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text


BY_NAME = {
    "workers": workers(2),
    "pin-memory": pin_memory(),
    "fused": fused(),
    "compile": compiled(),
    "cuda-graphs": compiled(cuda_graphs=True),
    "autocast": autocast(),
    "tf32": tf32(),
    "cudnn-benchmark": cudnn_benchmark(),
    "threads": threads(1),
    "pin": pin_cores(),
    "buckets": buckets(),
    "keep-activations": keep_activations(),
    "checkpointing": checkpoint_blocks(),
    "micro-batches": micro_batches(),
}
"""What ``--knob NAME`` means for a user's job when no finding asks for it with values of its own."""

OWN = {
    "train.compile": ("compile", "reordered"),
    "train.micro_batch_size": ("micro-batch", "reordered"),
    "train.dtype": ("dtype", "precision"),
    "parallel.procs": ("procs", "reordered"),
    "parallel.reshard_after_forward": ("reshard", "same"),
    "parallel.activation_checkpointing": ("checkpointing", "same"),
}
"""Configuration keys that leave the training what it is -> (knob's name, what the losses may do)."""


def override(setting: str) -> Knob | None:
    """The knob of ``section.key=value``, or None where it would change the training (a larger global batch)."""
    key = setting.partition("=")[0]
    if key not in OWN:
        return None
    name, result = OWN[key]
    return Knob(name, setting, result, f"set {setting} in the configuration", {}, (setting,))  # type: ignore[arg-type]
