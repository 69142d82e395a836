"""``ridgeline trace`` on real and made traces: the contract of its summary, its tables, its one line on bad input."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ridgeline.profiling.analyses.bandwidth import bus_ceilings
from ridgeline.profiling.columns import columns, markdown
from ridgeline.profiling.dump import frames, report_sections
from ridgeline.profiling.explain import explain
from ridgeline.profiling.load import find_traces
from ridgeline.profiling.summary import RANK_KEYS, summarize
from ridgeline.profiling.trace import Trace
from ridgeline.profiling.trust import defects

TRACES = Path(__file__).parents[2] / "shared" / "traces"
FILES = sorted(TRACES.rglob("*.json.gz")) if TRACES.is_dir() else []
needs_traces = pytest.mark.skipif(not FILES, reason="the shared traces are not here")


def trace(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ridgeline", "trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def document(*arguments: str | Path) -> Any:
    done = trace(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def rank_file(folder: Path, rank: int, late_us: float) -> Path:
    """Three steps of 10 ms with one all-reduce each; this rank arrives ``late_us`` after the earliest one could."""
    events = []
    for step in range(3):
        begun = step * 10_000.0
        events += [
            event(f"ProfilerStep#{step}", begun, 10_000, "user_annotation"),
            event("aten::mm", begun + late_us, 4_000),
            event("c10d::allreduce_", begun + late_us + 4_000, 50),
            event(
                "gloo:all_reduce",
                begun + 7_000,
                1_000,
                "user_annotation",
                2,
                **{"Input Dims": [[256]], "Input type": ["float"]},
            ),
            event("aten::add", begun + 8_100, 1_800),
        ]
    target = folder / f"rank{rank}.json.gz"
    info = {"rank": rank, "world_size": 2, "backend": "gloo"}
    target.write_bytes(gzip.compress(json.dumps({"distributedInfo": info, "traceEvents": events}).encode()))
    return target


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, of which the second comes 3 ms late to every collective."""
    folder = tmp_path_factory.mktemp("pair")
    rank_file(folder, 0, 0)
    rank_file(folder, 1, 3_000)
    return folder


def test_the_summary_keeps_its_contract(pair: Path) -> None:
    found = document("summary", pair)
    assert set(found) == {"integrity", "ranks", "stragglers", "findings"}
    assert [set(row) for row in found["ranks"]] == [set(RANK_KEYS)] * 2
    first = found["ranks"][0]
    assert (first["rank"], first["device"], first["steps"], first["span_ns"]) == (0, "cpu", 3, 30_000_000)
    assert first["compute_ns"] == 3 * 5_800_000
    assert first["communication_ns"] == 3 * 4_000_000, "from the call at 4 ms to the end of the transfer at 8 ms"
    assert first["overlap_fraction"] == 0 and first["kernel_count"] == 0
    (late,) = found["stragglers"]
    assert (late["rank"], late["caused_wait_ns"], late["op"]) == (1, 9_000_000, "c10d::allreduce_")
    assert any(one["kind"] == "straggler" and one["rank"] == 1 for one in found["findings"])


def test_collectives_without_a_partner_are_told_and_doubt_the_straggler(pair: Path, tmp_path: Path) -> None:
    """Rank 1 lost its last collective: one of rank 0's three has no partner, and none of rank 1's two."""
    rank_file(tmp_path, 0, 0)
    lost = rank_file(tmp_path, 1, 3_000)
    whole = json.loads(gzip.decompress(lost.read_bytes()))
    whole["traceEvents"] = [
        one for one in whole["traceEvents"] if one["ts"] < 20_000 or "all" not in one["name"] or "Step" in one["name"]
    ]
    lost.write_bytes(gzip.compress(json.dumps(whole).encode()))
    (told,) = [one for one in document("summary", tmp_path)["integrity"] if one["kind"] == "unmatched_collectives"]
    assert (told["rank"], told["count"]) == (0, 1) and "1 of 3" in told["message"]
    assert "stragglers" in told["unsafe"]
    assert not [one for one in document("summary", pair)["integrity"] if one["kind"] == "unmatched_collectives"]


