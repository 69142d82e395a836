"""Ahead-of-time compilation by Inductor, and loading what it made without a compiler.

Private names used (read in torch 2.11 to 2.13): ``torch._inductor.aoti_compile_and_package``,
``torch._C._aoti.AOTIModelPackageLoader``, ``cpu_vec_isa.pick_vec_isa``. The public loader is not used: it imports the
whole of ``torch.export``, and then asks the C++ compiler, in many test compilations, what the CPU can do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ridgeline.compiler.internals import check_version


def compile_program(program: Any, file: Path) -> None:
    """Compile an exported program to a ``.pt2`` package with its weights inside."""
    check_version("`compile package`")
    import torch._inductor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its trees
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def load_program(file: Path) -> Callable[..., Any]:
    """The compiled model of a ``.pt2`` package: takes and returns what the model did, under no_grad.

    Raises:
        RuntimeError: the file is damaged, or made by a torch whose packages this one cannot read.
    """
    check_version("a compiled package")
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
    takes, gives = (pytree.treespec_loads(text) for text in loader.get_call_spec())

    def run(*args: Any, **kwargs: Any) -> Any:
        values, spec = pytree.tree_flatten((args, kwargs))
        if spec != takes:
            raise ValueError(f"the package takes {takes}, was given {spec}")
        outputs = loader.boxed_run([one for one in values if isinstance(one, torch.Tensor)])
        return pytree.tree_unflatten(outputs, gives)

    return run


def instruction_flags() -> list[str]:
    """What Inductor compiles vector code for on this CPU, as compiler flags without ``-m``: ``avx512f``, ``fma``.

    Asks the C++ compiler, which takes seconds the first time.
    """
    from torch._inductor import cpu_vec_isa

    isa = cpu_vec_isa.pick_vec_isa()
    flags = isa.build_arch_flags() if isa else ""
    return sorted({flag.removeprefix("-m") for flag in flags.split() if flag.startswith("-m")})
