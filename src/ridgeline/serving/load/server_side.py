"""What a Ridgeline server says of its own work during a load test: bytes read, decode time, batch; from ``/metrics``.

Another server, or one without these counters, is simply not reported on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ridgeline.serving.load.client import Connection, Target

COUNTERS = ("decode_bytes", "decode_seconds", "decode_steps", "decode_tokens")
CEILING = "ridgeline_read_ceiling_bytes_per_second"
FORMULA = "bytes the decode steps had to read (weights, resident cache) / decode seconds / measured read bandwidth"


async def scrape(target: Target, timeout: float) -> dict[str, float]:
    """The counters by name, empty when the server has none of them."""
    content: list[bytes] = []
    connection = Connection(target)
    try:
        async with asyncio.timeout(timeout):
            status = await connection.request("GET", "/metrics", b"", lambda status, piece: content.append(piece))
    except (OSError, EOFError, TimeoutError):
        return {}
    finally:
        connection.close()
    return parse(b"".join(content).decode("utf-8", "replace")) if status == 200 else {}


def parse(text: str) -> dict[str, float]:
    """Our counters and the ceiling out of Prometheus text."""
    wanted = {f"ridgeline_{name}_total": name for name in COUNTERS} | {CEILING: "ceiling"}
    found = {}
    for line in text.splitlines():
        name = wanted.get(line.partition("{")[0])
        if name is not None:
            found[name] = float(line.rpartition(" ")[2])
    return found


def account(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Mean decode batch, bytes per second and MBU between two scrapes; empty when nothing is known."""
    if not all(name in before and name in after for name in COUNTERS):
        return {}
    spent = {name: after[name] - before[name] for name in COUNTERS}
    if spent["decode_seconds"] <= 0 or spent["decode_steps"] <= 0:
        return {}
    rate = spent["decode_bytes"] / spent["decode_seconds"]
    ceiling = after.get("ceiling")
    return {
        "decode_batch_mean": spent["decode_tokens"] / spent["decode_steps"],
        "decode_bytes_per_second": rate,
        "read_ceiling_bytes_per_second": ceiling,
        "mbu": rate / ceiling if ceiling else None,
        "mbu_formula": FORMULA,
    }
