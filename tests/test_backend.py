"""The backend as torch.compile sees it: registration, options, training, frozen weights, the cache, what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ridgeline.compiler.backend import validate, watch
from ridgeline.compiler.internals.graphs import SourceTag
from ridgeline.errors import UserError

EAGER = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        high = x.float()
        return self.weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    """A Llama block as one finds it: projections apart, norms and rotations by hand."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = Norm(dim), Norm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        normed = self.first(x)
        q, k, v = (f(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        normed = self.second(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def test_torch_lists_and_loads_it_without_an_import_of_ours():
    code = (
        "import sys, torch; listed = 'ridgeline' in torch.compiler.list_backends();"
        "before = any(m.startswith('ridgeline') for m in sys.modules);"
        "f = torch.compile(lambda x: x.sin() + 1, backend='ridgeline', options={'inner': 'eager'});"
        "print(listed, before, torch.equal(f(torch.ones(3)), torch.ones(3).sin() + 1), 'ridgeline.compiler.backend' in sys.modules)"
    )
    assert python(code) == "True False True True"


def test_a_second_backend_of_the_name_is_refused():
    torch._dynamo.lookup_backend("ridgeline")
    with pytest.raises(AssertionError, match="ridgeline"):
        torch._dynamo.register_backend(lambda graph, examples: graph.forward, name="ridgeline")


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"freez": True}, None, "no option 'freez' .did you mean 'freeze'"),
        ({"max_autotun": True}, None, "did you mean 'max_autotune'"),
        ({"patterns": "some"}, None, "option 'patterns' is 'pays' .default., 'all', 'none', got 'some'"),
        ({"freeze": "yes"}, None, "option 'freeze' is True"),
        (None, "max-autotun", "no mode 'max-autotun' .did you mean 'max-autotune'"),
    ],
)
def test_options_are_checked(options, mode, message):
    with pytest.raises(UserError, match=message):
        validate(options, mode)
    with pytest.raises(Exception, match="backend 'ridgeline'"):
        torch.compile(torch.sin, backend="ridgeline", options=options, mode=mode)(torch.ones(2))


def test_modes_and_settings_reach_inductor():
    own, settings = validate({"patterns": "all", "epilogue_fusion": False}, "max-autotune-no-cudagraphs")
    assert own["patterns"] == "all"
    assert settings["max_autotune"] is True
    assert settings["epilogue_fusion"] is False


