"""Who wrote and who read each tensor: execution traces made by hand and by torch, and what memory events alone say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.dataflow import COLUMNS, ROLES, tensor_flow, why_empty
from ridgeline.profiling.analyses.execution import Node, effects, load_execution_trace
from ridgeline.profiling.analyses.flow_findings import flow_findings
from ridgeline.profiling.load import load_table, parse_table
from test_profiling_memory import STEP, memory
from test_profiling_synthetic import event, text

ADD = "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor"
ADD_ = "aten::add_.Tensor(Tensor(a!) self, Tensor other, *, Scalar alpha=1) -> Tensor(a!)"
MUL_ = "aten::mul_.Tensor(Tensor(a!) self, Tensor other) -> Tensor(a!)"
MM = "aten::mm(Tensor self, Tensor mat2) -> Tensor"
GELU = "aten::gelu(Tensor self, *, str approximate='none') -> Tensor"
VIEW = "aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)"
EMPTY = "aten::empty_like(Tensor self, *, ScalarType? dtype=None) -> Tensor"
COPY = "aten::copy_(Tensor(a!) self, Tensor src, bool non_blocking=False) -> Tensor(a!)"
CLONE = "aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor"


class Graph:
    """An execution trace made by hand; every tensor has 256 float elements unless it says otherwise."""

    def __init__(self) -> None:
        self.nodes: list[dict] = []
        self.next_id = 10

    def node(
        self, name: str, inputs: list[int], outputs: list[int], schema: str = "", parent: int = 1, **more: Any
    ) -> int:
        """Append a node; tensors are given by their storage."""
        made = more.get("id") or self.new_id()
        kind, step = more.get("dtype", "float"), more.get("stride", 1)

        def side(storages: list[int]) -> dict:
            return {
                "values": [[storage + 1000, storage, 0, 256, 4, "cpu"] for storage in storages],
                "shapes": [[256]] * len(storages),
                "types": [f"Tensor({kind})"] * len(storages),
                "strides": [[step]] * len(storages),
            }

        attrs = [{"name": "op_schema", "type": "string", "value": schema}]
        attrs.append({"name": "rf_id", "type": "uint64", "value": more.get("rf_id", 0)})
        self.nodes.append(
            {
                "id": made,
                "name": name,
                "ctrl_deps": parent,
                "inputs": side(inputs),
                "outputs": side(outputs),
                "attrs": attrs,
            }
        )
        return made

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def load(self) -> list[Node]:
        return msgspec.json.decode(json.dumps(self.nodes).encode(), type=list[Node])


def training() -> Graph:
    """x1, w2 -> mm -> 3 -> gelu -> 4; backward reads 3 and writes 5, the gradient; the optimizer changes w2 with it."""
    graph = Graph()
    graph.node("aten::mm", [1, 2], [3], MM)
    graph.node("aten::gelu", [3], [4], GELU)
    back = graph.new_id()
    graph.node("aten::mm", [3, 4], [5], MM, parent=back)
    graph.node("torch::autograd::AccumulateGrad", [5], [], parent=back)
    graph.node("autograd::engine::evaluate_function: MmBackward0", [], [], id=back)
    step = graph.new_id()
    graph.node("aten::add", [5, 6], [7], ADD, parent=step)
    graph.node("aten::add_", [6, 5], [6], ADD_, parent=step)
    graph.node("aten::add_", [2, 7], [2], ADD_, parent=step)
    graph.node("Optimizer.step#SGD.step", [], [], id=step)
    graph.node("aten::mm", [1, 2], [8], MM)
    last = graph.new_id()
    graph.node("aten::add_", [2, 6], [2], ADD_, parent=last)
    graph.node("Optimizer.step#SGD.step", [], [], id=last)
    return graph


def by_tensor(frame: pl.DataFrame) -> dict[str, dict]:
    return {row["tensor"]: row for row in frame.to_dicts()}


def test_roles_writers_and_readers_by_hand() -> None:
    """Each tensor of a step made by hand: its role follows from who wrote it and who read it."""
    frame = tensor_flow(training().load())
    assert frame.columns == list(COLUMNS["tensor_flow"])
    rows = by_tensor(frame)
    assert {name: row["role"] for name, row in rows.items()} == {
        "1.0.0": "input",
        "2.0.0": "parameter",
        "2.0.1": "parameter",
        "2.0.2": "parameter",
        "3.0.0": "activation",
        "4.0.0": "activation",
        "5.0.0": "gradient",
        "6.0.0": "optimizer_state",
        "6.0.1": "optimizer_state",
        "7.0.0": "temporary",
        "8.0.0": "temporary",
    }
    assert set(frame["role"]) <= set(ROLES)
    hidden = rows["3.0.0"]
    assert (hidden["written_by"], hidden["first_read_by"], hidden["last_read_by"]) == (
        "aten::mm",
        "aten::gelu",
        "aten::mm",
    )
    assert (hidden["reads"], hidden["bytes"], hidden["dtype"]) == (2, 1024, "float")
    assert (hidden["written_at"], hidden["last_read_at"]) == (0, 2)
    assert rows["2.0.0"]["written_by"] is None and rows["2.0.1"]["written_by"] == "aten::add_"


def test_innermost_operator_and_views() -> None:
    """A composite neither reads nor writes what its children did; views move nothing; an operator that fills memory
    its child only made is the writer; reused storage ids begin a new life."""
    graph = Graph()
    outer = graph.new_id()
    graph.node("aten::view", [1], [1], VIEW, parent=outer)
    graph.node("aten::mm", [1, 2], [3], MM, parent=outer)
    graph.node("aten::linear", [1, 2], [3], MM, id=outer)
    norm = graph.new_id()
    graph.node("aten::empty_like", [3], [4], EMPTY, parent=norm)
    graph.node("aten::native_layer_norm", [3], [4], GELU, id=norm)
    graph.node("aten::gelu", [4], [3], GELU)
    rows = by_tensor(tensor_flow(graph.load()))
    assert (rows["1.0.0"]["reads"], rows["1.0.0"]["last_read_by"]) == (1, "aten::mm")
    assert rows["3.0.0"]["written_by"] == "aten::mm" and rows["3.0.0"]["last_read_by"] == "aten::native_layer_norm"
    assert rows["4.0.0"]["written_by"] == "aten::native_layer_norm"
    assert rows["3.1.0"]["written_by"] == "aten::gelu"


def test_a_helper_that_writes_before_its_operator_returns() -> None:
    """``aten::addmm`` copies its bias into the result first; with the id of a storage that is gone, that copy is no
    write to the old tensor."""
    graph = Graph()
    graph.node("aten::mm", [1, 2], [3], MM)
    outer = graph.new_id()
    graph.node("aten::copy_", [3, 9], [3], COPY, parent=outer)
    graph.node("aten::addmm", [9, 1, 2], [3], MM, id=outer)
    graph.node("aten::gelu", [3], [4], GELU)
    rows = by_tensor(tensor_flow(graph.load()))
    assert rows["3.0.0"]["reads"] == 0
    assert (rows["3.1.0"]["written_by"], rows["3.1.0"]["last_read_by"]) == ("aten::addmm", "aten::gelu")
    assert "3.0.1" not in rows


def scalars(dtype: str, after: str = "double") -> list[Node]:
    """Backward writes 3 and lets it go; the optimizer then multiplies 6 by a Python number that got its storage's id."""
    graph = Graph()
    back = graph.new_id()
    graph.node("aten::mm", [1, 2], [3], MM, parent=back, dtype=dtype)
    graph.node("autograd::engine::evaluate_function: MmBackward0", [], [], id=back)
    step = graph.new_id()
    graph.node("aten::mul_", [6, 3], [6], MUL_, parent=step)
    number = graph.nodes[-1]["inputs"]
    number["values"][1] = [1003, 3, 0, 1, 8, "cpu"]
    number["shapes"][1], number["strides"][1], number["types"][1] = [], [], f"Tensor({after})"
    graph.node("Optimizer.step#SGD.step", [], [], id=step)
    return graph.load()


