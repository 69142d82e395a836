"""What the observer hears and makes of it: planted faults in this process, and its pure parts against hand and brute force."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ridgeline.compiler.doctor.assemble import assemble  # noqa: E402
from ridgeline.compiler.doctor.breaks import original_name, parse_break, resumed_line  # noqa: E402
from ridgeline.compiler.doctor.clock import Cell, Clock, EntryCell  # noqa: E402
from ridgeline.compiler.doctor.guards import cause, differing, parse_failure, parse_guards  # noqa: E402
from ridgeline.compiler.doctor.model import Finding, Frame, Observation, Timing, Trial, ranked  # noqa: E402
from ridgeline.compiler.doctor.observe import Observer  # noqa: E402
from ridgeline.compiler.doctor.ranks import compare_ranks  # noqa: E402
from ridgeline.compiler.doctor.raw import EntryInfo, Raw, SeenGraph  # noqa: E402
from ridgeline.compiler.doctor.recompiled import guard_findings  # noqa: E402
from ridgeline.compiler.doctor.report import advice, document, over_budget, verdict  # noqa: E402
from ridgeline.compiler.doctor.silent import cudagraph_findings  # noqa: E402
from ridgeline.compiler.doctor.timing import PATTERN, Interleave, break_even, step_timing  # noqa: E402
from ridgeline.compiler.internals import parse_version, require_torch  # noqa: E402
from ridgeline.errors import UserError  # noqa: E402

HERE = str(Path(__file__).resolve())
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code and no changed option from one test to the next."""
    import torch._dynamo

    suppress, limit = torch._dynamo.config.suppress_errors, torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.config.suppress_errors, torch._dynamo.config.recompile_limit = suppress, limit
    torch._dynamo.reset()


def line_of(text: str) -> int:
    """The only line of this file that holds ``text`` (and no quotes: not the line that asks)."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if text in line and '"' not in line]
    return number


def of_kind(observation: Observation, kind: str) -> list[Finding]:
    return [one for one in observation.findings if one.kind == kind]


def inner(x: Any) -> Any:
    x = x + 1
    time.sleep(0.005)  # the compiler stops here
    return x * 2


def outer(x: Any) -> Any:
    y = inner(x).sin()
    if y.sum() > 100:  # and here
        y = y + 1
    return y.cos()


def test_breaks_have_place_calls_and_the_time_between_graphs() -> None:
    """Twelve calls sleep 5 ms each between the graphs of ``inner``: of the eleven that do not compile, 55 ms at least."""
    with Observer() as observer:
        compiled = torch.compile(outer, backend="eager", dynamic=False)
        for _ in range(12):
            compiled(torch.ones(3))
    seen = observer.observation()
    by_line = {one.line: one for one in of_kind(seen, "graph_break")}
    assert sorted(by_line) == [line_of("# the compiler stops here"), line_of("# and here")] and seen.breaks == 2
    slept, branched = by_line[min(by_line)], by_line[max(by_line)]
    assert (slept.file, slept.function, branched.function) == (HERE, "inner", "outer")
    assert slept.code.startswith("time.sleep(0.005)") and branched.detail["gb"] == "GB0170"
    assert slept.calls == branched.calls == 12
    assert 11 * 0.005 <= slept.detail["run_seconds"] <= seen.wall_seconds
    assert branched.detail["run_seconds"] < slept.detail["run_seconds"]


def test_resumed_parts_are_folded_into_their_function() -> None:
    """Five compilations (two halves of ``inner``, three parts of ``outer``), and two functions."""
    with Observer() as observer:
        torch.compile(outer, backend="eager")(torch.ones(3))
    frames = observer.observation().frames
    assert {one.function for one in frames} == {"inner", "outer"}
    assert len(frames) == 5 and sum(one.resumed for one in frames) == 3
    assert all(one.seconds > 0 and one.phases["dynamo"] > 0 for one in frames)


def test_nothing_is_left_behind() -> None:
    """Handlers and patched functions are gone, also after an exception; a function compiled before runs as before."""
    from torch._dynamo import convert_frame, eval_frame, output_graph

    def hooked() -> list[Any]:
        names = ("torch.__trace", "torch._dynamo", "torch._inductor")
        loggers = [logging.getLogger(name) for name in names]
        handlers = [[*one.handlers, one.level, one.propagate] for one in loggers]
        patched = (
            convert_frame.get_and_maybe_log_recompilation_reasons,
            output_graph.OutputGraph.call_user_compiler,
            eval_frame._TorchDynamoContext.__call__,
        )
        return [handlers, *patched]

    before = hooked()
    with pytest.raises(ZeroDivisionError), Observer():
        compiled = torch.compile(outer, backend="eager")
        assert hooked()[0] != before[0]
        raise ZeroDivisionError
    assert hooked() == before
    assert torch.equal(compiled(torch.ones(3)), outer(torch.ones(3)))


def test_a_fault_of_ours_does_not_end_the_program(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A wording that we cannot take apart: said once, and the program gets its result."""
    from ridgeline.compiler.doctor import observe

    monkeypatch.setattr(observe, "parse_break", lambda text: 1 / 0)
    with Observer():
        assert torch.compile(outer, backend="eager")(torch.ones(3)).shape == (3,)
    assert capsys.readouterr().err.count("on_trace failed: ZeroDivisionError") == 1


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Any) -> Any:
        self.step += 1  # a number that Dynamo takes for a constant
        return x * self.step


