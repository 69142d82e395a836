"""Reports: self-contained HTML pages from runs. Figures are read, never computed, here."""

from ridgeline.report.build import write_report

__all__ = ["write_report"]
