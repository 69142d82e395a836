"""Eager and compiled against float64: the planted fault is named, its script shows it, and good news is told too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from ridgeline.compiler.accuracy import blame
from ridgeline.compiler.accuracy.check import Accuracy, backend_named, check
from ridgeline.compiler.accuracy.measure import distance, row
from ridgeline.compiler.accuracy.prefix import Captured, capture, first, only, spelled
from ridgeline.compiler.accuracy.reference import answer, reference
from ridgeline.compiler.target import resolve
from ridgeline.errors import UserError

SOURCE = """\
import operator
import torch
import torch.nn.functional as F


def gated(x, w):
    h = x @ w
    a, b = h.chunk(2, -1)
    y = F.silu(a) * b
    z = torch.softmax(y, -1)
    return z.sum(-1), y.cos()


class Dropout(torch.nn.Module):
    def forward(self, x, w):
        return F.dropout(x @ w, 0.5)


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(256).bfloat16())

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


Norm.example_inputs = lambda: (torch.randn(512, 256).bfloat16(),)


def example_inputs():
    return torch.randn(8, 16), torch.randn(16, 32)


def run(gm, change):
    class Changed(torch.fx.Interpreter):
        def run_node(self, node):
            return change(node, self, super().run_node(node))

    return lambda *values: Changed(gm).run(*values)


def rounds_silu(gm, inputs):
    wrong = lambda node, _, out: out.bfloat16().float() if getattr(node.target, "__name__", "") == "silu" else out
    return run(gm, wrong)


class SlantedCos(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * -ctx.saved_tensors[0].sin() * 1.01


def slants_cos(gm, inputs):
    def wrong(node, interpreter, out):
        return SlantedCos.apply(interpreter.env[node.args[0]]) if node.target == "cos" else out

    return run(gm, wrong)


def rounds_products_of_silu(gm, inputs):
    together = any(n.target is operator.mul and any("silu" in str(a) for a in n.args) and
                   any(getattr(m.target, "__name__", "") == "silu" for m in gm.graph.nodes) for n in gm.graph.nodes)
    wrong = lambda node, _, out: out.bfloat16().float() if together and node.target is operator.mul else out
    return run(gm, wrong)


def last_element(gm, inputs):
    def wrong(node, _, out):
        if getattr(node.target, "__name__", "") == "softmax":
            out = out.clone()
            out[-1, 0] += 0.01
        return out

    return run(gm, wrong)
"""


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    path = tmp_path_factory.mktemp("target") / "gate.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("backend", "operator", "line", "company"),
    [
        ("rounds_silu", "torch.nn.functional.silu", 9, []),
        ("slants_cos", "Tensor.cos", 11, []),  # right forward, wrong gradient
        ("rounds_products_of_silu", "operator.mul", 9, ["torch.nn.functional.silu"]),  # right alone, wrong together
        ("last_element", "torch.softmax", 10, []),  # one element of 128
    ],
)
def test_the_planted_fault_is_named_and_its_script_shows_it(ops, tmp_path, backend, operator, line, company):
    script = tmp_path / "repro.py"
    result = check(resolve(f"{ops}:gated"), f"{ops}:{backend}", script)
    found = result.blame
    assert found is not None and found.line == line and found.company == company
    assert found.operator.replace("nn.functional.softmax", "softmax") == operator
    assert found.stage == f"backend {backend}" and result.verdict.startswith("compiled is LESS accurate")
    assert result.repro == script and result.repro_confirmed
    text = script.read_text()
    compile(text, "repro", "exec")
    assert "ridgeline." not in text  # it needs torch alone, and the backend it accuses


def test_a_right_backend_is_not_blamed_and_no_script_is_written(ops, tmp_path):
    result = check(resolve(f"{ops}:gated"), "aot_eager", tmp_path / "repro.py")
    assert result.blame is None and result.worse == [] and not (tmp_path / "repro.py").exists()
    names = [one.name for one in result.rows]
    assert names == ["output 0", "output 1", "gradient of input 0", "gradient of input 1"]
    assert all(one.eager == one.compiled and one.closer == "equal" for one in result.rows)
    assert result.verdict.startswith("compiled is as accurate as eager")


def test_bf16_rmsnorm_by_inductor_is_more_accurate_than_eager_and_it_says_so(ops):
    """Eager rounds every step to bf16; the fused kernel rounds once, and must be closer to float64."""
    found = resolve(f"{ops}:Norm")
    result = check(found)
    output = next(one for one in result.rows if one.name == "output 0")
    assert output.compiled < output.eager and output.closer == "compiled" and not output.worse
    assert result.verdict.startswith("compiled is MORE accurate than eager")
    # Held against the definition in float64, computed here.
    (x,), weight = found.args, found.module.weight.detach()
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    eager = float((found.call(x).detach().double() - exact).norm() / exact.norm())
    assert output.eager == pytest.approx(eager, rel=1e-9)


class Casts(nn.Module):
    """Everything that would throw float64 away: casts, dtypes of results, buffers, factories."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x):
        h = self.linear(x.to(torch.bfloat16).float())
        h = torch.log_softmax(h, -1, dtype=torch.float32) * self.scale.half()
        ones = torch.ones(6, dtype=torch.float32)
        return (h + ones).sum(-1, dtype=torch.float32).type(torch.bfloat16)


def test_the_reference_is_float64_throughout_whatever_the_program_casts():
    torch.manual_seed(0)
    model = Casts()
    x = torch.randn(4, 6)
    got = reference(model, (x,), {})
    weight, bias = model.linear.weight.detach().double(), model.linear.bias.detach().double()
    by_hand = (torch.log_softmax(x.double() @ weight.T + bias, -1) * model.scale.double() + 1).sum(-1)
    assert got.outputs[0].dtype == torch.float64
    assert torch.allclose(got.outputs[0], by_hand, rtol=1e-14, atol=0)
    assert model.linear.weight.dtype == torch.float32  # the model itself is not touched
    assert got.gradients[1].dtype == torch.float64 and got.gradients[1].shape == (6, 6)


def test_gradients_are_those_of_autograd():
    x = torch.randn(5, requires_grad=True)
    got = answer(lambda: (x.sin(), x.exp()), [x])
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randn(5, generator=draw).bfloat16().float() for _ in range(2))
    assert torch.allclose(got.gradients[0], one * x.detach().cos() + two * x.detach().exp())


