"""Predicted beside measured, one row each."""

from __future__ import annotations

from typing import Any

from ridgeline.plan.calibration import step_seconds


def compare(prediction: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows ``{name, unit, predicted, measured, ratio}``; ratio = predicted / measured, None when either is missing.

    ``prediction`` is :meth:`Plan.to_dict`; ``measured`` a train run's summary (``step_seconds`` or
    ``tokens_per_second``, ``parameters``, ``peak_memory_bytes``, ``mfu``).
    """
    return [
        _row("parameters", "", prediction.get("parameters"), measured.get("parameters")),
        _row("step seconds", "seconds", prediction.get("step_seconds"), step_seconds(measured, prediction)),
        _row("tokens per second", "", prediction.get("tokens_per_second"), measured.get("tokens_per_second")),
        _row("peak bytes per rank", "bytes", prediction.get("peak_bytes"), measured.get("peak_memory_bytes")),
        _row("MFU", "", prediction.get("mfu"), measured.get("mfu")),
    ]


def _row(name: str, unit: str, predicted: float | None, measured: float | None) -> dict[str, Any]:
    ratio = predicted / measured if predicted is not None and measured else None
    return {"name": name, "unit": unit, "predicted": predicted, "measured": measured, "ratio": ratio}
