"""What a kernel could cost at best on a named device: bytes over bandwidth or FLOPs over peak, whichever is longer.

The roofline of Williams, Waterman and Patterson (2009): with intensity ``I = FLOPs / bytes``, a kernel is bound by
memory below the ridge ``peak / bandwidth`` and by arithmetic above it. The floor is a prediction for the kernels that
were fused *here*; another device's compiler fuses otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.errors import UserError, nearest
from ridgeline.hardware import peaks

# Short names that mean one row of the datasheet table: the module with the fastest link of its kind.
SHORT_NAMES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "L4": "NVIDIA L4",
    "L40S": "NVIDIA L40S",
}


@dataclass(frozen=True)
class Device:
    """A device's limits: FLOP/s of matrix products by dtype, FLOP/s of everything else, bytes/s of memory."""

    name: str
    source: str  # "measured here on ..." or the datasheet
    flops_per_second: dict[str, float]
    bytes_per_second: float

    def peak(self, dtype: str, matmul: bool) -> float | None:
        """FLOP/s that applies: of the operands' dtype for a matrix product, of fp32 otherwise."""
        return self.flops_per_second.get(dtype if matmul else "fp32")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bound:
    """``intensity`` in FLOP/byte (None: FLOPs unknown), ``by`` "memory", "compute" or "unknown", least time."""

    intensity: float | None
    by: str
    floor_seconds: float | None


def bound(bytes_moved: int, flops: int | None, dtype: str, matmul: bool, device: Device) -> Bound:
    """The roofline of one kernel. With unknown FLOPs only the memory's floor is known, and nothing says what binds."""
    memory = bytes_moved / device.bytes_per_second
    peak = device.peak(dtype, matmul)
    if flops is None:
        return Bound(None, "unknown", memory or None)
    intensity = flops / bytes_moved if bytes_moved else None
    if peak is None:
        return Bound(intensity, "unknown", memory or None)
    arithmetic = flops / peak
    return Bound(intensity, "memory" if memory >= arithmetic else "compute", max(memory, arithmetic))


def device_named(name: str | None, progress: Callable[[str, float], None] | None = None) -> Device:
    """A datasheet row by its exact or short name; None is this machine, as `ridgeline env` has measured it.

    Raises:
        UserError: no such row.
        JobError: this machine could not be measured.
    """
    if name is None:
        from ridgeline.hardware import ceilings

        return device_from_ceilings(ceilings(quick=True, progress=progress))
    row = peaks.peaks_for(SHORT_NAMES.get(name.upper(), name))
    if row is None:
        raise UserError(f"device '{name}': not in the peak table{nearest(name, [*SHORT_NAMES, *peaks.table()])}")
    return Device(row.device, row.source, row.flops_per_second, row.bytes_per_second)


def device_from_ceilings(found: Any) -> Device:
    """This machine: the best rates that `hardware` has measured."""
    rates: Mapping[str, float] = found.gemm_flops_per_second
    memory = max(filter(None, (found.read_bytes_per_second, found.copy_bytes_per_second)), default=None)
    if memory is None:
        raise UserError(f"device '{found.device}': its memory bandwidth was not measured; name one with --device")
    return Device(found.device, f"measured here on {found.measured_at[:10]}", dict(rates), memory)
