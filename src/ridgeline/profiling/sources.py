"""Where traces lie, and their text block by block: plain, gzip or zstd, told apart by content and not by name.

A damaged compressed stream ends early: what could be had is handed on, and a note says so. Nothing is written
anywhere, so a reader that is interrupted leaves nothing behind.
"""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ridgeline.errors import UserError

TRACE_SUFFIXES = (".json", ".json.gz", ".json.zst")
Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all), of the files as they are on disk."""

BLOCK = 1 << 19
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_STEP = 256  # once a stream is known to be damaged, feed it in steps as small as this up to the damage


def find_traces(where: str | Path | Sequence[str | Path]) -> list[Path]:
    """The trace files of a file, a folder of ranks (not searched below), a glob, or a list of these, by name.

    Raises:
        UserError: nothing there, or no trace in the folder.
    """
    if isinstance(where, (list, tuple)):
        return list(dict.fromkeys(path for one in where for path in find_traces(one)))
    path = Path(str(where))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(TRACE_SUFFIXES) and file.is_file())
        if not found:
            raise UserError(f"trace folder {path}: holds no .json, .json.gz or .json.zst file")
        return found
    if path.exists():
        raise UserError(f"trace {path}: neither a file nor a folder; a trace is read more than once, so save it first")
    if not glob.has_magic(str(path)):
        raise UserError(f"trace {path}: no such file or folder")
    found = sorted(Path(one) for one in glob.glob(str(path), recursive=True) if os.path.isfile(one))
    if not found:
        raise UserError(f"trace {path}: no file matches")
    return found


class Reader:
    """The uncompressed text of one file as blocks of about half a megabyte.

    ``notes`` holds, once the blocks have been read, what was wrong with the compressed stream. ``progress`` is told
    ``done + bytes read`` of ``total``.
    """

    def __init__(self, path: Path, progress: Progress | None = None, done: int = 0, total: int | None = None) -> None:
        self.path, self.notes = path, list[str]()
        self._progress, self._done = progress, done
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise UserError(f"trace {path}: cannot be read ({error.strerror or error})") from None
        self._total = self.size if total is None else total

    def raw_size(self) -> int:
        """At least this many bytes of text (what gzip's trailer or the file's size says; the truth may be more)."""
        with self.path.open("rb") as file:
            if file.read(2) != _GZIP or self.size < 18:
                return self.size
            file.seek(-4, os.SEEK_END)
            return max(self.size, int.from_bytes(file.read(4), "little"))

    def blocks(self) -> Iterator[bytes]:
        """The text, in order.

        Raises:
            UserError: unreadable, or no text could be had of a compressed stream.
        """
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
                file.seek(0)
                if magic[:2] == _GZIP:
                    yield from self._gzip(file)
                elif magic == _ZSTD:
                    yield from self._zstd(file)
                else:
                    yield from self._pieces(file)
        except OSError as error:
            raise UserError(f"trace {self.path}: cannot be read ({error.strerror or error})") from None

    def _pieces(self, file: BinaryIO, size: int = BLOCK) -> Iterator[bytes]:
        while piece := file.read(size):
            self._done += len(piece)
            if self._progress:
                self._progress(self._done, self._total)
            yield piece

    def _gzip(self, file: BinaryIO) -> Iterator[bytes]:
        stream, finished, any_text = zlib.decompressobj(wbits=31), False, False
        for piece in self._pieces(file, BLOCK // 32):
            while piece:
                if finished:  # several members one after the other are one text; zeros may pad the end
                    piece = piece.lstrip(b"\0")
                    if piece[:2] not in (_GZIP, b"\x1f"):
                        break
                    stream, finished = zlib.decompressobj(wbits=31), False
                before = stream.copy()
                try:
                    text = stream.decompress(piece)
                except zlib.error as error:
                    text = _up_to_damage(before, piece)
                    self._damaged("gzip", str(error), any_text or bool(text))
                    yield text
                    return
                any_text |= bool(text)
                if text:
                    yield text
                finished, piece = stream.eof, stream.unused_data
        if not finished:
            self._damaged("gzip", "it is cut off", any_text)

    def _zstd(self, file: BinaryIO) -> Iterator[bytes]:
        import zstandard

        stream, any_text = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True), False
        try:
            for piece in self._pieces(file, BLOCK // 32):
                if text := stream.decompress(piece):
                    any_text = True
                    yield text
        except zstandard.ZstdError as error:
            self._damaged("zstd", str(error), any_text)

    def _damaged(self, what: str, error: str, any_text: bool) -> None:
        if not any_text:
            raise UserError(f"trace {self.path}: the {what} stream is cut off or damaged ({error})")
        self.notes.append(f"the {what} stream is cut off or damaged ({error}); read up to there")


def _up_to_damage(stream: zlib._Decompress, piece: bytes) -> bytes:
    """What ``stream`` gives of ``piece`` before it fails."""
    out = []
    try:
        for at in range(0, len(piece), _STEP):
            out.append(stream.decompress(piece[at : at + _STEP]))
    except zlib.error:
        pass
    return b"".join(out)
