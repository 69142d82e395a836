"""Tables and sections for tests of a trace's page, and its script's reading of the packed events in Python."""

from __future__ import annotations

import base64
import json
import zlib
from typing import NamedTuple

import numpy as np

from ridgeline.profiling.table import Kind, Links, TraceMeta, TraceTable

BASE = 10**18
"""When the made traces begin, ns."""
LINK_TYPES = (np.int32, np.int64, np.int32, np.int64)


def make_table(events, rank=0, source="made.json", links=()):
    """A table from (name, kind, thread, start, duration, correlation[, arguments]) rows; a device row's stream is its
    thread's second half. ``links``: forward-backward arrows as (thread, time, thread, time)."""
    events = sorted(events, key=lambda e: (e[3], -e[4], e[2], e[0]))
    names = tuple(dict.fromkeys(e[0] for e in events))
    threads = tuple(dict.fromkeys(e[2] for e in events))
    start = np.array([e[3] for e in events], np.int64)
    device = np.array([e[1] in (Kind.KERNEL, Kind.MEMCPY, Kind.MEMSET) for e in events], np.bool_)
    stream = np.array([int(e[2][1] or -1) for e in events], np.int64)
    return TraceTable(
        meta=TraceMeta(source=source, rank=rank),
        names=names,
        threads=threads,
        kind=np.array([e[1] for e in events], np.int8),
        name=np.array([names.index(e[0]) for e in events], np.int32),
        thread=np.array([threads.index(e[2]) for e in events], np.int32),
        start=start,
        end=start + np.array([e[4] for e in events], np.int64),
        args=[json.dumps(e[6]).encode() if len(e) > 6 else b"" for e in events],
        correlation=np.array([e[5] for e in events], np.int64),
        device=np.where(device, 0, -1).astype(np.int32),
        stream=np.where(device, stream, -1),
        links=Links(*(np.array(column, kind) for column, kind in zip(_ends(links, threads), LINK_TYPES, strict=True))),
    )


def _ends(links, threads):
    """Columns of the arrows, threads as codes."""
    coded = [(threads.index(one), begun, threads.index(other), came) for one, begun, other, came in links]
    return zip(*coded, strict=True) if coded else ((),) * 4


SHAPES = {
    "External id": 5,
    "Input Dims": [[64, 32], [32, 8], []],
    "Input type": ["float", "c10::BFloat16", "Scalar"],
    "Input Strides": [[32, 1], [1, 32], []],
    "Concrete Inputs": ["", "", "<2>"],
}
LAUNCHED = {"stream": 7, "grid": [8, 2, 1], "shared memory": 4096, "est. achieved occupancy %": 25}


def small(rank=0, base=BASE, odd="<script>alert(1)</script> & co"):
    """A step with an operator that launches a kernel, a collective beside it, and a name that is also HTML, which is
    the operator's backward."""
    host, gpu = ("1", "1"), ("0", "7")
    return make_table(
        [
            ("ProfilerStep#3", Kind.ANNOTATION, host, base, 1_000_000, -1),
            ("aten::mm", Kind.CPU_OP, host, base + 100_000, 200_000, -1, SHAPES),
            ("cudaLaunchKernel", Kind.RUNTIME, host, base + 150_000, 50_000, 11),
            (odd, Kind.CPU_OP, host, base + 400_000, 100_000, -1, {"Call stack": "m.py(3): <f>;m.py(9): g"}),
            ("sgemm_128", Kind.KERNEL, gpu, base + 320_000, 250_000, 11, LAUNCHED),
            ("ncclDevKernel_AllReduce", Kind.KERNEL, ("0", "9"), base + 500_000, 300_000, -1),
        ],
        rank,
        links=[(host, base + 100_000, host, base + 400_000)],
    )