@pytest.mark.parametrize(("dtype", "after"), [("float", "double"), ("double", "double"), ("long int", "long int")])
def test_a_python_number_at_the_address_of_a_tensor_that_is_gone(dtype: str, after: str) -> None:
    """No operator makes the tensor that wraps a number; it is not read as the one that had its address before."""
    rows = by_tensor(tensor_flow(scalars(dtype, after)))
    gone = rows.get("3.0.0")
    assert gone is not None and (gone["role"], gone["reads"], gone["bytes"]) == ("temporary", 0, 1024)
    number = rows["3.1.0"]
    assert (number["role"], number["written_by"], number["last_read_by"]) == ("input", None, "aten::mul_")
    assert (number["bytes"], number["dtype"]) == (8, after)


def test_views_in_other_types_and_shapes_are_the_same_tensor() -> None:
    """What a recorded view gives, of whatever type or without dimensions, is still its source."""
    graph = Graph()
    graph.node("aten::mm", [1, 2], [3], MM, dtype="double")
    graph.node("aten::view", [3], [3], VIEW, dtype="double")
    graph.nodes[-1]["outputs"]["types"] = ["Tensor(long int)"]
    graph.node("aten::gelu", [3], [4], GELU, dtype="long int")
    graph.node("aten::select", [3], [3], VIEW, dtype="double")
    graph.nodes[-1]["outputs"].update(shapes=[[]], strides=[[]])
    graph.node("aten::gelu", [3], [5], GELU, dtype="double")
    graph.nodes[-1]["inputs"].update(shapes=[[]], strides=[[]])
    rows = by_tensor(tensor_flow(graph.load()))
    assert rows["3.0.0"]["reads"] == 2 and "3.1.0" not in rows


