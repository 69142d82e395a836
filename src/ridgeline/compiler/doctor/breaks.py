"""The text of a graph break, taken apart: place, code, reason, hints, stack. Pure functions on strings."""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass, field
from pathlib import Path

_PLACE = re.compile(r"^Graph break in user code at (.+):(\d+)$", re.MULTILINE)
_CODE = re.compile(r"/gb/(gb\d+)\.html", re.IGNORECASE)
_REASON = re.compile(r"^Graph Break Reason: (.*?)(?=^User code traceback:|\Z)", re.MULTILINE | re.DOTALL)
_STACK = re.compile(r'^\s*File "(.+?)", line (\d+), in (.+)$', re.MULTILINE)
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_(\d+)(?:_.*)?$")
_SKIPPED = ("Skipping the function and falling back to eager", "results in a skip")
_PREAMBLES = ("Encountered graph break when attempting to trace", "Failed to handle graph break gracefully")


@dataclass
class Break:
    """``code`` is dynamo's registry code such as ``GB0059``, or "". ``skipped``: the whole function runs in eager."""

    file: str = ""
    line: int = 0
    code: str = ""
    title: str = ""
    explanation: str = ""
    hints: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    function: str = ""
    skipped: bool = False
    because: str = ""
    """Why the function had to be skipped: ``graph break in loop``, or ""."""


def parse_break(text: str) -> Break:
    """Take apart the payload of a ``dynamo_graph_break_reason``. An unknown wording gives its first line as title."""
    text = text.split("\nTraceback (most recent call last):\n")[0]
    found = Break(skipped=any(words in text for words in _SKIPPED))
    stack = _STACK.findall(text)
    found.stack = [f"{file}:{line} in {original_name(name)}" for file, line, name in stack]
    place = _PLACE.search(text)
    if place:
        found.file, found.line = place.group(1), int(place.group(2))
    elif stack:
        found.file, found.line = stack[-1][0], int(stack[-1][1])
    if stack:
        found.function = original_name(stack[-1][2])
    reason = _REASON.search(text)
    _read_reason(found, reason.group(1) if reason else text)
    return found


def _read_reason(found: Break, reason: str) -> None:
    """The innermost break is the cause; what dynamo tripped over while handling it says why the function is skipped."""
    cause, _, rest = reason.partition("*** While handling this graph break, another graph break occurred: ***")
    code = _CODE.search(cause)
    found.code = code.group(1).upper() if code else ""
    lines = [line.rstrip() for line in cause.splitlines()]
    body = [line for line in lines if line.strip() and not line.startswith(_PREAMBLES)]
    found.title = body[0].strip() if body else ""
    found.explanation = _paragraph(body, "Explanation:")
    found.hints = [line.strip()[len("Hint:") :].strip() for line in body if line.strip().startswith("Hint:")]
    found.because = next((line.strip() for line in rest.splitlines() if line.strip()), "")


def _paragraph(lines: list[str], label: str) -> str:
    """The text after ``label`` with the lines that continue it, indented deeper."""
    out: list[str] = []
    for line in lines:
        stripped = line.strip()
        if out and (line.startswith("  Hint:") or stripped.startswith("Developer debug context:")):
            break
        if stripped.startswith(label):
            out.append(stripped[len(label) :].strip())
        elif out and line.startswith("    "):
            out.append(stripped)
    return " ".join(out)


def original_name(name: str) -> str:
    """``forward`` of ``torch_dynamo_resume_in_forward_at_12``; other names as they are."""
    while match := _RESUMED.match(name):
        name = match.group(1)
    return name


def resumed_line(name: str) -> int | None:
    """12 of ``torch_dynamo_resume_in_forward_at_12``; None for a function that is not resumed."""
    match = _RESUMED.match(name)
    return int(match.group(2)) if match else None


def code_line(file: str, line: int) -> str:
    """The source line, stripped; "" when it cannot be read."""
    if not file or line < 1 or not Path(file).is_file():
        return ""
    return linecache.getline(file, line).strip()[:200]
