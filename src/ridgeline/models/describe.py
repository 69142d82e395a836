"""What a model folder or a GGUF file holds, without reading the weights."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ridgeline.errors import UserError
from ridgeline.models.config import DecoderConfig
from ridgeline.models.folder import find_folder, tensor_files
from ridgeline.models.hf_config import load_config

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def describe(path: str | Path) -> dict[str, Any]:
    """Family, shapes, parameters, stored types and bytes of a folder, a hub id, or a ``.gguf`` file.

    ``tensors`` has one entry per kind of tensor, layers folded together: name with ``*``, count, shape, dtype,
    parameters, bytes. ``parameters`` counts a tied head once. Raises `UserError` as `load_config` and `tensor_files` do.
    """
    if str(path).endswith(".gguf"):
        source, config, rows = _gguf(path)
    else:
        source, config, rows = _folder(find_folder(path))
    dtypes: dict[str, int] = {}
    for _, _, dtype, size in rows:
        dtypes[dtype] = dtypes.get(dtype, 0) + size
    return {
        "path": str(source),
        "family": config.family,
        "parameters": config.num_parameters,
        "bytes": sum(dtypes.values()),
        "dtype_bytes": dtypes,
        "config": dataclasses.asdict(config),
        "tensors": _folded(rows),
    }


Row = tuple[str, tuple[int, ...], str, int]  # name, shape, dtype, bytes


def _folder(folder: Path) -> tuple[Path, DecoderConfig, list[Row]]:
    index = tensor_files(folder)
    rows: list[Row] = []
    for file in sorted(set(index.values())):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                dtype = str(part.get_dtype()).lower()
                rows.append((name, shape, dtype, math.prod(shape) * _bits(dtype) // 8))
    return folder, load_config(folder), rows


def _bits(dtype: str) -> int:
    """Bits of one element, from safetensors' own names: f32, bf16, f8_e4m3, i64."""
    found = re.search(r"\d+", dtype)
    if found is None and dtype != "bool":
        raise UserError(f"stored type '{dtype}' is not known")
    return int(found.group()) if found else 8


def _gguf(path: str | Path) -> tuple[Path, DecoderConfig, list[Row]]:
    from ridgeline.models.gguf import GGUF, resolve

    file = resolve(path)
    gguf = GGUF(file)
    rows = [
        (name, tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name.lower(), int(tensor.n_bytes))
        for name, tensor in gguf.stored.items()
    ]
    return file, gguf.config(), rows


def _folded(rows: list[Row]) -> list[dict[str, Any]]:
    folded: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for name, shape, dtype, size in rows:
        kind = LAYER.sub("*", name)
        entry = folded.setdefault(
            (kind, shape, dtype),
            {"name": kind, "count": 0, "shape": list(shape), "dtype": dtype, "parameters": 0, "bytes": 0},
        )
        entry["count"] += 1
        entry["parameters"] += math.prod(shape)
        entry["bytes"] += size
    return sorted(folded.values(), key=lambda entry: (entry["count"] > 1, entry["name"]))