def copying(used_after: bool = False, written_after: bool = False, **form: Any) -> list[Node]:
    """mm -> 3, cloned into 4, which gelu reads."""
    graph = Graph()
    graph.node("aten::mm", [1, 2], [3], MM)
    clone = graph.new_id()
    graph.node("aten::empty_like", [3], [4], EMPTY, parent=clone, **form)
    graph.node("aten::copy_", [4, 3], [4], COPY, parent=clone)
    if form:
        (to, _) = graph.nodes[-1]["inputs"]["types"], None
        to[0] = f"Tensor({form.get('dtype', 'float')})"
        graph.nodes[-1]["inputs"]["strides"] = [[form.get("stride", 1)], [1]]
    graph.node("aten::clone", [3], [4], CLONE, id=clone)
    graph.node("aten::gelu", [4], [5], GELU)
    if used_after:
        graph.node("aten::gelu", [3], [6], GELU)
    if written_after:
        graph.node("aten::add_", [3, 1], [3], ADD_)
    return graph.load()


def test_needless_copies() -> None:
    """A copy in the form of a source that nothing uses again is named; one that is needed is not."""
    (found,) = flow_findings(copying(), min_bytes=1).filter(pl.col("finding") == "needless copy").to_dicts()
    assert (found["operator"], found["count"], found["bytes"]) == ("aten::clone", 1, 1024)
    assert found["knob"] and "aten::mm" in found["evidence"]
    for needed in (
        copying(used_after=True),
        copying(written_after=True),
        copying(dtype="c10::BFloat16"),
        copying(stride=2),
    ):
        assert flow_findings(needed, min_bytes=1).is_empty()
    assert flow_findings(copying(), min_bytes=1025).is_empty()


def test_recomputation_candidates_are_cheap_and_far() -> None:
    """The activation of gelu qualifies, that of mm does not; neither does a near one."""
    graph = Graph()
    graph.node("aten::mm", [1, 2], [3], MM)
    graph.node("aten::gelu", [3], [4], GELU)
    for _ in range(6):
        graph.node("aten::gelu", [1], [20], GELU)
    back = graph.new_id()
    graph.node("aten::mm", [3, 4], [5], MM, parent=back)
    graph.node("autograd::engine::evaluate_function: MmBackward0", [], [], id=back)
    (row,) = flow_findings(graph.load(), min_bytes=1).to_dicts()
    assert (row["finding"], row["operator"]) == ("recomputation candidate", "aten::gelu")
    assert flow_findings(graph.load(), min_bytes=1, min_share=0.95).is_empty()


def test_with_a_profilers_trace_times_and_releases_are_known() -> None:
    """Joined by record function ids and memory events: kept from the end of the last read to the release."""
    graph = Graph()
    graph.node("aten::mm", [1, 2], [3], MM, rf_id=1)
    graph.node("aten::gelu", [3], [4], GELU, rf_id=2)
    events = [
        event("aten::mm", "cpu_op", 10, 50, **{"Record function id": 1}),
        event("aten::gelu", "cpu_op", 100, 50, **{"Record function id": 2}),
        event("aten::mul", "cpu_op", 800, 100, **{"Record function id": 3}),
        memory(20, 1024, 7),
        memory(110, 1024, 8),
        memory(850, -1024, 7),
    ]
    rows = by_tensor(tensor_flow(graph.load(), parse_table(text(events), "r0.json")))
    hidden = rows["3.0.0"]
    assert (hidden["written_ns"], hidden["last_read_ns"], hidden["freed_ns"]) == (60_000, 150_000, 850_000)
    assert (hidden["lifetime_ns"], hidden["kept_ns"], hidden["released_by"]) == (790_000, 700_000, "aten::mul")
    assert rows["4.0.0"]["freed_ns"] is None
    kept = flow_findings(graph.load(), parse_table(text(events), "r0.json"), min_bytes=1)
    assert kept.select("finding", "operator", "bytes").rows() == [("kept after last read", "aten::mm", 1024)]
    assert flow_findings(graph.load(), parse_table(text(events), "r0.json"), min_bytes=1, min_share=0.9).is_empty()


