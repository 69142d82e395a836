"""Token ids to visible text, one token at a time: no half characters, no stop strings. No torch.

A byte-level token may end inside a UTF-8 character, and a stop string may begin in one token and end in the next. So
text is held back while it could still change (a trailing U+FFFD may be a character whose bytes have not all come) or
while it could be the beginning of a stop string; everything else is shown at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
CONTEXT_TOKENS = 6  # decoders that treat the first token apart (a leading space) see these before the new ones


class Detokenizer:
    """Incremental decode: the pieces that `add` and `flush` return make up ``decode(all ids)``.

    Exact for byte-level vocabularies. With byte fallback (SentencePiece) a character already shown can later turn out
    to belong to an invalid run of bytes; it is not taken back.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # a window: tokens already shown in full, then the new ones
        self._before = ""  # the text of those shown in full
        self._given = 0  # characters given after it

    def add(self, token: int) -> str:
        """The text that became certain with ``token``."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED):
            return self._give(text[len(self._before) : -1])  # only the last character can still change
        piece = self._give(text[len(self._before) :])
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._before, self._given = self._decode(self._ids), 0
        return piece

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        return self._give(self._decode(self._ids)[len(self._before) :])

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


class StopWatch:
    """Looks for stop strings in a stream of text pieces and holds back only what could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """(text to show, whether a stop string was found). The earliest stop string and all after it are dropped."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The held text, at the end of generation."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Detokeniser and stop strings of one sequence together."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._watch = StopWatch(stops)

    def add(self, token: int) -> tuple[str, bool]:
        """(text to show, stop string found)."""
        return self._watch.add(self._detokenizer.add(token))

    def flush(self) -> tuple[str, bool]:
        """What was held back; a stop string may be completed by a character that never will be."""
        text, found = self._watch.add(self._detokenizer.flush())
        return (text, True) if found else (text + self._watch.flush(), False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
