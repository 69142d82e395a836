"""What a package was made with, and the refusal of a machine or a torch it does not fit, by name."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError

FORMAT = 1
NAME = "manifest.json"
PROGRAM = "model.pt2"
CACHE = "cache.zip"
CACHE_FIELDS = ("python", "threads")  # the compiler writes the number of threads into its loops, and looks it up by it
# Compiler flags to the names of /proc/cpuinfo, where they differ.
CPUINFO = {"avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16"}


def here(device: str) -> dict[str, Any]:
    """What this process runs on: the fields of a manifest that must agree."""
    import torch

    return {
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "system": platform.system(),
        "architecture": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: str) -> str:
    import torch

    if device != "cuda":
        return device
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"


def cpu_features(root: Path = Path("/")) -> set[str] | None:
    """Instruction sets of this CPU as Linux names them; None where the system does not tell."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].partition(":")[2].split()) if lines else None


def missing_features(wanted: Iterable[str], available: set[str] | None) -> list[str]:
    """Compiler flags that this CPU has no instructions for; none when the system does not tell."""
    if available is None:
        return []
    named = {flag: CPUINFO.get(flag, flag).replace("-", "_") for flag in wanted}
    return sorted(flag for flag, name in named.items() if name not in available)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a package.

    Raises:
        UserError: it is not a package, or of a format this version does not know.
    """
    file = folder / NAME
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        known = document["format"]
    except FileNotFoundError:
        raise UserError(f"{folder}: not a package (no {NAME})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged") from None
    if known != FORMAT:
        raise UserError(f"{folder}: package format {known}, this version reads {FORMAT}")
    return dict(document)


def check(folder: Path, part: str) -> dict[str, Any]:
    """The manifest, if this process can use the file ``part`` of the package.

    Raises:
        UserError: the first thing that differs, with what the package was made for and what is here.
    """
    document = read(folder)
    if part not in document["files"]:
        raise UserError(f"{folder}: made without {part}")
    found = here(document["made_for"]["device_type"])
    for name in ("torch", "system", "architecture", "device", *(CACHE_FIELDS if part == CACHE else ())):
        if document["made_for"][name] != found[name]:
            raise UserError(
                f"{folder}: made for {name} {document['made_for'][name]}, this is {found[name]}; make it anew"
            )
    if _newer(document["made_for"]["libc"], found["libc"]):
        raise UserError(
            f"{folder}: made for libc {document['made_for']['libc']}, this is {found['libc']}; make it anew"
        )
    lacking = missing_features(document["made_for"]["instructions"], cpu_features())
    if lacking:
        raise UserError(f"{folder}: made for a CPU with {', '.join(lacking)}, which this one lacks; make it anew")
    expected = document["files"][part]
    if not (folder / part).is_file() or digest(folder / part) != expected["sha256"]:
        raise UserError(f"{folder / part}: damaged or missing (not the file the manifest describes)")
    return document


def _newer(made: str, found: str) -> bool:
    """Whether code linked against the first C library cannot run on the second: another one, or an older version."""
    if not made or not found:
        return False
    (name, version), (other, ours) = made.split(" ", 1), found.split(" ", 1)
    return name != other or _numbers(version) > _numbers(ours)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def describe(files: Iterable[Path]) -> dict[str, Mapping[str, Any]]:
    """Name to size and checksum."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in files}
