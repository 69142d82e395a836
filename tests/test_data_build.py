"""The build end to end: what it writes, what it remembers, and that nothing it depends on changes it."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer

from ridgeline.cli.main import main
from ridgeline.config import DataSection, parse_config
from ridgeline.data import Dataset, batch, build, why
from ridgeline.data.features import FEATURES
from ridgeline.errors import UserError
from ridgeline.runs import list_runs

COMMON = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "have",
    "with",
    "be",
    "for",
    "on",
    "as",
    "by",
    "this",
    "we",
    "will",
    "our",
    "all",
    "from",
    "more",
    "must",
    "these",
    "which",
    "people",
]


def text(seed, words=120):
    """English enough for the filters, and different for every seed."""
    draw = random.Random(seed)
    made = ["".join(draw.choice("aeioustrnlcdm") for _ in range(draw.randint(3, 9))) for _ in range(60)]
    sentences = []
    while words > 0:
        length = min(words, draw.randint(6, 14))
        words -= length
        sentences.append(" ".join(draw.choice(COMMON if draw.random() < 0.5 else made) for _ in range(length)) + ".")
    return "\n".join(" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3))


def section(tmp_path, sources, **fields):
    values = {"name": "test", "path": str(tmp_path / "out"), "tokenizer": {"vocab_size": 500}, "workers": 1}
    return DataSection(sources=[str(source) for source in sources], **{**values, **fields})


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in texts), encoding="utf-8")
    return path


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def table(folder):
    return pl.read_parquet(folder / "provenance.parquet")


def documents_of(folder, split):
    """Token arrays of a split, by Megatron's layout and nothing of ours."""
    raw = (folder / f"{split}.idx").read_bytes()
    code, count = struct.unpack_from("<BQ", raw, 17)
    data = np.fromfile(folder / f"{split}.bin", {4: np.int32, 8: np.uint16}[code])
    return np.split(data, np.cumsum(np.frombuffer(raw, np.int32, count, 34))[:-1]) if count else []


