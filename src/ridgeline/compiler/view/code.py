"""Where kernels are defined and called in the source that Inductor generates."""

from __future__ import annotations

import re
from dataclasses import dataclass

HANDLE = "[Provenance debug handles]"
DEFINED = re.compile(r"^(\w+) = async_compile\.\w+\(")
BUFFER = re.compile(r"\bbuf\d+\b")


@dataclass(frozen=True)
class CallSite:
    """A call in lines ``first .. last`` (from 0, both included) of the kernel ``name``, and the buffers it names."""

    name: str
    first: int
    last: int
    buffers: frozenset[str]


def call_sites(code: str) -> list[CallSite]:
    """Every call of a kernel or of a library, in order: the statement below a provenance comment."""
    lines, found = code.splitlines(), []
    for number, line in enumerate(lines):
        if HANDLE not in line:
            continue
        name = line.split(HANDLE, 1)[1].strip().rpartition(":")[0]
        first = last = number + 1
        while last < len(lines) - 1 and lines[last].lstrip().startswith("#"):
            last += 1
        last = _end(lines, last)
        text = "\n".join(lines[first : last + 1])
        found.append(CallSite(name, number, last, frozenset(BUFFER.findall(text))))
    return found


def _end(lines: list[str], first: int) -> int:
    """The last line of the statement that begins in line ``first``: where its brackets are closed."""
    depth = 0
    for number in range(first, len(lines)):
        depth += sum(lines[number].count(one) for one in "([{") - sum(lines[number].count(one) for one in ")]}")
        if depth <= 0:
            return number
    return len(lines) - 1


def definitions(code: str) -> dict[str, tuple[int, int]]:
    """Kernel name to the lines (from 0, both included) of its source."""
    lines, found = code.splitlines(), {}
    for number, line in enumerate(lines):
        defined = DEFINED.match(line)
        if defined:
            last = next((at for at in range(number + 1, len(lines)) if lines[at].startswith("'''")), number)
            found[defined[1]] = (number, last)
    return found
