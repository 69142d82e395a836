"""Memory from traces and from snapshots: known answers by hand, identities, and pickles that must be refused."""

from __future__ import annotations

import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.memory import (
    CATEGORIES,
    COLUMNS,
    memory_allocations,
    memory_peak,
    memory_timeline,
    why_empty,
)
from ridgeline.profiling.analyses.oom import explain_oom, why_no_oom
from ridgeline.profiling.analyses.pickles import PickleRefused, plain_pickle, read_plain_pickle
from ridgeline.profiling.analyses.snapshot import (
    read_snapshot,
    snapshot_of,
    snapshot_peak,
    snapshot_segments,
    snapshot_timeline,
    why_no_history,
)
from ridgeline.profiling.load import load_table, parse_table
from ridgeline.profiling.table import TraceTable
from test_profiling_synthetic import event, step, text

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
GIB = 2**30


def memory(at: float, size: int, address: int, total: int | None = None, device: int = 0, order: int = 0) -> dict:
    """One [memory] instant of the profiler, at ``at`` us."""
    args = {"Bytes": size, "Addr": address, "Device Type": 1, "Device Id": device, "Ev Idx": order}
    args |= {"Total Reserved": 10_000} | ({} if total is None else {"Total Allocated": total})
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": at, "s": "t", "args": args}


def table(events: list[dict], stacks: bool = False) -> TraceTable:
    return parse_table(text(events), "rank0.json", stacks)


STEP = [
    step(0, 0, 1000),
    event("aten::mm", "cpu_op", 10, 50),
    event("aten::relu", "cpu_op", 100, 50),
    event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", 400, 100),
    event("aten::mm", "cpu_op", 410, 50),
    event("Optimizer.step#Adam.step", "user_annotation", 600, 100),
    event("aten::zeros_like", "cpu_op", 610, 10),
    memory(20, 100, 1, 1100),  # activation
    memory(110, 40, 2, 1140),  # temporary
    memory(140, -40, 2, 1100),
    memory(420, 300, 3, 1400),  # gradient
    memory(430, 60, 4, 1460),  # temporary
    memory(450, -60, 4, 1400),
    memory(490, -100, 1, 1300),
    memory(615, 500, 5, 1800),  # state
    memory(690, -200, 77, 1600),  # allocated before the capture
    memory(800, -300, 3, 1300),
    memory(900, 7, 6, 1307),  # nobody knows
]


def test_categories_by_lifetime_and_their_operators() -> None:
    """A step made by hand: every allocation has the category, operator and lifetime of its construction."""
    frame = memory_allocations(table(STEP))
    assert frame.columns == list(COLUMNS["memory_allocations"])
    found = {
        row["bytes"]: (row["category"], row["operator"], row["phase"], row["freed_ns"]) for row in frame.to_dicts()
    }
    assert found == {
        100: ("activations", "aten::mm", "forward", 490_000),
        40: ("temporaries", "aten::relu", "forward", 140_000),
        300: ("gradients", "aten::mm", "backward", 800_000),
        60: ("temporaries", "aten::mm", "backward", 450_000),
        500: ("optimizer_state", "aten::zeros_like", "optimizer", None),
        7: ("unknown", None, "forward", None),
    }
    assert all(frame["evidence"])
    assert dict(frame.select("bytes", "at_peak").iter_rows())[500] is True
    assert dict(frame.select("bytes", "at_peak").iter_rows())[100] is False


def test_timeline_and_peak_by_hand() -> None:
    """1,000 bytes stood before; the peak of 1,800 is the gradient, the state and those."""
    made = table(STEP)
    line = memory_timeline(made)
    assert line.columns == list(COLUMNS["memory_timeline"])
    assert line["allocated_bytes"].to_list() == [1100, 1140, 1100, 1400, 1460, 1400, 1300, 1800, 1600, 1300, 1307]
    assert line["unrecorded_bytes"].to_list() == [0] * 11
    assert line["before_capture_bytes"].to_list()[-3:] == [800] * 3
    peak = memory_peak(made)
    assert peak["time_ns"].unique().to_list() == [615_000]
    assert sorted(peak.select("category", "bytes").rows()) == [
        ("before_capture", 1000),
        ("gradients", 300),
        ("optimizer_state", 500),
    ]
    assert peak["share"].sum() == pytest.approx(1)


