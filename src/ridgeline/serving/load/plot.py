"""The latency plot of a load test: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ridgeline.runs import write_atomic
from ridgeline.serving.load.stats import samples
from ridgeline.serving.load.workload import Exchange


def write_plot(path: Path, exchanges: Sequence[Exchange], summary: dict[str, Any]) -> None:
    """Distributions of TTFT, inter-token latency and end-to-end time, and latency over the test's time."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    good = [item for item in exchanges if item.error is None]
    bad = [item for item in exchanges if item.error is not None]
    times = samples(exchanges)
    titles = ("Time to first token", "Inter-token latency", "End to end", "Over the test")
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles)
    for row, column, name, key in ((1, 1, "TTFT", "ttft"), (1, 2, "ITL", "itl"), (2, 1, "end to end", "e2e")):
        x, y = _cumulative(times[key])
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line_shape="hv", name=name), row=row, col=column)
        figure.update_xaxes(title_text="milliseconds", rangemode="tozero", row=row, col=column)
        figure.update_yaxes(title_text="share of all", range=[0, 1.02], row=row, col=column)
        for rank, level in enumerate((50, 90, 99)):
            value = summary.get(f"{key}_p{level}")
            if value is not None:
                # one label below the other: percentiles often stand close together
                note = {"annotation_text": f"p{level} {value * 1000:.1f}", "annotation_yshift": -150 - 18 * rank}
                figure.add_vline(x=value * 1000, line_dash="dot", line_width=1, row=row, col=column, **note)
    for items, name, symbol in ((good, "answered", "circle"), (bad, "failed", "x")):
        figure.add_trace(
            go.Scatter(
                x=[item.sent for item in items],
                y=[item.total * 1000 for item in items],
                mode="markers",
                marker_symbol=symbol,
                name=name,
            ),
            row=2,
            col=2,
        )
    figure.update_xaxes(title_text="sent at, seconds", row=2, col=2)
    figure.update_yaxes(title_text="end to end, milliseconds", rangemode="tozero", row=2, col=2)
    figure.update_layout(title=_title(summary), template="plotly_white", height=820)
    write_atomic(path, figure.to_html(include_plotlyjs=True, full_html=True))


def _cumulative(ordered: Sequence[float]) -> tuple[list[float], list[float]]:
    """Milliseconds and the share of values at or below them."""
    return [value * 1000 for value in ordered], [(rank + 1) / len(ordered) for rank in range(len(ordered))]


def _title(summary: dict[str, Any]) -> str:
    return (
        f"{summary['completed']} of {summary['requests']} requests answered by {summary['model']}: "
        f"{summary['tokens_per_second']:.1f} tokens/s, {summary['requests_per_second']:.2f} requests/s"
    )
