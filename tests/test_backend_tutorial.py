"""docs/backend-in-thirty-lines.md says what happens: its code blocks run, in order, in one process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[1] / "docs/backend-in-thirty-lines.md"


def test_the_blocks_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    torch.manual_seed(0)
    torch._dynamo.reset()
    names: dict[str, object] = {"__name__": "tutorial"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{DOCUMENT.name} block {number + 1}", "exec"), names)
    toy_lines = "\n".join(blocks[1:3]).splitlines()
    assert "ridgeline" not in "\n".join(blocks)
    assert sum(1 for line in toy_lines if line and not line.startswith("assert")) <= 30
