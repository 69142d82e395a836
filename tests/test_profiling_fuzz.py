"""Thousands of damaged traces: each gives a table that can be analysed, or one line that says why not. Never a crash."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import numpy as np
import pytest

from ridgeline.errors import UserError
from ridgeline.profiling.breakdown import break_down
from ridgeline.profiling.load import parse_table
from test_profiling_synthetic import event, kernel, launch, phase, step, text

BATCHES, EACH = 10, 500
ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    2**63,
    2**64,
    -(2**70),
    10**400,
    "",
    "x",
    "9" * 30,
    "²",
    "NaN",
    [],
    [[]],
    {},
    {"a": [{}]},
]
FIELDS = ["ph", "name", "cat", "pid", "tid", "ts", "dur", "args", "id"]
ARGS = ["correlation", "device", "stream", "Collective name", "rank", "Input Dims"]


def events() -> list[dict]:
    """A small trace with everything in it: steps, launches, kernels, copies, a collective, arrows, marks, a stack."""
    arrow = {"cat": "fwdbwd", "name": "fwdbwd", "pid": 1, "tid": 1, "id": 5}
    return [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "rank 0"}},
        step(1, 0, 100),
        phase("forward", 0, 40),
        event("aten::mm", "cpu_op", 5, 20, **{"Input Dims": [[2, 3], [3, 4]], "External id": 7}),
        launch(10, 1),
        kernel("gemm", 20, 30, 1),
        launch(30, 2, "cudaMemcpyAsync"),
        event("Memcpy HtoD", "gpu_memcpy", 55, 5, (0, 7), correlation=2, device=0, stream=7, bytes=64),
        event("ncclDevKernel_AllReduce", "kernel", 60, 20, (0, 20), correlation=3, **{"Collective name": "allreduce"}),
        event("record_param_comms", "cpu_op", 40, 5, **{"Collective name": "allreduce", "Rank": 0}),
        {**arrow, "ph": "s", "ts": 6},
        {**arrow, "ph": "f", "ts": 41, "bp": "e"},
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": 7, "args": {"Bytes": 8}},
        event("f.py(1): f é", "python_function", 1, 2),
        step(2, 100, 50),
        launch(110, 4),
        kernel("relu", 115, 10, 4),
    ]


WHOLE = [
    text(events()),
    json.dumps(events()).encode(),
    json.dumps({"baseTimeNanoseconds": 10**18, "traceEvents": events(), "traceName": "t"}, indent=1).encode(),
]


def flip(data: bytearray, draw: random.Random) -> None:
    """Change some bytes."""
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def cut(data: bytearray, draw: random.Random) -> None:
    """Lose the end."""
    del data[draw.randrange(len(data)) :]


def delete(data: bytearray, draw: random.Random) -> None:
    """Lose a piece."""
    at = draw.randrange(len(data))
    del data[at : at + draw.randint(1, 200)]


def splice(data: bytearray, draw: random.Random) -> None:
    """Insert a piece of another trace."""
    other, at = draw.choice(WHOLE), draw.randrange(len(data))
    begin = draw.randrange(len(other))
    data[at:at] = other[begin : begin + draw.randint(1, 400)]


def retype(data: bytearray, draw: random.Random) -> None:
    """Give fields values of another type, size or sign; shuffle and repeat events."""
    made = events()
    for _ in range(draw.randint(1, 4)):
        one = draw.choice(made)
        field = draw.choice(FIELDS)
        if draw.random() < 0.3 and isinstance(one.get("args"), dict):
            one["args"][draw.choice(ARGS)] = draw.choice(ODD)
        else:
            one[field] = draw.choice(ODD)
    draw.shuffle(made)
    made += made[: draw.randint(0, 5)]
    info = {"rank": draw.choice(ODD), "world_size": draw.choice(ODD), "backend": draw.choice(ODD)}
    top = {"distributedInfo": info, "baseTimeNanoseconds": draw.choice(ODD), "ridgeline": draw.choice(ODD)}
    data[:] = json.dumps({**top, "traceEvents": made} if draw.random() < 0.7 else made).encode()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_traces_never_crash(batch: int) -> None:
    """5,000 in all, over the batches. Every answer is a table in order, or one line that names the trace."""
    draw, outcomes = random.Random(batch), Counter[str]()
    begun = time.monotonic()
    for number in range(EACH):
        data = bytearray(WHOLE[number % len(WHOLE)])
        mutate = draw.choice([flip, cut, delete, splice, retype])
        mutate(data, draw)
        try:
            table = parse_table(bytes(data), "bad.json", stacks=bool(number % 2))
        except UserError as error:
            assert "bad.json" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        assert (np.diff(table.start) >= 0).all()
        outcomes["repaired" if table.meta.repairs else "read"] += 1
        try:
            break_down(table)
        except UserError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - begun < 60
    assert outcomes["repaired"] > 100 and outcomes["read"] > 20, outcomes
