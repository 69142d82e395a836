"""Token files in the layout of Megatron's indexed dataset: ``NAME.bin`` (raw tokens) and ``NAME.idx``.

The index, little endian: ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences, u64 length of the document
array, then i32 sequence lengths, i64 byte offsets, i64 document array (the first sequence of each document and,
last, the number of sequences). One sequence is one document here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.data.disk import atomic
from ridgeline.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, Any] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
LONGEST = 2**31 - 1


@dataclass(frozen=True)
class TokenFile:
    """One split. ``tokens`` ``[tokens]`` (memory-mapped, read-only) and ``documents`` ``[documents + 1]``, token offsets."""

    tokens: npt.NDArray[Any]
    documents: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> npt.NDArray[Any]:
        """Tokens of document ``index``, its end token included."""
        return self.tokens[self.documents[index] : self.documents[index + 1]]


def write_index(target: Path, lengths: npt.NDArray[np.int64], dtype: npt.DTypeLike) -> None:
    """Write the ``.idx`` for documents of ``lengths`` tokens.

    Raises:
        UserError: a document has 2**31 tokens or more, which the format cannot say.
    """
    if len(lengths) and int(lengths.max()) > LONGEST:
        raise UserError(f"{target}: a document of {lengths.max():,} tokens; the format ends at {LONGEST:,}")
    width = np.dtype(dtype).itemsize
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1] * width, out=offsets[1:])
    with atomic(target) as file:
        file.write(HEADER.pack(MAGIC, 1, dtype_code(dtype), len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(offsets.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_tokens(prefix: Path) -> TokenFile:
    """Open ``prefix.bin`` and ``prefix.idx``.

    Raises:
        UserError: a file is missing, is no Megatron index, or the two do not belong together.
    """
    index, data = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    try:
        raw = index.read_bytes()
        size = data.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file") from None
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise UserError(f"{index}: not a Megatron index")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != 1 or code not in DTYPES:
        raise UserError(f"{index}: version {version}, dtype code {code}; known are version 1 and codes 1 to 8")
    if len(raw) != HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{index}: truncated or damaged ({len(raw)} bytes)")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
    bounds = np.frombuffer(raw, "<i8", documents, HEADER.size + 12 * sequences)
    starts = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    dtype = np.dtype(DTYPES[code])
    if size != int(starts[-1]) * dtype.itemsize:
        raise UserError(
            f"{data}: {size} bytes, its index says {int(starts[-1]) * dtype.itemsize}: truncated or replaced"
        )
    tokens = np.memmap(data, dtype, "r") if size else np.empty(0, dtype)
    return TokenFile(tokens, starts[bounds])


def dtype_code(dtype: npt.DTypeLike) -> int:
    """Megatron's number for ``dtype``."""
    wanted = np.dtype(dtype)
    return next(code for code, known in DTYPES.items() if np.dtype(known) == wanted)