def scaled(x: Any, by: Any, names: Any) -> Any:
    return x * by + len(names)


def test_a_recompilation_tells_the_guard_its_source_and_both_values() -> None:
    """Every kind of change by hand, one at a time: size, dtype, number, length, gradient mode."""
    x = torch.ones(3)
    calls = [(x, 2, "a"), (torch.ones(4), 2, "a"), (x.double(), 2, "a"), (x, 2.5, "a"), (x, 2, "abc")]
    with Observer() as observer:
        compiled = torch.compile(scaled, backend="eager", dynamic=False)
        for arguments in calls:
            compiled(*arguments)
        with torch.no_grad():
            compiled(*calls[0])
    found = of_kind(observer.observation(), "recompile")
    changes = {(one.detail["source"], one.detail["old"], one.detail["new"]) for one in found}
    assert changes == {
        ("x.size()[0]", "3", "4"),
        ("x", "Float", "Double"),
        ("by", "2", "2.5"),
        ("names", "'a'", "'abc'"),
        ("grad_mode", "True", "False"),
    }
    assert observer.observation().recompiles == 5


def test_the_recompile_limit_is_no_secret() -> None:
    """Twelve values of a counter: eight compilations, of which seven are again, and four calls in eager."""
    with Observer() as observer:
        compiled = torch.compile(Counting(), backend="eager")
        for _ in range(12):
            compiled(torch.ones(3))
    seen = observer.observation()
    (again,), (limit,) = of_kind(seen, "recompile"), of_kind(seen, "recompile_limit")
    assert (
        again.count == 7 and again.detail["source"] == "self.step" and again.line == line_of("# a number that Dynamo")
    )
    assert again.detail["values"] == [[str(n), str(n + 1)] for n in range(7)]
    assert limit.detail["limit"] == torch._dynamo.config.recompile_limit == 8 and limit.calls == 4
    assert limit.lost_seconds > 0 and seen.fallbacks == 1 and seen.recompiles >= 7


def test_a_backend_that_fails_in_silence_is_heard() -> None:
    """``suppress_errors`` turns an error of the backend into eager; without it the program sees it."""

    def broken(graph: Any, inputs: Any) -> Any:
        raise KeyError("no rule for sin")

    torch._dynamo.config.suppress_errors = True
    with Observer() as observer:
        compiled = torch.compile(lambda x: x.sin(), backend=broken)
        for _ in range(3):
            compiled(torch.ones(3))
    (one,) = of_kind(observer.observation(), "backend_fallback")
    assert "no rule for sin" in one.reason and one.detail["backend"] == "broken" and one.line > 0
    torch._dynamo.config.suppress_errors = False
    with Observer() as observer, pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(lambda x: x.cos(), backend=broken)(torch.ones(3))
    assert [one.kind for one in observer.observation().findings] == ["compile_failed"]


