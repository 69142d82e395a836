"""Calibration: finished runs correct the time model of their device. The factor is always named in a plan.

One file per device in the cache folder keeps, for each run, predicted and measured seconds per step. The factor for a
job is the median ratio of the last runs with the same dtype, process count and compile setting whose predicted step
was within a factor of four of the job's: what slows a toy down (Python, launches) says nothing about a large step. Runs
whose ceilings were measured on a busy machine are not remembered.
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

ALIKE = 4.0  # predicted steps within this factor of one another
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


@dataclass(frozen=True)
class History:
    """Finished runs of one kind on one device, oldest first: ``(run, predicted seconds, measured / predicted)``."""

    runs: tuple[tuple[str, float, float], ...] = ()

    def near(self, predicted: float) -> Calibration | None:
        """The factor for a step predicted to take ``predicted`` seconds, or None when no run was of that size."""
        alike = [run for run in self.runs if 1 / ALIKE <= run[1] / predicted <= ALIKE][-LAST:]
        if not alike:
            return None
        return Calibration(statistics.median(ratio for _, _, ratio in alike), tuple(name for name, _, _ in alike))


def for_job(ceilings: Ceilings, dtype: str, procs: int, compiled: bool, folder: Path | None = None) -> History:
    """What is known of finished runs with this setting on the device of ``ceilings``; empty when nothing is."""
    setting = dict(zip(SETTING, (dtype, procs, compiled), strict=True))
    entries = _entries(_file(ceilings.device, folder))
    alike = [entry for entry in entries if all(entry.get(key) == value for key, value in setting.items())]
    return History(tuple((entry["run"], entry["predicted"], entry["ratio"]) for entry in alike))


def record(run: Run, folder: Path | None = None) -> float | None:
    """Remember a finished run's measured against predicted (uncalibrated) seconds per step; returns their ratio.

    Reads ``prediction.json`` and ``summary.json`` of the run (``step_seconds``, or ``tokens_per_second``). None, and
    nothing is remembered, when the run holds no prediction or no measurement, or its ceilings were measured on a busy
    machine. The same run replaces its own entry.
    """
    prediction, summary = run.load_json("prediction.json") or {}, run.summary
    predicted, measured = prediction.get("step_seconds_uncalibrated"), step_seconds(summary, prediction)
    if not predicted or not measured:
        return None
    inputs = prediction["time"]["inputs"]
    if inputs.get("disturbed"):
        return None
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
        return [entry for entry in entries if entry["ratio"] > 0 and entry["predicted"] > 0 and entry["run"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
