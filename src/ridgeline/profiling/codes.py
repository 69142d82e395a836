"""Values that repeat as small numbers: names, threads and categories are written once and coded ever after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Codes(dict[Any, int]):
    """A number for every distinct value, in order of appearance."""

    def __missing__(self, value: Any) -> int:
        self[value] = code = len(self)
        return code

    def of(self, *values: list[Any]) -> NDArray[np.int32]:
        """The codes of a list's values, or of several lists' tuples; what cannot be hashed counts as its text."""
        one, count = len(values) == 1, len(values[0])
        try:  # zip hands out the same tuple again and again: no garbage
            return np.fromiter(map(self.__getitem__, values[0] if one else zip(*values, strict=True)), np.int32, count)
        except TypeError:
            again = values[0] if one else zip(*values, strict=True)
            return np.fromiter((self[_hashable(value)] for value in again), np.int32, count)


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return str(value) if isinstance(value, (list, dict)) else value


def text_codes(codes: Codes, text: Callable[[Any], Any]) -> tuple[NDArray[np.int32], tuple[Any, ...]]:
    """(for every code the place of its text in sorted order, the sorted texts): independent of the file's order."""
    texts = [text(value) for value in codes]
    rank = {one: at for at, one in enumerate(sorted(set(texts)))}
    return np.fromiter((rank[one] for one in texts), np.int32, len(texts)), tuple(rank)
