"""Claims that cannot rot: every figure quoted in the docs is a key into ``evidence/*.json``.

An evidence file maps keys to entries::

    "train.vs_trainer": {
      "value": 4.4, "unit": "x", "format": ".1f", "command": "make bench", "commit": "388bd76",
      "device": "...", "versions": {...}, "date": "2026-11-21", "aa_floor": 0.02, "measures": ["src/ridgeline/train"]
    }

A document quotes it as ``4.4<!-- evidence:train.vs_trainer -->``, or holds a block between
``<!-- evidence-table:FILE -->`` and ``<!-- /evidence-table -->`` that ``render`` fills from the ``tables`` of
that file. ``check`` fails when a quoted value differs from its entry, when a key is missing, and when a line of prose
or a table holds a measured figure (a number with a unit of speed, time, rate or a ratio) with no key on it;
evidence older than the code it measured is listed, not failed.

Usage: ``python -m ridgeline.bench evidence check|render [ROOT]``.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ridgeline.runs import environment, write_atomic

DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/*.md")
# Logs of what was tried are dated diaries with their own figures; they quote nothing as the present truth.
DIARIES = ("docs/log.md", "docs/gpu-results.md")

QUOTE = re.compile(r"([-+]?[\d,]*\.?\d+)[^\d<|]{0,24}<!-- evidence:([\w.]+) -->")
CODE = re.compile(r"`[^`]*`")  # inline code shows how a thing is written, it quotes nothing
KEY = re.compile(r"<!-- evidence:([\w.]+) -->")
TABLE = re.compile(r"(<!-- evidence-table:([\w.]+) -->\n)(.*?)(<!-- /evidence-table -->)", re.DOTALL)
MEASURED = re.compile(r"\d\s?(?:tokens?/s|tok/s|MB/s|GB/s|[TG]FLOP/s|%|ms\b|times\b|x\b|×)")
# A limit, a bar or a definition is not a measurement: such lines say so with this mark.
NOT_MEASURED = "<!-- no-evidence: "


def write_evidence(
    file: Path, entries: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Sequence[Sequence[str]]], **common: Any
) -> None:
    """Write an evidence file; every entry gets the commit, date, device and versions it was measured with.

    ``common`` holds what all entries share: ``command``, ``device``, ``measures`` (paths whose change makes the
    evidence old). ``tables`` maps a name to rows of cells, the first row being the header.
    """
    stamp = {
        "commit": _git(file.parent, "rev-parse", "--short", "HEAD") or None,
        "date": datetime.date.today().isoformat(),
        "versions": environment()["versions"],
        **common,
    }
    document = {
        "entries": {key: {**stamp, **entry} for key, entry in entries.items()},
        "tables": {name: [list(row) for row in rows] for name, rows in tables.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(document, indent=1) + "\n")


def load_evidence(root: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[list[str]]]]:
    """All entries by key and all tables by name below ``root/evidence``.

    Raises:
        ValueError: a key or a table stands in two files, or an entry lacks a field.
    """
    entries: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[list[str]]] = {}
    for file in sorted((root / "evidence").glob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        for kind, target in (("entries", entries), ("tables", tables)):
            for key, value in document[kind].items():
                if key in target:
                    raise ValueError(f"{file}: {kind} key '{key}' stands in another file too")
                target[key] = value
        for key, entry in document["entries"].items():
            missing = {"value", "unit", "command", "commit", "device", "versions", "date", "aa_floor"} - set(entry)
            if missing:
                raise ValueError(f"{file}: entry '{key}' lacks {', '.join(sorted(missing))}")
    return entries, tables


def show(entry: Mapping[str, Any]) -> str:
    """The value as the documents print it."""
    return format(entry["value"], entry.get("format", "g"))


def check(root: Path) -> list[str]:
    """Every problem as ``file:line: what``; empty when the documents are true to the evidence."""
    entries, tables = load_evidence(root)
    problems = []
    for document in documents(root):
        text = document.read_text(encoding="utf-8")
        name = document.relative_to(root)
        for found in TABLE.finditer(text):
            if found[2] not in tables:
                problems.append(f"{name}: no evidence table '{found[2]}'")
            elif found[3] != markdown(tables[found[2]]):
                problems.append(f"{name}: table '{found[2]}' is not what the evidence says: run `make evidence`")
        problems += [f"{name}:{number}: {what}" for number, what in _check_lines(text, entries)]
    return problems


def render(root: Path) -> list[Path]:
    """Fill quoted values and tables of all documents from the evidence; the files that changed."""
    entries, tables = load_evidence(root)
    changed = []
    for document in documents(root):
        old = document.read_text(encoding="utf-8")
        new = TABLE.sub(lambda m: m[1] + markdown(tables[m[2]]) + m[4] if m[2] in tables else m[0], old)
        new = QUOTE.sub(lambda m: m[0].replace(m[1], show(entries[m[2]]), 1) if m[2] in entries else m[0], new)
        if new != old:
            write_atomic(document, new)
            changed.append(document)
    return changed


def stale(root: Path) -> list[str]:
    """Evidence whose measured code has changed since: ``key: path changed in COMMIT (n commits later)``."""
    rows = []
    for key, entry in load_evidence(root)[0].items():
        for path in entry.get("measures", []):
            later = _git(root, "rev-list", f"{entry['commit']}..HEAD", "--", path)
            if later:
                rows.append(
                    f"{key} ({entry['date']}): {path} changed {len(later.split())} times since {entry['commit']}"
                )
    return rows


def documents(root: Path) -> Iterator[Path]:
    """The Markdown files that quote figures."""
    for pattern in DOCUMENTS:
        for file in sorted(root.glob(pattern)):
            if str(file.relative_to(root)) not in DIARIES:
                yield file


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _check_lines(text: str, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    fenced = tabled = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        tabled = (tabled or "<!-- evidence-table:" in line) and "<!-- /evidence-table" not in line
        if fenced or tabled:
            continue
        line = CODE.sub("", line)
        for value, key in QUOTE.findall(line):
            if key in entries and value != show(entries[key]):
                yield number, f"says {value}, evidence '{key}' says {show(entries[key])}: run `make evidence`"
        keys = KEY.findall(line)
        for key in keys:
            if key not in entries:
                yield number, f"no evidence for '{key}'"
        if not keys and NOT_MEASURED not in line and MEASURED.search(line):
            yield number, f"a measured figure without evidence: {line.strip()[:80]}"


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: Sequence[str]) -> int:
    """``check`` or ``render`` the documents below a root; the exit code."""
    if not arguments or arguments[0] not in ("check", "render"):
        print("usage: python -m ridgeline.bench evidence check|render [ROOT]", file=sys.stderr)
        return 2
    root = Path(arguments[1] if len(arguments) > 1 else ".").resolve()
    if arguments[0] == "render":
        print("\n".join(f"updated {file}" for file in render(root)) or "nothing to update")
        return 0
    problems = check(root)
    for problem in problems:
        print(problem)
    for row in stale(root):
        print(f"old evidence: {row}")
    print(f"{len(load_evidence(root)[0])} figures in evidence, {len(problems)} problems")
    return 1 if problems else 0