@pytest.fixture
def mixed(tmp_path):
    """One corpus in every kind of file: 90 documents, among them duplicates and rubbish."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(text(0), encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress(text(1).replace("\n", "\r\n").encode()))
    jsonl(folder / "c.jsonl", [text(i) for i in range(2, 40)] + [text(0), "too short", "", "# # # " * 60])
    lines = "".join(json.dumps({"text": text(i)}) + "\n" for i in range(40, 60)).encode()
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(
        pa.table({"text": [text(i) for i in range(60, 84)] + [text(2)]}), folder / "e.parquet", row_group_size=7
    )
    return folder


def test_a_corpus_of_every_kind_is_built_and_every_token_leads_back(tmp_path, mixed):
    report = build(section(tmp_path, [mixed], split=(0.8, 0.15, 0.05)))
    folder = tmp_path / "out"
    rows = table(folder).to_dicts()
    assert (report.documents, report.kept) == (89, 84) and len(rows) == 89
    assert report.dropped == {"duplicate": 2, "min_words": 2, "empty": 1}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    split_documents = {split: documents_of(folder, split) for split in ("train", "validation", "test")}
    flat = {split: np.concatenate([*arrays, np.empty(0, np.uint16)]) for split, arrays in split_documents.items()}
    originals = {i: text(i) for i in range(84)}
    texts = []
    for row in rows:
        if row["fate"] != "kept":
            assert row["split"] is None and row["tokens"] is None and row["reason"]
            continue
        ids = flat[row["split"]][row["token_offset"] : row["token_offset"] + row["tokens"]]
        assert ids[-1] == tokenizer.token_to_id("<|endoftext|>") == 0 and (ids[:-1] != 0).all()
        texts.append(tokenizer.decode(ids[:-1].tolist()))
    assert texts == list(originals.values())  # nothing lost, nothing changed but line ends, in source order
    counts = {split: len(arrays) for split, arrays in split_documents.items()}
    assert counts == {split: report.splits[split]["documents"] for split in counts} and min(counts.values()) > 0
    assert sum(map(len, flat.values())) == report.tokens == sum(row["tokens"] or 0 for row in rows)
    assert not (folder / ".build").exists()


def test_the_dataset_opens_verifies_and_feeds_batches(tmp_path, mixed):
    report = build(section(tmp_path, [mixed]))
    dataset = Dataset.open(tmp_path / "out")
    dataset.verify()
    assert dataset.vocab_size == report.vocab_size <= 500 and dataset.manifest["dtype"] == "uint16"
    assert dataset.fingerprint == report.fingerprint and dataset.tokenizer_path.is_file()
    tokens = batch(dataset, 3, 4, 32, seed=1)
    assert tokens.shape == (4, 33) and tokens.max() < dataset.vocab_size
    with pytest.raises(UserError, match="did you mean 'validation'"):
        dataset.split("valdation")
    with open(dataset.path / "train.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"train.bin is not what was built"):
        Dataset.open(dataset.path).verify()
    (dataset.path / "validation.idx").write_bytes(b"")
    with pytest.raises(UserError, match=r"validation.idx has 0 bytes"):
        Dataset.open(dataset.path)


def test_transformers_reads_the_tokenizer_the_same_way(tmp_path, mixed):
    transformers = pytest.importorskip("transformers")
    build(section(tmp_path, [mixed]))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs(text(0))["input_ids"] == documents_of(tmp_path / "out", "train")[0][:-1].tolist()
    assert theirs.decode(theirs(text(3))["input_ids"]) == text(3)


def test_workers_and_shards_do_not_change_a_byte(tmp_path, mixed):
    reference = None
    for workers, shard_documents in ((1, 1024), (2, 10), (4, 1024)):
        folder = tmp_path / f"out-{workers}"
        build(section(tmp_path, [mixed], path=str(folder), workers=workers, shard_documents=shard_documents))
        found = {
            name: data for name, data in contents(folder).items() if name.endswith((".bin", ".idx", "tokenizer.json"))
        }
        rows = table(folder)
        reference = reference or (found, rows)
        assert found == reference[0] and rows.equals(reference[1])
        if shard_documents == 1024:
            whole = contents(folder)
            assert whole == contents(tmp_path / "out-1")


def test_the_split_follows_content_and_seed_and_nothing_else(tmp_path):
    texts = [text(i, 60) for i in range(300)]
    shares = (0.7, 0.2, 0.1)
    build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", texts)], split=shares))
    first = {row["content_hash"]: row["split"] for row in table(tmp_path / "out").to_dicts()}
    for name, share in zip(("train", "validation", "test"), shares, strict=True):
        expected, got = 300 * share, sum(split == name for split in first.values())
        assert abs(got - expected) < 4 * (expected * (1 - share)) ** 0.5
    shuffled = jsonl(tmp_path / "y.jsonl", random.Random(1).sample(texts, 200))
    build(section(tmp_path, [shuffled], split=shares, path=str(tmp_path / "other")))
    assert all(first[row["content_hash"]] == row["split"] for row in table(tmp_path / "other").to_dicts())
    build(section(tmp_path, [shuffled], split=shares, path=str(tmp_path / "seed"), seed=1))
    assert any(first[row["content_hash"]] != row["split"] for row in table(tmp_path / "seed").to_dicts())


def test_duplicates_name_the_first_in_source_order(tmp_path):
    source = jsonl(
        tmp_path / "x.jsonl", [text(1), text(2), text(1), text(1) + "\r", "e\u0301" + text(3), "\u00e9" + text(3)]
    )
    report = build(section(tmp_path, [source]))
    rows = table(tmp_path / "out").to_dicts()
    assert report.dropped == {"duplicate": 2}
    assert [row["duplicate_of"] for row in rows] == [None, None, rows[0]["id"], None, None, rows[4]["id"]]
    assert len({row["id"] for row in rows}) == 6
    everything = section(tmp_path, [source], deduplicate=False, path=str(tmp_path / "all"))
    assert build(everything).kept == 6


def test_all_features_of_every_document_are_kept_so_limits_can_be_asked_again(tmp_path, mixed):
    build(section(tmp_path, [mixed]))
    strict = section(tmp_path, [mixed], path=str(tmp_path / "strict"), filters={"min_mean_word_length": 5.2})
    wanted = build(strict).dropped["min_mean_word_length"]
    rows = table(tmp_path / "out")
    assert rows.select(FEATURES).null_count().sum_horizontal().item() == 0
    again = rows.filter((pl.col("mean_word_length") < 5.2) & (pl.col("words") >= 50) & (pl.col("characters") > 0))
    assert len(again) == wanted > 3


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path):
    strange = text(1) + " <|endoftext|> " + text(2)
    build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", [strange, text(3)])], split=(1, 0, 0)))
    documents = documents_of(tmp_path / "out", "train")
    assert [int((ids == 0).sum()) for ids in documents] == [1, 1]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(documents[0][:-1].tolist(), skip_special_tokens=False) == strange


# --- loaded tokenizers


def test_a_loaded_tokenizer_with_truncation_gaps_and_many_tokens(tmp_path):
    build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", [text(i) for i in range(5)])], split=(1, 0, 0)))
    trained = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    trained.enable_truncation(7)
    trained.enable_padding(length=9)
    document = json.loads(trained.to_str())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 70_000, "content": "<far>"})
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    settings = section(tmp_path, [tmp_path / "x.jsonl"], path=str(tmp_path / "big"), tokenizer={"path": str(other)})
    try:
        Tokenizer.from_str(json.dumps(document)).get_vocab()["<far>"]
    except Exception as error:
        pytest.skip(f"this tokenizers version refuses ids with gaps: {error}")
    report = build(settings.model_copy(update={"split": (1.0, 0.0, 0.0)}))
    far = Tokenizer.from_file(str(other / "tokenizer.json")).token_to_id("<far>")
    assert report.vocab_size == far + 1 and report.dtype == ("int32" if far >= 65_500 else "uint16")
    ours, theirs = documents_of(tmp_path / "big", "train"), documents_of(tmp_path / "out", "train")
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)) and len(ours) == len(theirs)
    assert (tmp_path / "big" / "chat_template.jinja").is_file()
    assert "chat_template.jinja" in [path.name for path in Dataset.open(tmp_path / "big").tokenizer_files]


def test_more_than_65500_tokens_are_int32_and_ids_survive(tmp_path):
    vocab = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 70_001)}}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|endoftext|>"}
    document = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    for key in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        document[key] = None
    document["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    words = [f"w{i}" for i in (1, 300, 65_499, 65_500, 65_535, 65_536, 70_000)]
    source = jsonl(tmp_path / "x.jsonl", [" ".join(words)])
    fields = {"tokenizer": {"path": str(tmp_path)}, "filters": {"enabled": False}, "split": (1, 0, 0)}
    report = build(section(tmp_path, [source], **fields))
    assert report.dtype == "int32" and report.vocab_size == 70_001
    assert documents_of(tmp_path / "out", "train")[0].tolist() == [1, 300, 65_499, 65_500, 65_535, 65_536, 70_000, 0]
    assert batch(Dataset.open(tmp_path / "out"), 0, 1, 7, 0).tolist() == [
        [1, 300, 65_499, 65_500, 65_535, 65_536, 70_000, 0]
    ]


@pytest.mark.parametrize(
    "content, words",
    [(None, ["no tokenizer.json"]), ("{}", ["cannot be read"]), ("words", ["no end-of-document token"])],
)
def test_a_tokenizer_that_will_not_do_is_refused(tmp_path, content, words):
    if content == "words":
        model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
        content = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", [text(1)])], tokenizer={"path": str(tmp_path)}))
    assert all(word in str(error.value) for word in words)


# --- what is empty, bad or changed


def test_an_empty_corpus_and_one_that_filters_remove_whole(tmp_path):
    with pytest.raises(UserError, match="the corpus is empty: no document in 1 files"):
        build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", [])]))
    source = jsonl(tmp_path / "y.jsonl", ["one two three", "four five six", "", "# # # " * 60])
    with pytest.raises(
        UserError, match=r"all 4 documents were removed, 3 of them by min_words \(empty 1\); data.filters"
    ) as error:
        build(section(tmp_path, [source]))
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()
    assert why(tmp_path / "out", "y.jsonl@0").line == "dropped by min_words: 3 is below 50"
    report = build(
        section(tmp_path, [source], filters={"min_words": 2, "min_stop_words": 0, "repetition": False}, split=(1, 0, 0))
    )
    assert report.kept == 2  # the build that ended with nothing does not stand in the way of the next


def test_small_splits_may_be_empty_and_the_report_says_so(tmp_path):
    report = build(section(tmp_path, [jsonl(tmp_path / "x.jsonl", [text(i) for i in range(3)])]))
    assert any("the test split is empty" in note for note in report.notes)
    assert any("no more pairs" in note for note in report.notes) == (report.vocab_size < 500)
    dataset = Dataset.open(tmp_path / "out")
    assert len(dataset.split("test")) == 0
    with pytest.raises(UserError, match="the test split has 0 tokens"):
        batch(dataset, 0, 1, 8, 0, split="test")
    with pytest.raises(UserError, match="the train split is empty"):
        fields = {"split": (1e-9, 1 - 1e-9, 0.0), "path": str(tmp_path / "none")}
        build(section(tmp_path, [tmp_path / "x.jsonl"], **fields))


def test_a_malformed_line_stops_the_build_or_is_recorded(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(20)])
    lines = source.read_text().splitlines(keepends=True)
    lines[12] = '{"text": "broken\n'
    source.write_text("".join(lines))
    settings = section(tmp_path, [source], shard_documents=5)
    with pytest.raises(UserError, match=r"x.jsonl: line 13: not valid JSON at byte \d+.*on_bad_record=skip"):
        build(settings)
    assert len(list((tmp_path / "out" / ".build").glob("read-*.shard"))) == 2  # the shards before it are kept
    report = build(settings.model_copy(update={"on_bad_record": "skip"}))
    assert report.kept == 19 and report.dropped == {"malformed": 1}
    fate = why(tmp_path / "out", f"x.jsonl@{sum(map(len, lines[:12]))}")
    assert fate.line.startswith("dropped: malformed, line 13: not valid JSON")
    with pytest.raises(UserError, match="on_bad_record=skip and left out 1"):
        build(settings)


def test_truncated_files_stop_the_build_with_their_name(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not for long")
    with pytest.raises(UserError, match=r"x.parquet: truncated or damaged parquet file at row 0"):
        build(section(tmp_path, [tmp_path / "x.parquet"]))
    lines = "".join(json.dumps({"text": text(i)}) + "\n" for i in range(30)).encode()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(UserError, match=r"x.jsonl.gz: line \d+: truncated gzip stream at byte \d+"):
        build(section(tmp_path, [tmp_path / "x.jsonl.gz"]))
    report = build(
        section(tmp_path, [tmp_path], on_bad_record="skip", split=(1, 0, 0), shard_documents=3), rebuild=True
    )
    assert report.dropped["malformed"] == 2 and 5 < report.kept < 30


@pytest.mark.parametrize(
    "change, words",
    [
        ({"filters": {"min_words": 3}}, "data.filters.min_words was 50 and is now 3"),
        ({"normalize": "nfkc"}, "data.normalize was 'nfc' and is now 'nfkc'"),
        ({"tokenizer": {"vocab_size": 400}}, "data.tokenizer.vocab_size was 500 and is now 400"),
        ({"seed": 5}, "data.seed was 0 and is now 5"),
        ({"split": (0.5, 0.5, 0.0)}, "data.split was"),
    ],
)
def test_a_changed_configuration_is_refused_by_name_and_rebuilt_on_demand(tmp_path, change, words):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(12)])
    first = build(section(tmp_path, [source]))
    before = contents(tmp_path / "out")
    changed = section(tmp_path, [source], **change)
    with pytest.raises(UserError, match="holds a dataset of another configuration") as error:
        build(changed)
    assert words in str(error.value) and "--rebuild" in str(error.value)
    assert contents(tmp_path / "out") == before
    second = build(changed, rebuild=True)
    assert second.fingerprint != first.fingerprint and not second.reused
    fresh = build(changed.model_copy(update={"path": str(tmp_path / "fresh")}))
    assert fresh.fingerprint == second.fingerprint and contents(tmp_path / "fresh") == contents(tmp_path / "out")


def test_a_changed_source_is_refused_by_name_and_an_unchanged_one_is_not_read_again(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(12)])
    first = build(section(tmp_path, [source]))
    again = build(section(tmp_path, [source], workers=2, shard_documents=3))
    assert again.reused and not first.reused and again.fingerprint == first.fingerprint
    source.write_text(source.read_text() + json.dumps({"text": text(99)}) + "\n")
    with pytest.raises(UserError, match=r"x.jsonl has changed; use `ridgeline data build CONFIG --rebuild`"):
        build(section(tmp_path, [source]))
    jsonl(tmp_path / "y.jsonl", [text(3)])
    with pytest.raises(UserError, match=r"data.sources was"):
        build(section(tmp_path, [source, tmp_path / "y.jsonl"]))


# --- why, show and the program


def ridgeline(*arguments):
    """The program in this process: its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code or 0


