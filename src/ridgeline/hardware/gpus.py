"""GPUs by their exact names, and how they are linked. torch is imported only when a device file exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def accelerator_possible() -> bool:
    """Whether the kernel shows a GPU at all; spares a machine without one the import of torch."""
    return any(Path(name).exists() for name in DEVICE_FILES)


def gpu_inventory() -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """All visible GPUs, and a row per pair (None with fewer than two)."""
    if not accelerator_possible():
        return [], None
    import torch

    if not torch.cuda.is_available():
        return [], None
    count = torch.cuda.device_count()
    return [_gpu(torch, index) for index in range(count)], _links(torch, count) if count > 1 else None


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": torch.cuda.get_device_name(index),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_cache_bytes": getattr(properties, "L2_cache_size", None),
        "architecture": getattr(properties, "gcnArchName", None),  # AMD only
        "runtime": f"cuda {torch.version.cuda}" if torch.version.cuda else f"hip {torch.version.hip}",
    }


def _links(torch: Any, count: int) -> list[dict[str, Any]]:
    # The tool numbers by PCI bus, torch by CUDA_VISIBLE_DEVICES and speed: only where the two must agree.
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    same_numbers = len(names) == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ
    kinds = _nvidia_topology() if same_numbers else {}
    return [
        {"pair": [a, b], "peer_access": torch.cuda.can_device_access_peer(a, b), "link": kinds.get((a, b))}
        for a in range(count)
        for b in range(a + 1, count)
    ]


def _nvidia_topology() -> dict[tuple[int, int], str]:
    """Link names by pair of GPUs from ``nvidia-smi topo -m``; empty when the tool is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    try:
        done = subprocess.run([tool, "topo", "-m"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_topology(done.stdout)


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """The matrix of ``nvidia-smi topo -m``: ``{(0, 1): "NV12", (0, 2): "SYS", ...}``, upper triangle."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    header = next((line for line in lines if line[:1].isspace() and "GPU0" in line.split()), "")
    columns = [int(name[3:]) for name in header.split() if re.fullmatch(r"GPU\d+", name)]
    links = {}
    for line in lines:
        match = re.match(r"^GPU(\d+)\s+(.*)$", line)
        if match is None or not columns:
            continue
        row = int(match[1])
        for column, cell in zip(columns, match[2].split(), strict=False):
            if row < column and cell != "X":
                links[row, column] = cell
    return links
