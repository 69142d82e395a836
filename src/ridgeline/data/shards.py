"""The shards of the first pass on the disk: a Parquet file and, behind it, the checksum of its bytes.

Parquet's own checksums leave gaps (dictionaries, the file's metadata), and a shard that is taken up days later must be
what was written, to the last bit.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.data.disk import REBUILD, write_bytes
from ridgeline.data.features import FEATURES
from ridgeline.data.workspace import Workspace
from ridgeline.errors import JobError

CHECKSUM_BYTES = 16


def write_shard(
    workspace: Workspace,
    number: int,
    columns: Mapping[str, Sequence[Any]],
    values: npt.NDArray[np.float64],
    end: Sequence[int],
) -> None:
    """Write shard ``number``: one row per record, features ``[records, features]``, and where the next one begins."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(columns[name], kind) for name, kind in _types().items()}
    arrays.update({name: pa.array(values[:, index]) for index, name in enumerate(FEATURES)})
    metadata = {b"ridgeline": json.dumps({"shard": number, "end": list(end)}).encode()}
    buffer = io.BytesIO()
    table = pa.table(arrays).replace_schema_metadata(metadata)
    pq.write_table(table, buffer, compression="zstd", compression_level=1)
    buffer.write(_checksum(buffer.getbuffer()))
    write_bytes(workspace.shard("read", number), buffer.getbuffer())


def open_shard(workspace: Workspace, number: int, columns: Sequence[str]) -> Any:
    """Columns of a finished shard as an Arrow table.

    Raises:
        JobError: the file is missing, damaged or another shard's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = workspace.shard("read", number)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: {error.strerror or error}; {REBUILD} starts anew") from None
    content = memoryview(data)[:-CHECKSUM_BYTES]
    if _checksum(content) != data[-CHECKSUM_BYTES:]:
        raise JobError(f"{path}: damaged (checksum differs); {REBUILD} starts anew")
    table = pq.read_table(pa.BufferReader(content), columns=list(columns))
    held = _metadata(table)["shard"]
    if held != number:
        raise JobError(f"{path}: holds shard {held}; {REBUILD} starts anew")
    return table


def shard_end(table: Any) -> tuple[int, int]:
    """Where the shard after this one begins: file and record."""
    file, record = _metadata(table)["end"]
    return int(file), int(record)


def _metadata(table: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.schema.metadata[b"ridgeline"])
    return found


def _checksum(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def _types() -> dict[str, Any]:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    return {
        "file": pa.int32(),
        "offset": whole,
        "length": whole,
        "content_hash": text,
        "reason": text,
        "value": real,
        "limit": real,
        "broken": text,
        "detail": text,
        "text": pa.large_string(),
    }
