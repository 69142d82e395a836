"""Random numbers without state: the number at global index ``i`` of the stream ``(seed, name)`` is a pure function.

Any shard of any parameter can therefore be drawn alone, on any rank, in any order, and equals the same part of the
whole. (Drawing through DTensor on CPU repeats the same numbers on every shard, pytorch#138329.)

Bits: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) used as a
counter-based generator: output ``n`` of the stream with state ``key`` is ``mix(key + (n + 1) * GOLDEN)``.
Normals: Box-Muller (1958), one 64-bit output per pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import pi, prod

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)

# log and cos may round differently in the vector body and the scalar tail of a numpy loop. Drawing whole aligned
# blocks makes every number come from the same loop position whatever part of it is asked for.
BLOCK = 1 << 15


def stream_key(seed: int, name: str) -> np.uint64:
    """The 64-bit key of the stream ``name`` under ``seed``: the head of a SHA-256, so names never collide in practice."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def bits(key: np.uint64, start: int, count: int) -> np.ndarray:
    """Outputs ``start .. start + count`` of SplitMix64 seeded with ``key``: uint64 ``[count]``."""
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z *= GOLDEN
    z += key
    z ^= z >> np.uint64(30)
    z *= _MULTIPLY_1
    z ^= z >> np.uint64(27)
    z *= _MULTIPLY_2
    z ^= z >> np.uint64(31)
    return z


def normal(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Standard normals ``start .. start + count`` of the stream ``(seed, name)``: float32 ``[count]``.

    Bitwise independent of how a range is cut: ``normal(s, n, 0, 10)[4:] == normal(s, n, 4, 6)``.
    """
    if start < 0 or count < 0:
        raise ValueError(f"start and count must not be negative, got {start} and {count}")
    key = stream_key(seed, name)
    out = np.empty(count, dtype=np.float32)
    for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(start + count, first + BLOCK)
        if low < high:
            out[low - start : high - start] = _normal_block(key, block)[low - first : high - first]
    return out


def normal_rows(seed: int, name: str, shape: Sequence[int], first_row: int, rows: int) -> np.ndarray:
    """Rows ``first_row .. first_row + rows`` of a standard normal tensor of ``shape``: float32 ``[rows, *shape[1:]]``.

    The element at global index ``i`` (row-major) of the whole tensor is number ``i`` of the stream, so a dim-0 shard
    equals that part of the unsharded tensor. ``rows`` may be 0 (an empty shard).
    """
    width = prod(shape[1:])
    return normal(seed, name, first_row * width, rows * width).reshape(rows, *shape[1:])


def _normal_block(key: np.uint64, block: int) -> np.ndarray:
    raw = bits(key, block * (BLOCK // 2), BLOCK // 2)
    high = (raw >> np.uint64(32)).astype(np.float64)
    low = (raw & np.uint64(0xFFFFFFFF)).astype(np.float64)
    # The half offset keeps the logarithm's argument inside (0, 1): the largest draw is 6.7 standard deviations.
    radius = np.sqrt(-2.0 * np.log((high + 0.5) * 2.0**-32))
    angle = low * (2.0 * pi * 2.0**-32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1).astype(np.float32)
