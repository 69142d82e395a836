"""Seconds from starting a process to the demo model's first output: torch.compile, and a package of `compile package`.

python benchmarks/cold_start.py --rounds 3 --out cold_start.json

    compile, cold      torch.compile with an empty cache folder (a new machine)
    compile, warm      torch.compile, the cache folder of an earlier process
    restored, cold     `ridgeline compile restore` of a package into an empty cache folder, then torch.compile
    package, cold      the package's program, empty cache folder: nothing is compiled
    eager              no compiler at all, for scale

Every sample is a fresh process; rounds alternate. The package is made once, before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import options
from ridgeline.bench import interleave

BATCH, SEQ_LEN = 2, 64
MODEL = """
import json, sys, time
import torch
from ridgeline.compiler.target import resolve
target = resolve("demo", batch={batch}, seq_len={seq_len})
call = target.module
"""
COMPILED = MODEL + "call = torch.compile(target.module, dynamic=False)\n"
RESTORED = "from ridgeline.compiler.package.load import restore\nrestore({package!r})\n" + COMPILED
PACKAGED = """
import json, sys, time
import torch
from ridgeline.compiler.package.load import load
class target:
    torch.manual_seed(0)
    args = (torch.randint(0, 8192, ({batch}, {seq_len})),)
call = load({package!r})
"""
FIRST_OUTPUT = """
with torch.no_grad():
    call(*target.args)
print(json.dumps({"seconds": time.time() - float(sys.argv[1])}))
"""


def main() -> None:
    """Measure, print, keep."""
    chosen = options.parser(__doc__, rounds=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(Path(folder), chosen.rounds)
    options.leave(document, chosen.out)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Make the package, run every contender ``rounds`` times; medians, floors and ratios."""
    package = folder / "package"
    started = time.perf_counter()
    make_package(package)
    built = time.perf_counter() - started
    contenders: dict[str, Callable[[], dict[str, float]]] = {
        "eager": lambda: first_output(MODEL, package, folder / "empty"),
        "compile, cold": lambda: first_output(COMPILED, package, folder / "cold", afresh=True),
        "compile, warm": lambda: first_output(COMPILED, package, folder / "warm"),
        "restored, cold": lambda: first_output(RESTORED, package, folder / "restored", afresh=True),
        "package, cold": lambda: first_output(PACKAGED, package, folder / "packaged", afresh=True),
    }
    first_output(COMPILED, package, folder / "warm")  # the earlier process
    session = interleave(contenders, rounds, lambda at, name, found: print(at, name, found, file=sys.stderr))
    seconds = {name: session.median(name, "seconds") for name in contenders if name not in session.failures}
    cold = seconds["compile, cold"]
    return {
        "rows": {
            name: {"seconds": value, "aa_floor": session.floor(name, "seconds")} for name, value in seconds.items()
        },
        "package_seconds": built,
        "package_bytes": sum(file.stat().st_size for file in package.iterdir()),
        "cold_ratio": seconds["package, cold"] / cold,
        "warm_ratio": seconds["restored, cold"] / cold,
        "failures": session.failures,
        "batch": BATCH,
        "seq_len": SEQ_LEN,
    }


def make_package(package: Path) -> None:
    """`ridgeline compile package demo PACKAGE`."""
    command = [sys.executable, "-m", "ridgeline", "compile", "package", "demo", str(package)]
    command += ["--batch", str(BATCH), "--seq-len", str(SEQ_LEN)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def first_output(script: str, package: Path, cache: Path, afresh: bool = False) -> dict[str, float]:
    """Seconds from starting a process to its first output, interpreter and imports included."""
    if afresh:
        shutil.rmtree(cache, ignore_errors=True)
    text = script.format(batch=BATCH, seq_len=SEQ_LEN, package=str(package)) + FIRST_OUTPUT
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", text, str(time.time())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["failed without a message"])[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