def test_a_backend_that_hides_its_failure_behind_inductor_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows its own exception and calls Inductor (here a stand-in), by a name it bound while it was imported."""
    from torch._inductor import compile_fx as module

    monkeypatch.setattr(module, "compile_fx", lambda graph, inputs: lambda *args: graph(*args))
    with Observer() as observer:
        from torch._inductor.compile_fx import compile_fx

        def hidden(graph: Any, inputs: Any) -> Any:
            try:
                raise RuntimeError("no kernel for sin")
            except RuntimeError:
                return compile_fx(graph, inputs)

        def honest(graph: Any, inputs: Any) -> Any:
            return compile_fx(graph, inputs)

        torch.compile(lambda x: x.sin(), backend=hidden)(torch.ones(3))
        torch.compile(lambda x: x.cos(), backend=honest)(torch.ones(3))
    (one,) = observer.observation().findings
    assert one.kind == "backend_fallback" and one.detail["backend"] == "hidden"
    assert one.detail["error"] == "RuntimeError: no kernel for sin"


def test_cuda_graphs_not_used_and_costly_guards_are_findings() -> None:
    """From what was heard to findings: the reason where torch gave one, and guards that take half of every call."""
    raw = Raw(wall_seconds=1.0)
    raw.metrics = [{"compile_id": "0/0", "co_name": "f", "co_filename": HERE, "co_firstlineno": 1, "guard_count": 40}]
    raw.graphs = [
        SeenGraph("0/0", "inductor", 1),
        SeenGraph("1/0", "inductor", 1, "skipping cudagraphs due to mutated inputs"),
    ]
    reasons = {one.reason for one in cudagraph_findings(raw)}
    assert reasons == {"the graph is not on a CUDA device", "mutated inputs"}
    raw.entries = {0: EntryInfo("f", HERE, 1, "inductor")}
    cell = EntryCell(0)
    cell.before.after_calls, cell.before.after_ns = 100, 20_000_000
    raw.clock_entries, graph = [cell], Cell("0/0")
    graph.calls, graph.ns = 100, 20_000_000
    raw.clock_graphs = {"0/0": graph}
    (guards,) = guard_findings(raw, assemble(raw).frames)
    assert guards.lost_seconds == pytest.approx(0.02) and guards.detail["share"] == pytest.approx(0.5)
    assert guards.reason == "40 guards and entering take 200 us of every call, 50% of it"
    graph.ns = 900_000_000  # guards of 2 % are no finding
    assert guard_findings(raw, assemble(raw).frames) == []


def test_a_backend_that_hands_the_graph_back_is_heard() -> None:
    """``eager`` does so on purpose; any other backend has given up."""

    def lazy(graph: Any, inputs: Any) -> Any:
        try:
            raise NotImplementedError("sin")
        except NotImplementedError:
            return graph.forward

    with Observer() as observer:
        torch.compile(lambda x: x.sin(), backend=lazy)(torch.ones(3))
        torch.compile(lambda x: x.cos(), backend="eager")(torch.ones(3))
    (one,) = observer.observation().findings
    assert one.kind == "backend_fallback" and one.detail["backend"] == "lazy" and one.calls == 1


def test_lowered_precision_is_found_and_honest_backends_are_not_blamed() -> None:
    """bf16 has 8 bits: a relative error of about 2^-9, thousands of times fp32's. Dropout cannot be compared."""

    def low(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            return tuple(one.float() for one in graph(*(arg.bfloat16() for arg in args)))

        return run

    def honest(graph: Any, inputs: Any) -> Any:
        return lambda *args: graph(*args)

    x = torch.rand(1000)
    with Observer() as observer:
        torch.compile(lambda x: x.sin() * 3, backend=low)(x)
        torch.compile(lambda x: x.cos() * 3, backend=honest)(x)
        torch.compile(lambda x: torch.dropout(x, 0.5, True), backend=honest)(x)
    (one,) = observer.observation().findings
    assert one.kind == "precision_lowered" and one.detail["backend"] == "low"
    assert 2**-12 < one.detail["error"] < 2**-7 and one.detail["error_eager"] < 1e-6


def test_a_break_in_a_loop_gives_up_the_function() -> None:
    def looping(x: Any) -> Any:
        for _ in range(3):
            torch._dynamo.graph_break()
            x = x + 1
        return x

    with Observer() as observer:
        compiled = torch.compile(looping, backend="eager")
        for _ in range(4):
            compiled(torch.ones(3))
    seen = observer.observation()
    (one,) = of_kind(seen, "graph_break")
    assert one.detail["skipped"] and "runs in eager" in one.reason and one.calls == 4 and one.lost_seconds > 0
    assert seen.fallbacks == 1 and seen.graphs == 0


def test_compiled_functions_are_counted_in_every_thread() -> None:
    with Observer() as observer:
        compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", dynamic=False)
        compiled(torch.ones(3))
        threads = [threading.Thread(target=lambda: [compiled(torch.ones(3)) for _ in range(20)]) for _ in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    seen = observer.observation()
    assert sum(one["calls"] for one in seen.entries) == 61 and seen.frames[0].calls == 61


def test_eager_steps_are_taken_in_turn_and_change_no_result() -> None:
    """Thirty calls: results equal eager's on both sides, and both sides were called."""
    with Observer(measure=True) as observer:
        compiled = torch.compile(lambda x: (x.sin() * 2).sum(), backend="eager")
        results = [compiled(torch.full((3,), float(n))) for n in range(30)]
    assert all(torch.equal(one, (torch.full((3,), float(n)).sin() * 2).sum()) for n, one in enumerate(results))
    timing = observer.observation().timing
    assert timing is not None and 4 <= timing.samples <= 15
    assert timing.eager_seconds > 0 and timing.compiled_seconds > 0


def test_without_trace_compile_time_is_still_known() -> None:
    handlers = list(logging.getLogger("torch.__trace").handlers)
    with Observer(trace=False) as observer:
        torch.compile(outer, backend="eager")(torch.ones(3))
        assert logging.getLogger("torch.__trace").handlers == handlers
    seen = observer.observation()
    assert len(seen.frames) == 5 and seen.compile_seconds > 0 and seen.breaks == 0


# The pure parts.


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 12), st.integers(0, 5))
def test_no_eager_step_before_the_compiler_is_calm_and_never_too_many(
    compiled: list[bool], most: int, quiet: int
) -> None:
    """Against brute force: after ``quiet`` calm steps the pattern, one letter per step that may take it."""
    schedule = Interleave(samples=most, quiet=quiet)
    calm, letters, eager = 0, 0, 0
    for lately in compiled:
        calm = 0 if lately else calm + 1
        expected = False
        if calm > quiet and eager < most:
            expected = PATTERN[letters % 4]
            letters += 1
        eager += expected
        assert schedule.choose(7, lately) == expected
    assert eager <= most


