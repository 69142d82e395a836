"""Plain, gzip and zstd files as one kind of byte stream, in which damage is always noticed.

The libraries' own file objects do less: zstandard's takes a truncated frame for the end of the file, and gzip's
throws away what it had read before the damage.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

CHUNK = 1 << 18
GZIP = 16 + zlib.MAX_WBITS


class StreamDamage(Exception):
    """The compressed stream ends early or is not what its name says; the message is a part of a sentence."""


def open_stream(path: Path, compression: str) -> BinaryIO:
    """The decompressed bytes of ``path``; ``compression`` is ``""``, ``"gz"`` or ``"zst"``.

    Several gzip members or zstd frames are one stream. Reading raises :class:`StreamDamage` for a truncated or corrupt
    stream, after all that could be read before it, and never ends quietly.
    """
    if compression == "gz":
        return cast(BinaryIO, io.BufferedReader(_Frames(path, "gzip", lambda: zlib.decompressobj(GZIP), zlib.error)))
    if compression == "zst":
        import zstandard

        frame = zstandard.ZstdDecompressor().decompressobj
        return cast(BinaryIO, io.BufferedReader(_Frames(path, "zstd", frame, zstandard.ZstdError)))
    return open(path, "rb", buffering=CHUNK)


class _Frames(io.RawIOBase):
    """Frame after frame of a file. A frame says where it ends; a file that ends elsewhere is truncated."""

    def __init__(self, path: Path, name: str, new_frame: Callable[[], Any], error: type[Exception]) -> None:
        super().__init__()
        self.file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self.name, self.new_frame, self.error = name, new_frame, error
        self.frame: Any = None
        self.frames = 0
        self.pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.pending:
            self.pending = memoryview(self._chunk())
        taken = self.pending[: len(buffer)]
        buffer[: len(taken)] = taken
        self.pending = self.pending[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self.file.close()
        super().close()

    def _chunk(self) -> bytes:
        """Some decompressed bytes; b"" only at the proper end."""
        while True:
            data = self._input()
            if not data:
                if (self.frame is not None and not self.frame.eof) or not self.frames:
                    raise StreamDamage(f"truncated {self.name} stream")
                return b""
            if self.frame is None or self.frame.eof:
                self.frame = self.new_frame()
                self.frames += 1
            try:
                out = bytes(self.frame.decompress(data))
            except self.error as error:
                raise StreamDamage(f"damaged {self.name} stream ({error})") from None
            if out:
                return out

    def _input(self) -> bytes:
        left = b""
        if self.frame is not None and self.frame.eof:
            left = self.frame.unused_data
            if self.name == "gzip":  # a gzip file may be padded with zeros
                left = left.lstrip(b"\0")
        return left or self.file.read(CHUNK)