def device_file(path: Path) -> Path:
    """One step on an accelerator: a kernel nobody can know for a collective, and a matrix product beside it."""
    events = [
        event("ProfilerStep#0", 0, 1_000, "user_annotation"),
        event("cudaLaunchKernel", 10, 5, "cuda_runtime", correlation=1),
        event("cudaLaunchKernel", 20, 5, "cuda_runtime", correlation=2),
        event("house_sum", 100, 700, "kernel", 7, correlation=1, device=0, stream=7),
        event("gemm", 300, 200, "kernel", 8, correlation=2, device=0, stream=8),
        event("cudaDeviceSynchronize", 30, 780, "cuda_runtime", correlation=3),
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_a_role_table_speaks_in_every_figure(tmp_path: Path) -> None:
    """Named communication by the user, the kernel is: 700 us of which 200 are hidden behind the matrix product."""
    path = device_file(tmp_path / "r0.json")
    (plain,) = document("summary", path)["ranks"]
    assert (plain["compute_ns"], plain["communication_ns"]) == (700_000, 0)
    (tmp_path / "roles.toml").write_text('"house_sum" = "communication"\n')
    (told,) = document("summary", path, "--roles", tmp_path / "roles.toml")["ranks"]
    assert (told["compute_ns"], told["communication_ns"]) == (200_000, 700_000)
    assert told["exposed_communication_ns"] == 500_000 and told["overlap_fraction"] == pytest.approx(2 / 7)
    split = document("comm", path, "--roles", tmp_path / "roles.toml")
    assert split["overlap"][0]["hidden_ns"] == 200_000 and split["collectives"][0]["evidence"] == "user table"
    asked = ["--change", "free-communication"]
    free = document("whatif", path, *asked, "--roles", tmp_path / "roles.toml")["rows"][0]
    assert free["predicted_ns"] < document("whatif", path, *asked)["rows"][0]["predicted_ns"]
    (tmp_path / "wrong.toml").write_text('"house_sum" = "comunication"\n')
    refused = trace("summary", path, "--roles", tmp_path / "wrong.toml")
    assert refused.returncode == 2 and "did you mean 'communication'" in refused.stderr


def test_bandwidth_stands_beside_the_ceiling(pair: Path) -> None:
    """1 KiB in the transfer's 1 ms over two ranks: the factor of an all-reduce is 1."""
    rates = Trace.load(pair).collective_bandwidth(ceiling={"all_reduce": 2_048_000.0})
    (row,) = rates.to_dicts()
    assert (row["op"], row["bytes"], row["count"]) == ("all_reduce", 1024, 3)
    assert row["bus_bytes_per_second"] == pytest.approx(1_024_000) and row["ceiling_share"] == pytest.approx(0.5)
    ceilings = {"all_reduce_bytes_per_second": 5e9, "all_gather_bytes_per_second": None, "read_bytes_per_second": 1.0}
    assert bus_ceilings(ceilings) == {"all_reduce": 5e9}


def test_one_step_of_the_summary(pair: Path) -> None:
    found = document("summary", pair, "--step", 1)
    assert [row["span_ns"] for row in found["ranks"]] == [10_000_000] * 2
    assert [row["steps"] for row in found["ranks"]] == [1, 1]
    assert found["stragglers"][0]["caused_wait_ns"] == 3_000_000


def test_findings_are_ranked_and_doubted_where_ranks_lack(pair: Path) -> None:
    whole = explain(Trace.load(pair))
    assert [one.gain_seconds[1] for one in whole] == sorted((one.gain_seconds[1] for one in whole), reverse=True)
    assert all(0 <= one.gain_seconds[0] <= one.gain_seconds[1] <= 1.5 * one.seconds + 1e-9 for one in whole)
    half = Trace.load(pair / "rank0.json.gz")
    lacking = defects(half)
    assert [one.kind for one in lacking] == ["missing_ranks"]
    told = {one.kind: one.unsafe for one in explain(half, lacking)}
    assert told["communication"] == ("missing_ranks",)


def test_every_table_documents_every_column(pair: Path) -> None:
    known = {name for table in columns().values() for name in table} | {"rank"}
    for name, make in frames().items():
        assert set(make(Trace.load(pair)).columns) <= known, name
    assert all(text.strip() for table in columns().values() for text in table.values())
    page = Path(__file__).parents[1] / "docs" / "columns.md"
    assert page.read_text(encoding="utf-8").endswith(markdown()), "python -m ridgeline.profiling.columns"


@pytest.mark.parametrize(
    "verb",
    [
        "explain",
        "kernels",
        "launches",
        "comm",
        "counters",
        "idle",
        "critical-path",
        "tree",
        "sequences",
        "roofline",
        "memory",
        "flow",
        "whatif",
    ],
)
def test_every_verb_prints_for_people_and_machines(pair: Path, verb: str) -> None:
    shown = trace(verb, pair)
    assert shown.returncode == 0 and shown.stdout.strip(), shown.stderr
    assert "Traceback" not in shown.stderr
    assert isinstance(document(verb, pair), dict)


def test_the_critical_path_goes_through_the_late_rank(pair: Path) -> None:
    segments = pl.DataFrame(document("critical-path", pair, "--across")["segments"])
    on_late = segments.filter(pl.col("rank") == 1)["duration_ns"].sum()
    assert on_late >= 3 * 7_000_000, "its 3 ms late start and its matrix product bound every step"


def test_diff_says_first_how_the_captures_differ(pair: Path, tmp_path: Path) -> None:
    rank_file(tmp_path, 0, 0)
    found = document("diff", pair, tmp_path / "rank0.json.gz")
    assert any("rank" in row["key"] for row in found["configuration"])
    same = document("diff", pair, pair)
    assert same["configuration"] == [] and all(row["delta_ns"] == 0 for row in same["changes"])


def test_export_for_perfetto_and_parquet(pair: Path, tmp_path: Path) -> None:
    (file,) = document("export", pair / "rank1.json.gz", "--out", tmp_path / "out.json.gz")["files"]
    events = json.loads(gzip.decompress(Path(file).read_bytes()))["traceEvents"]
    assert {one["name"] for one in events} >= {"aten::mm", "c10d::allreduce_"}
    written = document("export", pair, "--out", tmp_path / "tables")["files"]
    assert {Path(one).stem for one in written} == set(frames())
    assert pl.read_parquet(tmp_path / "tables" / "temporal.parquet")["span_ns"].to_list() == [30_000_000] * 2


@pytest.mark.parametrize("verb", ["summary", "explain", "kernels", "idle", "critical-path", "tree", "roofline", "diff"])
def test_names_in_brackets_are_names(tmp_path: Path, verb: str) -> None:
    """ROCm's kernels end in ``[clone .kd]``, and a range may bear any name: none of it is markup of the terminal."""
    names = ["Cijk_Ailk [clone .kd]", "[/bold]closed", "odd[red]"]
    events = []
    for at, name in enumerate(names):
        ids = {"correlation": at + 1, "device": 0, "stream": 7}
        events += [
            event(name, 10 + 100 * at, 50),
            event("cudaLaunchKernel", 20 + 100 * at, 5, "cuda_runtime", correlation=at + 1),
            event(name, 60 + 100 * at, 30, "kernel", 7, **ids),
        ]
    file = tmp_path / "odd[red].json"
    file.write_text(json.dumps({"traceEvents": [*events, event("odd[/row]", 400, 9, "kind[/x]", 9, stream=9)]}))
    done = trace(verb, file, *([file, "--by", "kernel"] if verb == "diff" else []))
    assert done.returncode == 0, done.stderr[-500:]
    if verb in ("kernels", "critical-path", "tree"):
        assert all(name in done.stdout for name in names), done.stdout


def test_findings_of_a_small_step_are_no_zeros(tmp_path: Path) -> None:
    """A step of 90 us in operators, of which four decimals of a second would leave nothing."""
    events = [event(f"ProfilerStep#{at}", 100.0 * at, 90, "user_annotation") for at in range(2)]
    events += [event("aten::add", 100.0 * at + 10 * i, 6) for at in range(2) for i in range(9)]
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"traceEvents": events}))
    done = trace("explain", file)
    (most, *_) = document("explain", file)["findings"]
    assert done.returncode == 0 and done.stderr == "" and 0 < most["seconds"] < 1e-4
    assert f"{most['seconds'] * 1e6:.3g} us per step" in done.stdout, done.stdout


