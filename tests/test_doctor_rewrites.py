"""Source rewrites of the doctor: they keep values, gradients and side effects, and near misses are refused."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.compiler.doctor.rewrites import Refused, rewrite, unified_diff
from ridgeline.compiler.doctor.rewrites.text import Edit, Source

HEADER = "import logging\nimport math\n\nimport torch\nimport torch.nn.functional as F\n\nlogger = logging.getLogger('x')\n\n\n"

# name of the rewrite, the line on which the trouble stands, the function `f(x)`
REWRITTEN: dict[str, tuple[str, str, str]] = {
    "assigned in both sides": (
        "if tensor to torch.where",
        "if x.sum() > 0:",
        """
        def f(x):
            if x.sum() > 0:
                y = torch.relu(x)
            else:
                y = -x
            return y * 2
        """,
    ),
    "kept in one side": (
        "if tensor to torch.where",
        "if h.mean() > 0.1:",
        """
        def f(x):
            h = torch.tanh(x)
            if h.mean() > 0.1:
                h = h * 0.5
            return h
        """,
    ),
    "a side with an infinite derivative": (
        "if tensor to torch.cond",
        "if x.sum() > 0:",
        """
        def f(x):
            if x.sum() > 0:
                x = torch.log(x.abs() + 1)
            return x
        """,
    ),
    "both sides return": (
        "if tensor to torch.where",
        "if x.sum().item() > 0.1:",
        """
        def f(x):
            if x.sum().item() > 0.1:
                return x * 2
            return x + 1
        """,
    ),
    "swapped values": (
        "if tensor to torch.where",
        "if a.sum() > b.sum():",
        """
        def f(x):
            a = torch.tanh(x)
            b = torch.sigmoid(x)
            if a.sum() > b.sum():
                a = b * 2
                b = torch.relu(x)
            return a - b
        """,
    ),
    "negated": (
        "if tensor to torch.cond",
        "if not (x > 0).any():",
        """
        def f(x):
            if not (x > 0).any():
                x = x * x
            return x + 0
        """,
    ),
    "truth of a number": (
        "if tensor to torch.where",
        "if x.sum():",
        """
        def f(x):
            if x.sum():
                x = x + 3
            return x * 2
        """,
    ),
    "inside an expression": (
        "if tensor to torch.where",
        "y = 2 * (x.relu() if x.sum() > 0 else -x)",
        """
        def f(x):
            y = 2 * (x.relu() if x.sum() > 0 else -x)
            return y
        """,
    ),
    "a scale kept as a tensor": (
        ".item() kept as a tensor",
        "s = x.abs().max().item() + 1.0",
        """
        def f(x):
            s = x.abs().max().item() + 1.0
            return x / s
        """,
    ),
    "float of a tensor": (
        ".item() kept as a tensor",
        "return x * float(x.detach().mean()) + 1",
        """
        def f(x):
            return x * float(x.detach().mean()) + 1
        """,
    ),
    "a while with a bound": (
        "loop bounded",
        "while i < 5 and err > 1:",
        """
        def f(x):
            err = x.norm()
            i = 0
            while i < 5 and err > 1:
                half = x / 2
                err = half.norm()
                x = half
                i += 1
            return x * err
        """,
    ),
    "a for with a break": (
        "loop bounded",
        "if err < 0.5:",
        """
        def f(x):
            err = x.abs().max()
            for i in range(4):
                if err < 0.5:
                    break
                x = x * 0.5 - i * 0.01
                err = x.abs().max()
            return x
        """,
    ),
}

REFUSED: dict[str, tuple[str, str, str]] = {
    "a flag is no tensor": (
        "not known",
        "if flag:",
        "def f(x, flag=True):\n    if flag:\n        x = x * 2\n    return x",
    ),
    "a length is no tensor": (
        "Python bool",
        "if len(x):",
        "def f(x):\n    if len(x):\n        x = x * 2\n    return x",
    ),
    "a print in the side": (
        "no plain assignment",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        print(1)\n    return x",
    ),
    "in place": ("in place", "if x.sum() > 0:", "def f(x):\n    if x.sum() > 0:\n        x += 1\n    return x"),
    "in place by method": (
        "in place",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        x = x.add_(1)\n    return x",
    ),
    "in place later": (
        "in place",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        x = x * 2\n    x += 1\n    return x",
    ),
    "unbound otherwise": (
        "no value",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        y = x * 2\n    return y",
    ),
    "dependent": (
        "another name",
        "if x.sum() > 0:",
        "def f(x):\n    y = x + 1\n    if x.sum() > 0:\n        x = x * 2\n        y = x * 3\n    return y",
    ),
    "and": (
        "stop early",
        "if x.sum() > 0 and x[0] > 1:",
        "def f(x):\n    if x.sum() > 0 and x[0] > 1:\n        x = x * 2\n    return x",
    ),
    "raise": (
        "no plain assignment",
        "if x.isnan().any():",
        "def f(x):\n    if x.isnan().any():\n        raise ValueError\n    return x",
    ),
    "attribute": (
        "no plain assignment",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        f.seen = x\n    return x",
    ),
    "global": (
        "global",
        "if x.sum() > 0:",
        "g = 1\ndef f(x):\n    global g\n    if x.sum() > 0:\n        g = x * 2\n    else:\n        g = x * 3\n    return x",
    ),
    "constants": (
        "Python constant",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        s = 1.0\n    else:\n        s = 2.0\n    return x * s",
    ),
    "equal is a bool": (
        "Python bool",
        "if torch.equal(x, x):",
        "def f(x):\n    if torch.equal(x, x):\n        x = x * 2\n    return x",
    ),
    "early return": (
        "goes on",
        "if x.sum() > 0:",
        "def f(x):\n    if x.sum() > 0:\n        return x\n    x = x + 1\n    return x",
    ),
    "elif": (
        "elif",
        "elif x.mean() > 0:",
        "def f(x, n=1):\n    if n > 1:\n        x = x * 2\n    elif x.mean() > 0:\n        x = x * 3\n    return x",
    ),
    "a stored number": (
        "stored",
        "f.last = x.sum().item()",
        "def f(x):\n    f.last = x.sum().item()\n    return x * 2",
    ),
    "a returned number": ("returned", "return x.sum().item()", "def f(x):\n    return x.sum().item()"),
    "a number that decides": (
        "decides a branch",
        "s = x.sum().item()",
        "def f(x):\n    s = x.sum().item()\n    if s > 1:\n        x = x * 2\n    return x * s",
    ),
    "a number for Python": (
        "given to sqrt",
        "s = x.sum().item()",
        "def f(x):\n    s = x.sum().item()\n    return x * math.sqrt(s)",
    ),
    "a number as text": (
        "becomes text",
        "s = x.sum().item()",
        "def f(x):\n    s = x.sum().item()\n    print(f'{s}')\n    return x * s",
    ),
    "a number in a list": (
        "container",
        "s = [x.sum().item()]",
        "def f(x):\n    s = [x.sum().item()]\n    return x * s[0]",
    ),
    "two values": (
        "more than one value",
        "s = x.sum().item()",
        "def f(x):\n    s = 1.0\n    s = x.sum().item()\n    return x * s",
    ),
    "an unknown partner": (
        "not known",
        "s = x.sum().item()",
        "def f(x, k=2):\n    s = x.sum().item()\n    return x * (s * k)",
    ),
    "no bound": (
        "no bound",
        "while x.norm() > 1:",
        "def f(x):\n    while x.norm() > 1:\n        x = x / 2\n    return x",
    ),
    "a bound from outside": (
        "no bound",
        "while i < n and x.norm() > 1:",
        "def f(x, n=3):\n    i = 0\n    while i < n and x.norm() > 1:\n        x = x / 2\n        i += 1\n    return x",
    ),
    "too many turns": (
        "more than 32",
        "if x.norm() < 1:",
        "def f(x):\n    for i in range(1000):\n        if x.norm() < 1:\n            break\n        x = x / 2\n    return x",
    ),
    "the counter is an answer": (
        "read after",
        "if x.norm() < 1:",
        "def f(x):\n    for i in range(10):\n        if x.norm() < 1:\n            break\n        x = x / 2\n    return x, i",
    ),
    "a turn that prints": (
        "no plain assignment",
        "if x.norm() < 1:",
        "def f(x):\n    for i in range(10):\n        if x.norm() < 1:\n            break\n        print(i)\n        x = x / 2\n    return x",
    ),
    "a condition with another draw": (
        "random",
        "if x.norm() < torch.rand(()):",
        "def f(x):\n    for i in range(10):\n        if x.norm() < torch.rand(()):\n            break\n        x = x / 2\n    return x",
    ),
    "a print in a module": (
        "whole module",
        "print(1)",
        "class M(torch.nn.Module):\n    def forward(self, x):\n        print(1)\n        return x",
    ),
    "a print in a callee": (
        "not compiled by itself",
        "print(1)",
        "def g(x):\n    print(1)\n    return x\ndef f(x):\n    return g(x)",
    ),
    "a print in a branch": (
        "branch or a loop",
        "print(1)",
        "@torch.compile\ndef f(x, n=1):\n    if n > 1:\n        print(1)\n    return x",
    ),
    "a print before two returns": (
        "only return",
        "print(1)",
        "@torch.compile\ndef f(x, n=1):\n    print(1)\n    if n > 1:\n        return x\n    return x * 2",
    ),
    "no torch": ("import torch", "if x.sum() > 0:", "def f(x):\n    if x.sum() > 0:\n        x = x * 2\n    return x"),
    "nothing to do": ("no rewrite", "return x", "def f(x):\n    return x"),
}


def program(body: str, header: str = HEADER) -> str:
    return header + textwrap.dedent(body).strip() + "\n"


def line_of(text: str, code: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.strip() == code)


def function(text: str, name: str = "f") -> Callable[..., Any]:
    namespace: dict[str, Any] = {}
    exec(compile(text, "<program>", "exec"), namespace)
    made: Callable[..., Any] = namespace[name]
    return made


def with_gradient(run: Callable[..., Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape))
    assert x.grad is not None
    return y.detach(), x.grad


def numbers() -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=6)


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_rewritten_function_equals_the_original(case: str) -> None:
    name, code, body = REWRITTEN[case]
    before = program(body)
    made = rewrite(before, line_of(before, code))
    assert made.name == name
    old, new = function(before), function(made.source)

    @settings(max_examples=25 if "cond" not in made.source else 5, deadline=None)
    @given(numbers())
    def same(values: list[float]) -> None:
        x = torch.tensor(values, dtype=torch.float64)
        for a, b in zip(with_gradient(old, x), with_gradient(new, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, equal_nan=True)

    same()


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_rewritten_function_is_one_graph_and_takes_both_ways(case: str) -> None:
    _, code, body = REWRITTEN[case]
    before = program(body)
    old = function(before)
    new = torch.compile(function(rewrite(before, line_of(before, code)).source), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    graphs: list[Any] = []
    torch.compile(function(before), backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(torch.ones(3))
    assert len(graphs) != 1
    for sign in (1.0, -1.0, 0.01):
        x = sign * torch.tensor([0.3, 2.0, 1.0])
        for a, b in zip(with_gradient(old, x), with_gradient(new, x), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("case", REFUSED)
def test_near_misses_are_refused_with_the_reason(case: str) -> None:
    reason, code, body = REFUSED[case]
    text = program(body, "" if case == "no torch" else HEADER)
    with pytest.raises(Refused, match=reason):
        rewrite(text, line_of(text, code))


def test_gradient_of_the_side_not_taken_does_not_become_nan() -> None:
    """sqrt has an infinite derivative at 0: torch.where would give 0 times infinity."""
    body = "def f(x):\n    if x.sum() > 0:\n        y = torch.sqrt(x)\n    else:\n        y = x * 2\n    return y"
    text = program(body)
    made = rewrite(text, line_of(text, "if x.sum() > 0:"))
    _, gradient = with_gradient(function(made.source), torch.zeros(3))
    assert made.name == "if tensor to torch.cond"
    assert torch.equal(gradient, 2 * torch.linspace(0.5, 1.5, 3))


def test_number_compared_in_double_precision_stays_so() -> None:
    """0.1 in float32 is more than 0.1 in Python, but not more than 0.1 cast to float32."""
    text = program("def f(x):\n    if x.sum().item() > 0.1:\n        return x * 2\n    return x + 1")
    made = rewrite(text, line_of(text, "if x.sum().item() > 0.1:"))
    x = torch.tensor([0.1])
    assert torch.equal(function(made.source)(x), function(text)(x)) and function(text)(x).item() < 1


def test_number_of_a_buffer_stays_what_it_was_when_the_buffer_changes() -> None:
    body = """
    count = torch.ones(())


    def f(x):
        before = count.item()
        count.add_(1)
        return x.relu() * before
    """
    text = program(body)
    made = rewrite(text, line_of(text, "before = count.item()"))
    old, new = function(text), function(made.source)
    for _ in range(2):
        assert torch.equal(old(torch.ones(2)), new(torch.ones(2)))


def test_prints_move_out_and_show_the_same() -> None:
    body = """
    @torch.compile(backend="aot_eager", fullgraph=FULL)
    def f(x, *, k=2):
        h = x.relu()
        print("mean", h.mean().item(), k)
        print(f"sum {h.sum().item():.3f}")
        return h * k, h.sum().item()
    """
    before = program(body.replace("FULL", "False"))
    made = rewrite(program(body.replace("FULL", "True")), line_of(before, 'print("mean", h.mean().item(), k)'))
    assert "after the function" in made.note
    shown, answers = [], []
    for text in (before, made.source):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            answers.append(function(text)(torch.arange(4.0), k=3))
        shown.append(out.getvalue())
    assert shown[0] == shown[1] == "mean 1.5 3\nsum 6.000\n"
    assert torch.equal(answers[0][0], answers[1][0]) and answers[0][1] == answers[1][1] == 6.0


def test_function_compiled_by_assignment_is_wrapped_too() -> None:
    body = """
    def step(x):
        logger.warning("at %s", x.sum())
        return (x * 2).sum().item()


    f = torch.compile(step, backend="eager", fullgraph=True)
    done = 1
    """
    text = program(body)
    made = rewrite(text, line_of(text, 'logger.warning("at %s", x.sum())'))
    assert made.name.startswith("prints moved") and function(made.source)(torch.ones(3)) == 6.0
    assert "done = 1" in made.source.splitlines()


def test_only_the_lines_of_the_statement_change() -> None:
    body = "def f(x):\n    # größer, ✓\n    a = 'ü'  ;  b = 2   # odd   spacing\n    if x.sum() > 0:  # gone\n        x = x * 2\n    return x  # kept"
    before = program(body)
    after = rewrite(before, line_of(before, "if x.sum() > 0:  # gone")).source
    diff = unified_diff(before, after, "a.py")
    assert [line for line in diff.splitlines() if line[:1] in "-+" and line[:3] not in ("---", "+++")] == [
        "-    if x.sum() > 0:  # gone",
        "-        x = x * 2",
        "+    x = torch.where(x.sum() > 0, x * 2, x)",
    ]


def test_edits_are_in_bytes_and_from_the_end() -> None:
    source = Source("a = 'ü'; b = a\n")
    first, second = source.tree.body
    edits = [Edit(*source.span(first), "x = 1"), Edit(*source.span(second), "y = 'ö'")]  # type: ignore[arg-type]
    assert source.edited(edits) == "x = 1; y = 'ö'\n"


def test_text_that_is_no_python_is_refused() -> None:
    with pytest.raises(Refused, match="line 2"):
        rewrite("a = 1\nb = (\n", 1)