def test_other_functions_follow_the_step_and_are_not_left_in_eager() -> None:
    """Two calls of B per step of A. When A is never called again, B may not stay in eager because A's last step was."""
    schedule = Interleave(samples=100, quiet=1)
    taken = []
    for _ in range(6):
        step = schedule.choose(0, False)
        taken.append((step, [schedule.choose(1, False) for _ in range(2)]))
    assert [step for step, _ in taken] == [False, False, True, True, False, False]
    assert all(others == [step, step] for step, others in taken)
    while not schedule.choose(0, False):
        schedule.choose(1, False), schedule.choose(1, False)
    assert [schedule.choose(1, False) for _ in range(5)] == [True, True, False, False, False]


def test_step_times_are_medians_of_the_alternating_stretch() -> None:
    """By hand: compiled 10 ms, eager 30 ms, the first step compiled for 5 s and is left out."""
    cell, now = EntryCell(3), 0
    modes = [2, 0, 0, 0] + [0, 1, 1, 0] * 6 + [0]
    for mode in modes:
        cell.steps.append((now, mode))
        now += {0: 10_000_000, 1: 30_000_000, 2: 5_000_000_000}[mode]
    cell.eager_calls = modes.count(1)
    timing = step_timing([cell], 3)
    assert timing is not None
    assert (timing.eager_seconds, timing.compiled_seconds) == (pytest.approx(0.03), pytest.approx(0.01))
    assert timing.floor_seconds == pytest.approx(0.0) and timing.samples == 12


@given(st.floats(0.0, 1e3), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0), st.floats(0.0, 0.1))
def test_break_even_is_the_first_step_that_has_paid(cost: float, eager: float, compiled: float, floor: float) -> None:
    timing = Timing(eager, compiled, floor, 10)
    step = break_even(cost, timing)
    if step is None:
        assert eager - compiled <= floor or eager <= compiled
        return
    gain = eager - compiled
    assert step * gain >= cost * (1 - 1e-9) and (step == 1 or (step - 1) * gain < cost * (1 + 1e-9))