def test_no_output_takes_the_place_of_a_trace_or_a_device(tmp_path: Path) -> None:
    """Writing beside and renaming would replace both without a word; nothing may be left beside them either."""
    pair = tmp_path / "pair"
    pair.mkdir()
    rank_file(pair, 0, 0)
    rank_file(pair, 1, 3_000)
    link, pipe = tmp_path / "link.json.gz", tmp_path / "pipe.json"
    os.link(pair / "rank1.json.gz", link)
    os.link(pair / "rank1.json.gz", pair / "new.rank1.json.gz")  # what an export of both as new.json.gz would write
    os.mkfifo(pipe)
    before = {file: file.read_bytes() for file in pair.iterdir()}
    for verb, source, out, words in [
        ("export", pair / "rank1.json.gz", pair / "rank1.json.gz", "is the trace itself"),
        ("report", pair / "rank1.json.gz", link, "is the trace itself"),
        ("export", pair / "rank[01].json.gz", pair / "new.json.gz", "is the trace itself"),
        ("export", pair, pipe, "is no regular file"),
        ("report", pair, pipe, "is no regular file"),
        ("summary", pipe, None, "neither a file nor a folder"),
        ("report", pair, tmp_path, "is a folder"),
        ("report", pair, tmp_path / "none" / "page.html", "no folder"),
    ]:
        # several ranks get names of their own, so the pipe bears the one of a rank
        source = pair / "rank0.json.gz" if out == pipe else source
        done = trace(verb, source, *(["--out", out] if out else []))
        assert done.returncode == 2 and words in done.stderr, (verb, out, done.stderr)
    assert {file: file.read_bytes() for file in pair.iterdir()} == before
    assert stat.S_ISFIFO(pipe.stat().st_mode) and not (tmp_path / "none").exists()