def crowd(count, rank=0):
    """``count`` events: half kernels on four streams, half operators nested five deep, each kernel launched by one."""
    rng = np.random.default_rng(rank)
    half, calls = count // 2, count // 10
    busy, gap = rng.integers(500, 20_000, half), rng.integers(0, 3_000, half)
    start = np.cumsum(busy + gap) - busy
    outer = np.cumsum(rng.integers(2_000, 120_000, calls))
    inner = np.diff(np.append(outer, outer[-1] + 9_000)) - 100
    starts = np.concatenate([start, *(outer + d * inner // 12 for d in range(5))])
    ends = np.concatenate([start + busy, *(outer + inner - d * inner // 12 for d in range(5))])
    kernel = np.arange(starts.size) < half
    thread = np.where(kernel, 1 + np.arange(starts.size) % 4, 0)
    name = np.where(kernel, rng.integers(0, 20, starts.size), rng.integers(20, 60, starts.size))
    kind = np.where(kernel, Kind.KERNEL, Kind.CPU_OP)
    innermost = np.arange(starts.size) >= starts.size - calls
    kind[innermost] = Kind.RUNTIME
    correlation = np.where(kernel, np.arange(starts.size) % calls, -1)
    correlation[innermost] = np.arange(calls)
    order = np.lexsort((name, thread, -ends, starts))
    return TraceTable(
        meta=TraceMeta(source="crowd.json", rank=rank),
        names=tuple(f"kernel_{i}" for i in range(20)) + tuple(f"aten::op_{i}" for i in range(40)),
        threads=(("1", "1"), *(("0", str(stream)) for stream in (7, 8, 9, 10))),
        kind=kind[order].astype(np.int8),
        name=name[order].astype(np.int32),
        thread=thread[order].astype(np.int32),
        start=starts[order].astype(np.int64),
        end=ends[order].astype(np.int64),
        args=[b'{"External id": %d, "grid": [%d, 1, 1]}' % (at, at % 811) if at % 3 else b"" for at in order.tolist()],
        correlation=correlation[order].astype(np.int64),
        device=np.where(kernel, 0, -1)[order].astype(np.int32),
        stream=np.where(kernel, thread + 6, -1)[order].astype(np.int64),
    )


def everything(ranks=(0, 1)):
    """Every section, with figures that are easy to find again."""
    times = {"start_ns": BASE + 500_000, "end_ns": BASE + 800_000}
    return {
        "integrity": [
            "3 launches without a device event: <lost>",
            {"rank": 1, "message": "1 of 3 steps is missing", "unsafe": ["per-step means"]},
        ],
        "findings": [finding(), {"rank": None, "title": "small", "seconds": 0.001, "evidence": "e1", "knob": None}],
        "summary": [summary(rank) for rank in ranks],
        "idle": [{"rank": 0, "device": 0, "stream": 7, "cause": "host wait", "idle_ns": 250_000}],
        "kernels": [kernel(at) for at in range(25)],
        "communication": [
            wait(1, 0, 6_000_000, "all_reduce", "slow_op", 2),
            wait(1, 0, 3_000_000, "broadcast", None, 1),
            {"late_rank": 0, "waiting_rank": 1, "wait_ns": 1_000_000},
        ],
        "calltree": [
            call("step", 0, 1000, 100, 1),
            call("aten::mm", 1, 600, 600, 3),
            call("aten::add", 1, 300, 300, 2),
        ],
        "roofline": roofline(),
        "memory": memory(),
        "collectives": [
            {"match": 0, "rank": rank, **times, "waiting_ns": 200_000 * (1 - rank), "last": rank == 1, "complete": True}
            for rank in ranks
        ],
        "critical_path": [
            {"rank": 0, "name": "aten::mm", "type": "operator", "start_ns": BASE + 100_000, "end_ns": BASE + 300_000}
        ],
    }


def finding():
    return {
        "rank": 1,
        "title": "large",
        "seconds": 0.02,
        "gain_seconds": [0.0, 0.015],
        "per": "per step",
        "evidence": "late in every step",
        "knob": "pin_memory=True",
        "unsafe": ["idle"],
        "start_ns": BASE + 200_000,
        "end_ns": BASE + 400_000,
    }


def summary(rank):
    return {
        "rank": rank,
        "device": "gpu",
        "span_ns": 1_000_000,
        "busy_ns": 700_000,
        "idle_ns": 300_000,
        "compute_ns": 400_000,
        "communication_ns": 300_000,
        "exposed_communication_ns": 200_000,
        "memory_ns": 100_000,
        "overlap_fraction": 1 / 3,
        "kernel_count": 1234,
    }


def kernel(at):
    times = {"sum_ns": 1000 * at, "mean_ns": 500, "share": at / 400}
    return {"name": f"void k{at}<T>", "count": at + 1, "role": "compute", **times}


def wait(late, waiting, ns, name, operator, count):
    who = {"late_rank": late, "waiting_rank": waiting}
    return {**who, "wait_ns": ns, "name": name, "operator": operator, "count": count}


def call(name, depth, inclusive, exclusive, count):
    return {"name": name, "depth": depth, "inclusive_ns": inclusive, "exclusive_ns": exclusive, "count": count}


def roofline():
    counted = {
        "operator": "aten::mm",
        "input_dims": "[[64, 64], [64, 64]]",
        "dtype": "float32",
        "flops": 2e9,
        "device_time_ns": 10**7,
        "flops_per_second": 2e11,
        "intensity_flops_per_byte": 200.0,
        "share_of_ceiling": 0.5,
        "bound": "compute",
    }
    unknown = dict.fromkeys(("flops", "flops_per_second", "intensity_flops_per_byte"))
    limits = {"gemm_flops_per_second": {"fp32": 4e11, "fp8": None}, "read_bytes_per_second": 1e10}
    return {
        "operators": [counted, {"operator": "aten::sort", "device_time_ns": 10**7, **unknown}],
        "ceilings": {**limits, "source": "measured here"},
    }


def memory():
    where = {"rank": 0, "device": "cuda 0"}
    held = {"category": "a", "operator": "aten::empty", "where": "m.py(3): f", "count": 7, "bytes": 2 << 20}
    return {
        "timeline": [
            {**where, "time_ns": at, "allocated_bytes": a + b, "a_bytes": a, "b_c_bytes": b}
            for at, a, b in [(0, 1 << 20, 0), (50, 1 << 20, 1 << 20), (90, 1 << 20, 0)]
        ],
        "peak": [{"rank": 0, **held, "share": 1.0}],
    }


class Unpacked(NamedTuple):
    """An event of the page; ``partner`` and ``forward`` are positions or -1, ``arguments`` a dict or None."""

    rank: str
    lane: str
    depth: int
    name: str
    start: int
    end: int
    role: int
    partner: int
    forward: int
    correlation: int
    arguments: dict | None


def unpack(packed):
    """What the page's script does, in Python: every event in the page's order."""
    data, parts, at = zlib.decompress(base64.b64decode(packed.block)), {}, 0
    for name, size in packed.header["sizes"].items():
        parts[name], at = data[at : at + size], at + size
    assert at == len(data)
    texts = json.loads(zlib.decompress(base64.b64decode(packed.texts)))
    streams = {name: iter(part if name == "role" else decode(part)) for name, part in parts.items()}
    out = []
    for rank in packed.header["ranks"]:
        last = 0
        for label, depth, count in [(one["label"], *row) for one in rank["lanes"] for row in enumerate(one["rows"])]:
            now = 0
            for _ in range(count):
                one = {name: next(stream) for name, stream in streams.items()}
                now += one["start"]
                last += signed(one["correlation"] - 1) if one["correlation"] else 0
                out.append(
                    Unpacked(
                        rank=rank["label"],
                        lane=label,
                        depth=depth,
                        name=texts["names"][one["name"]],
                        start=now,
                        end=now + one["duration"],
                        role=one["role"],
                        partner=far(one["partner"], len(out)),
                        forward=far(one["forward"], len(out)),
                        correlation=last if one["correlation"] else -1,
                        arguments=texts["sets"][one["arguments"] - 1] if one["arguments"] else None,
                    )
                )
    assert len(out) == packed.header["count"] and all(not list(stream) for stream in streams.values())
    return out


def signed(value):
    return -(value + 1) // 2 if value % 2 else value // 2


def far(value, here):
    """A position from its coded distance."""
    return here + signed(value - 1) if value else -1


def decode(data):
    out, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            out.append(value)
            value = shift = 0
    return out
