"""Plots as HTML fragments (Plotly). Each takes plain numbers; nothing is computed here but axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0b6bcb", "#d9730d", "#23845b", "#8a4fbf", "#c4314b", "#8a94a0", "#c9a227")
LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": "#1b2430"},
    "margin": {"l": 64, "r": 24, "t": 48, "b": 48},
    "height": 340,
    "colorway": COLOURS,
    # Anchored by its bottom above the plot: a low plot with few bars would otherwise lie under its box.
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "bgcolor": "rgba(0,0,0,0)"},
    "hovermode": "x unified",
}


def plotly_script() -> str:
    """The library itself, embedded once per page so that the page works offline."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def loss_curve(steps: Sequence[int], loss: Sequence[float | None], validation: Sequence[tuple[int, float]]) -> str:
    """Training loss per step and validation loss where it was taken; nats per token."""
    figure = _figure(xaxis={"title": "step"}, yaxis={"title": "loss (nats per token)"})
    figure.add_scatter(x=list(steps), y=list(loss), mode="lines", name="training")
    if validation:
        x, y = zip(*validation, strict=True)
        figure.add_scatter(x=x, y=y, mode="lines+markers", name="validation", marker={"size": 8})
    return _fragment(figure)


def series(x: Sequence[float], lines: Mapping[str, Sequence[float | None]], x_title: str, y_title: str) -> str:
    """Several lines over one axis."""
    figure = _figure(xaxis={"title": x_title}, yaxis={"title": y_title, "rangemode": "tozero"})
    for name, y in lines.items():
        figure.add_scatter(x=list(x), y=list(y), mode="lines", name=name)
    return _fragment(figure)


def stacked_bars(rows: Sequence[str], parts: Mapping[str, Sequence[float]], x_title: str) -> str:
    """One horizontal bar per row, made of parts in a fixed order."""
    figure = _figure(barmode="stack", xaxis={"title": x_title}, hovermode="closest", height=130 + 46 * len(rows))
    for name, values in parts.items():
        figure.add_bar(y=list(rows), x=list(values), name=name, orientation="h", hovertemplate="%{x:.4g} s " + name)
    figure.update_yaxes(autorange="reversed")
    return _fragment(figure)


def latency_curves(samples: Mapping[str, Sequence[float]]) -> str:
    """Cumulative distributions: the share of samples at or below a latency, on a logarithmic axis."""
    figure = _figure(
        xaxis={"title": "milliseconds (log)", "type": "log"}, yaxis={"title": "share of samples", "tickformat": ".0%"}
    )
    for name, values in samples.items():
        ordered = sorted(values)
        if ordered:
            share = [(index + 1) / len(ordered) for index in range(len(ordered))]
            figure.add_scatter(
                x=[1e3 * value for value in ordered], y=share, mode="lines", name=name, line={"shape": "hv"}
            )
    figure.update_layout(hovermode="closest")
    return _fragment(figure)


def _figure(**layout: Any) -> Any:
    import plotly.graph_objects as go

    return go.Figure(layout={**LAYOUT, **layout})


def _fragment(figure: Any) -> str:
    return str(
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    )
