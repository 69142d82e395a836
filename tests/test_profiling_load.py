"""Reading traces: exact times, every schema, and one clear line for what is no trace."""

from __future__ import annotations

import gzip
import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.decimal_time import microseconds_to_ns
from ridgeline.profiling.load import find_traces, load_table, load_tables, parse_table
from ridgeline.profiling.table import Kind, TraceTable, kind_of

EVENT = '{"ph":"X","cat":"cpu_op","name":"aten::mm","pid":1,"tid":1,"ts":%s,"dur":%s}'


def exact(text: str) -> int:
    """The oracle: Python's decimal arithmetic."""
    return int((Decimal(text) * 1000).to_integral_value(rounding=ROUND_HALF_UP))


DECIMALS = st.one_of(
    st.integers(0, 2**50).map(str),
    st.builds(lambda whole, part: f"{whole}.{part}", st.integers(0, 2**51), st.integers(0, 10**6).map(str)),
    st.builds(lambda whole, part: f"{whole}.{part:03d}", st.integers(0, 9 * 10**15), st.integers(0, 999)),
    st.floats(0, 1e15, allow_nan=False).map(repr),
    st.builds(
        lambda whole, part: f"{whole}.{part}", st.integers(0, 9 * 10**15), st.text("0123456789", min_size=1, max_size=4)
    ),
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
        ("mtia_runtime", Kind.RUNTIME),
        ("mtia_ccp_events", Kind.KERNEL),
        ("mtia_insight", Kind.DEVICE_OTHER),
        ("collective_comm", Kind.DEVICE_OTHER),
        ("hpu_op", Kind.RUNTIME),
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


def event(name: str, category: str | None, pid: object, start: float, **args: object) -> dict:
    """A complete event of 5 us."""
    made = {"ph": "X", "name": name, "pid": pid, "tid": 7, "ts": start, "dur": 5, "args": args}
    return made if category is None else {**made, "cat": category}


def label(pid: object, name: str) -> dict:
    """The name of a process."""
    return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}


def table_of(events: list[dict], **top: object) -> TraceTable:
    """Their table."""
    return parse_table(json.dumps({**top, "traceEvents": events}).encode(), "t.json")