def test_distances_by_hand():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert distance(torch.tensor([3.0, 4.5]), truth) == (0.1, 0.5)
    assert distance(torch.tensor([0.25]), torch.zeros(1, dtype=torch.float64)) == (0.25, 0.25)
    assert distance(torch.empty(0), torch.empty(0, dtype=torch.float64)) == (0.0, 0.0)
    infinite = torch.tensor([float("inf"), 1.0])
    assert distance(infinite, infinite.double()) == (0.0, 0.0)
    assert distance(torch.tensor([float("nan"), 1.0]), torch.ones(2, dtype=torch.float64))[0] == float("inf")


@pytest.mark.parametrize(
    ("eager", "compiled", "closer", "worse"),
    [
        (1e-2, 1.9e-2, "eager", False),  # within twice
        (1e-2, 2.1e-2, "eager", True),
        (1e-2, 1.05e-2, "equal", False),
        (1e-2, 1e-3, "compiled", False),
    ],
)
def test_worse_is_more_than_twice_as_far_as_eager(eager, compiled, closer, worse):
    truth = torch.ones(1, dtype=torch.float64)
    got = row("t", truth, truth + eager, truth + compiled)
    assert (got.closer, got.worse) == (closer, worse)


def test_less_than_half_an_epsilon_is_the_luck_of_rounding():
    """fp32 has an epsilon of 1.19e-7: twice half of that is no fault even where eager happens to be exact."""
    truth = torch.ones(1, dtype=torch.float64)
    step = torch.finfo(torch.float32).eps
    assert not row("t", truth, torch.ones(1), torch.ones(1) + step).worse
    assert row("t", truth, torch.ones(1), torch.ones(1) + 2 * step).worse


@pytest.fixture(scope="module")
def captured(ops):
    found = resolve(f"{ops}:gated")
    found.require_grad()
    (one,) = capture(lambda backend: torch.compile(found.call, backend=backend)(*found.args))
    return one


