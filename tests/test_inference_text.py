"""Tokens to text and chat to prompt, against `tokenizers`, transformers and the plain definition of a stop string."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers, trainers

from ridgeline.errors import UserError
from ridgeline.inference.detokenize import Detokenizer, StopWatch, TextStream
from ridgeline.inference.fewshot import chrf, read, score
from ridgeline.inference.request import SamplingParams
from ridgeline.inference.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat, and the dog ran", "naïve café, 日本語 und Grüße", "🙂🙃 emoji 👩‍👩‍👧", "\n\n  x\ty"]
TEMPLATE = """{%- for message in messages %}
  {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{{ bos_token if loop.first }}<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{%- if tools is defined and tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|assistant|>{{ {'é': 1} | tojson }}{% endif %}"""


@pytest.fixture(scope="module")
def raw() -> Raw:
    """A byte-level BPE whose small vocabulary cuts characters into bytes."""
    tokenizer = Raw(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def decoder(raw: Raw):
    return lambda ids: raw.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_pieces_make_up_the_whole_for_any_ids(raw, ids):
    """Also for ids whose bytes are no UTF-8; and no piece but the last ends in half a character."""
    stream = Detokenizer(decoder(raw))
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.flush() == raw.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_of_real_text_never_show_a_replacement(raw, text):
    stream = Detokenizer(decoder(raw))
    pieces = [stream.add(token) for token in raw.encode(text).ids]
    assert "".join(pieces) + stream.flush() == text
    assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")


def test_metaspace_spaces_survive():
    """A decoder that strips the first token's space (Llama's) would eat every space without the context kept."""
    vocab = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4}
    tokenizer = Raw(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    ids = [1, 2, 3, 4, 1, 2, 2, 2, 2, 2, 2, 2, 3]
    stream = Detokenizer(decoder(tokenizer))
    assert "".join(map(stream.add, ids)) + stream.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).count(" cat") == 8


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_across_pieces(pieces, stops):
    """Shown text = what stands before the earliest stop string; and only a possible beginning of one is held back."""
    watch, shown, found = StopWatch(stops), "", False
    for number, piece in enumerate(pieces):
        text, found = watch.add(piece)
        shown += text
        if found:
            break
        whole = "".join(pieces[: number + 1])
        held = whole[len(shown) :]
        assert whole.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
    whole = "".join(pieces)
    if not found:
        shown += watch.flush()
    ends = [_first_end(whole, stop) for stop in stops if stop in whole]
    assert found == bool(ends)
    if not found:
        assert shown == whole
    else:
        assert whole.startswith(shown) and not any(stop in shown for stop in stops)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)


def _first_end(whole: str, stop: str) -> int:
    return whole.index(stop) + len(stop)


def test_a_stop_string_in_a_character_that_comes_in_bytes(raw):
    ids = raw.encode("abc日本").ids
    stream, shown = TextStream(decoder(raw), ("日",)), ""
    for token in ids:
        text, found = stream.add(token)
        shown += text
        if found:
            break
    assert found and shown == "abc"


def test_tokenizer_and_template_equal_transformers(raw, tmp_path):
    raw.save(str(tmp_path / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "system", "content": " Be  brief. "}, {"role": "user", "content": "Où?\n"}]
    for opened in (True, False):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
        assert ours.apply_chat_template(chat, add_generation_prompt=opened) == expected
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(chat) == ids
    with pytest.raises(UserError, match="no role tool"):
        ours.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("source", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"])
def test_templates_run_in_a_sandbox(raw, tmp_path, source):
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError):
        Tokenizer.load(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


def test_errors_of_a_tokenizer_folder(raw, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.apply_chat_template([])
    with pytest.raises(UserError, match="UTF-8"):
        tokenizer.encode("ab\udce9")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "from 0"),
        ("temperature", float("nan"), "from 0"),
        ("top_p", 0.0, "above 0 to 1"),
        ("top_k", -1, "from 0"),
        ("repetition_penalty", 0, "above 0"),
        ("max_tokens", 0, "from 1"),
        ("logprobs", 21, "0 to 20"),
        ("seed", -1, "from 0"),
        ("stop", ("",), "one character"),
    ],
)
def test_invalid_parameters_name_the_field_and_the_range(field, value, words):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})
    assert field in str(error.value) and words in str(error.value)


# sacrebleu 2.6.0, sentence_chrf(hypothesis, [reference]).score
CHRF = [
    ("Le chien est petit.", "Le chien est petit.", 100.0),
    ("J'habite à London.", "J'habite à Londres.", 74.03089820033122),
    ("le grand éléphant", "l'arbre vert", 7.0621468926553685),
    ("un café de coffee", "une tasse de café", 25.278887778887775),
    ("", "Merci.", 0.0),
    ("Me", "Merci.", 31.25),
]


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), CHRF)
def test_chrf_equals_sacrebleu(hypothesis, reference, expected):
    assert chrf(hypothesis, reference) == pytest.approx(expected, abs=1e-9)


def test_few_shot_files(tmp_path):
    task = read("en-fr")
    assert len(task.examples) == 8 and len(task.queries) == 12
    perfect = score(task, [f" {answers[0]}\nEnglish: more" for _, answers in task.queries])
    assert perfect.exact_match == 1.0 and perfect.chrf == pytest.approx(100.0)
    assert score(task, [""] * 12).chrf == 0.0
    assert task.prompt("x").endswith("English: x\nFrench:")
    file = tmp_path / "f.jsonl"
    for text, words in [
        ('{"input": "a"}', "line 1"),
        ('{"input": "a", "output": "b"}\n[1]', "line 2"),
        ("{", "not JSON"),
        ('{"query": "a", "answers": []}', "answers"),
        ('{"input": "a", "output": "b"}', "no line with 'query'"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            read(file)
    with pytest.raises(UserError, match="en-fr"):
        read("nothing")


def test_named_templates(raw, tmp_path):
    raw.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    settings_ = {"chat_template": named, "bos_token": {"content": "<s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    assert Tokenizer.load(tmp_path).apply_chat_template([]) == "D<s>"