@given(st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True), st.lists(st.integers(1, 9999), max_size=3))
def test_a_resumed_name_is_its_functions(name: str, lines: list[int]) -> None:
    resumed = name
    for line in lines:
        resumed = f"torch_dynamo_resume_in_{resumed}_at_{line}"
    assert original_name(resumed) == original_name(name)
    if lines:
        assert resumed_line(resumed) == lines[-1]


def test_the_text_of_a_break_is_taken_apart() -> None:
    found = parse_break(
        "Graph break in user code at /a/b.py:14\n"
        "Graph Break Reason: Failed to handle graph break gracefully. Skipping the function and falling back to eager."
        " Graph break encountered:\n\nFailed to trace builtin operator\n"
        "  Explanation: Dynamo does not know `print`\n    with these types.\n"
        "  Hint: Avoid it.\n  Hint: Report it.\n\n  Developer debug context: builtin print\n\n"
        " For more details about this graph break, please visit: https://x/gb/gb0059.html\n"
        "*** While handling this graph break, another graph break occurred: ***\n\ngraph break in loop\n  Explanation: no\n"
        'User code traceback:\n  File "/a/b.py", line 30, in main\n    f()\n'
        '  File "/a/b.py", line 14, in torch_dynamo_resume_in_f_at_9\n\n'
        'Traceback (most recent call last):\n  File "/torch/x.py", line 1, in y\n'
    )
    assert (found.file, found.line, found.code, found.function) == ("/a/b.py", 14, "GB0059", "f")
    assert (
        found.title == "Failed to trace builtin operator" and found.skipped and found.because == "graph break in loop"
    )
    assert found.explanation == "Dynamo does not know `print` with these types."
    assert found.hints == ["Avoid it.", "Report it."] and found.stack == ["/a/b.py:30 in main", "/a/b.py:14 in f"]
    assert parse_break("something quite new").title == "something quite new"


class Holder:
    step = 4


@pytest.mark.parametrize(
    ("reason", "names", "expected"),
    [
        ("0/0: tensor 'x' size mismatch at index 1. expected 3, actual 4", {}, ("x.size()[1]", "3", "4", "size")),
        ("0/0: tensor 'x' dtype mismatch. expected Float, actual Double", {}, ("x", "Float", "Double", "dtype")),
        ("0/1: s.step == 3    # code  # a.py:7 in f (HINT: x)", {"s": Holder()}, ("s.step", "3", "4", "value")),
        ("0/1: len(d) != 1", {"d": {1: 2, 3: 4}}, ("len(d)", "1", "2", "length")),
        ("0/1: not d   # code", {"d": [1]}, ("len(d)", "0", "1", "length")),
        ("0/1: ___check_type_id(o, 123), type=<class 'a.B'>", {"o": 3}, ("o", "a.B", "builtins.int", "type")),
        ("0/1: GLOBAL_STATE changed: grad_mode ", {}, ("grad_mode", "?", "?", "global state")),
        ("0/1: d['k'] == 'a'", {"d": {"k": "b"}}, ("d['k']", "'a'", "'b'", "value")),
        ("0/1: f(x) == 1", {"f": lambda x: 1 / 0, "x": 1}, ("f(x)", "1", "?", "value")),
        ("0/1: words of tomorrow", {}, ("words of tomorrow", "?", "?", "value")),
    ],
)
def test_the_text_of_a_guard_is_taken_apart(reason: str, names: dict[str, Any], expected: tuple[str, ...]) -> None:
    """The new value is read from the frame, and nothing is called to read it (``f`` would raise)."""
    failure = parse_failure(reason, names)
    assert (failure.source, failure.old, failure.new, failure.what) == expected


