"""The linked levels of a compilation: known bytes and FLOPs, every line traced to its Python, bounds by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ridgeline.compiler.target import resolve
from ridgeline.compiler.view import code, roofline, source
from ridgeline.compiler.view.collect import collect
from ridgeline.errors import JobError, UserError
from ridgeline.report.compile_page import write_compile_page

H100 = roofline.device_named("H100")
SOURCE = """\
import torch
import torch.nn.functional as F


def norm_gelu_sum(x, weight):
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    y = F.gelu(x * scale * weight)
    return y.sum(-1)


def product(x, weight):
    return helper(x, weight) + 1.0


def helper(x, weight):
    return x[:, :32] @ weight[:32, None].expand(32, 8)


def breaks(x, weight):
    x = x * 2
    print("a break")
    return x + 1


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 8)

    def forward(self, x, weight):
        return self.linear(x)


def make_model():
    return Model()


def nothing(x, weight):
    return 3


def example_inputs():
    return torch.randn(16, 64), torch.ones(64)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    (path / "ops.py").write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def inference(folder):
    return collect(resolve(f"{folder}/ops.py:norm_gelu_sum"), H100)


@pytest.fixture(scope="module")
def training(folder):
    return collect(resolve(f"{folder}/ops.py:norm_gelu_sum"), H100, backward=True)


def pane(view, name):
    return next(one for one in view.panes if one.name == name)


def above(view, entity):
    """Every ancestor of an entity, itself included."""
    seen, todo = set(), [entity]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += view.up[one]
    return seen


def python_lines(view, entity):
    """Text of the Python lines an entity comes from."""
    lines = pane(view, "python")
    found = above(view, entity)
    return [text.split(None, 1)[1] for text, one in zip(lines.lines, lines.of, strict=True) if one in found]


def linked(view, name, contains):
    """Entities of the lines of a pane that hold a text."""
    lines = pane(view, name)
    return [one for text, one in zip(lines.lines, lines.of, strict=True) if contains in text and one >= 0]


def test_rmsnorm_gelu_sum_is_one_kernel_of_known_bytes_and_operations(inference):
    """x is read (16*64*4), the weight (64*4), the sums are written (16*4); nothing else touches memory."""
    (kernel,) = inference.kernels
    assert kernel.bytes_moved == 4096 + 256 + 64
    # Square and its sum; then divide, add eps, rsqrt, times x, times weight, GELU's x*0.5, x*0.707, erf, +1, product,
    # and the sum: 2 + 11 for each of the 1024 elements, as the loops are written.
    assert kernel.flops == 13 * 1024
    assert kernel.intensity == pytest.approx(13 * 1024 / 4416)
    assert kernel.bound == "memory" and kernel.floor_seconds == pytest.approx(4416 / 3350e9)
    assert kernel.bytes_unfused == 4160 + 4480  # the mean square goes to memory and back without fusion
    assert [one["line"] for one in kernel.sources] == [7, 6, 8]  # most operators first
    assert inference.totals()["kernels"] == 1 and inference.graphs == 1


def test_every_line_of_every_pane_leads_to_the_python_line_it_was_made_from(inference):
    (gelu,) = linked(inference, "torch", "gelu")
    assert python_lines(inference, gelu) == ["y = F.gelu(x * scale * weight)"]
    (root,) = linked(inference, "aten", "aten.rsqrt")
    assert python_lines(inference, root) == ["scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)"]
    (total,) = linked(inference, "aten", "aten.sum")
    assert python_lines(inference, total) == ["return y.sum(-1)"]
    (mean_loop,) = set(linked(inference, "loops", "op0:"))
    assert python_lines(inference, mean_loop) == ["scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)"]
    for name in ("fused", "code"):  # one kernel holds all three lines
        assert len(python_lines(inference, max(pane(inference, name).of))) == 3


def test_levels_hold_what_they_are_called(inference):
    assert any("torch._C._nn.gelu" in line for line in pane(inference, "torch").lines)  # not decomposed yet
    assert not any("gelu" in line for line in pane(inference, "aten").lines if "#" not in line)
    assert any("aten.erf" in line for line in pane(inference, "aten").lines)
    assert any("ops.load('arg0_1', 64*p0 + p1)" in line for line in pane(inference, "loops").lines)
    assert any("one kernel of 2" in line for line in pane(inference, "fused").lines)
    generated = pane(inference, "code")
    first = next(at for at, line in enumerate(generated.lines) if "async_compile.cpp_pybinding" in line)
    call = next(
        at for at, line in enumerate(generated.lines) if line.strip().startswith("cpp_fused") and "=" not in line
    )
    assert generated.of[first] >= 0 and generated.of[call] in above(inference, generated.of[first])
    comments = {pane(inference, "aten").lines[at]: entity for at, entity in pane(inference, "aten").comments.items()}
    assert any(text.strip().startswith("# ops.py:7 in norm_gelu_sum: y = F.gelu") for text in comments)


