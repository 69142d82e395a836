"""Events of the compiler, in the process it runs in, made an :class:`Observation`.

::

    with Observer() as observer:
        compiled(x)
    observation = observer.observation()
"""

from __future__ import annotations

from typing import Any

from ridgeline.compiler.doctor.model import Observation


class Observer:
    """Watches every ``torch.compile`` of this process from ``__enter__`` to ``__exit__``.

    ``trace`` listens to the structured trace, which costs compile time and no run time; without it breaks and guards
    have no reasons. ``measure`` interleaves eager calls after the warm-up (see :mod:`.timing`).
    """

    def __init__(self, *, trace: bool = True, measure: bool = False) -> None:
        self.trace, self.measure = trace, measure

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def observation(self) -> Observation:
        """What was seen so far."""
        return Observation()