def test_the_cause_is_the_nearest_compilation_then_the_source_that_most_failed_by() -> None:
    """The call (x of 3, n = 4, s = 'a') against guards by hand; what cannot be read counts as held."""
    guards = ["TENSOR_MATCH check_tensor(L['x'], Tensor, Keys(CPU), torch.float32, device=None, size=[{}], stride=[1])"]
    guards += ["EQUALS_MATCH L['n'] == {}", "SEQUENCE_LENGTH len(L['s']) == 1", "ID_MATCH unreadable"]
    names = {"x": torch.ones(3), "n": 4, "s": "a"}
    assert [differing([one.format(size) for one in guards], names) for size in ("4", "3", "None")] == [1, 1, 1]
    assert differing([guards[0].format("None"), guards[1].format("4")], names) == 0
    assert differing([guards[0].format("3, 3"), guards[1].format("5")], names) == 2
    near, far = (parse_failure(one) for one in ("0/0: n == 3", "0/1: s == 'b'"))
    assert cause([replace(far, differing=2), replace(near, differing=1)]) == replace(near, differing=1)
    reasons = ["0/2: s == 'b'", "0/1: n == 3", "0/0: n == 2"]
    assert cause([parse_failure(one) for one in reasons]).old == "3"
    assert cause([parse_failure(one) for one in reasons[:2]]).source == "s"


def test_guards_without_addresses_are_the_same_everywhere() -> None:
    text = (
        "TREE_GUARD_MANAGER:\n+- RootGuardManager\n| +- GLOBAL_STATE: ___check_global_state() against {}\n"
        "| +- GuardManager: source=L['x'], accessed_by=FrameLocalsGuardAccessor(key='x'), type=<class 'torch.Tensor'>\n"
        "| | +- TENSOR_MATCH: check_tensor(L['x'], size=[3])  # y = x + 1  # b.py:7 in f\n"
        "| | +- ID_MATCH: ___check_obj_id(L['x'], {id})  # y = x + 1  # b.py:7 in f\n"
    )
    one, other = (parse_guards(text.replace("{id}", number)) for number in ("140342279249264", "94759495569168"))
    assert one == other and one.count == 2 and one.sources == ["x (2)"] and one.places == {"x": ("y = x + 1", 7)}


def test_gaps_and_graphs_add_up_to_the_call() -> None:
    """Graphs and pauses of known length, without any compiler: what is counted lies between them and the wall clock."""
    clock = Clock()
    graph = clock.graph("0/0", lambda: time.sleep(0.004))

    def twice() -> None:
        graph()
        time.sleep(0.006)
        graph()

    entry = clock.entry(0, twice, twice)
    began = time.perf_counter()
    for _ in range(3):
        entry()
    wall = time.perf_counter() - began
    cell, (call,) = clock.graphs()["0/0"], clock.entries()
    assert (cell.calls, cell.after_calls, call.calls, call.graphless_calls) == (6, 6, 3, 0)
    assert cell.ns >= 6 * 4_000_000 and cell.after_ns >= 3 * 6_000_000
    assert cell.ns + cell.after_ns + call.before.after_ns <= call.ns <= wall * 1e9


def rank_of(rank: int, compilations: int, operators: int = 3) -> Observation:
    """Rank ``rank`` compiled ``f`` so often, a second each, for another size every time."""
    frames = [Frame(f"0/{n}", "f", "a.py", 3, seconds=1.0, operators=operators) for n in range(compilations)]
    detail = {"guard": "expected 8, actual 6", "source": "x.size()[0]"}
    again = (
        [Finding("recompile", "a.py", 4, "y = x + 1", "size changed", "f", detail=detail)] if compilations > 1 else []
    )
    return Observation(findings=again, frames=frames, rank=rank, world=3)


def test_the_rank_that_compiles_more_is_named() -> None:
    ranks = [rank_of(0, 1), rank_of(1, 3), rank_of(2, 1)]
    (one,) = compare_ranks(ranks, [{}, {}, {}])
    assert one.detail["rank"] == 1 and one.detail["guard"] == "expected 8, actual 6"
    assert (one.line, one.count, one.lost_seconds) == (4, 2, 2.0)
    assert compare_ranks([rank_of(0, 2), rank_of(1, 2)], [{}, {}]) == []
    assert compare_ranks([rank_of(0, 2)], [{}]) == []
    (other,) = compare_ranks([rank_of(0, 1), rank_of(1, 1, operators=5), rank_of(2, 1)], [{}, {}, {}])
    assert other.detail["rank"] == 1 and "another graph" in other.reason
    (guards,) = compare_ranks([rank_of(0, 1), rank_of(1, 1)], [{"0/0": ["n == 1"]}, {"0/0": ["n == 2"]}])
    assert guards.detail["guard"] == "n == 2" and guards.lost_seconds == 0


