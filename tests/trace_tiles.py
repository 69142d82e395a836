"""Make a large trace of a real one: its events again and again, each copy later than the last and with ids of its own.

    python tests/trace_tiles.py trace.json.gz big.json.zst --megabytes 5000

Times, correlation ids, external ids, event indices and flow ids are shifted, so that launches and arrows of one copy
never meet those of another. The text of every event is otherwise what the profiler wrote.
"""

from __future__ import annotations

import argparse
import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import zstandard

_SHIFTED = re.compile(rb'("(?:ts|correlation|External id|Ev Idx|id)"\s*:\s*)(\d+)')
_SPAN = re.compile(rb'"ts"\s*:\s*(\d+)(?:\.\d+)?\s*,\s*"dur"\s*:\s*(\d+)')
_GAP_US = 1000


def tiles(text: bytes, copies: int) -> Iterator[bytes]:
    """The text of ``copies`` copies, block by block."""
    head, _, rest = text.partition(b'"traceEvents": [')
    at = max(0, len(rest) - 20_000)
    end = re.search(rb"\}\s*\](?=\s*(?:,\s*\"|\}))", rest[at:])
    assert end, "no end of the events in the last 20 kB"
    body = rest[: at + end.start() + 1]
    tail = rest[len(body) :]
    parts = _SHIFTED.split(body)
    keys = [key.split(b'"')[1] for key in parts[1::3]]
    values = [int(digits) for digits in parts[2::3]]
    strides = {key: max(v for k, v in zip(keys, values, strict=True) if k == key) + 1 for key in set(keys)}
    times = [(int(start), int(length)) for start, length in _SPAN.findall(body)]
    strides[b"ts"] = max(start + length for start, length in times) - min(start for start, _ in times) + _GAP_US
    by_value = [strides[key] for key in keys]
    yield head + b'"traceEvents": ['
    for copy in range(copies):
        parts[2::3] = [b"%d" % (value + copy * stride) for value, stride in zip(values, by_value, strict=True)]
        yield (b"," if copy else b"") + b"".join(parts)
    yield tail


def read(path: Path) -> bytes:
    """The text of a plain or gzip file."""
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def main() -> None:
    """Write the large trace, compressed if its name ends in .zst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=int, default=300)
    options = parser.parse_args()
    text = read(options.source)
    copies = -(-options.megabytes * 10**6 // len(text))
    with options.out.open("wb") as raw:
        out = zstandard.ZstdCompressor(1).stream_writer(raw) if options.out.suffix == ".zst" else raw
        written = sum(out.write(block) and len(block) for block in tiles(text, copies))
        out.close()
    print(f"{copies} copies, {written / 1e6:.0f} MB of text", file=sys.stderr)


if __name__ == "__main__":
    main()