def test_memory_events_alone() -> None:
    """Writers, releases and roles from the profiler's trace; readers are null and the reason is said."""
    table = parse_table(text(STEP), "rank0.json")
    frame = tensor_flow(None, table)
    assert frame.columns == list(COLUMNS["tensor_flow"])
    row = frame.filter(pl.col("bytes") == 100).row(0, named=True)
    assert (row["role"], row["written_by"], row["lifetime_ns"]) == ("activation", "aten::mm", 470_000)
    assert row["released_by"] == "autograd::engine::evaluate_function: MmBackward0"
    assert frame["last_read_by"].is_null().all()
    assert "ExecutionTraceObserver" in (why_empty(None, table) or "")
    bare = parse_table(text(STEP[:3]), "rank0.json")
    assert tensor_flow(None, bare).is_empty() and "profile_memory" in (why_empty(None, bare) or "")
    assert tensor_flow().is_empty() and why_empty(training().load(), None) is None


def test_schemas() -> None:
    """What changes and what is new, for the forms that schemas take."""
    assert effects(ADD_).changes == {0} and effects(ADD_).fresh == (False,)
    assert effects(MM).changes == frozenset() and effects(MM).fresh == (True,)
    assert effects(VIEW).fresh == (False,)
    many = "aten::_foreach_add_.List(Tensor(a!)[] self, Tensor[] other, *, Scalar alpha=1) -> ()"
    assert effects(many).changes == {0} and effects(many).fresh == ()
    out = "aten::max.dim_max(Tensor self, int dim, bool keepdim=False, *, Tensor(a!) max, Tensor(b!) max_values) -> "
    assert effects(out + "(Tensor(a!) values, Tensor(b!) indices)").changes == {3, 4}
    default = "aten::conv(Tensor input, SymInt[2] stride=[1, 1], Tensor(a!)? bias=None) -> (Tensor, Tensor)"
    assert effects(default).changes == {2} and effects(default).fresh == (True, True)
    assert not effects("").known


@pytest.mark.parametrize("data", [b"", b"[]", b'{"traceEvents": []}', b'{"nodes": 3}', b"\x1f\x8b\x00"])
def test_what_is_no_execution_trace_is_refused(data: bytes, tmp_path: Path) -> None:
    """One line that names the file."""
    path = tmp_path / "et.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"et\.json") as refused:
        load_execution_trace(path)
    assert "\n" not in str(refused.value)


def test_torchs_own_execution_trace(tmp_path: Path) -> None:
    """Two training steps recorded by torch: every parameter and its gradient, both weights' sizes, the needless clone."""
    torch = pytest.importorskip("torch")
    from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 32)
    observer = ExecutionTraceObserver().register_callback(str(tmp_path / "et.json"))
    options = {"record_shapes": True, "profile_memory": True, "execution_trace_observer": observer}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        for _ in range(2):
            (model(x).clone() ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    nodes, table = load_execution_trace(tmp_path / "et.json"), load_table(tmp_path / "trace.json")
    assert why_empty(nodes, table) is None and why_empty(nodes[: len(nodes) // 2], table) is None
    for other in (  # a capture whose calls bear the same numbers, and one whose numbers are past ours
        [msgspec.structs.replace(one, name=f"other::{one.name}") for one in nodes],
        [msgspec.structs.replace(one, attrs=[type(one.attrs[0])("rf_id", 10**9 + one.id)]) for one in nodes],
    ):
        assert "is not of this capture" in (why_empty(other, table) or "")
    frame = tensor_flow(nodes, table)
    sizes = sorted(4 * one.numel() for one in model.parameters())
    of_role = {name: frame.filter(pl.col("role") == name) for name in ROLES}
    assert sorted(of_role["parameter"].filter(pl.col("written_by").is_null())["bytes"]) == sizes
    assert sorted(of_role["gradient"]["bytes"].to_list()) == sorted(sizes * 2)
    assert of_role["gradient"]["last_read_by"].is_not_null().all()
    # Momentum: made in the first step by clone, changed twice in the second.
    assert sorted(of_role["optimizer_state"]["bytes"].unique()) == sorted(set(sizes))
    hidden = of_role["activation"].filter((pl.col("bytes") == 8 * 64 * 4) & (pl.col("written_by") == "aten::addmm"))
    assert hidden.height == 2 and set(hidden["last_read_by"]) == {"aten::gelu_backward"}
    assert hidden["freed_ns"].is_not_null().all()
    copies = flow_findings(nodes, table, min_bytes=1).filter(pl.col("finding") == "needless copy")
    assert ("aten::clone", 2, 2 * 8 * 16 * 4) in copies.select("operator", "count", "bytes").rows()