def test_data_survives_json() -> None:
    finding = Finding("graph_break", "a.py", 3, detail={"gb": "GB0059"})
    seen = Observation(findings=[finding], frames=[Frame("0/0", "f", "a.py", 1)], timing=Timing(2.0, 1.0, 0.1, 9))
    assert Observation.from_dict(seen.to_dict()) == seen
    trial = Trial(finding, "capture_scalar_outputs", "setting", gain_seconds=1.0, kept=True, why="faster")
    assert Trial.from_dict(trial.to_dict()) == trial


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 3), st.integers(1, 3)), max_size=12), st.randoms())
def test_findings_are_ranked_by_seconds_and_always_alike(rows: list[tuple[float, int, int]], random: Any) -> None:
    findings = [Finding("graph_break", "a.py", line, calls=calls, lost_seconds=lost) for lost, calls, line in rows]
    first = ranked(findings)
    random.shuffle(findings)
    assert [one.to_dict() for one in ranked(findings)] == [one.to_dict() for one in first]
    losses = [one.lost_seconds for one in first]
    assert losses == sorted(losses, reverse=True)


def test_what_is_said_follows_from_the_figures() -> None:
    """The verdict, the fix's fields of a trial, and the budget."""
    finding = Finding("graph_break", "/a/train.py", 3, "print(x)", lost_seconds=2.0, detail={"gb": "GB0059"})
    seen = Observation(findings=[finding], breaks=1, wall_seconds=10.0, timing=Timing(0.4, 0.1, 0.01, 9, 30.0))
    seen.timing.break_even_step = break_even(30.0, seen.timing)  # type: ignore[union-attr, arg-type]
    assert "4.00 times as fast as an eager one; compiling pays from step 100 on" in verdict(seen)
    assert "1 graph break loses up to 2 s of 10 s, most by a graph break at train.py:3" in verdict(seen)
    assert "print" in advice(finding) and "Nothing to fix" in verdict(Observation())
    kept = Trial(
        finding, "reorderable_logging_functions", "setting", error=1e-7, gain_seconds=1.5, kept=True, why="faster"
    )
    refused = Trial(finding, "nested_graph_breaks", "setting", gain_seconds=9.0, why="outputs differ")
    (one,) = document(seen, [refused, kept])["findings"]
    assert (one["fix"], one["kept"], one["error"], one["gain"]) == ("reorderable_logging_functions", True, 1e-7, 1.5)
    assert len(one["trials"]) == 2
    assert over_budget(seen, {"breaks": 0, "recompiles": 0}) == ["1 breaks, 0 allowed"]
    assert over_budget(seen, {"breaks": 1, "fallbacks": 0}) == []


@pytest.mark.parametrize(
    ("text", "version"), [("2.13.0+cpu", (2, 13)), ("2.11", (2, 11)), ("3.0a0", (3, 0)), ("x", (0, 0))]
)
def test_versions_are_read(text: str, version: tuple[int, int]) -> None:
    if text != "3.0a0":
        assert parse_version(text) == version
    with pytest.raises(UserError, match=r"the doctor needs torch 99\.0 to 99\.1, this is 2\."):
        require_torch((99, 0), (99, 1), "the doctor")
    assert require_torch((2, 0), (99, 0)) == parse_version(torch.__version__)


def test_a_container_of_torch_nn_has_its_own_name() -> None:
    """Dynamo puts a frame of its own around it; nobody wrote `wrap_inline`."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    with Observer() as observer:
        compiled = torch.compile(model, backend="eager")
        compiled(torch.ones(2, 4))
    observation = observer.observation()
    assert [one["name"] for one in observation.entries] == ["Sequential"]
    assert {frame.function for frame in observation.frames} == {"Sequential"}


def test_a_break_in_pythons_own_library_is_put_where_it_was_called() -> None:
    """`logging.warning` breaks inside logging; the line to look at is the one that logs."""

    def report(x: Any) -> Any:
        y = x + 1
        logging.warning("a line")
        return y * 2

    with Observer() as observer:
        torch.compile(report, backend="eager")(torch.ones(2))
    (found,) = [one for one in observer.observation().findings if one.kind == "graph_break"]
    assert (found.file, found.code) == (HERE, 'logging.warning("a line")')
    assert "logging" in found.reason and found.function.endswith("report")
