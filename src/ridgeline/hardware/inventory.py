"""The device inventory: CPU, memory, NUMA, caches, network interfaces, GPUs. What is unknown is None, never guessed."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from ridgeline.hardware.gpus import gpu_inventory
from ridgeline.hardware.limits import (
    ROOT,
    allowed_cpus,
    memory_limit_bytes,
    parse_cpu_list,
    physical_cores,
    quota_cores,
    read_int,
    read_text,
    usable_threads,
)

# What decides which GEMM kernels a CPU can run; names as in /proc/cpuinfo (x86 `flags`, Arm `Features`).
FEATURES = {
    "x86": (
        "avx2",
        "avx512f",
        "avx512_bf16",
        "avx512_fp16",
        "avx512_vnni",
        "avx_vnni",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    ),
    "arm": ("asimd", "bf16", "i8mm", "sve", "sve2"),
}


def inventory(root: Path = ROOT) -> dict[str, Any]:
    """Everything a figure may depend on: ``cpu, memory, numa, nics, gpus, gpu_links``.

    Sizes in bytes, speeds in bits per second. ``root`` is the folder that holds ``proc`` and ``sys`` (for tests).
    """
    gpus, links = gpu_inventory()
    return {
        "cpu": cpu_inventory(root),
        "memory": memory_inventory(root),
        "numa": numa_inventory(root),
        "nics": nic_inventory(root),
        "gpus": gpus,
        "gpu_links": links,
    }


def cpu_inventory(root: Path = ROOT) -> dict[str, Any]:
    """Model, sockets, cores and threads (present and allowed), ISA features, caches."""
    entries = _cpuinfo(root)
    first = entries[0] if entries else {}
    present = parse_cpu_list(read_text(root / "sys/devices/system/cpu/online") or "") or None
    allowed = allowed_cpus()
    packages = {
        read_int(root / f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id") for cpu in present or []
    }
    return {
        "name": first.get("model name"),
        "vendor": first.get("vendor_id"),
        "model": "-".join(first[key] for key in ("cpu family", "model", "stepping") if key in first) or None,
        "machine": platform.machine(),
        "sockets": len(packages - {None}) or None,
        "cores": physical_cores(present, root) if present else None,
        "threads": len(present) if present else os.cpu_count(),
        "threads_allowed": len(allowed) if allowed is not None else None,
        "quota_cores": quota_cores(root),
        "threads_usable": usable_threads(root),
        "features": _features(first),
        "caches": cache_inventory(root),
    }


def cache_inventory(root: Path = ROOT) -> list[dict[str, Any]]:
    """One row per kind of cache: level, type, bytes of one instance, instances on the machine."""
    found: dict[tuple[int, str, int], set[str]] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, kind, size = read_int(folder / "level"), read_text(folder / "type"), read_text(folder / "size")
        match = re.fullmatch(r"(\d+)([KMG]?)", size or "")
        if level is None or kind is None or match is None:
            continue
        size_bytes = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
        shared = read_text(folder / "shared_cpu_list") or str(folder)
        found.setdefault((level, kind, size_bytes), set()).add(shared)
    return [
        {"level": level, "type": kind, "bytes": size, "instances": len(instances)}
        for (level, kind, size), instances in sorted(found.items())
    ]


def largest_cache_bytes(root: Path = ROOT) -> int | None:
    """All instances of the largest cache level together: what a bandwidth test has to exceed."""
    return max((row["bytes"] * row["instances"] for row in cache_inventory(root)), default=None)


def memory_inventory(root: Path = ROOT) -> dict[str, int | None]:
    """Total, available and cgroup-limited bytes."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text(root / "proc/meminfo") or "", re.MULTILINE))
    total, available = (int(values[key]) * 1024 if key in values else None for key in ("MemTotal", "MemAvailable"))
    return {"total_bytes": total, "available_bytes": available, "limit_bytes": memory_limit_bytes(root)}


def usable_memory_bytes(root: Path = ROOT) -> int | None:
    """Available memory, capped by the cgroup limit."""
    memory = memory_inventory(root)
    known = [value for key in ("available_bytes", "limit_bytes") if (value := memory[key]) is not None]
    return min(known, default=None)


def numa_inventory(root: Path = ROOT) -> list[dict[str, Any]]:
    """One row per NUMA node: its CPUs, memory and distances to every node. Empty when the kernel does not tell."""
    nodes = []
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        total = re.search(r"MemTotal:\s+(\d+) kB", read_text(folder / "meminfo") or "")
        nodes.append(
            {
                "node": int(folder.name[4:]),
                "cpus": read_text(folder / "cpulist"),
                "memory_bytes": int(total[1]) * 1024 if total else None,
                "distances": [int(part) for part in (read_text(folder / "distance") or "").split()],
            }
        )
    return nodes


def nic_inventory(root: Path = ROOT) -> list[dict[str, Any]]:
    """Network interfaces but the loopback; a virtual device's unknown speed (-1 or unreadable) is None."""
    nics = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        if folder.name == "lo" or not folder.is_dir():
            continue
        speed = read_int(folder / "speed")
        nics.append(
            {
                "name": folder.name,
                "state": read_text(folder / "operstate"),
                "bits_per_second": speed * 1_000_000 if speed and speed > 0 else None,
                "virtual": not (folder / "device").exists(),
                "infiniband": (folder / "device/infiniband").exists(),
            }
        )
    return nics


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """/proc/cpuinfo as one dictionary per logical CPU."""
    text = read_text(root / "proc/cpuinfo") or ""
    rows = [dict(re.findall(r"^([^\t:]+?)\s*:\s?(.*)$", block, re.MULTILINE)) for block in text.split("\n\n")]
    return [row for row in rows if row]


def _features(entry: dict[str, str]) -> dict[str, bool] | None:
    """Whether each instruction-set extension is there; None when the kernel lists none."""
    if "flags" in entry:
        return {name: name in entry["flags"].split() for name in FEATURES["x86"]}
    if "Features" in entry:
        return {name: name in entry["Features"].split() for name in FEATURES["arm"]}
    return None