def test_backward_hangs_below_the_forward_operators_it_differentiates(training):
    phases = [one["phase"] for one in pane(training, "aten").sections]
    assert phases == ["forward", "backward"]
    border = pane(training, "aten").sections[1]["first"]
    aten = pane(training, "aten")
    (exp,) = [entity for entity in linked(training, "aten", "aten.exp.default") if aten.of.index(entity) > border]
    assert python_lines(training, exp) == [
        "y = F.gelu(x * scale * weight)"
    ]  # only GELU's derivative has an exponential
    (erf,) = [entity for entity in linked(training, "aten", "aten.erf.default") if aten.of.index(entity) < border]
    assert erf in above(training, exp)
    assert {one.phase for one in training.kernels} == {"forward", "backward"}
    orphans = [
        text
        for text, entity in zip(aten.lines, aten.of, strict=True)
        if entity >= 0 and not python_lines(training, entity)
    ]
    assert all("tangents" in text for text in orphans)


def test_a_matrix_product_is_a_library_call_of_2mnk_flops(folder):
    view = collect(resolve(f"{folder}/ops.py:product"), H100)
    (product,) = [one for one in view.kernels if one.kind == "library call"]
    assert product.flops == 2 * 16 * 32 * 8 and product.dtype == "fp32"
    assert [one["line"] for one in product.sources] == [16]
    # The caller's line is above the operator too, as a weaker link.
    (node,) = linked(view, "torch", "@")
    callers = [view.panes[0].lines[view.panes[0].of.index(one)] for one in view.weak[node]]
    assert len(callers) == 1 and "return helper(x, weight) + 1.0" in callers[0]


def test_a_graph_break_makes_two_graphs_and_their_sections(folder):
    view = collect(resolve(f"{folder}/ops.py:breaks"), H100)
    assert view.graphs == 2 and [one["title"] for one in pane(view, "torch").sections] == ["graph 0", "graph 1"]