def test_place_is_the_users_line_when_stacks_are_loaded() -> None:
    """Library frames are passed over; without stacks the operators around it are named."""
    frames = [
        event("train.py(40): step", "python_function", 5, 200),
        event("torch/nn/functional.py(12): relu", "python_function", 90, 80),
        event("<built-in method relu>", "python_function", 95, 70),
    ]
    by_bytes = dict(memory_allocations(table(STEP + frames, stacks=True)).select("bytes", "where").iter_rows())
    assert by_bytes[40] == "train.py(40): step"
    assert by_bytes[300] == "autograd::engine::evaluate_function: MmBackward0 > aten::mm"
    assert dict(memory_allocations(table(STEP)).select("bytes", "where").iter_rows())[40] == "aten::relu"


def test_a_reused_output_of_the_last_step_is_not_a_temporary_of_its_phase() -> None:
    """Made in one forward and released in the next one: it outlived a backward, so nothing is claimed."""
    events = [*STEP, memory(150, 33, 9), memory(950, -33, 9)]
    row = memory_allocations(table(events)).filter(pl.col("bytes") == 33).row(0, named=True)
    assert row["category"] == "unknown"


def test_no_memory_events_says_so() -> None:
    """Empty frames with their columns, and a sentence."""
    bare = table(STEP[:3])
    for name, frame in (
        ("memory_timeline", memory_timeline(bare)),
        ("memory_allocations", memory_allocations(bare)),
        ("memory_peak", memory_peak(bare)),
    ):
        assert frame.is_empty() and frame.columns == list(COLUMNS[name])
    assert "profile_memory" in (why_empty(bare) or "") and why_empty(table(STEP)) is None


@st.composite
def histories(draw: Any) -> list[tuple[int, int, int]]:
    """(address, bytes, device) events in time order: allocations at free addresses, releases of live ones."""
    live: dict[tuple[int, int], int] = {}
    out = []
    for _ in range(draw(st.integers(0, 25))):
        key = (draw(st.integers(1, 5)), draw(st.integers(0, 1)))
        size = -live.pop(key) if key in live else draw(st.integers(1, 1000))
        if size > 0:
            live[key] = size
        out.append((key[0], size, key[1]))
    return out


@settings(max_examples=40, deadline=None)
@given(history=histories(), shift=st.integers(0, 10**6), seed=st.randoms(use_true_random=False))
def test_timeline_identities(history: list, shift: int, seed: random.Random) -> None:
    """Categories sum to the whole, the whole is a replay of the events, the peak's rows sum to its maximum; order in
    the file and a shift of time change nothing."""
    marks = [memory(at * 50, size, address, None, dev) for at, (address, size, dev) in enumerate(history)]
    events = [*STEP[:7], *marks]
    line = memory_timeline(table(events))
    assert (line.select(pl.sum_horizontal(f"{name}_bytes" for name in CATEGORIES)).to_series()).equals(
        line["allocated_bytes"].alias("sum"), check_names=False
    )
    for device in (0, 1):
        held, replay = 0, []
        for _, size, dev in history:
            if dev == device:
                held += size
                replay.append(held)
        here = line.filter(pl.col("device") == f"cuda:{device}")
        assert here["allocated_bytes"].to_list() == replay
        peak = memory_peak(table(events)).filter(pl.col("device") == f"cuda:{device}")
        assert peak["bytes"].sum() == max(replay, default=0)
    moved = [{**one, "ts": one["ts"] + shift} for one in seed.sample(events, len(events))]
    assert memory_timeline(table(moved)).drop("time_ns").equals(line.drop("time_ns"))


@needs_traces
def test_real_trace_agrees_with_the_allocators_own_total() -> None:
    """On a whole capture our running sum is the allocator's figure at every one of 236 events."""
    real = load_table(TRACES / "tracelens/h100/gaunernst_bert-small-uncased__1016001.json.gz")
    line = memory_timeline(real)
    cuda = line.filter(pl.col("device").str.starts_with("cuda"))
    assert line.height == 236
    assert cuda["unrecorded_bytes"].abs().max() == 0
    assert memory_peak(real).filter(pl.col("device") == "cuda:0")["bytes"].sum() == cuda["allocated_bytes"].max()


# Snapshots


def frame(file: str, line: int, name: str) -> dict:
    return {"filename": file, "line": line, "name": name}


LIBRARY = [frame("/x/site-packages/torch/nn/modules/linear.py", 134, "forward")]
MODEL, LOSS = [*LIBRARY, frame("model.py", 88, "attention")], [frame("train.py", 12, "loss")]


def entry(action: str, address: int, size: int, at: int, frames: list | None = None, **more: Any) -> dict:
    """One history entry as torch 2.11 to 2.13 write it."""
    made = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": at, "frames": frames or []}
    return {**made, "compile_context": "N/A", "user_metadata": "", "pool_id": (0, 0), **more}


def block(address: int, size: int, state: str, asked: int = 0, frames: list | None = None) -> dict:
    return {"address": address, "size": size, "requested_size": asked, "state": state, "frames": frames or []}


