"""``python -m ridgeline.bench evidence check|render [ROOT]`` and ``python -m ridgeline.bench acceptance [FILE]``."""

from __future__ import annotations

import sys

from ridgeline.bench import acceptance, evidence

TOOLS = {"evidence": evidence.main, "acceptance": acceptance.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TOOLS:
        print(f"usage: python -m ridgeline.bench {'|'.join(TOOLS)} ...", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(TOOLS[sys.argv[1]](sys.argv[2:]))
