"""Make a package: export, compile ahead of time, fill the compiler's caches, and prove that the result is the model.

The program is compiled by AOTInductor with the weights inside; a language model's batch and length stay free. The
caches are those of a fresh `torch.compile` of the same target in a process of its own; torch's own cache artefacts
(`torch.compiler.save_cache_artifacts`) hold no C++ libraries, so a CPU would compile all of them again.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ridgeline.compiler.failures import compiling
from ridgeline.compiler.package import manifest
from ridgeline.compiler.package.load import load
from ridgeline.compiler.target import Logits, Target
from ridgeline.errors import JobError, UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What to put into a package."""

    text: str  # the target as the user named it
    program: bool = True
    cache: bool = True
    max_batch: int = 64
    seed: int = 0
    batch: int = 1
    seq_len: int = 64


def build(target: Target, wanted: Wanted, out: Path, say: Say = lambda line: None) -> dict[str, Any]:
    """Write the package to the folder ``out`` (a package that is there is replaced); returns its manifest.

    Raises:
        UserError: ``out`` holds something else, or nothing was asked for.
        JobError: exporting or compiling failed, or the compiled program does not answer as the model does.
    """
    _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "package"
        folder.mkdir()
        inputs: list[dict[str, Any]] = []
        if wanted.program:
            inputs = _program(target, wanted, folder / manifest.PROGRAM, say)
        if wanted.cache:
            say("filling the compiler's caches in a process of its own")
            _cache(wanted, folder / manifest.CACHE)
        document = _manifest(target, wanted, folder, inputs)
        (folder / manifest.NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if wanted.program:
            say("comparing with the model")
            document["largest_relative_error"] = _prove(target, folder)
            (folder / manifest.NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _swap(folder, out, Path(temporary) / "old")
    return document


def _refuse_foreign(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / manifest.NAME).is_file():
        raise UserError(f"{out}: not empty and not a package; name another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder")


def _swap(new: Path, out: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    new.rename(out)


# the program


def _program(target: Target, wanted: Wanted, file: Path, say: Say) -> list[dict[str, Any]]:
    from ridgeline.compiler.internals.aoti import compile_program

    model = _exportable(target)
    shapes, free = _dynamic(target, wanted)
    args = tuple(_example(one, free) for one in target.args)
    say("exporting")
    with compiling(target.name), torch.no_grad():
        program = torch.export.export(model, args, dict(target.kwargs), dynamic_shapes=shapes)
        say("compiling ahead of time with AOTInductor")
        compile_program(program, file)
    tensors = [one for one in tree_leaves((target.args, target.kwargs)) if isinstance(one, Tensor)]
    return [
        {"shape": [free.get(dim, size) for dim, size in enumerate(one.shape)], "dtype": str(one.dtype)}
        for one in tensors
    ]


def _exportable(target: Target) -> nn.Module:
    """A module in evaluation mode; of a decoder a copy whose attention does not depend on the length."""
    if target.module is None:
        return _Function(target.call)
    if not isinstance(target.module, Logits):
        return target.module.eval()
    model = copy.deepcopy(target.module).eval()
    for block in model.decoder.blocks:
        block.attn.blocked = False  # a form for some lengths only would fix the length
    return model


class _Function(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _dynamic(target: Target, wanted: Wanted) -> tuple[Any, dict[int, str]]:
    """torch.export's dynamic shapes and the names of the free dims: batch and length of a language model's tokens."""
    if not isinstance(target.module, Logits):
        return None, {}
    longest = target.module.decoder.config.context_length
    dims = {0: torch.export.Dim("batch", min=1, max=wanted.max_batch), 1: torch.export.Dim("seq", min=1, max=longest)}
    return {"tokens": dims}, {0: f"1 to {wanted.max_batch}", 1: f"1 to {longest}"}


def _example(value: Any, free: dict[int, str]) -> Any:
    """Sizes of 1 would be taken for constants: free dims are traced with at least 2."""
    if not isinstance(value, Tensor) or not free:
        return value
    repeats = [2 if dim in free and size == 1 else 1 for dim, size in enumerate(value.shape)]
    return value.repeat(repeats)


def _prove(target: Target, folder: Path) -> float:
    """The largest distance from eager, relative to eager's largest value, on the example and on other shapes.

    Raises:
        JobError: it is beyond what rounding explains.
    """
    model, worst = load(folder), 0.0
    eager = target.module.eval() if target.module is not None else target.call
    cases = [target.args]
    if isinstance(target.module, Logits):
        vocab = target.module.decoder.config.vocab_size
        cases += [(torch.randint(0, vocab, shape),) for shape in ((1, 1), (2, 7))]
    for args in cases:
        with torch.no_grad():
            pairs = zip(
                tree_leaves(model(*args, **target.kwargs)), tree_leaves(eager(*args, **target.kwargs)), strict=True
            )
            for got, expected in pairs:
                worst = max(worst, _relative(got, expected))
    if not worst < 0.1:
        raise JobError(f"{target.name}: the compiled program differs from the model (relative error {worst:.2g})")
    return worst


def _relative(got: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor) or not expected.numel():
        return 0.0
    size = float(expected.double().abs().max()) or 1.0
    return float((got.double() - expected.double()).abs().max()) / size


# the caches


def _cache(wanted: Wanted, file: Path) -> None:
    """Compile the target in a fresh process with an empty cache folder, and keep that folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        arguments = [wanted.text, str(wanted.seed), str(wanted.batch), str(wanted.seq_len)]
        command = [sys.executable, "-m", "ridgeline.compiler.package.warm", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise JobError(f"filling the caches: {last.removeprefix('ridgeline: ')}")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.suffix != ".lock" and "locks" not in path.parts:
                    archive.write(path, path.relative_to(folder).as_posix())


def _manifest(target: Target, wanted: Wanted, folder: Path, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    from ridgeline.compiler.internals.aoti import instruction_flags

    kinds = {one.device.type for one in tree_leaves((target.args, target.kwargs)) if isinstance(one, Tensor)}
    device = "cuda" if "cuda" in kinds else "cpu"
    return {
        "format": manifest.FORMAT,
        "target": wanted.text,
        "parameters": target.num_parameters,
        "inputs": inputs,
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "made_for": {**manifest.here(device), "device_type": device, "instructions": instruction_flags()},
        "files": manifest.describe(sorted(folder.iterdir())),
    }