def segment(address: int, blocks: list[dict], device: int = 0) -> dict:
    size = sum(one["size"] for one in blocks)
    active = sum(one["size"] for one in blocks if one["state"] != "inactive")
    kind = {"segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False, "stream": 0}
    sizes = {"total_size": size, "allocated_size": active, "active_size": active, "requested_size": active}
    return {"device": device, "address": address, **kind, **sizes, "blocks": blocks, "frames": []}


def snapshot_dict() -> dict:
    """Weights of 300 from before; 600 of activations of which 200 are released; a request for 900 fails with 100 free.

    At the end: [weights 300 | free 200 | activation 400(390 asked)] and a wholly free segment of 128.
    """
    base = 10_000
    weights = block(base, 300, "active_allocated", 300, LOSS)
    kept = block(base + 500, 400, "active_allocated", 390, MODEL)
    return {
        "segments": [
            segment(base, [weights, block(base + 300, 200, "inactive"), kept]),
            segment(50_000, [block(50_000, 128, "inactive")]),
        ],
        "device_traces": [
            [
                entry("alloc", base + 300, 200, 1, MODEL),
                entry("alloc", base + 500, 390, 2, MODEL),
                entry("free_requested", base + 700_000, 50, 3),
                entry("free_completed", base + 700_000, 50, 3),
                entry("segment_alloc", 50_000, 128, 4),
                entry("alloc", 50_000, 120, 4, LOSS),
                entry("free_requested", 50_000, 120, 5),
                entry("free_requested", base + 300, 200, 6),
                {key: value for key, value in entry("oom", 0, 900, 7, MODEL, device_free=100).items() if key != "addr"},
            ],
            [],
        ],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "expandable_segments": False},
        "external_annotations": [],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_snapshot_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    """What pickle wrote is what we read, in every protocol torch may use."""
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot_dict(), protocol=protocol))
    assert read_plain_pickle(path) == snapshot_dict()
    line = snapshot_timeline(read_snapshot(path))
    # At the end 690 asked for; backwards through the history there were 350 before it.
    assert line["allocated_bytes"].to_list() == [550, 940, 890, 890, 890, 1010, 890, 690, 690]
    assert line["reserved_bytes"].to_list() == [900] * 4 + [1028] * 5
    assert line["time_ns"].to_list()[:2] == [1000, 2000]


def test_snapshot_peak_is_explained_to_the_byte() -> None:
    """The peak of 1,010: both activations, the loss, the weights, and 0 of the tensor released before."""
    peak = snapshot_peak(snapshot_of(snapshot_dict(), "s"))
    assert peak.filter(pl.col("device") == "cuda:0").select("where", "count", "bytes").rows() == [
        ("model.py:88 attention", 2, 590),
        ("train.py:12 loss", 2, 420),
    ]
    assert peak["share"].sum() == pytest.approx(1)
    assert "linear.py:134 forward" in peak["stack"][0]


def test_snapshot_segments_by_hand() -> None:
    """Free bytes between live tensors are trapped; a wholly free segment's are not."""
    assert snapshot_segments(snapshot_of(snapshot_dict(), "s")).select(
        "total_bytes", "active_bytes", "free_bytes", "largest_free_bytes", "rounding_bytes", "trapped_bytes"
    ).rows() == [(900, 700, 200, 200, 10, 200), (128, 0, 128, 128, 0, 0)]


def test_oom_for_want_of_memory() -> None:
    """900 asked, 100 on the device and 128 to return: 672 had to go; the two largest holders have 690."""
    report = explain_oom(snapshot_of(snapshot_dict(), "s"))
    assert report is not None
    assert (report.requested_bytes, report.device_free_bytes, report.missing_bytes) == (900, 100, 672)
    assert (report.allocated_bytes, report.reserved_bytes, report.fragmented) == (690, 1028, False)
    assert report.enough == 2
    assert report.holders["where"].to_list() == ["model.py:88 attention", "train.py:12 loss"]
    assert "model.py:88" in " ".join(report.sentences) and report.to_dict()["holders"][0]["bytes"] == 390


def test_oom_from_fragmentation() -> None:
    """Enough is cached, but in two pieces between live tensors: the cure named is another."""
    live = [block(at * 200, 100, "active_allocated", 100, MODEL) for at in range(3)]
    holes = [block(at * 200 + 100, 100, "inactive") for at in range(2)]
    blocks = sorted(live + holes, key=lambda one: one["address"])
    made = {
        "segments": [segment(0, blocks)],
        "device_traces": [[entry("oom", 0, 150, 1, device_free=0)]],
    }
    report = explain_oom(snapshot_of(made, "s"))
    assert report is not None and report.fragmented and report.largest_free_block_bytes == 100
    assert any("expandable_segments" in one for one in report.sentences)


