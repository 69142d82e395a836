"""Gopher features and rules against a plain-Python reading of their definitions, and the known traps."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.config import FilterSection
from ridgeline.data import features, repetition
from ridgeline.data.features import FEATURES, measure
from ridgeline.data.normalize import normalize
from ridgeline.data.rules import REPETITION_LIMITS, judge, rules

STOP = {"the", "be", "to", "of", "and", "that", "have", "with"}


# --- the oracle: each definition as one would write it with strings and sets


def words_of(text):
    found = []
    for chunk in text.split():
        marks = "".join({c for c in chunk if unicodedata.category(c)[0] in "PS"})
        core = chunk.strip(marks) if marks else chunk
        if not core:
            found.append(chunk)
            continue
        start = len(chunk) - len(chunk.lstrip(marks)) if marks else 0
        found += [piece for piece in (chunk[:start], core, chunk[start + len(core) :]) if piece]
    return found


def is_symbol(word):
    return all(unicodedata.category(c)[0] in "PS" for c in word)


def top_gram(words, n):
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return len(gram) * count


def duplicate_grams(words, n):
    seen, characters, place = set(), 0, 0
    while place < len(words) - n + 1:
        gram = "".join(words[place : place + n])
        if gram in seen:
            characters += len(gram)
            place += n
        else:
            seen.add(gram)
            place += 1
    return characters


def duplicates(pieces):
    seen, count, characters = set(), 0, 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count, characters


def share(part, whole):
    return part / whole if whole else 0.0


def reference(text):
    words = words_of(text)
    plain = [word for word in words if not is_symbol(word)]
    lines, split_lines = text.splitlines(), re.split(r"\n+", text)
    paragraphs = re.split(r"\n{2,}", text.strip())
    line_count, line_characters = duplicates(split_lines)
    paragraph_count, paragraph_characters = duplicates(paragraphs)
    return {
        "characters": len(text),
        "words": len(plain),
        "mean_word_length": share(sum(map(len, plain)), len(plain)),
        "hash_word_ratio": share(text.count("#"), len(words)),
        "ellipsis_word_ratio": share(text.count("...") + text.count("…"), len(words)),
        "bullet_line_ratio": share(sum(bool(re.match(r"\s*[•-]", line)) for line in lines), len(lines)),
        "ellipsis_line_ratio": share(sum(bool(re.search(r"(\.\.\.|…)\s*$", line)) for line in lines), len(lines)),
        "alpha_word_ratio": share(sum(any(c.isalpha() for c in word) for word in words), len(words)),
        "stop_words": len(STOP & set(words)),
        "duplicate_line_ratio": share(line_count, len(split_lines)),
        "duplicate_paragraph_ratio": share(paragraph_count, len(paragraphs)),
        "duplicate_line_char_ratio": share(line_characters, len(text)),
        "duplicate_paragraph_char_ratio": share(paragraph_characters, len(text)),
        **{f"top_{n}_gram_char_ratio": share(top_gram(words, n), len(text)) for n in (2, 3, 4)},
        **{f"duplicate_{n}_gram_char_ratio": share(duplicate_grams(words, n), len(text)) for n in range(5, 11)},
    }


def assert_as_reference(texts):
    values = measure(texts)
    assert np.isfinite(values).all()
    for row, text in zip(values, texts, strict=True):
        expected = reference(text)
        assert list(expected) == list(FEATURES)
        np.testing.assert_allclose(row, list(expected.values()), rtol=1e-12, atol=0, err_msg=repr(text[:200]))


# Few words and much punctuation: repetition, joined n-grams that coincide ("a b" and "ab"), symbol words.
pieces = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "the",
        "The",
        "of",
        "with,",
        '("to',
        "...",
        "…",
        "#",
        "##tag",
        "•",
        "-",
        "9,5",
        "don't",
        "é",
        "日本",
        "😀",
    ]
)
spaces = st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\u00a0", "\u3000"])
repetitive = st.lists(st.tuples(pieces, spaces), max_size=80).map(lambda parts: "".join(a + b for a, b in parts))
anything = st.text(max_size=200).map(lambda text: normalize(text, "nfc"))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.one_of(repetitive, anything), max_size=6))
def test_every_feature_is_what_its_definition_says(texts):
    assert_as_reference(texts)


def test_long_and_short_texts_of_a_batch_do_not_touch():
    phrase = "we the people of the united states in order to form a more perfect union "
    texts = [phrase * 400, "", phrase, "x" * 300_000, phrase[:20], phrase * 3, " \n\n ", phrase]
    assert_as_reference(texts)
    alone = np.concatenate([measure([text]) for text in texts])
    np.testing.assert_array_equal(measure(texts), alone)


def test_batching_changes_nothing(monkeypatch):
    texts = [f"document {i} says that " + "the same thing to all of them, " * (i % 7) for i in range(60)]
    expected = measure(texts)
    monkeypatch.setattr(features, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(repetition, "BUCKETS", 2)
    np.testing.assert_array_equal(measure(texts), expected)


@pytest.mark.parametrize("text", ["", " ", "\n\n\n", "word", "#", "…", "\u00a0", "a" * 1_000_000, "\ud800"[:0]])
def test_odd_texts_give_finite_values(text):
    assert_as_reference([text])


def test_trap_ngrams_are_joined_by_nothing_for_duplicates_and_by_a_space_for_the_top():
    text = "ab c d e f a bc d e f"  # the same ten letters twice, cut differently
    row = dict(zip(FEATURES, measure([text])[0], strict=True))
    assert row["duplicate_5_gram_char_ratio"] == pytest.approx(6 / len(text))
    assert row["top_2_gram_char_ratio"] == pytest.approx(len("d e") * 2 / len(text))


def test_trap_the_top_ngram_counts_when_it_occurs_once():
    assert measure(["one two"])[0][FEATURES.index("top_2_gram_char_ratio")] == 1.0


def test_trap_stop_words_are_distinct_and_case_sensitive():
    rows = measure(["the the the the", "The Be To", "the, and."])
    assert rows[:, FEATURES.index("stop_words")].tolist() == [1, 0, 2]


def test_surrogates_and_controls_never_reach_a_feature():
    text = normalize("a\ud800b\x00c\ufeff\r\nd\x0ce\u2028f", "nfc")
    assert text == "a\ufffdbc\nd\ne\nf"
    assert_as_reference([text])


@given(st.text(max_size=60), st.sampled_from(["nfc", "nfkc", "none"]))
def test_normalising_twice_changes_nothing(text, form):
    once = normalize(text, form)
    assert normalize(once, form) == once
    assert "\r" not in once and "\x00" not in once
    once.encode("utf-8")
    if form != "none":
        assert unicodedata.is_normalized(form.upper(), once)


# --- rules


def english(words):
    cycle = [
        "of",
        "all",
        "the",
        "things",
        "that",
        "we",
        "have",
        "to",
        "do",
        "with",
        "care",
        "and",
        "thought",
        "none",
        "can",
        "be",
        "rushed",
        "today",
        "friends",
    ]
    return " ".join(
        f"{cycle[i % len(cycle)]}{'' if i < len(cycle) else chr(97 + i * 7 % 26) * (i % 5)}" for i in range(words)
    )


@pytest.mark.parametrize(
    "text, rule",
    [
        (english(49), "min_words"),
        (english(100) + " " + "# " * 20, "max_hash_word_ratio"),
        (english(100) + " wait... " * 15, "max_ellipsis_word_ratio"),
        ("\n".join(f"- {english(60)[i * 9 : i * 9 + 9]} item{i}" for i in range(30)), "max_bullet_line_ratio"),
        (english(60) + " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", "min_alpha_word_ratio"),
        (
            "voici une phrase " + " ".join(f"mot{chr(97 + i % 26)}{chr(97 + i // 3)}" for i in range(60)),
            "min_stop_words",
        ),
        (" ".join(c * 12 for c in "abcdefghijklmnopqrstuvwxyz") * 3, "max_mean_word_length"),
        (" ".join(f"{chr(97 + i % 26)}{chr(97 + i % 7)}" for i in range(80)), "min_mean_word_length"),
        ("\n\n".join([english(60)] * 5), "max_duplicate_line_ratio"),
    ],
)
def test_the_first_broken_rule_is_the_reason_and_all_broken_ones_are_named(text, rule):
    verdict = judge(measure([text]), rules(FilterSection()))[0]
    assert verdict is not None and verdict.reason == rule == verdict.broken[0]
    limit = next(r for r in rules(FilterSection()) if r.name == rule)
    assert verdict.limit == limit.limit and reference(text)[limit.feature] == pytest.approx(verdict.value)
    assert (verdict.value < verdict.limit) == (limit.side == "min")


def test_ordinary_english_stays_and_switches_work():
    text = "The committee that met with us will have to decide which of the many proposals is best, and " + english(90)
    assert judge(measure([text]), rules(FilterSection())) == [None]
    assert judge(measure(["x"]), rules(FilterSection(enabled=False))) == [None]
    repeated = "\n\n".join([english(60)] * 5)
    assert judge(measure([repeated]), rules(FilterSection(repetition=False))) == [None]


def test_the_limits_of_repetition_are_those_of_the_paper():
    assert [REPETITION_LIMITS[f"duplicate_{n}_gram_char_ratio"] for n in range(5, 11)] == [
        0.15,
        0.14,
        0.13,
        0.12,
        0.11,
        0.10,
    ]
    assert [REPETITION_LIMITS[f"top_{n}_gram_char_ratio"] for n in (2, 3, 4)] == [0.20, 0.18, 0.16]


def test_a_corpus_in_another_language_falls_to_the_stop_words_of_english():
    """The known trap: the English stop-word rule removes nearly all French, so language comes first."""
    french = "Le premier ministre a présenté hier devant les députés un programme qui doit " * 1
    text = french + " ".join(f"relancer{chr(97 + i % 26)}{chr(97 + i // 26)} l'économie" for i in range(60))
    assert judge(measure([text]), rules(FilterSection(repetition=False)))[0].reason == "min_stop_words"


@pytest.mark.parametrize("rule", rules(FilterSection()), ids=lambda rule: rule.name)
def test_a_value_on_its_limit_stays_and_one_beyond_it_goes(rule):
    beyond = np.nextafter(rule.limit, -np.inf if rule.side == "min" else np.inf)
    values = np.zeros((2, len(FEATURES)))
    values[:, FEATURES.index(rule.feature)] = rule.limit, beyond
    assert [verdict and verdict.reason for verdict in judge(values, [rule])] == [None, rule.name]
