"""Run the rows of ``acceptance.toml``: each has a command that shows it and an oracle outside us.

::

    [[row]]
    id = 6
    title = "plan params prints Megatron's figure and the instantiated one"
    command = "ridgeline plan params --layers 12 --hidden 768 --seq 1024 --vocab 50257"
    expect = ["124,438,272", "124,439,808"]
    oracle = "Megatron's formula; torch modules counted"

A row works when its command exits 0 and prints every ``expect``. Usage:
``python -m ridgeline.bench acceptance [--count] [FILE]``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ridgeline.errors import UserError

TOTAL = 55  # rows the whole system must show in the end
ROW_SECONDS = 300


@dataclass(frozen=True)
class Row:
    """One acceptance row that is claimed to work."""

    id: int
    title: str
    command: str
    oracle: str
    expect: list[str] = field(default_factory=list)


def load_rows(file: Path) -> list[Row]:
    """Read and validate the rows, in id order.

    Raises:
        UserError: a field is missing or unknown, an id repeats or is out of range.
    """
    rows = []
    for raw in tomllib.loads(file.read_text(encoding="utf-8"))["row"]:
        try:
            rows.append(Row(**raw))
        except TypeError as error:
            raise UserError(f"{file}: row {raw.get('id')}: {error}") from None
    ids = [row.id for row in rows]
    if len(set(ids)) != len(ids) or not all(1 <= i <= TOTAL for i in ids):
        raise UserError(f"{file}: ids must be unique and between 1 and {TOTAL}, got {ids}")
    return sorted(rows, key=lambda row: row.id)


def run_row(row: Row, folder: Path) -> str | None:
    """None when the row works, else why not."""
    # The programs of the environment this module runs in come first: `ridgeline` and `python` are ours.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    try:
        done = subprocess.run(
            row.command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=ROW_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {ROW_SECONDS} s"
    output = done.stdout + done.stderr
    if done.returncode:
        return f"exit code {done.returncode}: {output.strip().splitlines()[-1] if output.strip() else 'no output'}"
    missing = [text for text in row.expect if text not in output]
    return f"output lacks {missing[0]!r}" if missing else None


def main(arguments: Sequence[str]) -> int:
    """Run all rows and print the count; the exit code."""
    count_only = "--count" in arguments
    files = [argument for argument in arguments if not argument.startswith("-")]
    file = Path(files[0] if files else "acceptance.toml").resolve()
    rows = load_rows(file)
    if count_only:
        print(len(rows))
        return 0
    failed = 0
    for row in rows:
        started = time.perf_counter()
        problem = run_row(row, file.parent)
        failed += problem is not None
        verdict = f"FAILED: {problem}" if problem else "works"
        print(f"row {row.id:>2}  {verdict}  ({time.perf_counter() - started:.1f} s)  {row.title}", flush=True)
    print(f"acceptance: {len(rows) - failed} of {TOTAL} rows work ({len(rows)} claimed)")
    return 1 if failed else 0
