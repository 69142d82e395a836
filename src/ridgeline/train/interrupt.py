"""Being asked to stop: SIGTERM, the first Ctrl-C, and a launcher that has died all end the run after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

WATCH_PARENT = "RIDGELINE_WATCH_PARENT"  # set by our launcher in its workers


class StopRequest:
    """Within the ``with`` block, :attr:`asked` says whether to write a checkpoint and end.

    A second Ctrl-C interrupts at once. Signals can only be received in the main thread; in another one only the
    launcher's death is noticed.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._parent = os.getppid() if os.environ.get(WATCH_PARENT) else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def asked(self) -> bool:
        """True once a signal has come, or the launcher is gone (an orphan must not train on unseen)."""
        return self._signal is not None or (self._parent is not None and os.getppid() != self._parent)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
