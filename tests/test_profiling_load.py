"""Reading traces: exact times, every schema, and one clear line for what is no trace."""

from __future__ import annotations

import gzip
import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.decimal_time import microseconds_to_ns
from ridgeline.profiling.load import find_traces, load_table, parse_table
from ridgeline.profiling.table import Kind, kind_of

EVENT = '{"ph":"X","cat":"cpu_op","name":"aten::mm","pid":1,"tid":1,"ts":%s,"dur":%s}'


def exact(text: str) -> int:
    """The oracle: Python's decimal arithmetic."""
    return int((Decimal(text) * 1000).to_integral_value(rounding=ROUND_HALF_UP))


DECIMALS = st.one_of(
    st.integers(0, 2**50).map(str),
    st.builds(lambda whole, part: f"{whole}.{part}", st.integers(0, 2**51), st.integers(0, 10**6).map(str)),
    st.builds(lambda whole, part: f"{whole}.{part:03d}", st.integers(0, 9 * 10**15), st.integers(0, 999)),
    st.floats(0, 1e15, allow_nan=False).map(repr),
    st.builds(lambda n: f"-{n}.5", st.integers(0, 1000)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(DECIMALS, min_size=1, max_size=20))
def test_times_are_exact(texts: list[str]) -> None:
    """Whatever decimal text a writer leaves, the ns are those of exact arithmetic."""
    assert microseconds_to_ns([t.encode() for t in texts]).tolist() == [exact(t) for t in texts]


def test_epoch_times_keep_their_nanoseconds() -> None:
    """A float64 would lose these: it resolves a quarter of a microsecond at today's epoch."""
    assert microseconds_to_ns([b"1712195495519695.801", b"1712195495519695.999"]).tolist() == [
        1712195495519695801,
        1712195495519695999,
    ]
    with pytest.raises(ValueError, match="not a time"):
        microseconds_to_ns([b"soon"])
    with pytest.raises(ValueError, match="beyond int64"):
        microseconds_to_ns([b"99999999999999999999"])


def test_base_time_is_added() -> None:
    """torch 2.13 writes times relative to a base in ns."""
    data = (
        '{"baseTimeNanoseconds":1790857026000000000,"traceEvents":[' + EVENT % ("4385507933289.879", "31996.452") + "]}"
    )
    table = parse_table(data.encode(), "t.json")
    assert table.start.tolist() == [1790857026000000000 + 4385507933289879]
    assert (table.end - table.start).tolist() == [31996452]


@pytest.mark.parametrize(
    ("category", "kind"),
    [
        ("Operator", Kind.CPU_OP),
        ("cpu_op", Kind.CPU_OP),
        ("Kernel", Kind.KERNEL),
        ("Runtime", Kind.RUNTIME),
        ("cuda_runtime", Kind.RUNTIME),
        ("cuda_driver", Kind.RUNTIME),
        ("hip_runtime", Kind.RUNTIME),
        ("Memcpy", Kind.MEMCPY),
        ("gpu_memset", Kind.MEMSET),
        ("gpu_user_annotation", Kind.GPU_ANNOTATION),
        ("python_function", Kind.PYTHON),
        ("gpu_something_new", Kind.DEVICE_OTHER),
        ("fwdbwd", Kind.OTHER),
        (None, Kind.OTHER),
    ],
)
def test_categories_of_three_generations(category: str | None, kind: Kind) -> None:
    """Normalised at the door."""
    assert kind_of(category) == kind


def test_object_list_gzip_and_whitespace_read_the_same(tmp_path: Path) -> None:
    """Plain Chrome lists and indented or compressed objects are the same trace."""
    events = "[" + ",".join(EVENT % (start, 5) for start in (10, 20.25)) + "]"
    document = json.dumps({"traceEvents": json.loads(events)}, indent=2)
    (tmp_path / "a.json").write_text(events)
    (tmp_path / "b.json").write_text("\n\n " + document)
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(document.encode()))
    tables = [load_table(path) for path in find_traces(tmp_path)]
    assert [t.start.tolist() for t in tables] == [[10_000, 20_250]] * 3
    assert [t.meta.schema for t in tables] == ["list", "object", "object"]