def test_training_equals_eager_and_every_pattern_of_a_block_is_found():
    block, x = Block(), torch.randn(2, 6, 32)
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    with watch() as seen:
        compiled = torch.compile(block, backend="ridgeline", fullgraph=True, options={**EAGER, "patterns": "all"})
        got = torch.autograd.grad(compiled(x).square().sum(), list(block.parameters()))
    names = sorted(one.pattern for one in seen[0] if one.refused is None)
    assert names == ["attention", "rms_norm", "rms_norm", "swiglu"]
    for a, b in zip(expected, got, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_one_graph_under_changing_batch_sizes_training_and_inference():
    block = Block()
    with watch() as seen:
        compiled = torch.compile(block, backend="ridgeline", dynamic=True, fullgraph=True, options=EAGER)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 6, 32)
            assert torch.allclose(compiled(x), block(x), rtol=1e-4, atol=1e-5)
        assert len(seen) == 1
        with torch.no_grad():
            for batch in (2, 3, 5):
                x = torch.randn(batch, 6, 32)
                assert torch.allclose(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


def frozen(model: nn.Module, x: torch.Tensor, **options):
    with torch.no_grad(), watch() as seen:
        compiled = torch.compile(model, backend="ridgeline", fullgraph=True, options={**EAGER, **options})
        compiled(x)
    return compiled, [one.pattern for one in seen[0] if one.refused is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_are_packed_and_merged_in_inference_and_as_exact_as_eager(dtype):
    block, x = Block().to(dtype), torch.randn(1, 1, 32).to(dtype)
    compiled, names = frozen(block, x)
    if dtype is torch.bfloat16 and not names:
        pytest.skip("this CPU has no bf16 in oneDNN")
    assert sorted(names) == ["2 linears merged", "3 linears merged", "packed linear", "packed linear"]
    with torch.no_grad():
        got, eager = compiled(x), block(x)
        exact = Block()
        exact.load_state_dict(block.state_dict())
        true = exact.double()(x.double())
    assert (got.double() - true).norm() <= 2 * (eager.double() - true).norm()


def test_weights_changed_in_place_are_packed_again():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    compiled, names = frozen(model, x)
    assert names == ["packed linear", "packed linear"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
        model[0].load_state_dict(nn.Linear(8, 8).state_dict())
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
        model[1].weight = nn.Parameter(torch.randn(8, 8))
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_packed_weights_die_with_their_model():
    from ridgeline.compiler.backend import operators

    model, x = nn.Linear(8, 8), torch.randn(3, 8)
    before = len(operators._packs._packed)
    names = frozen(model, x)[1]
    assert names == ["packed linear"]
    assert len(operators._packs._packed) == before + 1
    del model
    torch._dynamo.reset()
    import gc

    gc.collect()
    assert len(operators._packs._packed) == before


def test_a_conv1d_of_gpt2_is_packed_too():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 12)

    model, x = Conv1D(), torch.randn(2, 3, 8)
    compiled, names = frozen(model, x)
    assert names == ["packed linear"]
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("case", ["training", "asked not to", "no parameter", "float64", "weight is a sum"])
def test_what_is_not_frozen(case):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("buffer", torch.randn(8, 8))

        def forward(self, x):
            weight = {"no parameter": self.buffer, "weight is a sum": self.weight + 1}.get(case, self.weight)
            return F.linear(x, weight)

    dtype = torch.float64 if case == "float64" else torch.float32
    model, x = Model().to(dtype), torch.randn(3, 8, dtype=dtype)
    with torch.set_grad_enabled(case == "training"), watch() as seen:
        options = {**EAGER, "freeze": case != "asked not to"}
        got = torch.compile(model, backend="ridgeline", options=options)(x)
    assert seen == [[]]
    assert torch.allclose(got, model(x))


def test_an_input_changed_between_two_linears_is_not_merged():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            first = self.a(x)
            x.add_(1.0)
            return first + self.b(x)

    model, x = Model(), torch.randn(3, 8)
    compiled, names = frozen(model, x.clone())
    assert names == ["packed linear", "packed linear"]
    with torch.no_grad():
        assert torch.allclose(compiled(x.clone()), model(x.clone()), atol=1e-6)


def test_a_graph_within_the_graph_is_left_alone_and_said_so():
    from torch.utils.checkpoint import checkpoint

    block, x = Block(), torch.randn(2, 6, 32, requires_grad=True)
    with watch() as seen:
        got = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="ridgeline", options=EAGER)(x)
    assert "is a graph within the graph" in seen[0][0].refused
    assert torch.allclose(got, block(x), rtol=1e-4, atol=1e-5)


def test_switches_of_autograd_and_autocast_inside_are_kept():
    lin = nn.Linear(8, 8)

    def function(x):
        with torch.no_grad():
            still = lin(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = lin(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * lin.bias + still, low

    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(function, backend="ridgeline", fullgraph=True, options={**EAGER, "patterns": "all"})
    with watch() as seen:
        out, low = compiled(x)
    assert [one.pattern for one in seen[0]] == ["rms_norm"]
    expected, expected_low = function(x)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, expected_low)
    (got,) = torch.autograd.grad(out.sum() + low.sum(), x)
    (true,) = torch.autograd.grad(expected.sum() + expected_low.sum(), x)
    assert torch.allclose(got, true, rtol=1e-4, atol=1e-5)


def test_random_numbers_are_drawn_as_before():
    def function(x):
        return F.dropout(x, 0.5, training=True)

    compiled = torch.compile(function, backend="ridgeline", options=EAGER)
    x = torch.ones(64)
    compiled(x)
    torch.manual_seed(7)
    got = compiled(x)
    torch.manual_seed(7)
    assert torch.equal(got, function(x))


def test_the_tag_follows_the_source(tmp_path: Path):
    (tmp_path / "one.py").write_text("x = 1\n")
    first = SourceTag(tmp_path).uuid()
    assert SourceTag(tmp_path).uuid() == first
    (tmp_path / "one.py").write_text("x = 2\n")
    assert SourceTag(tmp_path).uuid() != first


CACHED = """
import json, sys, torch
from torch._dynamo.utils import counters
from ridgeline.compiler import backend
from ridgeline.compiler.internals import graphs
if sys.argv[1:] == ["changed"]:
    graphs.SourceTag.uuid = lambda self: "another source"
class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.out = torch.nn.Parameter(torch.ones(8)), torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.out(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight)
torch.manual_seed(0)
model, x = Norm(), torch.randn(4, 8)
with torch.no_grad(), backend.watch() as seen:
    out = torch.compile(model, backend="ridgeline", options={"patterns": "all"})(x)
    assert torch.allclose(out, model(x), atol=1e-5)
names = [one.pattern for one in seen[0] if one.refused is None]
found = counters["inductor"], counters["aot_autograd"]
print(json.dumps([names, found[0]["fxgraph_cache_hit"] + found[1]["autograd_cache_hit"], found[0]["fxgraph_cache_miss"]]))
"""


@pytest.mark.slow
def test_the_cache_survives_restarts_and_not_a_change_of_our_source(tmp_path: Path):
    script = tmp_path / "cached.py"
    script.write_text(CACHED)

    def run(*arguments: str) -> list:
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    names, hits, misses = run()
    assert sorted(names) == ["packed linear", "rms_norm"]
    assert (hits, misses) == (0, 1)
    _, hits, misses = run()
    assert hits >= 1  # a hit of AOTAutograd's cache looks its graph up in the other one
    assert misses == 0
    _, hits, misses = run("changed")
    assert (hits, misses) == (0, 1)


def test_torch_of_another_release_is_one_line(monkeypatch):
    from ridgeline.compiler import internals

    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(UserError, match=r"backend 'ridgeline' needs torch 2\.11 to 2\.13, this is 2\.9\.1"):
        internals.check_version("the backend 'ridgeline'")
