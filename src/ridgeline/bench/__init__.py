"""Measuring honestly: interleaved sessions, evidence behind every quoted figure, acceptance rows."""

from ridgeline.bench.ab import Session, interleave
from ridgeline.bench.evidence import write_evidence

__all__ = ["Session", "interleave", "write_evidence"]
