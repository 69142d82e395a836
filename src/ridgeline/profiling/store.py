"""A column that grows by pieces without ever being held twice.

Pieces are copied into blocks of anonymous memory that goes back to the system the moment a block is no longer needed;
memory from the allocator would stay with the process, because longer-lived objects lie between the pieces. A column
starts with a narrow type and is widened once a value does not fit.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS = 1 << 20


class Store:
    """Append arrays, then take the whole column once."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._blocks: list[NDArray[Any]] = []
        self._count = 0

    def append(self, values: NDArray[Any]) -> None:
        """Add values at the end."""
        if values.size and values.dtype.itemsize > self._dtype.itemsize:
            limit = np.iinfo(self._dtype)
            if int(values.max()) > limit.max or int(values.min()) < limit.min:
                self._widen(values.dtype)
        at = 0
        while at < values.size:
            free = self._count % _ROWS
            if not free:
                self._blocks.append(_block(_ROWS, self._dtype))
            piece = values[at : at + _ROWS - free]
            self._blocks[-1][free : free + piece.size] = piece
            self._count += piece.size
            at += piece.size

    def take(self, dtype: Any) -> NDArray[Any]:
        """The whole column as ``dtype``, or wider where that does not hold it; the store is empty afterwards."""
        out, at = np.empty(self._count, np.promote_types(dtype, self._dtype)), 0
        self._blocks.reverse()
        while self._blocks:
            block = self._blocks.pop()
            size = min(_ROWS, self._count - at)
            out[at : at + size] = block[:size]
            at += size
        self._count = 0
        return out

    def _widen(self, dtype: np.dtype[Any]) -> None:
        for at, block in enumerate(self._blocks):
            wide = _block(_ROWS, dtype)
            wide[:] = block
            self._blocks[at] = wide
        self._dtype = dtype


def _block(rows: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(mmap.mmap(-1, rows * dtype.itemsize), dtype)
