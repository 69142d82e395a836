"""The partitioner: no cycles, equal results, what crosses and why not; OpenVINO where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter

from ridgeline.compiler.backend import partition
from ridgeline.errors import JobError, UserError

aten = torch.ops.aten
with_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


class Engine:
    """Runs what it is given node by node; refuses the operators named."""

    def __init__(self, *refused: str) -> None:
        self.name, self.refused, self.parts = "walker", refused, []

    def refuses(self, node):
        return "not today" if any(name in str(node.target) for name in self.refused) else None

    def compile(self, part, examples):
        self.parts.append([str(node.target) for node in part.graph.nodes if node.op == "call_function"])
        return lambda *inputs: Interpreter(part).run(*inputs)


@pytest.fixture(autouse=True)
def inductor_is_not_needed(monkeypatch):
    """The other side runs node by node too, but in the tests that say otherwise: Inductor takes seconds."""
    monkeypatch.setattr(partition.graphs, "standalone", lambda part, examples: lambda *a: Interpreter(part).run(*a))
    torch._dynamo.reset()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    first = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU())
    return nn.Sequential(*first, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Sigmoid())


@st.composite
def random_graphs(draw):
    """(a graph of additions and multiplications over three inputs, which of its nodes the engine refuses)."""
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(3)]
    refused = []
    for _ in range(draw(st.integers(1, 25))):
        target = draw(st.sampled_from([aten.add.Tensor, aten.mul.Tensor]))
        pair = tuple(nodes[draw(st.integers(0, len(nodes) - 1))] for _ in range(2))
        nodes.append(graph.call_function(target, pair))
        if draw(st.booleans()):
            refused.append(nodes[-1].name)
    graph.output(tuple(nodes[draw(st.integers(3, len(nodes) - 1))] for _ in range(2)))
    graph.eliminate_dead_code()
    return GraphModule({}, graph), refused


@settings(max_examples=300, deadline=None)
@given(random_graphs(), st.integers(1, 4))
def test_parts_form_no_cycle_and_compute_the_same(made, minimum):
    graph, refused = made

    class Named(Engine):
        def refuses(self, node):
            return "named" if node.name in refused else None

    engine = Named()
    places, refusals = partition.assign(graph, engine, minimum)
    for node, place in places.items():
        assert (place[1] == "inductor") == (node in refusals)
        for source in node.all_input_nodes:
            if source in places and places[source] != place:
                assert places[source][0] < place[0]
    inputs = [torch.randn(3) for _ in range(3)]
    expected = graph(*inputs)
    got = partition.compile_parts(graph, engine)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_both_sides_run_and_agree_in_inference():
    model, x, engine = small_model(), torch.randn(5, 8), Engine("tanh", "erf", "gelu")
    with torch.no_grad():
        got = torch.compile(model, backend="ridgeline", options={"engine": engine})(x)
        assert torch.allclose(got, model(x), rtol=1e-5)
    assert len(engine.parts) >= 2
    assert not any("gelu" in name or "tanh" in name for part in engine.parts for name in part)


def test_training_is_partitioned_forward_and_backward():
    model, x, engine = small_model(), torch.randn(5, 8), Engine("tanh")
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    out = torch.compile(model, backend="ridgeline", options={"engine": engine})(x)
    forward_parts = len(engine.parts)
    got = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    assert 0 < forward_parts < len(engine.parts)
    for a, b in zip(expected, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_several_results_stay_with_their_operator():
    def model(x):
        a, b, c = torch.split(x, 2, -1)
        return (a * b + c).sin() + torch.var_mean(x, -1, keepdim=True)[0]

    x, engine = torch.randn(4, 6), Engine("sin")
    with torch.no_grad():
        got = torch.compile(model, backend="ridgeline", options={"engine": engine})(x)
    assert torch.allclose(got, model(x))


def test_dry_run_says_what_goes_where_what_crosses_and_why_not():
    report = partition.dry_run(small_model(), torch.randn(5, 8), engine=Engine("gelu", "tanh"))
    (parts,) = report.graphs
    assert [part.side for part in parts] == ["walker", "inductor", "walker", "inductor"]
    assert report.refused["not today"] == {"aten.gelu.default": 1, "aten.tanh.default": 1}
    # after the tanh there are two operators left, which stay with it
    alone = report.refused["alone in a part of fewer than 3 operators"]
    assert alone["aten.addmm.default"] == alone["aten.sigmoid.default"] == 1
    assert parts[1].operators == {"aten.gelu.default": 1}
    assert (parts[1].bytes_in, parts[1].bytes_out) == (5 * 16 * 4, 5 * 16 * 4)
    parameters = 16 * 8 + 8 + 8 * 8 + 8
    assert (parts[2].bytes_in, parts[2].bytes_out) == ((5 * 16 + parameters) * 4, 5 * 8 * 4)
    text = str(report)
    assert "graph 0" in text
    assert "refused by walker: aten.gelu.default x1, aten.tanh.default x1: not today" in text
    assert report.to_dict()["engine"] == "walker"


def test_dry_run_of_training_covers_the_backward():
    report = partition.dry_run(small_model(), torch.randn(5, 8), engine=Engine("gelu"), training=True)
    assert len(report.graphs) == 2


def test_an_engine_that_fails_is_heard():
    class Broken(Engine):
        def compile(self, part, examples):
            raise RuntimeError("no such device\nmore")

    class Late(Engine):
        def compile(self, part, examples):
            def run(*inputs):
                raise RuntimeError("lost the device")

            return run

    with torch.no_grad():
        with pytest.raises(Exception, match="engine 'walker' cannot compile a part: no such device more"):
            torch.compile(small_model(), backend="ridgeline", options={"engine": Broken()})(torch.randn(5, 8))
        with pytest.raises(JobError, match="engine 'walker' failed: lost the device"):
            torch.compile(small_model(), backend="ridgeline", options={"engine": Late()})(torch.randn(5, 8))


def test_unknown_engine():
    with pytest.raises(UserError, match=r"no engine 'openvimo' .did you mean 'openvino'"):
        partition.find_engine("openvimo")


@pytest.mark.slow
def test_the_rest_goes_through_inductor(monkeypatch):
    monkeypatch.undo()
    model, x, engine = small_model(), torch.randn(5, 8), Engine("tanh", "gelu")
    with torch.no_grad():
        got = torch.compile(model, backend="ridgeline", options={"engine": engine})(x)
        assert torch.allclose(got, model(x), rtol=1e-5, atol=1e-6)
    assert engine.parts


@with_openvino
def test_openvino_runs_parts_in_full_precision():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(7, 64)
    exact = model.double()(x.double())
    model.float()
    with torch.no_grad():
        got = torch.compile(model, backend="ridgeline", options={"engine": "openvino"})(x)
        asked = torch.compile(model, backend="ridgeline", options={"engine": "openvino", "precision": "bf16"})(x)
        eager = model(x)
    assert (got - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.norm()
    report = partition.dry_run(model, x)
    assert any(part.side == "openvino" and part.operators.get("aten.addmm.default") for part in report.graphs[0])
    if "avx512_bf16" in torch.__config__.show() or (asked - exact).norm() > 1e-4 * exact.norm():
        assert (asked - exact).norm() > 10 * (got - exact).norm()  # what a silent bf16 would have cost


@with_openvino
def test_openvino_refuses_what_it_cannot_hold():
    report = partition.dry_run(nn.Linear(8, 8).double(), torch.randn(2, 8).double())
    assert any("float64 is not among" in reason for reason in report.refused)
    with pytest.raises(UserError, match=r"no precision 'bf15' .did you mean 'bf16'"):
        partition.find_engine("openvino", precision="bf15")


@pytest.mark.skipif(importlib.util.find_spec("openvino") is not None, reason="OpenVINO is installed")
def test_openvino_absent_is_one_line():
    with pytest.raises(UserError, match="engine 'openvino' is not installed"):
        partition.find_engine("openvino")