def test_the_room_is_imported_without_torch_arrow_or_a_table_engine():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'pyarrow', 'polars', 'narwhals', 'zstandard']));"
    code = f"{blocked} from ridgeline.data import Dataset, SampleOrder, build; print(SampleOrder(9, 0).order(3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and 0 <= int(done.stdout) < 9, done.stderr


def test_why_finds_documents_by_id_path_place_and_beginning(tmp_path, mixed):
    build(section(tmp_path, [mixed]))
    folder, rows = tmp_path / "out", table(tmp_path / "out").to_dicts()
    kept = why(folder, "a.txt")
    assert kept.row["source"].endswith("in/a.txt") and kept.line.startswith(f"kept: {kept.row['tokens']:,} tokens of")
    assert (
        why(folder, kept.row["id"]).row
        == kept.row
        == why(folder, kept.row["id"][:9]).row
        == why(folder, "in/a.txt").row
    )
    short = next(row for row in rows if row["reason"] == "min_words")
    fate = why(folder, f"c.jsonl@{short['offset']}")
    assert fate.line == "dropped by min_words: 2 is below 50" and "min_stop_words" in fate.row["broken"]
    copy = next(row for row in rows if row["reason"] == "duplicate")
    assert why(folder, copy["id"]).line == f"dropped: duplicate of {kept.row['id']}"
    with pytest.raises(UserError, match=r"42 documents fit, such as .*SOURCE@OFFSET"):
        why(folder, "c.jsonl")
    with pytest.raises(UserError, match=r"'a.text': not among 89 \(did you mean 'a.txt'\?\)"):
        why(folder, "a.text")
    with pytest.raises(UserError, match=r"no manifest\.json there"):
        why(tmp_path, "a.txt")


