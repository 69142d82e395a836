"""Calibration: finished runs correct the time model of their device. The factor is always named in a plan.

One file per device in the cache folder keeps, for each run, predicted and measured seconds per step. The factor for a
job is the median ratio of the last runs with the same dtype, process count and compile setting.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.hardware.measured import cache_folder
from ridgeline.runs import write_atomic

if TYPE_CHECKING:
    from ridgeline.hardware import Ceilings
    from ridgeline.runs import Run

LAST = 5  # runs of one kind that count
KEPT = 200  # entries in a file
SETTING = ("dtype", "procs", "compiled")


@dataclass(frozen=True)
class Calibration:
    """``measured / predicted`` seconds per step, the median of ``runs``."""

    factor: float
    runs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def load(device: str, setting: dict[str, Any], folder: Path | None = None) -> Calibration | None:
    """The factor for ``device`` and ``setting`` (``dtype, procs, compiled``), or None when no run of that kind is known."""
    entries = [entry for entry in _entries(_file(device, folder)) if all(entry.get(k) == setting[k] for k in SETTING)]
    last = entries[-LAST:]
    if not last:
        return None
    return Calibration(statistics.median(entry["ratio"] for entry in last), tuple(entry["run"] for entry in last))


def for_job(
    ceilings: Ceilings, dtype: str, procs: int, compiled: bool, folder: Path | None = None
) -> Calibration | None:
    """:func:`load` with the names a plan uses."""
    return load(ceilings.device, {"dtype": dtype, "procs": procs, "compiled": compiled}, folder)


def record(run: Run, folder: Path | None = None) -> float | None:
    """Remember a finished run's measured against predicted (uncalibrated) seconds per step; returns their ratio.

    Reads ``prediction.json`` and ``summary.json`` of the run (``step_seconds``, or ``tokens_per_second``). None, and
    nothing is remembered, when the run holds no prediction or no measurement. The same run replaces its own entry.
    """
    prediction, summary = run.load_json("prediction.json") or {}, run.summary
    predicted, measured = prediction.get("step_seconds_uncalibrated"), step_seconds(summary, prediction)
    if not predicted or not measured:
        return None
    inputs = prediction["time"]["inputs"]
    entry = {
        "run": run.id,
        **{key: inputs[key] for key in SETTING},
        "predicted": predicted,
        "measured": measured,
        "ratio": measured / predicted,
    }
    file = _file(inputs["device"], folder)
    others = [known for known in _entries(file) if known["run"] != run.id]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"device": inputs["device"], "runs": [*others, entry][-KEPT:]}, indent=1) + "\n")
    return float(entry["ratio"])


def step_seconds(measured: dict[str, Any], prediction: dict[str, Any]) -> float | None:
    """Measured seconds per step: as such, or tokens per step over tokens per second."""
    if measured.get("step_seconds"):
        return float(measured["step_seconds"])
    rate, tokens = measured.get("tokens_per_second"), prediction.get("tokens_per_step")
    return float(tokens) / float(rate) if rate and tokens else None


def _file(device: str, folder: Path | None) -> Path:
    return (folder or cache_folder()) / f"calibration-{hashlib.sha256(device.encode()).hexdigest()[:16]}.json"


def _entries(file: Path) -> list[dict[str, Any]]:
    """Entries of a file; a missing or damaged one counts as empty: it is only a memory of runs that still exist."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["runs"]
        return [entry for entry in entries if entry["ratio"] > 0 and entry["run"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
