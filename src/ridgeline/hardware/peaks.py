"""Datasheet peaks by exact device name. An unknown device has none: nothing is inferred from a similar name."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError, nearest

TABLE = Path(__file__).with_name("peaks.toml")


@dataclass(frozen=True)
class Peaks:
    """What the maker says: FLOP/s by dtype (dense, fp32 accumulation), bytes/s of memory, and where it says so."""

    device: str
    flops_per_second: dict[str, float]
    bytes_per_second: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def peaks_for(device: str) -> Peaks | None:
    """Peaks of the device with exactly this name, or None (every CPU: makers publish no GEMM rate)."""
    row = table().get(device)
    if row is None:
        return None
    flops = {dtype: float(tflops) * 1e12 for dtype, tflops in row["tflops"].items()}
    return Peaks(device, flops, float(row["gb_s"]) * 1e9, row["source"])


def peak_flops(device: str, dtype: str) -> float:
    """Datasheet FLOP/s, for a planner's ``--device`` and ``--dtype``.

    Raises:
        UserError: the table has no such device or no such dtype for it; the nearest is named.
    """
    peaks = peaks_for(device)
    if peaks is None:
        raise UserError(f"device '{device}': not in the peak table{nearest(device, table())}")
    if dtype not in peaks.flops_per_second:
        raise UserError(f"device '{device}': no {dtype} peak{nearest(dtype, peaks.flops_per_second)}")
    return peaks.flops_per_second[dtype]


def table() -> dict[str, Any]:
    """The whole table as it stands in the file."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
