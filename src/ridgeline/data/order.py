"""Which tokens a training step sees: a closed form of (seed, step), without an index and without state.

Sample ``s`` of a split is the window ``tokens[s * seq : s * seq + seq + 1]``; windows run through the ends of
documents. The samples of an epoch come in the order of a keyed permutation of ``0..n-1`` that is computed one
element at a time: a Feistel network (Luby and Rackoff 1988) over the next power of two, walked until it lands
inside (Black and Rogaway 2002). So any step costs the same to reach, and any number of ranks reads the same batches.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ridgeline.data.dataset import Dataset
from ridgeline.data.megatron import TokenFile
from ridgeline.data.repetition import Words, mix
from ridgeline.errors import UserError

ROUNDS = 6


class SampleOrder:
    """The order of ``num_samples`` samples for ``seed``; every epoch is another permutation of all of them."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise UserError(f"sample order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        bits = max(2, (num_samples - 1).bit_length())
        self.low_bits = np.uint64(bits // 2)
        self.high_bits = np.uint64(bits - bits // 2)

    @overload
    def order(self, index: int) -> int: ...
    @overload
    def order(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
    def order(self, index: Any) -> Any:
        """The sample at place ``index`` (an int, or int64 of any shape) counted from the start of epoch 0."""
        places = np.asarray(index, np.int64)
        if places.size and int(places.min()) < 0:
            raise UserError(f"sample index {int(places.min())}: must not be negative")
        epochs, inside = np.divmod(places.ravel(), self.num_samples)
        keys = mix(mix(np.uint64(self.seed % (1 << 64)) + epochs.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)))
        out = self._walk(inside.astype(np.uint64), keys).astype(np.int64).reshape(places.shape)
        return int(out) if np.isscalar(index) else out

    def _walk(self, values: Words, keys: Words) -> Words:
        values = self._permute(values, keys)
        outside = np.flatnonzero(values >= np.uint64(self.num_samples))
        while len(outside):  # ends: the cycle of a start that lies inside comes back inside
            values[outside] = self._permute(values[outside], keys[outside])
            outside = outside[values[outside] >= np.uint64(self.num_samples)]
        return values

    def _permute(self, values: Words, keys: Words) -> Words:
        """A bijection of ``0 .. 2**bits - 1``: halves in turn are xor-ed with a keyed function of the other."""
        low_mask = (np.uint64(1) << self.low_bits) - np.uint64(1)
        high_mask = (np.uint64(1) << self.high_bits) - np.uint64(1)
        high, low = values >> self.low_bits, values & low_mask
        for turn in range(ROUNDS):
            key = mix(keys + np.uint64(2 * turn + 1))
            high = high ^ (mix(low ^ key) & high_mask)
            low = low ^ (mix(high + key) & low_mask)
        return (high << self.low_bits) | low


def num_samples(tokens: TokenFile, seq_len: int, split: str = "") -> int:
    """How many windows of ``seq_len`` + 1 tokens (sharing one token with the next) a split has.

    Raises:
        UserError: not one.
    """
    found = (len(tokens) - 1) // seq_len
    if found < 1:
        name = f"the {split} split" if split else "the split"
        raise UserError(f"{name} has {len(tokens):,} tokens, fewer than one sample of train.seq_len={seq_len} + 1")
    return found


def batch(
    dataset: Dataset | TokenFile,
    step: int,
    global_batch_size: int,
    seq_len: int,
    seed: int,
    *,
    split: str = "train",
    rows: slice | None = None,
) -> npt.NDArray[np.int64]:
    """The tokens of one step, int64 ``[global_batch_size, seq_len + 1]``: inputs ``[:, :-1]``, targets ``[:, 1:]``.

    It depends on (seed, step) and the shapes only. ``rows`` selects a rank's part, such as ``slice(rank, None, world)``,
    and reads nothing else.
    """
    tokens = dataset if isinstance(dataset, TokenFile) else dataset.split(split)
    samples = batch_samples(tokens, step, global_batch_size, seq_len, seed, split=split, rows=rows)
    out = np.empty((len(samples), seq_len + 1), np.int64)
    for row, sample in enumerate(samples.tolist()):
        out[row] = tokens.tokens[sample * seq_len : (sample + 1) * seq_len + 1]
    return out


def batch_samples(
    tokens: TokenFile,
    step: int,
    global_batch_size: int,
    seq_len: int,
    seed: int,
    *,
    split: str = "",
    rows: slice | None = None,
) -> npt.NDArray[np.int64]:
    """The sample numbers of one step, int64 ``[rows]``."""
    places = np.arange(global_batch_size, dtype=np.int64)[rows or slice(None)] + step * global_batch_size
    return SampleOrder(num_samples(tokens, seq_len, split), seed).order(places)
