"""What the doctor is asked to run: ``train.py --lr 1``, ``package.module:function``, ``torchrun train.py``."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ridgeline.compiler.doctor.model import Target
from ridgeline.errors import UserError, nearest

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "mpirun", "srun")


def resolve_target(arguments: Sequence[str], compile_paths: Sequence[str] = ()) -> Target:
    """The program that the words of a command line name; it starts in the current folder.

    Raises:
        UserError: no words, no such script, no such program, or a path to compile that is none.
    """
    if not arguments:
        raise UserError("nothing to run: give SCRIPT [ARGUMENTS], module:function, or a command after --")
    folder = Path.cwd()
    paths = tuple(_checked(one) for one in compile_paths)
    first, *rest = arguments
    if first.endswith(".py"):
        script = _script(first, folder)
        return Target((sys.executable, first, *rest), folder, script.stem, script, compile_paths=paths)
    if _CALLABLE.match(first) and not (folder / first).exists():
        command = (sys.executable, "-m", "ridgeline.compiler.doctor.call", first, *rest)
        return Target(command, folder, first.partition(":")[2], callable=first, compile_paths=paths)
    return _command(first, rest, folder, paths)


def _command(first: str, rest: Sequence[str], folder: Path, paths: tuple[str, ...]) -> Target:
    if shutil.which(first) is None:
        raise UserError(f"'{first}' is no script (.py), no module:function and no program on PATH")
    named = next((one for one in rest if one.endswith(".py")), None)
    script = _script(named, folder) if named else None
    name = script.stem if script else Path(first).name
    distributed = Path(first).name in LAUNCHERS or any("torch.distributed" in one for one in rest)
    return Target((first, *rest), folder, name, script, compile_paths=paths, distributed=distributed)


def _script(name: str, folder: Path) -> Path:
    script = folder / name
    if not script.is_file():
        what = "is a folder" if script.is_dir() else "no such script"
        others = [one.name for one in script.parent.glob("*.py")] if script.parent.is_dir() else []
        raise UserError(f"{name}: {what}{nearest(Path(name).name, others) if others else ''}")
    return script


def _checked(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.(\w+|\*))*", path):
        raise UserError(f"--compile {path}: not a dotted path such as model or model.layers.*")
    return path