def test_snapshot_without_history_or_oom_says_so() -> None:
    """State alone still gives holders and segments."""
    state = snapshot_of({**snapshot_dict(), "device_traces": []}, "s")
    assert why_no_history(state) and why_no_oom(state) and explain_oom(state) is None
    assert snapshot_peak(state)["bytes"].sum() == 690
    assert snapshot_timeline(state).is_empty()
    whole = snapshot_of(snapshot_dict(), "s")
    assert why_no_history(whole) is None and why_no_oom(whole) is None


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"segments": 3},
        {"segments": [3]},
        {"segments": [{"address": 1}]},
        {"segments": [], "device_traces": [[{"action": "alloc", "size": "x"}]]},
        {"segments": [], "device_traces": [3]},
        {"segments": [], "device_traces": 3},
    ],
)
def test_what_is_no_snapshot_is_refused_in_one_line(broken: Any, tmp_path: Path) -> None:
    """Plain data of another form."""
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(broken))
    with pytest.raises(UserError) as refused:
        read_snapshot(path)
    assert "\n" not in str(refused.value) and "s.pickle" in str(refused.value)


class _Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple:
        return self.call, self.args


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(tmp_path: Path, protocol: int) -> None:
    """os.system by reduce, at any depth; the file it would make is not there."""
    mark = tmp_path / "executed"
    bad = {"segments": [{"x": _Evil(os.system, f"touch {mark}")}], "device_traces": []}
    path = tmp_path / "bad.pickle"
    path.write_bytes(pickle.dumps(bad, protocol=protocol))
    with pytest.raises(UserError, match="refused: ") as refused:
        read_snapshot(path)
    assert not mark.exists() and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"cos\nsystem\n.",
        b"\x80\x04.",
        b"\x80\x04K\x01K\x02.",
        b"\x80\x04(.",
        b"\x80\x04h\x05.",
        b"\x80\x04a.",
        b"\x80\x04]K\x01s.",
        b"\x80\x04}](K\x01K\x02u.",
        b"\x80\x04}(]K\x01u.",
        b"\x80\x04}(K\x01K\x02u.",
        b"\x80\x04\x8c\x02\xff\xff.",
        b"\x80\x04\xff.",
        b"\x80\x02X\xff\xff\xff\xffab.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"ab.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"ab.",
        b"\x80\x04\x8b" + struct.pack("<i", 2**30) + b"1.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x82\x01.",
        b"\x80\x04Pa\n.",
        b"\x80\x04I5\n.",
        pickle.dumps({1: 2}),
        pickle.dumps({1, 2}, 4),
        pickle.dumps(2**80, 4),
    ],
)
def test_damaged_and_boundless_pickles_are_refused(data: bytes) -> None:
    """Cut, nonsense, claims of sizes beyond the file, persistent ids, extensions, sets: one line each, at once."""
    with pytest.raises(PickleRefused) as refused:
        plain_pickle(data)
    assert "\n" not in str(refused.value)


def test_bombs_take_no_memory() -> None:
    """A memo index of 4 billion is a key and nothing more; lists that contain each other a billionfold are refused
    by count before anything walks them; deep nesting has a limit."""
    assert plain_pickle(b"\x80\x02]r\xff\xff\xff\xff.") == []
    laughs: list = [entry("alloc", 1, 1, 1)] * 1000
    bomb = {"segments": [], "device_traces": [laughs] * 1000}
    data = pickle.dumps(bomb, 4)
    with pytest.raises(UserError, match="more entries"):
        snapshot_of(plain_pickle(data), "bomb", len(data))
    with pytest.raises(PickleRefused, match="nested too deeply"):
        plain_pickle(b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".")
    with pytest.raises(PickleRefused, match="nested too deeply"):
        plain_pickle(b"\x80\x04" + b"(" * 200_000 + b".")


@settings(max_examples=60, deadline=None)
@given(seed=st.randoms(use_true_random=False), protocol=st.sampled_from([2, 4]))
def test_mutated_snapshots_are_read_or_refused(seed: random.Random, protocol: int) -> None:
    """Random damage gives a value or a refusal, never another exception."""
    data = bytearray(pickle.dumps(snapshot_dict(), protocol))
    for _ in range(seed.randint(1, 6)):
        data[seed.randrange(2, len(data))] = seed.randrange(256)
    try:
        made = snapshot_of(plain_pickle(bytes(data)), "mutated", len(data))
        snapshot_timeline(made), snapshot_peak(made), snapshot_segments(made), explain_oom(made)
    except (PickleRefused, UserError) as error:
        assert "\n" not in str(error)
