"""What the compiler says of itself while it runs: private hooks of torch 2.11 to 2.13, and nothing is left of them after.

One :class:`Events` collects: records of the structured trace (breaks, guards, reasons), compilation metrics, warnings,
each graph's calls and seconds, and the values a failed guard saw.
"""

from __future__ import annotations

from ridgeline.compiler.internals import check_version

_VERSION = check_version("the doctor")
