"""Private torch APIs of the compiler room stand in one package, behind a version check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ridgeline.compiler.internals import parse_version, require_torch
from ridgeline.errors import UserError

COMPILER = {"_dynamo", "_inductor", "_functorch", "_guards", "_subclasses", "_decomp", "_C"}
ROOM = Path(__file__).parents[1] / "src" / "ridgeline" / "compiler"


def private_names(path: Path) -> set[str]:
    """Imports of, and attribute chains into, the compiler's private modules of torch."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [one.name for one in node.names if one.name.startswith("torch.")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names = [ast.unparse(node)]
        else:
            continue
        found |= {name for name in names if name.split(".")[1] in COMPILER}
    return found


def test_private_names_of_torch_stand_in_internals_alone() -> None:
    files = [path for path in ROOM.rglob("*.py") if "internals" not in path.parts]
    assert len(files) > 40
    assert {str(path.relative_to(ROOM)): names for path in files if (names := private_names(path))} == {}
    assert any(private_names(path) for path in (ROOM / "internals").glob("*.py"))


@pytest.mark.parametrize("version", ["2.10.0", "2.14.0+cpu", "3.0", "unknown"])
def test_another_torch_is_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UserError, match=r"needs torch 2\.11 to 2\.13") as refused:
        require_torch((2, 11), (2, 13), "the doctor")
    assert version in str(refused.value) and "\n" not in str(refused.value)
    assert parse_version("2.13.0+cpu") == (2, 13)