def test_the_report_holds_what_the_analyses_found(pair: Path, tmp_path: Path) -> None:
    sections = report_sections(Trace.load(pair))
    (wait,) = sections["communication"]
    assert (wait["late_rank"], wait["waiting_rank"], wait["wait_ns"]) == (1, 0, 9_000_000)
    assert document("report", pair, "--out", tmp_path / "page.html")["report"] == str(tmp_path / "page.html")
    assert "aten::mm" in (tmp_path / "page.html").read_text(encoding="utf-8")


def execution_trace(path: Path) -> Path:
    """mm -> 3, cloned into 4, which gelu reads: the clone was for nothing."""

    def side(*storages: int) -> dict[str, Any]:
        values = [[one + 100, one, 0, 256, 4, "cpu"] for one in storages]
        forms = {"shapes": [[256]] * len(values), "strides": [[1]] * len(values)}
        return {"values": values, "types": ["Tensor(float)"] * len(values), **forms}

    def node(at: int, name: str, given: Any, made: Any, schema: str, parent: int = 1) -> dict[str, Any]:
        attrs = [{"name": "op_schema", "value": schema}, {"name": "rf_id", "value": 0}]
        return {"id": at, "name": name, "ctrl_deps": parent, "inputs": given, "outputs": made, "attrs": attrs}

    nodes = [
        node(10, "aten::mm", side(1, 2), side(3), "aten::mm(Tensor self, Tensor mat2) -> Tensor"),
        node(12, "aten::empty_like", side(3), side(4), "aten::empty_like(Tensor self) -> Tensor", 11),
        node(13, "aten::copy_", side(4, 3), side(4), "aten::copy_(Tensor(a!) self, Tensor src) -> Tensor(a!)", 11),
        node(11, "aten::clone", side(3), side(4), "aten::clone(Tensor self) -> Tensor"),
        node(14, "aten::gelu", side(4), side(5), "aten::gelu(Tensor self) -> Tensor"),
    ]
    text = json.dumps({"schema": "1.1.1-chakra.0.0.4", "nodes": nodes})
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_flow_finds_an_execution_trace_by_name_beside_or_alone(pair: Path, tmp_path: Path) -> None:
    """Given by file, by folder, recorded beside the trace, or without a trace: the same needless copy."""
    first = rank_file(tmp_path, 0, 0)
    alone = execution_trace(tmp_path / "et" / "alone.json")
    given = document("flow", first, "--execution-trace", alone, "--min-bytes", 1)
    assert [(one["finding"], one["operator"], one["bytes"]) for one in given["findings"]] == [
        ("needless copy", "aten::clone", 1024)
    ]
    assert given["why_not_all"] is None and given["summary"][0]["bytes"] >= 1024
    by_itself = document("flow", alone, "--min-bytes", 1)
    assert "times and releases are not known" in by_itself["why_not_all"]
    assert [one["operator"] for one in by_itself["findings"]] == ["aten::clone"]
    execution_trace(tmp_path / "execution" / "rank0.json.gz")
    beside = document("flow", first, "--min-bytes", 1)
    assert beside["tensors"] == given["tensors"] and beside["findings"] == given["findings"]
    shown = trace("flow", first, "--min-bytes", 1)
    assert "needless copy" in shown.stdout and "drop the clone" in shown.stdout
    for rank in (0, 1):
        execution_trace(tmp_path / "ranks" / f"rank{rank}.json.gz")
    both = document("flow", pair, "--execution-trace", tmp_path / "ranks", "--min-bytes", 1)
    assert [one["rank"] for one in both["findings"]] == [0, 1]
    refused = trace("flow", pair, "--execution-trace", alone)
    assert refused.returncode == 2 and "add --rank" in refused.stderr and refused.stdout == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["summary", "nowhere.json"], "no such file"),
        (["summary", "PAIR", "--step", "9"], "its steps are 0 to 2"),
        (["idle", "PAIR", "--rank", "7"], "no rank 7"),
        (["kernels", "PAIR", "--by", "operatr"], "did you mean 'operator'"),
        (["whatif", "PAIR", "--change", "free-comunication"], "did you mean 'free-communication'"),
        (["flow", "PAIR", "--execution-trace", "PAIR/none.json", "--rank", "0"], "cannot be read"),
        (["flow", "PAIR", "--execution-trace", "PAIR/..", "--rank", "0"], "holds no file with a trace's name"),
        (["critical-path", "PAIR", "--across", "--step", "1"], "leave out --step"),
        (["diff", "PAIR", "PAIR", "--by", "modul"], "did you mean 'module'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(pair: Path, arguments: list[str], words: str) -> None:
    done = trace(*[one.replace("PAIR", str(pair)) for one in arguments])
    assert done.returncode == 2 and done.stdout == "", done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("ridgeline:") and words in line


@needs_traces
@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_shared_trace_has_a_summary(path: Path) -> None:
    """With the identities that hold on any trace."""
    found = summarize(Trace.load(path))
    for row in found["ranks"]:
        assert row["busy_ns"] + row["idle_ns"] == row["span_ns"]
        assert max(row["compute_ns"], row["communication_ns"], row["memory_ns"]) <= row["busy_ns"]
        assert row["busy_ns"] <= row["compute_ns"] + row["communication_ns"] + row["memory_ns"]
        assert 0 <= row["exposed_communication_ns"] <= row["communication_ns"]
        assert (row["overlap_fraction"] is None) == (row["communication_ns"] == 0)
    json.dumps(found)


@needs_traces
def test_the_planted_straggler_is_found() -> None:
    found = summarize(Trace.load(TRACES / "gloo"))
    assert [one["rank"] for one in found["stragglers"]] == [1]
    assert len(find_traces(TRACES / "gloo")) == 2
