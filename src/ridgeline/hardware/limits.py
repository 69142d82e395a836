"""What this process may use of the machine: CPU affinity, cgroup quota, cgroup memory. Unknown is None."""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a page-rounded 2**63 for "no limit"


def read_text(path: Path) -> str | None:
    """The stripped content of a small file of the kernel's, or None when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """An integer file of the kernel's, or None."""
    text = read_text(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None


def parse_cpu_list(text: str) -> list[int]:
    """``0-3,8`` to ``[0, 1, 2, 3, 8]``."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def allowed_cpus() -> list[int] | None:
    """Logical CPUs in this process's affinity mask; None where the system has no such mask (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def quota_cores(root: Path = ROOT) -> float | None:
    """CPU quota of the tightest enclosing cgroup in cores (v2 ``cpu.max``, v1 ``cfs_quota``); None = no quota."""
    quotas = [_quota(folder) for folder in _cgroup_folders(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Memory limit of the tightest enclosing cgroup in bytes; None = no limit."""
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = read_int(folder / name)  # the word "max" is no integer: no limit
            if limit is not None and limit < UNLIMITED_BYTES:
                limits.append(limit)
    return min(limits, default=None)


def physical_cores(cpus: list[int], root: Path = ROOT) -> int | None:
    """Distinct physical cores behind the logical ``cpus``; None when the kernel does not tell."""
    seen = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core = read_int(topology / "core_id")
        if core is None:
            return None
        seen.add((read_int(topology / "physical_package_id"), core))
    return len(seen)


def usable_threads(root: Path = ROOT) -> int:
    """Compute threads worth starting: physical cores in the affinity mask, capped by the cgroup quota; at least 1.

    Two hardware threads of one core share its matrix units, so the second adds nothing to a GEMM.
    """
    cpus = allowed_cpus()
    logical = len(cpus) if cpus else os.cpu_count() or 1
    cores = (physical_cores(cpus, root) if cpus else None) or logical
    quota = quota_cores(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def busy_and_total_seconds(root: Path = ROOT) -> tuple[float, float] | None:
    """Seconds the allowed CPUs were busy (steal included) and in all, since boot; None when the kernel does not tell."""
    allowed, busy, total = set(allowed_cpus() or ()), 0, 0
    for line in (read_text(root / "proc/stat") or "").splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and (not allowed or int(name[3:]) in allowed):
            counts = [int(tick) for tick in ticks[:8]]  # user nice system idle iowait irq softirq steal
            total += sum(counts)
            busy += sum(counts) - counts[3] - counts[4]
    per_second = os.sysconf("SC_CLK_TCK") if total else 1
    return (busy / per_second, total / per_second) if total else None


def _quota(folder: Path) -> float | None:
    text = read_text(folder / "cpu.max")
    if text is not None:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else int(quota) / int(period or 100_000)
    v1 = read_int(folder / "cpu.cfs_quota_us")
    v1_period = read_int(folder / "cpu.cfs_period_us")
    return v1 / v1_period if v1 and v1 > 0 and v1_period else None


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and every parent, for v2 and for the v1 ``controller``."""
    mount = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controllers if controllers else mount
        inside = base / path.lstrip("/")
        folders.append(inside)
        folders.extend(parent for parent in inside.parents if base in (parent, *parent.parents))
    return [*dict.fromkeys([*folders, mount / controller, mount])]