def test_what_is_no_timed_event_is_counted_not_lost() -> None:
    """Metadata, Python stacks and arrows without an end are left out and named; stacks come back when asked for."""
    events = [
        json.loads(EVENT % (1, 2)),
        {"ph": "s", "cat": "fwdbwd", "id": 2**70, "ts": 1, "pid": 1, "tid": 1, "name": "f"},
        {"ph": "M", "name": "process_name", "pid": "Spans", "tid": 0, "args": {"name": "x"}},
        {"ph": "X", "cat": "python_function", "name": "f.py(1): f", "ts": 1, "dur": 2, "pid": 1, "tid": 1},
    ]
    data = json.dumps({"traceEvents": events}).encode()
    table = parse_table(data, "t.json")
    assert len(table) == 1
    assert table.meta.skipped == {"M:": 1, "X:python_function": 1, "unpaired:fwdbwd": 1}
    assert len(parse_table(data, "t.json", stacks=True)) == 2


def test_rank_from_the_file_or_its_name() -> None:
    """``distributedInfo`` may be absent or null."""
    body = '"traceEvents":[' + EVENT % (1, 1) + "]}"
    named = parse_table(('{"distributedInfo":null,' + body).encode(), "/x/rank12.json")
    assert named.meta.rank == 12
    stated = parse_table(('{"distributedInfo":{"rank":3,"world_size":8},' + body).encode(), "/x/rank12.json")
    assert (stated.meta.rank, stated.meta.world) == (3, 8)
    assert parse_table(("{" + body).encode(), "trace.json").meta.rank is None


@pytest.mark.parametrize(
    ("bad", "repair"),
    [
        (b'"name":"aten::mm\x01"', "control characters in strings replaced"),
        (b'"name":"aten::\xff\xfe"', "bytes that are not UTF-8 replaced"),
        (b'"name":"m","args":{"bw":Infinity,"x":[-inf,NaN]}', "NaN and Infinity read as null"),
    ],
)
def test_known_defects_of_writers_are_repaired_and_said(bad: bytes, repair: str) -> None:
    """Seen in real files; each reads, and the report says what was replaced."""
    event = b'{"ph":"X","cat":"cpu_op",' + bad + b',"pid":1,"tid":1,"ts":1.5,"dur":2}'
    table = parse_table(b'{\n\t"traceEvents":[' + event + b"]}", "t.json")
    assert table.start.tolist() == [1_500]
    assert repair in table.meta.repairs


def test_what_is_no_trace_is_one_clear_line(tmp_path: Path) -> None:
    """Text cut in its first event, damaged gzip, other JSON, an empty folder, nothing at all."""
    whole = ('{"traceEvents":[' + EVENT % (1, 1) + "]}").encode()
    (tmp_path / "cut.json").write_bytes(whole[:-30])
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(whole)[:12])
    (tmp_path / "noise.json.gz").write_bytes(b"\x1f\x8b" + b"noise" * 20)
    (tmp_path / "other.json").write_text('{"loss": [1, 2]}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "zero.json").write_bytes(b"")
    (tmp_path / "times.json").write_text('{"traceEvents":[' + EVENT % ('"late"', 1) + "]}")
    (tmp_path / "folder").mkdir()
    says = {
        "cut.json": "not a whole profiler trace",
        "cut.json.gz": "cut off or damaged",
        "noise.json.gz": "cut off or damaged",
        "other.json": "without 'traceEvents'",
        "list.json": "not a whole profiler trace",
        "zero.json": "not a whole profiler trace",
        "times.json": "not a time",
        "absent.json": "no such file",
        "folder": "holds no .json",
    }
    for name, message in says.items():
        with pytest.raises(UserError, match=message) as caught:
            [load_table(path) for path in find_traces(tmp_path / name)]
        assert name in str(caught.value) and "\n" not in str(caught.value)
