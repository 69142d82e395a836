"""Frequent kernel sequences: by hand, against plain loops over every n-gram, and in time on a real trace."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.sequences import COLUMNS, frequent_sequences, why_empty
from ridgeline.profiling.load import load_table
from test_profiling_launches import CONTROL, TRACES, call, captures, moved, needs_traces, row, table_of, work
from test_profiling_synthetic import CPU_STEP


def stream_of(text, gap_ns=10, stream=7, begin=0):
    """A stream that runs one kernel of 100 ns per letter; a ``-`` is a copy, a blank a pause of 1 ms."""
    events, at = [], begin
    for number, letter in enumerate(text):
        if letter == " ":
            at += 1_000_000
            continue
        category = "gpu_memcpy" if letter == "-" else "kernel"
        events.append(work(letter, at, 100, 1_000 * stream + number, stream, category))
        at += 100 + gap_ns
    return events


def counted(table, **options):
    """{sequence: (count, kernel_ns, gap_ns)}"""
    frame = frequent_sequences(table, top=10_000, **{"distinct": False, **options})
    assert frame.columns == list(COLUMNS["frequent_sequences"])
    return {"".join(one["sequence"]): (one["count"], one["kernel_ns"], one["gap_ns"]) for one in frame.rows(named=True)}


def test_sequences_by_hand():
    table = table_of(stream_of("abcabcdabc"))
    assert counted(table, length=(2, 3)) == {"abc": (3, 900, 60)}
    # "ab" and "bc" only occur inside "abc"; "abca" comes once.
    assert counted(table, length=(2, 2)) == {"ab": (3, 600, 30), "bc": (3, 600, 30)}


def test_occurrences_share_no_kernel():
    table = table_of(stream_of("aaaaa"))
    assert counted(table, length=(2, 2)) == {"aa": (2, 400, 20)}
    assert counted(table, length=(3, 3)) == {} and counted(table, length=(3, 3), min_count=1) == {"aaa": (1, 300, 20)}


def test_a_list_of_distinct_sequences_adds_up():
    """a b c repeats: once "abc" has taken its kernels, nothing is left of "bca" and "cab", the same loop turned."""
    table = table_of(stream_of("abcabcabc xy xy"))
    assert counted(table, distinct=True) == {"abc": (3, 900, 60), "xy": (2, 400, 20)}
    rotations = counted(table, length=(3, 3))
    assert set(rotations) == {"abc", "bca", "cab"} and counted(table, length=(3, 3), distinct=True) == {
        "abc": rotations["abc"]
    }


@given(st.text("abc- ", max_size=24), st.integers(2, 4))
def test_distinct_sequences_are_the_best_of_what_is_left(text, longest):
    """By count, against loops that weigh every sequence again in every round."""
    events = stream_of(text)
    table = table_of(events)
    letters = "".join(one["name"] for one in events)
    pauses = {at for at in range(1, len(events)) if events[at]["ts"] - events[at - 1]["ts"] > 1}

    def found_at(word, free):
        out, at = [], 0
        while at + len(word) <= len(letters):
            span = range(at, at + len(word))
            if letters[at : span.stop] == word and free.issuperset(span) and not pauses.intersection(span[1:]):
                out.append(at)
                at = span.stop
            else:
                at += 1
        return out

    free, expected = set(range(len(letters))), []
    candidates = ["".join(one) for one in frequent_sequences(table, (2, longest), 999, distinct=False)["sequence"]]
    everything = set(free)
    while candidates:
        ranked = [
            (len(found_at(w, free)), len(w) * len(found_at(w, free)), len(w), -found_at(w, everything)[0], w)
            for w in candidates
        ]
        count, *_, word = max(ranked)
        if count < 2:
            break
        expected.append((word, count))
        for at in found_at(word, free):
            free -= set(range(at, at + len(word)))
    got = frequent_sequences(table, (2, longest), 999, order="count")
    assert sorted(zip(map("".join, got["sequence"]), got["count"], strict=True)) == sorted(expected)


def test_copies_pauses_and_streams_separate():
    assert counted(table_of(stream_of("a-b a-b"))) == {}
    assert counted(table_of(stream_of("a ba b"))) == {}
    assert counted(table_of(stream_of("a ba b")), pause_ns=2_000_000, length=(2, 2)) == {"ab": (2, 400, 2_000_020)}
    two = table_of(stream_of("abc") + stream_of("abc", stream=20, begin=5))
    assert counted(two) == {} and counted(two, min_count=1)["abc"][0] == 1


def test_within_one_operator():
    events = []
    for at in range(3):
        begin = 10_000 * at
        events.append(row("aten::gelu", "cpu_op", begin, 1_000))
        events.append(row("aten::inner", "cpu_op", begin + 100, 500))
        for number, letter in enumerate("abx"):
            correlation = 10 * at + number
            launched = begin + 200 + 100 * number if letter != "x" else begin + 2_000
            events += [call(launched, 50, correlation), work(letter, begin + 3_000 + 200 * number, 100, correlation)]
    table = table_of(events)
    assert set(counted(table)) >= {"abx"} and counted(table, operator="aten::gelu") == {"ab": (3, 600, 300)}
    with pytest.raises(UserError, match="did you mean 'aten::gelu'"):
        frequent_sequences(table, operator="aten::gelo")


def plain(streams, longest, min_count):
    """{(stream, sequence): (count, kernel ns, gap ns)} by loops; ``streams[stream]`` = runs of (name, start, end)."""
    every: Counter = Counter()
    apart: dict = defaultdict(list)
    for stream, runs in streams.items():
        for run in runs:
            for length in range(2, longest + 1):
                taken: dict = {}
                for at in range(len(run) - length + 1):
                    key = stream, tuple(name for name, *_ in run[at : at + length])
                    every[key] += 1
                    if at >= taken.get(key, 0):
                        taken[key] = at + length
                        apart[key].append(run[at : at + length])
    often = {key: found for key, found in apart.items() if len(found) >= min_count}

    def inside(key):
        longer = (one for one in often if one[0] == key[0] and len(one[1]) == len(key[1]) + 1)
        return any(
            key[1] in (one[1][1:], one[1][:-1]) and every[one] == every[key] and len(often[one]) == len(often[key])
            for one in longer
        )

    return {
        key: (
            len(found),
            sum(end - start for one in found for _, start, end in one),
            sum(max(b[1] - a[2], 0) for one in found for a, b in itertools.pairwise(one)),
        )
        for key, found in often.items()
        if not inside(key)
    }


@given(st.lists(st.text("ab- ", max_size=14), max_size=2), st.integers(2, 5), st.integers(1, 3))
def test_any_text_is_counted_as_plain_loops_count_it(texts, longest, min_count):
    events, streams = [], {}
    for stream, text in enumerate(texts):
        made = stream_of(text, stream=stream)
        events += made
        streams[stream], run = [], []
        for one, following in zip(made, [*made[1:], None], strict=False):
            start, end = round(one["ts"] * 1000), round((one["ts"] + one["dur"]) * 1000)
            if one["cat"] == "kernel":
                run.append((one["name"], start, end))
            broken = following is None or following["cat"] != "kernel" or following["ts"] * 1000 - end > 1_000
            if broken or one["cat"] != "kernel":
                streams[stream].append(run)
                run = []
    table = table_of(events)
    got = frequent_sequences(table, (2, longest), 10_000, min_count=min_count, distinct=False)
    found = {
        (one["stream"], tuple(one["sequence"])): (one["count"], one["kernel_ns"], one["gap_ns"])
        for one in got.rows(named=True)
    }
    assert found == plain(streams, longest, min_count)


@given(captures(), st.integers(0, 99))
def test_nothing_depends_on_the_order_of_the_file_or_the_clock(events, seed):
    frame = frequent_sequences(table_of(events), min_count=1)
    starts = [one["ts"] for one in events if one["cat"] != "cpu_op"]
    if len(set(starts)) == len(starts):
        random.Random(seed).shuffle(events)
        assert frequent_sequences(table_of(moved(events, 9_000)), min_count=1).equals(frame)
    total = sum(round(one["dur"] * 1000) for one in events if one["cat"] == "kernel")
    assert all(one["kernel_ns"] <= total and one["gap_ns"] >= 0 for one in frame.rows(named=True))


def test_what_cannot_be_answered_says_why():
    table = table_of(stream_of("abab"))
    for wrong in ((1, 3), (4, 2)):
        with pytest.raises(UserError, match="sequence length"):
            frequent_sequences(table, wrong)
    with pytest.raises(UserError, match="no such order"):
        frequent_sequences(table, order="gaps")  # type: ignore[arg-type]
    for without in (table_of(CPU_STEP), table_of([]), table_of(stream_of("--"))):
        assert why_empty(without) and frequent_sequences(without).is_empty()
        assert frequent_sequences(without).columns == list(COLUMNS["frequent_sequences"])
    assert why_empty(table) is None and frequent_sequences(table_of(stream_of("a"))).is_empty()


def test_the_order_is_the_one_asked_for():
    table = table_of(stream_of("ababab") + stream_of("cdcd", gap_ns=500, begin=100_000_000))
    for order in ("gap_ns", "kernel_ns", "count"):
        assert frequent_sequences(table, order=order)[order].is_sorted(descending=True)
    assert frequent_sequences(table, top=1)["sequence"].to_list()[0][0] in "cd"


@needs_traces
def test_a_hundred_thousand_events_take_less_than_two_seconds():
    """HTA takes 44.6 s on this trace of 109,123 events. CPU time of this process, without the load."""
    table = load_table(TRACES / CONTROL)
    before = time.process_time()
    frame = frequent_sequences(table)
    assert time.process_time() - before < 2
    assert frame.height == 20 and (frame["count"] >= 2).all() and frame["gap_ns"].is_sorted(descending=True)
    # The rows share no kernel: together they hold at most what the device did and at most its pauses.
    work = table.intervals(table.device_rows)
    assert frame["kernel_ns"].sum() <= int(table.duration[table.device_rows].sum())
    assert (frame["count"] * frame["length"]).sum() <= int(table.device_rows.sum())
    assert frame["gap_ns"].sum() <= int(work.end[-1] - work.start[0])