def test_why_names_the_documents_nearest_to_an_unknown_one(tmp_path):
    names = ["1961-Kennedy.txt", "1962-Kennedy.txt", "1863-Lincoln.txt"]
    for number, name in enumerate(names):
        (tmp_path / name).write_text(text(number))
    build(section(tmp_path, [tmp_path / name for name in names]))
    with pytest.raises(UserError, match=r"'Kennedy': not among 3 \(did you mean '1961-K\S+' or '1962-K\S+'\?\)"):
        why(tmp_path / "out", "Kennedy")
    with pytest.raises(UserError, match=r"'Linkoln': not among 3 \(did you mean '1863-Lincoln.txt'"):
        why(tmp_path / "out", "Linkoln")
    with pytest.raises(UserError, match=r"'\?': not among 3 \(such as '1863-Lincoln.txt'\)"):
        why(tmp_path / "out", "?")


@pytest.mark.parametrize(
    "name", ["../../evil", "/", "a/b", ".", "..", " .. ", "a\0b", "a\nb", "", "  ", "x" * 101, "é" * 300]
)
def test_a_name_that_is_not_one_folder_is_refused(name):
    with pytest.raises(UserError, match=r"data\.name: must be letters, digits"):
        parse_config({"data": {"name": name}})


@pytest.mark.parametrize("name", ["corpus", "State of the Union", "v1.2_x-3", "..x", "Größe", "x" * 100])
def test_a_name_that_is_one_folder_is_taken(name):
    assert parse_config({"data": {"name": name}}).data.folder == f"datasets/{name}"