def test_folder_glob_list_and_zstd(tmp_path: Path) -> None:
    """Everything a user may name; a file is told apart by its content, several compressed members are one text."""
    document = ('{"traceEvents":[' + EVENT % (10, 5) + "]}").encode()
    (tmp_path / "rank0.json").write_bytes(document)
    (tmp_path / "rank1.json.gz").write_bytes(gzip.compress(document[:30]) + gzip.compress(document[30:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "rank2.json.zst").write_bytes(compress(document[:30]) + compress(document[30:]))
    (tmp_path / "rank3.json").write_bytes(gzip.compress(document))
    (tmp_path / "notes.txt").write_text("no trace")
    for where in (
        tmp_path,
        str(tmp_path / "rank*"),
        sorted(tmp_path.glob("rank*")),
        [tmp_path, tmp_path / "rank0.json"],
    ):
        tables = load_tables(where)
        assert [table.meta.rank for table in tables] == [0, 1, 2, 3]
        assert [table.start.tolist() for table in tables] == [[10_000]] * 4
    with pytest.raises(UserError, match="no file matches"):
        load_tables(str(tmp_path / "nothing*.json"))


def test_a_cut_trace_gives_its_whole_events(tmp_path: Path) -> None:
    """Cut anywhere, as text or as gzip, what came before the cut is there, and the report says where it ends."""
    document = (
        '{"distributedInfo":{"rank":4},"traceEvents":[' + ",".join(EVENT % (at, 1) for at in range(500))
    ).encode()
    table = parse_table(document[: document.index(EVENT.encode()[:20], 9000) - 7], "t.json")
    assert table.start.tolist() == [1000 * at for at in range(len(table))] and 90 < len(table) < 130
    assert (table.meta.rank, table.meta.repairs) == (4, (f"cut off after {len(table)} events",))
    noise = bytes(range(256)) * 8
    (tmp_path / "rank5.json.gz").write_bytes(gzip.compress(document, 1)[:-300])
    (tmp_path / "rank6.json.gz").write_bytes(gzip.compress(document, 1)[:-300] + noise)
    cut, noisy = load_tables(tmp_path)
    assert cut.start.tolist() == [1000 * at for at in range(len(cut))]
    for damaged in (cut, noisy):  # what noise decompresses to may pass for an event, so the second has a few strangers
        assert len({1000 * at for at in range(500)} & set(damaged.start.tolist())) > 50
        assert any("gzip stream is cut off or damaged" in one for one in damaged.meta.repairs)
        assert any(one.startswith("cut off after") for one in damaged.meta.repairs)


@pytest.mark.parametrize(
    ("bad", "repair"),
    [
        ('{"ph":"X","cat":"cpu_op","name":"x","pid":1,"tid":1,"ts":1,"dur":[1}', "1 damaged events left out"),
        ('{"ph":5,"cat":"cpu_op","name":"x","pid":1,"tid":1,"ts":1,"dur":1}', "1 damaged events left out"),
        (EVENT % ('"soon"', 1), "1 events without a readable time left out"),
        (EVENT % ("1" * 40, 1), "1 events without a readable time left out"),
        (EVENT % (1, "null"), "1 events without a readable time left out"),
        (EVENT % (1, "1e400"), "1 events without a readable time left out"),
    ],
)
def test_one_bad_event_does_not_cost_the_others(bad: str, repair: str) -> None:
    """It is left out and counted; the hundred around it, and the keys after them, are read."""
    events = [EVENT % (at, 1) for at in range(10, 110)]
    document = '{"traceEvents":[' + ",".join([*events[:50], bad, *events[50:]]) + '],"distributedInfo":{"rank":2}}'
    table = parse_table(document.encode(), "t.json")
    assert table.start.tolist() == [1000 * at for at in range(10, 110)]
    assert table.meta.rank == 2
    assert repair in table.meta.repairs


def test_order_duplicates_and_negative_durations() -> None:
    """The order of a file means nothing; an event merged in twice counts once; an end before its start stays visible."""
    events = [event(f"k{at}", "kernel", 0, at, correlation=at, device=0, stream=7) for at in range(20)]
    table = table_of([*events[::-1], *events[3:9]])
    assert table.start.tolist() == [1000 * at for at in range(20)]
    assert table.meta.repairs == ("6 duplicated events left out",)
    assert table_of(events).meta.repairs == ()
    backwards = table_of([{**events[1], "dur": -3}, *events[2:]])
    assert backwards.duration.tolist() == [-3000] + [5000] * 18
    alike = [{**event("f", "cpu_op", 1, 3), "args": {}, "dur": 0}] * 2
    for one in alike:
        one.pop("args", None)
    assert len(table_of(alike)) == 2


def test_lawful_oddities() -> None:
    """A comma before the end, a byte order mark, a list never closed (Chrome allows it), one file after another."""
    events = EVENT % (1, 1) + "," + EVENT % (2, 1)
    comma = parse_table(('{"traceEvents":[' + events + ', ],"distributedInfo":{"rank":1}}').encode(), "t.json")
    assert (len(comma), comma.meta.rank, comma.meta.repairs) == (2, 1, ("a comma before the end of the events",))
    assert len(parse_table(b"\xef\xbb\xbf[" + events.encode() + b"]", "t.json")) == 2
    unclosed = parse_table(("[" + events).encode(), "t.json")
    assert (len(unclosed), unclosed.meta.repairs) == (2, ("cut off after 2 events",))
    twice = parse_table(('{"traceEvents":[' + events + "]}" + '{"traceEvents":[' + events + "]}").encode(), "t.json")
    assert len(twice) == 2 and "keys around the events are damaged" in twice.meta.repairs[0]


def merged(name: object, **args: object) -> list[dict]:
    """One rank's part: an op, its launch and its kernel, with ids that the other rank uses too."""
    host, device = (name(83), name(0)) if callable(name) else name  # type: ignore[misc]
    return [
        event("aten::mm", "cpu_op", host, 1, **args),
        event("cudaLaunchKernel", "cuda_runtime", host, 2, correlation=9, **args),
        event("gemm", "kernel", device, 5, correlation=9, device=0, stream=7, **args),
    ]


@pytest.mark.parametrize(
    "parts",
    [
        # SGLang's merger puts the parallel ranks before the process id.
        [merged(lambda pid: f"[TP00-DP00] {pid}"), merged(lambda pid: f"[TP01-DP00] {pid}")],
        # TraceLens' fusion moves the ids apart, writes the rank into the arguments, and names the processes.
        [
            [*merged((83, 1), rank=0, pid_raw=83), label(83, "RANK 0 - CPU"), label(1, "RANK 0 - GPU")],
            [*merged((1083, 1001), rank=1, pid_raw=83), label(1083, "RANK 1 - CPU"), label(1001, "RANK 1 - GPU")],
        ],
        [merged((83, 1), rank=0, pid_raw=83), merged((1083, 1001), rank=1, pid_raw=83)],
        # By hand: the rank in the process id, or in the name of the process.
        [merged(lambda pid: f"rank0: {pid}"), merged(lambda pid: f"rank 1: {pid}")],
        [
            [*merged((83, 1)), label(83, "Rank 0"), label(1, "Rank 0 GPU")],
            [*merged((5, 6)), label(5, "Rank 1"), label(6, "Rank 1")],
        ],
    ],
    ids=["sglang", "tracelens", "tracelens without names", "process id", "process name"],
)
def test_a_merged_file_is_split_by_rank(parts: list[list[dict]], tmp_path: Path) -> None:
    """Each rank gets its own rows, so equal correlation ids never meet; the report says how the file was read."""
    (tmp_path / "all.json").write_text(
        json.dumps({"traceEvents": [*parts[1], *parts[0], event("x", "cpu_op", "Spans", 1)]})
    )
    tables = load_tables(tmp_path)
    assert [table.meta.rank for table in tables] == [0, 1]
    for table in tables:
        assert [table.names[code] for code in table.name.tolist()] == ["aten::mm", "cudaLaunchKernel", "gemm"]
        assert "a merged file of 2 ranks" in table.meta.repairs[0]
        assert "1 events of processes without a rank left out" in table.meta.repairs[0]
    (tmp_path / "all.json").write_text(json.dumps({"traceEvents": parts[0]}))
    assert len(load_tables(tmp_path)) == 1


def test_rows_of_other_accelerators_are_kept_and_said() -> None:
    """MTIA's rows by their category; an Ascend NPU writes none, and is known by the name of its process."""
    ascend = [
        label(3, "Ascend Hardware"),
        event("MatMulV2", None, 3, 1, **{"Task Type": "AI_CORE", "Physic Stream Id": 4}),
        event("SDMA", None, 3, 10, **{"Task Type": "SDMA", "Physic Stream Id": 11}),
        event("EVENT_WAIT", None, 3, 20, **{"Task Type": "EVENT_WAIT"}),
        event("Computing", None, 9, 1),
    ]
    table = table_of(ascend)
    kinds = {table.names[code]: Kind(int(kind)) for code, kind in zip(table.name.tolist(), table.kind, strict=True)}
    assert kinds == {
        "MatMulV2": Kind.KERNEL,
        "SDMA": Kind.MEMCPY,
        "EVENT_WAIT": Kind.DEVICE_OTHER,
        "Computing": Kind.OTHER,
    }
    assert table.stream[table.device_rows].tolist() == [4, 11, -1]
    assert table.meta.repairs == ("1 device events of a kind we do not know are kept as such",)
    mtia = table_of([event("fc", "mtia_ccp_events", 0, 1), event("x", "mtia_insight", 0, 9)])
    assert mtia.kind.tolist() == [Kind.KERNEL, Kind.DEVICE_OTHER]


@pytest.mark.parametrize("others", [[3], [3, "4"], [3, 7.5], [3, None], [3, 2**70]], ids=repr)
def test_ids_mean_the_same_whatever_stands_beside_them(others: list[object]) -> None:
    """Non-negative integers and digits in quotes are ids, all else is none; odd ids are decoded another way."""
    ids = [0, 5, -3, *others]
    made = [{"ph": "X", "cat": "cuda_runtime", "name": "l", "pid": 1, "tid": 1, "ts": at, "dur": 1} for at in range(9)]
    events = [{**one, "args": {"correlation": value}} for one, value in zip(made, ids, strict=False)]
    table = parse_table(json.dumps({"traceEvents": [*events, made[8]]}).encode(), "a.json")
    meant = [int(one) if isinstance(one, (int, str)) and 0 <= int(one) < 2**63 else -1 for one in ids]
    assert table.correlation.tolist() == [*meant, -1]


def test_marks_are_made_when_somebody_looks() -> None:
    """In time order, from a list in any order; one without a readable time is left out and counted."""
    made = [("i", 5, "b"), ("C", 3, "counter"), ("I", 5, "a"), ("i", "soon", "lost")]
    events = [
        {"ph": phase, "cat": "x", "name": name, "pid": 1, "tid": "t", "ts": ts, "args": {"at": at}}
        for at, (phase, ts, name) in enumerate(made)
    ]
    op = {"ph": "X", "cat": "cpu_op", "name": "mm", "pid": 1, "tid": 1, "ts": 1, "dur": 1}
    table = parse_table(json.dumps({"baseTimeNanoseconds": 7, "traceEvents": [*events, op]}).encode(), "a.json")
    assert len(table.marks) == 3 and table.meta.repairs == ("1 events without a readable time left out",)
    seen = [(one.phase, one.name, one.thread, one.time_ns, json.loads(one.args)) for one in table.marks]
    where = ("1", "t")
    assert seen == [
        ("C", "counter", where, 3007, {"at": 1}),
        ("i", "a", where, 5007, {"at": 2}),
        ("i", "b", where, 5007, {"at": 0}),
    ]
    assert table.marks[0].name == "counter" and table.marks == tuple(table.marks)
