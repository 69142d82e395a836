"""Programs with planted faults: each is found where it was planted; each that can be fixed is fixed, and proven.

Every fix runs in a process of its own, and is held against float64 with gradients. Those without a fix say why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ridgeline.compiler.doctor.candidates import propose
from ridgeline.compiler.doctor.model import Target
from ridgeline.compiler.doctor.search import counts, refusal
from ridgeline.compiler.doctor.workers import Workers

CORPUS = Path(__file__).parent / "doctor_corpus"


@dataclass(frozen=True)
class Planted:
    """What is in a program: a finding of ``kind`` at the line that begins with ``code``; fixes that must be proven (by
    the beginning of their names), or the words of the reason why there is none."""

    kind: str
    code: str
    fixes: tuple[str, ...] = ()
    reason: str = ""
    refused: str = ""
    """A fix that is tried and must be refused, since nothing falls."""


def broken(code: str, *fixes: str, reason: str = "") -> Planted:
    return Planted("graph_break", code, fixes, reason)


KEPT, WHERE, COND = ".item() kept as a tensor", "if tensor to torch.where", "if tensor to torch.cond"
MOVED = "prints moved out of the compiled function"
SCALARS, SHAPES = "capture_scalar_outputs=True", "capture_dynamic_output_shape_ops=True"

PLANTED = {
    "item_scale": broken("peak =", SCALARS, KEPT),
    "item_stored": broken("self.last =", SCALARS),
    "item_returned": broken("return x.square()", SCALARS, ".item() moved out of the compiled function"),
    "float_of_tensor": broken("weight =", SCALARS, KEPT),
    "tolist": broken("numbers =", reason="no rewrite is known"),
    "if_smooth": broken("if h.mean()", WHERE),
    "if_log": broken("if x.min()", COND),
    "if_returns": broken("if x.sum()", WHERE),
    "if_raises": broken("if torch.isnan", reason="no plain assignment"),
    "if_inplace": broken("if x.abs()", reason="in place"),
    "print_module": broken("print(", "reorderable_logging_functions=['builtins.print']"),
    "print_function": broken("print(", MOVED),
    "warn": broken("warnings.warn(", "reorderable_logging_functions=['warnings.warn']", MOVED),
    "log_method": broken("logger.warning(", MOVED),
    "mask_select": broken("chosen =", SHAPES),
    "nonzero": broken("found =", SHAPES),
    "unique": broken("return torch.unique", SHAPES),
    "callee_break": Planted("graph_break", "torch._dynamo.graph_break()", refused="nested_graph_breaks=True"),
    "while_bounded": broken("while i < 3", "loop bounded"),
    "while_unbounded": broken("while x.norm()", reason="no bound"),
    "size_varies": Planted("recompile", "", ("dynamic_sources=L['x']",)),
    "size_one_first": Planted("recompile", "", ("unbacked_sources=L['x']",)),
    "counter": Planted("recompile", "", ("allow_unspec_int_on_nn_module=True",)),
    "global_counter": Planted("recompile", "", ("dynamic_sources=",)),
    "limit_hit": Planted("recompile_limit", "", ("recompile_limit=64",)),
    "dict_length": Planted("recompile", "", reason="how many elements"),
    "grad_mode": Planted("recompile", "", reason="differ between calls"),
    "stride": Planted("recompile", "", reason="the layout decides"),
    "dtype": Planted("recompile", "", reason="the dtype decides"),
    "uncopyable": broken("return h * h.detach()", SCALARS),
    "autograd_grad": broken("(slope,) =", "trace_autograd_ops=True"),
    "backward_inside": Planted("graph_break", "loss.backward()", refused="trace_autograd_ops=True"),
}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with Workers(target_of("clean"), tmp_path_factory.mktemp("trials"), timeout=120) as made:
        yield made


def target_of(name: str) -> Target:
    script = CORPUS / f"{name}.py"
    return Target((sys.executable, script.name), CORPUS, name, script)


def test_every_program_is_planted() -> None:
    assert {path.stem for path in CORPUS.glob("*.py")} == {*PLANTED, "clean"} and len(PLANTED) >= 30


@pytest.mark.parametrize("name", PLANTED)
def test_fault_is_found_and_fixed_or_the_reason_is_named(name: str, workers: Workers, tmp_path: Path) -> None:
    planted, text = PLANTED[name], (CORPUS / f"{name}.py").read_text()
    workers.target, workers.folder = target_of(name), tmp_path
    before = workers.run(prove=True)
    assert before.failure == ""
    found = [one for one in before.observation.findings if one.kind == planted.kind]
    own = [one for one in found if one.file == str(CORPUS / f"{name}.py")]
    assert found and any(one.code.startswith(planted.code) for one in own or found), before.observation.findings
    candidates, reasons = propose(workers.target, before.observation.findings)
    named = {one.fix: one for one in candidates}
    for fix in planted.fixes:
        candidate = next(one for text, one in named.items() if text.startswith(fix))
        after = workers.run(candidate.setting, candidate.sources, prove=True)
        assert refusal(before, after) == "", (fix, after)
        assert sum(counts(after.observation)) < sum(counts(before.observation)) or planted.kind == "recompile_limit"
        assert after.proof["calls"] > 0
        assert after.proof["error"] <= max(2 * after.proof["error_eager"], 2**-23)
    if planted.refused:
        candidate = named[planted.refused]
        after = workers.run(candidate.setting, candidate.sources, prove=True)
        assert refusal(before, after).startswith("nothing falls")
    if planted.reason:
        assert not candidates and any(planted.reason in reason for reason in reasons.values()), (named, reasons)
    assert (CORPUS / f"{name}.py").read_text() == text


def test_program_with_nothing_to_fix_has_nothing_to_try(workers: Workers, tmp_path: Path) -> None:
    workers.target, workers.folder = target_of("clean"), tmp_path
    outcome = workers.run(prove=True)
    assert counts(outcome.observation) == (0, 0, 0) and outcome.failure == "" and outcome.proof["why"] == ""
    assert not any(one.kind in ("graph_break", "recompile") for one in outcome.observation.findings)


def test_a_model_that_cannot_be_copied_is_said(workers: Workers, tmp_path: Path) -> None:
    workers.target, workers.folder = target_of("uncopyable"), tmp_path
    proof = workers.run(prove=True).proof
    assert proof["calls"] > 0 and ["cannot be copied" in note for note in proof["notes"]] == [True]


def test_broken_training_shows_at_least_eight_kinds_of_trouble(workers: Workers, tmp_path: Path) -> None:
    script = CORPUS.parents[1] / "examples" / "broken_training.py"
    workers.target = Target((sys.executable, script.name), script.parent, "broken_training", script)
    workers.folder = tmp_path
    outcome = workers.run()
    found = outcome.observation.findings
    kinds = {(one.kind, one.detail.get("gb") or one.detail.get("what", "")) for one in found}
    assert outcome.failure == "" and len(kinds) >= 8, kinds
    assert {("graph_break", "GB0124"), ("graph_break", "GB0170"), ("recompile", "length")} <= kinds
    assert any(one.kind == "recompile_limit" for one in found)
    candidates, reasons = propose(workers.target, found)
    assert len(candidates) >= 8 and len({one.kind for one in candidates}) == 2 and reasons
