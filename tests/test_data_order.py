"""The order of samples and the token files, against an independent reading of their definitions."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data import SampleOrder, batch, batch_samples, num_samples, read_tokens
from ridgeline.data.megatron import TokenFile, write_index
from ridgeline.data.tokenizer import token_dtype
from ridgeline.errors import UserError

seeds = st.integers(-(2**40), 2**64 - 1)


# --- the permutation


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), seeds, st.integers(0, 5))
def test_each_epoch_is_a_permutation(count, seed, epoch):
    places = np.arange(count) + epoch * count
    order = SampleOrder(count, seed).order(places)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**48), seeds, st.data())
def test_one_element_costs_one_element_and_agrees_with_the_vector(count, seed, data):
    order = SampleOrder(count, seed)
    places = data.draw(st.lists(st.integers(0, 3 * count), min_size=1, max_size=5))
    together = order.order(np.array(places, np.int64))
    assert [order.order(place) for place in places] == together.tolist()
    assert all(0 <= sample < count for sample in together)


def test_epochs_and_seeds_give_other_orders():
    count = 1000
    seen = {tuple(SampleOrder(count, seed).order(np.arange(count) + e * count)) for seed in range(20) for e in range(5)}
    assert len(seen) == 100


def test_every_order_of_few_samples_is_reached_about_equally_often():
    """Chi-square over all 24 orders of 4 samples: 23 degrees of freedom, beyond 60 with a chance of 4e-5."""
    draws = 4800
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(draws):
        order = tuple(SampleOrder(4, seed).order(np.arange(4)).tolist())
        counts[order] = counts.get(order, 0) + 1
    expected = draws / 24
    assert len(counts) == 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 60


def test_neighbours_are_not_neighbours_any_more():
    order = SampleOrder(100_000, 7).order(np.arange(100_000))
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected of a random order


def test_the_order_is_fixed_for_good():
    """A change of these numbers would silently reorder every run that is resumed."""
    assert SampleOrder(1000, 42).order(np.array([0, 1, 2, 999, 1000])).tolist() == [777, 947, 480, 665, 900]


def test_a_start_at_any_step_costs_the_same():
    def seconds(count, place):
        started = time.perf_counter()
        for _ in range(200):
            SampleOrder(count, 3).order(place)
        return time.perf_counter() - started

    near, far = min(seconds(10_000, 0) for _ in range(3)), min(seconds(10**15, 10**16) for _ in range(3))
    assert far < 5 * near + 0.05


@pytest.mark.parametrize("call", [lambda: SampleOrder(0, 0), lambda: SampleOrder(5, 0).order(-1)])
def test_impossible_orders_are_refused(call):
    with pytest.raises(UserError):
        call()


# --- batches


def token_file(count, dtype=np.uint16):
    return TokenFile(np.arange(count).astype(dtype), np.array([0, count]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(50, 3000),
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 3),
    st.integers(2, 16),
    seeds,
)
def test_any_number_of_ranks_sees_the_same_batch(tokens, step, world, per_rank, seq, seed):
    data, size = token_file(tokens), world * per_rank
    whole = batch(data, step, size, seq, seed)
    assert whole.shape == (size, seq + 1) and whole.dtype == np.int64
    strided = [batch(data, step, size, seq, seed, rows=slice(rank, None, world)) for rank in range(world)]
    blocks = [
        batch(data, step, size, seq, seed, rows=slice(rank * per_rank, (rank + 1) * per_rank)) for rank in range(world)
    ]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    np.testing.assert_array_equal(np.stack(strided, axis=1).reshape(size, seq + 1), whole)
    np.testing.assert_array_equal(whole[:, 1:] - whole[:, :-1], 1)  # windows of consecutive tokens


def test_an_epoch_shows_every_window_once_and_every_target_once():
    data, seq, size = token_file(1 + 64 * 12), 12, 8
    windows = np.concatenate([batch(data, step, size, seq, 5) for step in range(8)])
    np.testing.assert_array_equal(np.sort(windows[:, 1:].ravel()), np.arange(1, 1 + 64 * 12))
    assert num_samples(data, seq) == 64
    again = np.concatenate([batch_samples(data, step, size, seq, 5) for step in range(8, 16)])
    np.testing.assert_array_equal(np.sort(again), np.arange(64))


def test_the_stream_of_samples_does_not_depend_on_the_batch_size():
    data = token_file(5000)
    one = np.concatenate([batch_samples(data, step, 4, 16, 9) for step in range(12)])
    other = np.concatenate([batch_samples(data, step, 16, 16, 9) for step in range(3)])
    np.testing.assert_array_equal(one, other)


def test_a_split_shorter_than_a_sample_is_refused_by_name():
    with pytest.raises(UserError, match=r"16 tokens.*train.seq_len=16"):
        batch(token_file(16), 0, 1, 16, 0)
    assert batch(token_file(17), 0, 3, 16, 0).shape == (3, 17)


# --- Megatron's files, read by hand


def read_by_hand(prefix):
    """The layout as Megatron's documents give it, byte by byte."""
    raw = prefix.with_suffix(".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code = struct.unpack("<QB", raw[9:18])
    assert version == 1
    dtype = {4: np.int32, 8: np.uint16}[code]
    sequences, documents = struct.unpack("<QQ", raw[18:34])
    at = 34
    lengths = np.frombuffer(raw, np.int32, sequences, at)
    at += 4 * sequences
    pointers = np.frombuffer(raw, np.int64, sequences, at)
    at += 8 * sequences
    bounds = np.frombuffer(raw, np.int64, documents, at)
    assert at + 8 * documents == len(raw) == 34 + 20 * sequences + 8
    assert bounds[0] == 0 and bounds[-1] == sequences and documents == sequences + 1
    data = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(data, dtype, n, p) for n, p in zip(lengths, pointers, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.sampled_from([np.uint16, np.int32]))
def test_token_files_read_back_by_hand_and_by_the_room(tmp_path_factory, lengths, dtype):
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    tokens = np.random.default_rng(0).integers(0, 65_499, sum(lengths)).astype(dtype)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    write_index(prefix.with_suffix(".idx"), np.array(lengths, np.int64), dtype)
    by_hand, opened = read_by_hand(prefix), read_tokens(prefix)
    assert len(by_hand) == len(opened.documents) - 1 == len(lengths)
    assert opened.tokens.dtype == dtype and len(opened) == sum(lengths)
    for index, document in enumerate(by_hand):
        np.testing.assert_array_equal(document, opened.document(index))
    np.testing.assert_array_equal(np.concatenate([*by_hand, np.empty(0, dtype)]), tokens)


def test_the_width_follows_megatrons_rule():
    assert [token_dtype(size) for size in (8192, 65_499, 65_500, 151_936)] == [np.uint16, np.uint16, np.int32, np.int32]


def test_documents_past_the_format_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"2,147,483,648 tokens"):
        write_index(tmp_path / "x.idx", np.array([2**31]), np.int32)
    assert not (tmp_path / "x.idx").exists()
    (tmp_path / "train.bin").write_bytes(np.arange(10, dtype=np.uint16).tobytes())
    write_index(tmp_path / "train.idx", np.array([4, 6]), np.uint16)
    good = (tmp_path / "train.idx").read_bytes()
    cases = [
        (good[:-1], "truncated"),
        (b"x" + good[1:], "not a Megatron index"),
        (good[:9] + b"\x02" + good[10:], "version 2"),
    ]
    for data, word in cases:
        (tmp_path / "train.idx").write_bytes(data)
        with pytest.raises(UserError, match=word):
            read_tokens(tmp_path / "train")
    (tmp_path / "train.idx").write_bytes(good)
    (tmp_path / "train.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="4 bytes, its index says 20"):
        read_tokens(tmp_path / "train")
