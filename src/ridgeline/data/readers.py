"""Files to raw records, and raw records to text or to a sentence that says what is wrong and where.

The two halves are apart because the first runs in one process, in order, and must stay cheap (split, do not
parse), while the second runs in the pool.

============  =====================================  ===========================
kind          one document                           ``Raw.offset``
============  =====================================  ===========================
``txt``       the whole file                         0
``jsonl``     one line, field ``text_key``           byte in the decompressed file
``parquet``   one row, column ``text_key``           row
============  =====================================  ===========================
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ridgeline.data.sources import SourceFile
from ridgeline.data.streams import StreamDamage, open_stream
from ridgeline.errors import UserError, nearest

BOM = b"\xef\xbb\xbf"
ROWS = 256


class Raw(NamedTuple):
    """A record as it lies in its file. ``data`` is None when the reader itself met the ``problem``.

    ``ended`` says that nothing of this file can follow, so that a resumed build does not meet the same damage twice.
    """

    file: int
    ordinal: int
    offset: int
    length: int
    kind: str
    data: bytes | None
    problem: str | None = None
    line: int = 0
    ended: bool = False


def read_raw(position: int, file: SourceFile, text_key: str, start: int = 0) -> Iterator[Raw]:
    """Raw records of ``file``, which is number ``position`` of its corpus, from record ``start`` on."""
    try:
        yield from READERS[file.kind](position, file, text_key, start)
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read ({error.strerror or error})") from None


def text_of(raw: Raw, text_key: str) -> tuple[str | None, str | None]:
    """The text of a record, or None and what is wrong with it."""
    if raw.data is None:
        return None, raw.problem
    where = {"txt": "", "jsonl": f"line {raw.line}: ", "parquet": f"row {raw.offset}: "}[raw.kind]
    data = raw.data[len(BOM) :] if raw.offset == 0 and raw.data.startswith(BOM) else raw.data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + (len(raw.data) - len(data)) + (raw.offset if raw.kind != "parquet" else 0)
        return None, f"{where}invalid UTF-8 at byte {at} (0x{data[error.start]:02x})"
    if raw.kind != "jsonl":
        return text, None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"{where}not valid JSON at byte {raw.offset + error.pos}: {error.msg}"
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        return None, f"{where}JSON that cannot be read ({_short(error)})"
    return _field(value, text_key, where)


def _field(value: Any, text_key: str, where: str) -> tuple[str | None, str | None]:
    if not isinstance(value, dict):
        return None, f"{where}expected an object with the key '{text_key}', got {_json_type(value)}"
    if text_key not in value:
        return (
            None,
            f"{where}no key '{text_key}'{nearest(text_key, [str(key)[:40] for key in list(value)[:12]])}; data.text_key names the field",
        )
    text = value[text_key]
    if not isinstance(text, str):
        return None, f"{where}'{text_key}' is {_json_type(text)}, expected a string"
    return text, None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def _read_txt(position: int, file: SourceFile, text_key: str, start: int) -> Iterator[Raw]:
    if start:
        return
    with open_stream(file.path, file.compression) as stream:
        try:
            data = stream.read()
        except StreamDamage as damage:
            yield Raw(position, 0, 0, 0, "txt", None, str(damage), ended=True)
            return
    yield Raw(position, 0, 0, len(data), "txt", data, ended=True)


def _read_jsonl(position: int, file: SourceFile, text_key: str, start: int) -> Iterator[Raw]:
    offset = ordinal = number = 0
    with open_stream(file.path, file.compression) as stream:
        while True:
            try:
                line = stream.readline()
            except StreamDamage as damage:
                what = f"line {number + 1}: {damage} at byte {offset}"
                yield Raw(position, ordinal, offset, 0, "jsonl", None, what, ended=True)
                return
            if not line:
                return
            number += 1
            if line.strip():
                if ordinal >= start:
                    data = line.rstrip(b"\r\n")
                    yield Raw(position, ordinal, offset, len(data), "jsonl", data, None, number)
                ordinal += 1
            offset += len(line)


def _read_parquet(position: int, file: SourceFile, text_key: str, start: int) -> Iterator[Raw]:
    import pyarrow as pa

    row = 0
    try:
        for values in _parquet_rows(file, text_key, start):
            if row == 0:
                row = start
            for value in values:
                if value is None:
                    yield Raw(position, row, row, 0, "parquet", None, f"row {row}: '{text_key}' is null")
                else:
                    yield Raw(position, row, row, len(value), "parquet", value)
                row += 1
    except (StreamDamage, pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        row = max(row, start)
        what = f"truncated or damaged parquet file at row {row} ({_short(error)})"
        yield Raw(position, row, row, 0, "parquet", None, what, ended=True)
    except UserError as error:
        yield Raw(position, 0, 0, 0, "parquet", None, str(error), ended=True)


def _parquet_rows(file: SourceFile, text_key: str, start: int) -> Iterator[list[bytes | None]]:
    """The text column from row ``start`` on, as bytes: Arrow does not promise that a string is UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    handle: Any = file.path
    if file.compression:
        with open_stream(file.path, file.compression) as stream:
            handle = io.BytesIO(stream.read())
    with pq.ParquetFile(handle, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        if text_key not in names:
            raise UserError(f"no column '{text_key}'{nearest(text_key, names)}; data.text_key names the column")
        kind = table.schema_arrow.field(text_key).type
        if not _is_text(kind):
            raise UserError(f"column '{text_key}' holds {kind}, expected strings")
        skip, groups = start, list(range(table.num_row_groups))
        while groups and skip >= table.metadata.row_group(groups[0]).num_rows:
            skip -= table.metadata.row_group(groups.pop(0)).num_rows
        for group in groups:  # one at a time, so that damage in one does not take rows of the one before along
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=[text_key]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                values = column.cast(pa.large_binary()).to_pylist()
                yield values[skip:]
                skip = max(0, skip - len(values))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(check(inner) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


READERS = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}
