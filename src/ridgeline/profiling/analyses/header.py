"""What a trace file says at its top, without its events: devices, versions, switches of the profiler, job."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Any

import msgspec

from ridgeline.errors import UserError

LIMIT_BYTES = 1 << 30
"""A larger file is read only up to its events: what follows them is left out."""
_EVENTS = re.compile(rb'"traceEvents"\s*:')


class _Top(msgspec.Struct):
    """Known keys; msgspec steps over all others, the events among them, without making objects of them."""

    deviceProperties: Any = None
    distributedInfo: Any = None
    schemaVersion: Any = None
    cuda_runtime_version: Any = None
    cuda_driver_version: Any = None
    cupti_version: Any = None
    hip_runtime_version: Any = None
    hip_driver_version: Any = None
    roctracer_version: Any = None
    rocprofiler_version: Any = None
    torch_version: Any = None
    record_shapes: Any = None
    profile_memory: Any = None
    with_stack: Any = None
    with_flops: Any = None
    with_modules: Any = None
    metadata: Any = None


def describe(path: str | Path) -> dict[str, Any]:
    """The top-level keys of a trace file that say how it was made; empty for a bare list of events.

    Raises:
        UserError: the file cannot be read, or is no trace.
    """
    try:
        text = _read(Path(path))
        if re.match(rb"\s*\[", text):
            return {}
        top = msgspec.json.decode(text, type=_Top)
    except (OSError, EOFError, zlib.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"trace {path}: its header cannot be read ({error})") from None
    return {key: value for key, value in msgspec.structs.asdict(top).items() if value is not None}


def _read(path: Path) -> bytes:
    """The text; of a file beyond the limit what lies before its events."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if packed else raw as stream:
            text: bytes = stream.read(LIMIT_BYTES)
            if not stream.read(1):
                return text
    found = _EVENTS.search(text)
    return text[: found.start()].rstrip().rstrip(b",") + b"}" if found else text
