"""Plain, gzip and zstd files as one kind of byte stream, in which damage is always noticed."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

CHUNK = 1 << 18


class StreamDamage(Exception):
    """The compressed stream ends early or is not what its name says; the message is a part of a sentence."""


def open_stream(path: Path, compression: str) -> BinaryIO:
    """The decompressed bytes of ``path``; ``compression`` is ``""``, ``"gz"`` or ``"zst"``.

    Reading raises :class:`StreamDamage` for a truncated or corrupt stream, never a short result.
    """
    if compression == "gz":
        return cast(BinaryIO, io.BufferedReader(_Gzip(path), CHUNK))
    if compression == "zst":
        return cast(BinaryIO, io.BufferedReader(_Zstd(path), CHUNK))
    return open(path, "rb", buffering=CHUNK)


class _Decompressed(io.RawIOBase):
    """A raw stream over :meth:`chunk`, which returns b"" only at a proper end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self.pending = b""

    def chunk(self) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.pending:
            self.pending = self.chunk()
        taken = self.pending[: len(buffer)]
        buffer[: len(taken)] = taken
        self.pending = self.pending[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self.file.close()
        super().close()


class _Gzip(_Decompressed):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stream = gzip.GzipFile(fileobj=self.file, mode="rb")

    def chunk(self) -> bytes:
        try:
            return self.stream.read(CHUNK)
        except EOFError:
            raise StreamDamage("truncated gzip stream") from None
        except (OSError, zlib.error) as error:
            raise StreamDamage(f"damaged gzip stream ({error})") from None


class _Zstd(_Decompressed):
    """Frame by frame: the library's own reader takes a truncated frame for the end of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import zstandard

        self.error = zstandard.ZstdError
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None

    def chunk(self) -> bytes:
        while True:
            data = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.file.read(CHUNK)
            if not data:
                if self.frame is not None and not self.frame.eof:
                    raise StreamDamage("truncated zstd stream")
                return b""
            if self.frame is None or self.frame.eof:
                self.frame = self.new_frame()
            try:
                out = bytes(self.frame.decompress(data))
            except self.error as error:
                raise StreamDamage(f"damaged zstd stream ({error})") from None
            if out:
                return out
