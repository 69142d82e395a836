"""How fast the program answers: ``ridgeline --help`` and ``import ridgeline``, each a fresh process.

python benchmarks/startup.py --out startup.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from ridgeline.bench import interleave

IMPORT = "import time; t = time.perf_counter(); import ridgeline; print(time.perf_counter() - t)"


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    session = interleave({"help": help_seconds, "import": import_seconds}, options.rounds)
    document = {
        name: {"seconds": session.median(name, "seconds"), "aa_floor": session.floor(name, "seconds")}
        for name in ("help", "import")
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def help_seconds() -> dict[str, float]:
    """Wall seconds of ``ridgeline --help``, interpreter start included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ridgeline", "--help"], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - started}


def import_seconds() -> dict[str, float]:
    """Wall seconds of ``import ridgeline`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    return {"seconds": float(done.stdout)}


if __name__ == "__main__":
    main()
