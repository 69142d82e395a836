"""Percentiles and the summary of a load test. Pure functions of the records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ridgeline.serving.load.workload import Exchange, LoadSettings

LEVELS = (50, 90, 99)
MOST_GAPS = 20_000  # a plot of more points is slow in the browser and shows nothing more


def percentile(values: Sequence[float], level: float) -> float:
    """The ``level``-th percentile with linear interpolation between ranks (numpy's default, Hyndman-Fan type 7).

    Raises:
        ValueError: ``values`` is empty or ``level`` outside 0 to 100.
    """
    if not values or not 0 <= level <= 100:
        raise ValueError("percentile: needs values and a level from 0 to 100")
    ordered = sorted(values)
    position = (len(ordered) - 1) * level / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Iterable[float], name: str) -> dict[str, float | None]:
    """``NAME_p50``, ``NAME_p90``, ``NAME_p99``; None without values."""
    ordered = sorted(values)
    return {f"{name}_p{level}": percentile(ordered, level) if ordered else None for level in LEVELS}


def summarize(exchanges: Sequence[Exchange], seconds: float, settings: LoadSettings) -> dict[str, Any]:
    """Headline figures of a load test that took ``seconds``. Times in seconds, rates per second of wall time.

    TTFT: request sent to first text. ITL: gaps between the pieces of text of one request, all pooled. Goodput: requests
    per second that ended well, within ``slo_ttft`` and with a mean gap within ``slo_itl``.
    """
    good = [exchange for exchange in exchanges if exchange.error is None]
    tokens = sum(exchange.completion_tokens for exchange in good)
    kinds = Counter(exchange.error for exchange in exchanges if exchange.error is not None)
    span = max(seconds, 1e-9)
    return {
        "requests": len(exchanges),
        "completed": len(good),
        "errors": len(exchanges) - len(good),
        "errors_by_kind": dict(sorted(kinds.items())),
        "seconds": seconds,
        "prompt_tokens": sum(exchange.prompt_tokens for exchange in good),
        "completion_tokens": tokens,
        "tokens_per_second": tokens / span,
        "requests_per_second": len(good) / span,
        **percentiles((e.ttft for e in good if e.ttft is not None), "ttft"),
        **percentiles((gap for e in good for gap in e.gaps), "itl"),
        **percentiles((e.total for e in good), "e2e"),
        **_goodput(good, span, settings),
    }


def samples(exchanges: Sequence[Exchange]) -> dict[str, list[float]]:
    """The measured times of good requests, sorted, seconds: ``ttft``, ``itl`` (thinned evenly when many), ``e2e``."""
    good = [exchange for exchange in exchanges if exchange.error is None]
    gaps = sorted(gap for exchange in good for gap in exchange.gaps)
    return {
        "ttft": sorted(exchange.ttft for exchange in good if exchange.ttft is not None),
        "itl": gaps[:: max(1, len(gaps) // MOST_GAPS)],
        "e2e": sorted(exchange.total for exchange in good),
    }


def _goodput(good: Sequence[Exchange], span: float, settings: LoadSettings) -> dict[str, Any]:
    if settings.slo_ttft is None and settings.slo_itl is None:
        return {}
    met = sum(1 for exchange in good if within(exchange, settings))
    return {"goodput": met / span, "slo_met": met, "slo_ttft": settings.slo_ttft, "slo_itl": settings.slo_itl}


def within(exchange: Exchange, settings: LoadSettings) -> bool:
    """Whether a good request met both targets; a target that is not set is met."""
    if settings.slo_ttft is not None and (exchange.ttft is None or exchange.ttft > settings.slo_ttft):
        return False
    if settings.slo_itl is None or not exchange.gaps:
        return True
    return sum(exchange.gaps) / len(exchange.gaps) <= settings.slo_itl
