"""What every column of every table means, gathered from the analyses; ``docs/profiling.md`` prints it.

python -m ridgeline.profiling.columns          (the tables in Markdown)
"""

from __future__ import annotations

import importlib

ANALYSES = (
    "temporal",
    "kernels",
    "launches",
    "roles",
    "idle",
    "counters",
    "collectives",
    "bandwidth",
    "matching",
    "ranks",
    "calltree",
    "critical_path",
    "whatif",
    "roofline",
    "sequences",
    "memory",
    "snapshot",
    "dataflow",
    "flow_findings",
    "antipatterns",
    "diff",
)


def columns() -> dict[str, dict[str, str]]:
    """Table -> column -> ``unit: definition``. Tables of several ranks have ``rank`` in front."""
    out: dict[str, dict[str, str]] = {}
    for name in ANALYSES:
        found = getattr(importlib.import_module(f"ridgeline.profiling.analyses.{name}"), "COLUMNS", {})
        nested = all(isinstance(value, dict) for value in found.values())
        out |= found if nested else {name: found}
    return out


def markdown() -> str:
    """The definitions as Markdown tables."""
    parts = []
    for table, defined in columns().items():
        rows = [f"| `{name}` | {text.replace('|', '/')} |" for name, text in defined.items()]
        parts.append("\n".join([f"### `{table}`", "", "| column | unit: definition |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
