"""Measured ceilings: what this device really reaches, measured once in a process of its own and cached.

A separate process measures with the device's own thread count whatever the caller has set, leaves no
two-gigabyte buffer behind, and cannot take the caller down with it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError
from ridgeline.hardware import child, collectives
from ridgeline.hardware.gpus import accelerator_possible
from ridgeline.hardware.inventory import cpu_inventory
from ridgeline.hardware.limits import usable_threads
from ridgeline.hardware.peaks import peaks_for
from ridgeline.runs import write_atomic

log = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
DISTURBED = 0.1  # of the CPUs used by others
FORMAT = 2  # of the cache file; raise it when the way of measuring changes


@dataclass(frozen=True)
class Ceilings:
    """The limits that figures are held against. Rates per second: FLOP, bytes; bus bandwidth for collectives.

    Bus bandwidth over n ranks: all-reduce ``2(n-1)/n * bytes / t``, all-gather ``(n-1)/n * gathered bytes / t``.
    Copy counts the bytes read plus the bytes written (not the cache's own write-allocate reads).
    """

    device: str
    kind: str  # "cpu" or "cuda"
    gemm_flops_per_second: dict[str, float]  # best size of each dtype
    copy_bytes_per_second: float | None
    read_bytes_per_second: float | None
    all_reduce_bytes_per_second: float | None
    all_gather_bytes_per_second: float | None
    backend: str | None  # of the collectives
    measured_at: str
    versions: dict[str, str]
    datasheet: dict[str, Any] | None
    threads: int = 1
    quick: bool = False
    collective_ranks: int = 2
    buffer_bytes: int = 0  # of the bandwidth tests
    elementwise_per_second: float | None = None  # exponentials of fp32, data in cache on a CPU
    process_bytes: int | None = None  # resident memory of a process that has loaded torch's training modules
    gemm_by_size: dict[str, dict[str, float]] = field(default_factory=dict)  # dtype -> edge length -> FLOP/s
    others_share: float | None = None  # of the CPUs, used by other processes while measuring
    seconds: float = 0.0  # the measurement took
    notes: tuple[str, ...] = ()  # what was not measured, and why

    @property
    def disturbed(self) -> bool:
        """Whether other processes took so much of the CPUs that the rates are too low to be ceilings."""
        return self.others_share is not None and self.others_share > DISTURBED

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Ceilings:
        """The inverse of :meth:`to_dict`.

        Raises:
            UserError: a field is missing or a rate is not a positive number.
        """
        try:
            known = {item.name: document[item.name] for item in fields(cls) if item.name in document}
            result = cls(**{**known, "notes": tuple(known.get("notes", ()))})
            rates = [*result.gemm_flops_per_second.values()]
            rates += [
                value for name, value in known.items() if name.endswith("_bytes_per_second") and value is not None
            ]
            if not all(rate > 0 for rate in rates):
                raise ValueError("a rate is not positive")
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"ceilings: not a complete record ({error})") from None
        return result


def ceilings(
    refresh: bool = False,
    quick: bool = False,
    progress: Progress | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
) -> Ceilings:
    """The device's ceilings, from the cache or measured now (under 25 s, ``quick`` under 8 s on two cores).

    Args:
        refresh: measure even when the cache has an answer.
        quick: if it comes to measuring, smaller sizes and fewer repeats. A cached record is used whichever it was.
        progress: called with a text and the fraction done.
        device: ``cpu`` or ``cuda``; default: the GPU when there is one.
        threads: CPU threads; default: the physical cores this process may use, whatever OMP_NUM_THREADS says.

    Raises:
        JobError: the measuring process failed.
    """
    key = cache_key(device, threads)
    file = cache_folder() / f"ceilings-{digest(key)}.json"
    with _one_at_a_time(file):
        cached, notice = _read(file, key)
        if notice:
            _tell(progress, notice)
        if cached is not None and not refresh:
            return cached
        measured = _measure(key, quick, progress)
        if measured.disturbed and cached is not None:
            measured = best_of(measured, cached)
        if notice:
            measured = replace(measured, notes=(*measured.notes, notice))
        return _store(file, key, measured, progress)


def best_of(disturbed: Ceilings, known: Ceilings) -> Ceilings:
    """The larger of each rate: what the device reached once is within its ceiling, however busy it is now."""
    gemm = {**known.gemm_flops_per_second, **disturbed.gemm_flops_per_second}
    gemm = {dtype: max(rate, known.gemm_flops_per_second.get(dtype, 0.0)) for dtype, rate in gemm.items()}
    rates: dict[str, Any] = {}
    for name in (
        item.name for item in fields(Ceilings) if item.name.endswith("_per_second") and "gemm" not in item.name
    ):
        rates[name] = max(filter(None, (getattr(disturbed, name), getattr(known, name))), default=None)
    note = f"rates that were higher on {known.measured_at} are kept from then"
    return replace(disturbed, gemm_flops_per_second=gemm, notes=(*disturbed.notes, note), **rates)


def cache_folder() -> Path:
    """``$RIDGELINE_CACHE`` or ``~/.cache/ridgeline``."""
    return Path(os.environ.get("RIDGELINE_CACHE") or Path.home() / ".cache" / "ridgeline")


def cache_key(device: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """All that a measurement depends on: device, software, threads.

    Raises:
        UserError: ``device`` is not ``cpu`` or ``cuda``, or no GPU is there.
    """
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device '{device}': expected cpu or cuda")
    gpu = _gpu_key() if device != "cpu" else None
    if gpu is None and device == "cuda":
        raise UserError("device 'cuda': torch sees no GPU on this machine; use cpu")
    cpu = cpu_inventory()
    software = {"torch": _version("torch"), "python": platform.python_version(), **(gpu or {}).get("versions", {})}
    return {
        "format": FORMAT,
        "kind": "cuda" if gpu else "cpu",
        "device": gpu["name"] if gpu else cpu["name"] or f"unknown {platform.machine()} CPU",
        "count": gpu["count"] if gpu else 1,
        "cpu": [cpu["name"], cpu["model"], sorted(name for name, there in (cpu["features"] or {}).items() if there)],
        "threads": threads or usable_threads(),
        "versions": software,
    }


def digest(key: dict[str, Any]) -> str:
    """The part of a cache file's name that stands for ``key``."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _gpu_key() -> dict[str, Any] | None:
    if not accelerator_possible():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    runtime = {"cuda": str(torch.version.cuda)} if torch.version.cuda else {"hip": str(torch.version.hip)}
    return {"name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count(), "versions": runtime}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _measure(key: dict[str, Any], quick: bool, progress: Progress | None) -> Ceilings:
    """Collectives first (two workers), then the device alone."""
    _tell(progress, "collectives between two processes", 0.0)
    group = collectives.measure(key["kind"], key["count"], key["threads"], quick)
    alone = child.measure(
        key["kind"], key["threads"], quick, lambda text, part: _tell(progress, text, 0.2 + 0.8 * part)
    )
    datasheet = peaks_for(key["device"])
    notes = [*group["notes"], *alone["notes"]]
    share = alone["others_share"]
    if share is not None and share > DISTURBED:
        notes.append(f"other processes used {share:.0%} of the CPUs meanwhile: too low; measure again when it is quiet")
    if datasheet is None:
        notes.append(f"no datasheet peaks: '{key['device']}' is not in the peak table")
    return Ceilings(
        device=key["device"],
        kind=key["kind"],
        gemm_flops_per_second={dtype: max(by_size.values()) for dtype, by_size in alone["gemm_by_size"].items()},
        copy_bytes_per_second=alone["copy_bytes_per_second"],
        read_bytes_per_second=alone["read_bytes_per_second"],
        all_reduce_bytes_per_second=group["all_reduce_bytes_per_second"],
        all_gather_bytes_per_second=group["all_gather_bytes_per_second"],
        backend=group["backend"],
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=key["versions"],
        datasheet=datasheet.to_dict() if datasheet else None,
        threads=key["threads"],
        quick=quick,
        buffer_bytes=alone["buffer_bytes"],
        elementwise_per_second=alone["elementwise_per_second"],
        process_bytes=alone["process_bytes"],
        gemm_by_size=alone["gemm_by_size"],
        others_share=alone["others_share"],
        seconds=round(group["seconds"] + alone["seconds"], 2),
        notes=tuple(notes),
    )


def _read(file: Path, key: dict[str, Any]) -> tuple[Ceilings | None, str | None]:
    """The cached record and, when the file is there but of no use, a notice."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["key"] != key:
            return None, f"cache {file}: made for another device or software; measuring again"
        return Ceilings.from_dict(document["ceilings"]), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"cache {file}: damaged ({type(error).__name__}); measuring again"


def _store(file: Path, key: dict[str, Any], measured: Ceilings, progress: Progress | None) -> Ceilings:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"key": key, "ceilings": measured.to_dict()}, indent=1) + "\n")
    except OSError as error:
        notice = f"cache {file}: not written ({error.strerror}); the next command measures again"
        _tell(progress, notice)
        return replace(measured, notes=(*measured.notes, notice))
    return measured


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Two processes that both find no cache would disturb each other's measurement: the second waits, then reads."""
    try:
        import fcntl

        file.parent.mkdir(parents=True, exist_ok=True)
        stream = open(file.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115 - held until the block ends
    except (ImportError, OSError):
        yield  # no lock to be had (read-only cache, no fcntl): the measurement is still right when alone
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _tell(progress: Progress | None, text: str, fraction: float | None = None) -> None:
    if progress is not None:
        progress(text, fraction if fraction is not None else 0.0)
    elif fraction is None:
        log.warning(text)
