"""Compare a target's eager and compiled answers with float64, and find the operator to blame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ridgeline.compiler.accuracy.blame import Backend, Blame, Judge, find
from ridgeline.compiler.accuracy.measure import Row, rows
from ridgeline.compiler.accuracy.prefix import capture
from ridgeline.compiler.accuracy.reference import answer, reference
from ridgeline.compiler.accuracy.repro import confirm, write_script
from ridgeline.compiler.failures import compiling
from ridgeline.compiler.target import Target, load_place
from ridgeline.errors import JobError, UserError, nearest

Say = Callable[[str], None]


@dataclass
class Accuracy:
    """Errors of every output and gradient; the operator to blame and a script that shows it, if compiled is worse."""

    target: str
    backend: str
    rows: list[Row]
    blame: Blame | None = None
    repro: Path | None = None
    repro_inputs: str = ""
    repro_confirmed: bool = False

    @property
    def worse(self) -> list[Row]:
        """What is more than twice as far from float64 as eager."""
        return [one for one in self.rows if one.worse]

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = {name: sum(one.closer == name for one in self.rows) for name in ("compiled", "eager", "equal")}
        total = f"of {len(self.rows)} tensors"
        split = f"compiled is closer in {counts['compiled']}, eager in {counts['eager']}, {counts['equal']} are equal"
        if self.worse:
            return (
                f"compiled is LESS accurate than eager: more than twice as far in {len(self.worse)} {total} ({split})"
            )
        if counts["compiled"] > counts["eager"]:
            best = max(self.rows, key=lambda one: one.eager / max(one.compiled, 1e-300) if one.eager else 0.0)
            shown = f"{best.name} {best.compiled_largest:.2g} against {best.eager_largest:.2g}"
            return f"compiled is MORE accurate than eager ({split}; largest error of {shown})"
        if counts["eager"] > counts["compiled"]:
            return f"compiled is within twice eager's error in all {len(self.rows)} tensors ({split})"
        return f"compiled is as accurate as eager ({split})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "target": self.target,
            "backend": self.backend,
            "verdict": self.verdict,
            "worse": len(self.worse),
            "tensors": [one.to_dict() for one in self.rows],
            "blame": self.blame.to_dict() if self.blame else None,
            "repro": str(self.repro) if self.repro else None,
            "repro_inputs": self.repro_inputs or None,
            "repro_confirmed": self.repro_confirmed,
        }


def check(
    target: Target, backend: str = "inductor", repro: Path | None = None, say: Say = lambda line: None
) -> Accuracy:
    """Compare, and when compiled is worse find the operator and write a script to ``repro``.

    Raises:
        UserError: the backend is unknown, the model cannot be copied, or the target draws random numbers.
        JobError: the compiler failed.
    """
    compiler = backend_named(backend)
    if target.module is None and any(True for _ in target.leaves()):
        target.require_grad()
    leaves = [one for _, one in target.leaves()]

    def run(call: Callable[..., Any]) -> Any:
        return call(*target.args, **target.kwargs)

    say("eager")
    eager = answer(lambda: run(target.call), leaves)
    _refuse_random(target, eager.outputs, answer(lambda: run(target.call), leaves).outputs)
    say("float64")
    exact = reference(target.call, target.args, target.kwargs)
    say(f"compiling with {backend}")
    with compiling(target.name):
        torch.compiler.reset()
        compiled = torch.compile(target.call, backend=compiler, dynamic=False)
        got = answer(lambda: run(compiled), leaves)
        result = Accuracy(target.name, backend, rows([name for name, _ in target.leaves()], exact, eager, got))
        if not result.worse:
            return result
        judge = Judge(compiler, say)

        def compile_and_run(catch: Callable[..., Any]) -> None:
            again = torch.compile(target.call, backend=catch, dynamic=False)
            answer(lambda: run(again), leaves)

        graphs = capture(compile_and_run)
        result.blame = find(graphs, judge)
        if result.blame is not None and repro is not None:
            _write_repro(result, result.blame, repro, judge)
    return result


def backend_named(name: str) -> Backend:
    """A registered backend by name, or the function that ``module:name`` or ``file.py:name`` is.

    Raises:
        UserError: there is none.
    """
    if ":" not in name:
        known = {*torch.compiler.list_backends(exclude_tags=())}
        if name not in known:
            raise UserError(f"backend '{name}': not registered{nearest(name, known)}")
        return name
    place, _, attribute = name.rpartition(":")
    module = load_place(place, f"backend '{name}'")
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"backend '{name}': no function '{attribute}' in {place}{nearest(attribute, vars(module))}")
    return found  # type: ignore[no-any-return]


def _refuse_random(target: Target, once: list[Tensor], again: list[Tensor]) -> None:
    if not once:
        raise JobError(f"{target.name}: no floating-point output to compare")
    if any(not torch.equal(a, b) and not bool((a.isnan() & b.isnan()).any()) for a, b in zip(once, again, strict=True)):
        hint = "call eval() on the model, or take the random part out"
        raise UserError(f"{target.name}: two eager runs differ, it draws random numbers (dropout?); {hint}")


def _write_repro(result: Accuracy, blame: Blame, file: Path, judge: Judge) -> None:
    place = f" ({Path(blame.file).name}:{blame.line})" if blame.file else ""
    title = f"{blame.operator}{place} is less accurate compiled than eager."
    result.repro, result.repro_inputs = write_script(
        blame.small, result.backend, title, file, lambda part: judge.worst(part) is not None
    )
    judge.say(f"running {file}")
    result.repro_confirmed = confirm(file)