def test_targets_are_functions_models_factories_and_carry_their_inputs(folder, tmp_path):
    for name in ("Model", "make_model"):
        found = resolve(f"{folder}/ops.py:{name}")
        assert isinstance(found.module, torch.nn.Module) and found.num_parameters == 64 * 8 + 8
        assert [one for one, _ in found.leaves()] == ["input 0", "input 1", "linear.weight", "linear.bias"]
        assert torch.equal(found.call(*found.args), found.module.linear(found.args[0]))
    assert torch.equal(resolve(f"{folder}/ops.py:make_model").args[0], resolve(f"{folder}/ops.py:make_model").args[0])
    (tmp_path / "own.py").write_text(
        "import torch\ndef f(x, y=1): return x\nf.example_inputs = lambda: {'x': torch.ones(2), 'y': 2}\n"
        "INPUTS = (torch.zeros(3),)\ndef g(x): return x\n"
    )
    assert resolve(f"{tmp_path}/own.py:f").kwargs["y"] == 2
    assert torch.equal(resolve(f"{tmp_path}/own.py:g").args[0], torch.zeros(3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no/such/file.py:f", "no file no/such/file.py"),
        ("ops.py", "say which function"),
        ("nonsense", "expected module:name"),
        ("json:lods", "did you mean 'loads'"),
        ("json:__name__", "not a function or a model"),
        ("json:loads", "no example inputs"),
        ("no_such_module:f", "ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_a_target_is_one_line(text, says):
    with pytest.raises(UserError, match=says) as caught:
        resolve(text)
    assert "\n" not in str(caught.value)


def test_a_target_whose_file_raises_or_that_has_nothing_to_compile_is_one_line(folder, tmp_path):
    (tmp_path / "bad.py").write_text("raise RuntimeError('many\\nlines')\n")
    with pytest.raises(UserError, match="RuntimeError: many lines"):
        resolve(f"{tmp_path}/bad.py:f")
    with pytest.raises(JobError, match="captured no graph"):
        collect(resolve(f"{folder}/ops.py:nothing"), H100)


def test_bounds_are_the_roofline():
    device = roofline.Device("d", "s", {"fp32": 100.0, "bf16": 1000.0}, 10.0)
    assert roofline.bound(20, 40, "fp32", False, device) == roofline.Bound(2.0, "memory", 2.0)
    assert roofline.bound(20, 400, "fp32", False, device) == roofline.Bound(20.0, "compute", 4.0)
    assert roofline.bound(20, 400, "bf16", True, device) == roofline.Bound(20.0, "memory", 2.0)
    assert roofline.bound(20, 400, "bf16", False, device).by == "compute"  # elementwise work runs in fp32
    assert roofline.bound(20, None, "fp32", False, device) == roofline.Bound(None, "unknown", 2.0)
    assert roofline.bound(20, 400, "int8", True, device).by == "unknown"


def test_devices_are_named_by_row_or_short_name_and_never_guessed():
    assert H100.name == "NVIDIA H100 80GB HBM3" and H100.bytes_per_second == 3350e9
    assert roofline.device_named("NVIDIA H100 PCIe").bytes_per_second == 2000e9
    for short, name in roofline.SHORT_NAMES.items():
        assert roofline.device_named(short).name == name
    with pytest.raises(UserError, match="did you mean 'H100'"):
        roofline.device_named("H1000")


def test_functions_around_lines(tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        "class A:\n    @staticmethod\n    def f(x):\n        def g(y):\n            return y\n        return g(x)\n\n\nz = 1\n"
    )
    found = source.functions([(str(file), 5), (str(file), 6), (str(file), 9), (str(file), 5)])
    assert [(one.title, one.first, one.last) for one in found] == [
        ("f.py: A.f.g", 4, 5),
        ("f.py: A.f", 2, 6),
        ("f.py", 7, 11),
    ]
    assert found[0].lines() == ["def g(y):", "    return y"]


def test_calls_and_definitions_in_generated_code():
    text = (
        "k_0 = async_compile.cpp_pybinding(['float*'], r'''\nbody\n''')\n"
        "def call(args):\n"
        "    # [Provenance debug handles] k_0:1\n"
        "    # another comment\n"
        "    k_0(arg0_1, buf0)\n"
        "    # [Provenance debug handles] extern_kernels.mm:2\n"
        "    extern_kernels.mm(buf0,\n        arg1_1, out=buf1)\n"
    )
    assert code.definitions(text) == {"k_0": (0, 2)}
    assert code.call_sites(text) == [
        code.CallSite("k_0", 4, 6, frozenset({"buf0"})),
        code.CallSite("extern_kernels.mm", 7, 9, frozenset({"buf0", "buf1"})),
    ]


def test_the_page_is_one_file_without_addresses_and_hostile_text_stays_text(inference, tmp_path):
    view = inference.to_dict()
    view["title"] = "</title><script>alert(1)</script>"
    view["panes"][0]["lines"][0] = "</script><b>"
    text = write_compile_page(view, tmp_path / "v.html").read_text()
    assert "<script>alert" not in text and "</script><b>" not in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    assert "@@" not in text.split("<script type", 1)[0]


def test_the_verb_prints_one_document_and_writes_the_page(folder, tmp_path):
    out = tmp_path / "page.html"
    done = ridgeline("compile", "view", f"{folder}/ops.py:product", "--out", out, "--device", "H100", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["file"] == str(out) and out.stat().st_size > 20_000
    assert document["device"]["name"] == H100.name and document["totals"]["flops"] >= 2 * 16 * 32 * 8


@pytest.mark.parametrize(
    ("change", "exit_code", "says"),
    [
        ({"CXX": "/nonexistent/g++"}, 1, "no working C++ compiler"),
        ({"TORCHINDUCTOR_CACHE_DIR": "file/below"}, 2, "not a directory; set TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_a_missing_compiler_and_a_cache_that_cannot_be_written_are_one_line(folder, tmp_path, change, exit_code, says):
    import os

    (tmp_path / "file").touch()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **change}
    target = f"{folder}/ops.py:norm_gelu_sum"
    done = ridgeline("compile", "view", target, "--device", "H100", "--out", "v.html", env=environment, cwd=tmp_path)
    assert done.returncode == exit_code and not (tmp_path / "v.html").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert says in last and "Traceback" not in done.stderr


def ridgeline(*arguments, **options):
    command = [sys.executable, "-m", "ridgeline", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "compiler.md"


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """The example of the document, compiled; and its blocks: (pane, phase) to lines."""
    text = DOCUMENT.read_text()
    file = tmp_path_factory.mktemp("document") / "norm.py"
    file.write_text(re.search(r"```python\n(import torch\n.*?)```", text, re.DOTALL)[1])
    target = f"{file}:norm_gelu_sum"
    views = {"": collect(resolve(target), H100), "backward": collect(resolve(target), H100, backward=True)}
    blocks = re.findall(r"```text (\w+) ?(\w*)\n(.*?)```", text, re.DOTALL)
    return views, {(name, phase): block.splitlines() for name, phase, block in blocks}


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the document shows what torch 2.13 makes")
def test_the_document_shows_what_the_tool_prints(document):
    views, blocks = document
    assert set(blocks) == {(name, "") for name in ("torch", "aten", "loops", "fused", "code")} | {("aten", "backward")}
    for (name, phase), lines in blocks.items():
        shown = pane(views[phase], name)
        rest = iter(shown.lines[next((one["first"] for one in shown.sections if one["phase"] == phase), 0) :])
        for line in lines:
            assert line == "..." or any(line == one for one in rest), (
                f"{name} {phase}: {line!r} is not there, in this order"
            )


def test_the_documents_figures_are_the_tools(document):
    (kernel,) = document[0][""].kernels
    text = DOCUMENT.read_text()
    assert f"{kernel.bytes_moved:,} bytes" in text and f"would move {kernel.bytes_unfused:,}" in text
    assert f"{kernel.flops // 1024} operations for each of 1,024 elements" in text
    assert "twelve operators here" in text and kernel.operators == 12