def test_parts_of_a_graph_compute_what_the_whole_computes(captured):
    names = [spelled(one) for one in captured.operators]
    assert names[:2] == ["operator.matmul", "Tensor.chunk"] and len(names) == 7  # picking a chunk is no operator
    x, w = (one.detach() for one in captured.inputs)
    a, b = (x @ w).chunk(2, -1)
    y = torch.nn.functional.silu(a) * b
    whole = first(captured, 7)
    assert torch.equal(whole.graph(*whole.inputs)[-1], y.cos())
    three = first(captured, 3)
    assert [
        torch.equal(p, q) for p, q in zip(three.graph(*three.inputs), (b, torch.nn.functional.silu(a)), strict=True)
    ]
    product = only(captured, [captured.operators[3]])
    assert len(product.inputs) == 2 and all(one.requires_grad and one.is_leaf for one in product.inputs)
    assert torch.equal(product.graph(*product.inputs)[0], y)


class Stub(blame.Judge):
    """A compiler that is wrong from a stage on, and cured by eager's roundings or not."""

    def __init__(self, first_bad, cured=False):
        super().__init__("inductor")
        self.first_bad, self.cured = first_bad, cured

    def worst(self, captured, backend=None):
        from torch._inductor import config

        stages = [one[1] for one in blame.STAGES]
        at = len(stages) if backend is None else stages.index(backend)
        if backend is None and config.emulate_precision_casts:
            return None if self.cured else "bad"
        return "bad" if at >= self.first_bad else None


@pytest.mark.parametrize(
    ("bad", "cured", "stage"),
    [
        (0, False, "Dynamo's graph"),
        (2, False, "the decompositions"),
        (3, False, "Inductor's loops, unfused"),
        (4, False, "Inductor's fusion"),
        (4, True, "Inductor's fusion"),
    ],
)
def test_the_stage_named_is_the_first_that_fails(bad, cured, stage):
    assert blame._stage(Captured(None, []), Stub(bad, cured)) == (stage, cured)


def test_random_targets_unknown_backends_and_models_that_cannot_be_copied_are_one_line(ops):
    with pytest.raises(UserError, match="draws random numbers"):
        check(resolve(f"{ops}:Dropout"), "eager")
    with pytest.raises(UserError, match="did you mean 'inductor'"):
        backend_named("inducto")
    with pytest.raises(UserError, match=r"no function 'rounds_sil'.*did you mean 'rounds_silu'"):
        backend_named(f"{ops}:rounds_sil")
    model = nn.Linear(2, 2)
    model.lock = __import__("threading").Lock()
    with pytest.raises(UserError, match="cannot be copied"):
        reference(model, (torch.ones(2),), {})


def test_verdicts_count_who_is_closer():
    def rows(*pairs):
        truth = torch.ones(1, dtype=torch.float64)
        return [row(f"t{at}", truth, truth + a, truth + b) for at, (a, b) in enumerate(pairs)]

    assert "within twice" in Accuracy("t", "b", rows((1e-3, 1.5e-3), (1e-3, 1e-3))).verdict
    assert "MORE accurate" in Accuracy("t", "b", rows((1e-3, 1e-4), (1e-3, 1e-3))).verdict
    assert "more than twice as far in 1 of 2" in Accuracy("t", "b", rows((1e-3, 1e-2), (1e-3, 1e-4))).verdict


def test_the_verb_exits_1_with_check_and_its_script_is_a_test_not_a_claim(ops, tmp_path):
    script = tmp_path / "r.py"
    command = [sys.executable, "-m", "ridgeline", "compile", "accuracy", f"{ops}:gated", "--check", "--json"]
    command += ["--backend", f"{ops}:rounds_silu", "--repro", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["blame"]["operator"].endswith("silu") and document["repro_confirmed"] is True
    assert document["worse"] >= 1 and len(document["tensors"]) == 4
    # With a healthy backend the same script finds no fault.
    script.write_text(script.read_text().replace(f"'{ops}:rounds_silu'", "'aot_eager'"))
    healthy = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert healthy.returncode == 0 and "worse" not in healthy.stdout, healthy.stdout + healthy.stderr