@pytest.mark.parametrize(
    "override",
    [
        "data.split=[nan,0.5,0.5]",
        "optimizer.learning_rate=inf",
        "data.filters.min_mean_word_length=nan",
        "model.rope_theta=inf",
    ],
)
def test_numbers_of_a_configuration_are_finite(override):
    with pytest.raises(UserError, match="finite number") as error:
        parse_config({}, [override])
    assert override.partition("=")[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["train.bin", "tokenizer.json", "provenance.parquet", "manifest.json", ".build/main.o"]
)
@pytest.mark.parametrize("rebuild", [False, True])
def test_files_of_somebody_else_are_neither_overwritten_nor_deleted(tmp_path, name, rebuild):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(20)])
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"{name}"):
        build(section(tmp_path, [source]), rebuild=rebuild)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert files == [tmp_path / "out" / name] and files[0].read_text() == '{"mine": 1}'


def test_other_files_beside_a_dataset_stay(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(20)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    build(section(tmp_path, [source]))
    build(section(tmp_path, [source], seed=1), rebuild=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_dataset_with_a_damaged_manifest_is_rebuilt_as_its_message_says(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [text(i) for i in range(20)])
    build(section(tmp_path, [source]))
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"format": "ridge')
    with pytest.raises(UserError, match="is damaged; `ridgeline data build CONFIG --rebuild` builds it again"):
        build(section(tmp_path, [source]))
    build(section(tmp_path, [source]), rebuild=True)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 0 bytes, .*; `ridgeline data build CONFIG --rebuild` builds it again"):
        Dataset.open(tmp_path / "out")


def test_the_program_builds_shows_answers_and_leaves_runs(tmp_path, mixed, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RIDGELINE_RUNS", raising=False)
    config = tmp_path / "job.toml"
    config.write_text('[data]\nname = "mixed"\nsources = ["in"]\n[data.tokenizer]\nvocab_size = 400\n')
    command = [sys.executable, "-m", "ridgeline", "data", "build", str(config), "data.workers=2", "--json"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    document = json.loads(built.stdout)
    assert document["kept"] == 84 and document["vocab_size"] == 400 and document["splits"]["train"]["tokens"] > 0
    (run,) = list_runs(tmp_path / "runs", "data")
    assert run.id == document["run"] and run.info["status"] == "done" and run.summary["tokens"] == document["tokens"]
    assert run.summary["fates"] == {"kept": 84, "dropped: duplicate": 2, "dropped: min_words": 2, "dropped: empty": 1}

    assert ridgeline("data", "why", "b.txt.gz", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fate"] == "kept" and answer["limits"]["words"] == {"min": 50, "max": 100_000}
    assert ridgeline("data", "why", "b.txt.gz") == 0
    people = capsys.readouterr().out
    assert "kept:" in people and "mean_word_length" in people
    assert ridgeline("data", "show", "datasets/mixed", "--verify") == 0
    shown = capsys.readouterr().out
    assert "checksums agree" in shown and "dropped: duplicate" in shown
    assert ridgeline("data", "build", config) == 0
    assert "already built" in capsys.readouterr().out

    for arguments, code, words in [
        (["build", config, "data.filters.min_wrds=3"], 2, "did you mean 'data.filters.min_words'"),
        (["build", config, "data.filters.min_words=3"], 2, "data.filters.min_words was 50 and is now 3"),
        (["show", "nowhere"], 2, "dataset nowhere: no manifest.json there"),
        (["why", "nothing"], 2, "document 'nothing': not among 89"),
    ]:
        assert ridgeline("data", *arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("ridgeline: ") and words in error and len(error.strip().splitlines()) == 1
    assert sorted(run.info["status"] for run in list_runs(tmp_path / "runs", "data")) == ["done", "done", "failed"]
