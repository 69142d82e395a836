"""The line as a picture: one card per stage, left to right, with its result, its time and its share of the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.report.page import esc, seconds

CARD, GAP, HEIGHT, PER_ROW = 246, 26, 146, 4
INK, SOFT, LINE, ACCENT, WARM = "#1b2430", "#5b6776", "#dde3ea", "#0b6bcb", "#d9730d"


@dataclass(frozen=True)
class Stage:
    """One stage of the line.

    ``limit`` is the share of the hardware's limit that the stage reached (0 to 1), None where no limit applies;
    ``limit_name`` says which limit, for instance ``of the measured bf16 GEMM rate``.
    """

    name: str
    result: str
    detail: str
    seconds: float
    limit: float | None = None
    limit_name: str = ""


def draw_line(stages: Sequence[Stage]) -> str:
    """An SVG of the stages in rows of four, arrows between them; widths of the time bars share one scale."""
    total = sum(stage.seconds for stage in stages) or 1.0
    rows = -(-len(stages) // PER_ROW)
    width = PER_ROW * CARD + (PER_ROW - 1) * GAP
    height = rows * HEIGHT + (rows - 1) * (GAP + 10)
    parts = []
    for index, stage in enumerate(stages):
        row, column = divmod(index, PER_ROW)
        x, y = column * (CARD + GAP), row * (HEIGHT + GAP + 10)
        parts.append(_card(stage, x, y, stage.seconds / total))
        if index + 1 < len(stages):
            parts.append(_arrow(x, y, last_in_row=column == PER_ROW - 1, width=width))
    return (
        f'<svg viewBox="-2 -2 {width + 4} {height + 4}" width="100%" role="img" '
        f'aria-label="the stages of the line with time and share of the limit">{"".join(parts)}</svg>'
    )


def _card(stage: Stage, x: float, y: float, share: float) -> str:
    bar = CARD - 32
    limit = _limit(stage, x + 16, y + 112, bar)
    return (
        f'<rect x="{x}" y="{y}" width="{CARD}" height="{HEIGHT}" rx="10" fill="#fff" stroke="{LINE}" stroke-width="1.5"/>'
        f'<text x="{x + 16}" y="{y + 25}" font-size="12.5" font-weight="700" letter-spacing=".06em" fill="{ACCENT}">'
        f"{esc(stage.name.upper())}</text>"
        f'<text x="{x + 16}" y="{y + 49}" font-size="16.5" font-weight="650" fill="{INK}">{esc(stage.result)}</text>'
        f'<text x="{x + 16}" y="{y + 67}" font-size="12" fill="{SOFT}">{esc(stage.detail)}</text>'
        f'<rect x="{x + 16}" y="{y + 82}" width="{bar}" height="6" rx="3" fill="#eef1f5"/>'
        f'<rect x="{x + 16}" y="{y + 82}" width="{max(3.0, bar * share):.1f}" height="6" rx="3" fill="{WARM}"/>'
        f'<text x="{x + 16}" y="{y + 102}" font-size="11.5" fill="{SOFT}">'
        f"{esc(seconds(stage.seconds))}, {100 * share:.0f} % of the whole line</text>{limit}"
    )


def _limit(stage: Stage, x: float, y: float, bar: float) -> str:
    if stage.limit is None:
        return f'<text x="{x}" y="{y + 21}" font-size="11.5" fill="{SOFT}">{esc(stage.limit_name or "no hardware limit applies")}</text>'
    filled = bar * min(1.0, max(0.0, stage.limit))
    return (
        f'<rect x="{x}" y="{y}" width="{bar}" height="6" rx="3" fill="#eef1f5"/>'
        f'<rect x="{x}" y="{y}" width="{filled:.1f}" height="6" rx="3" fill="{ACCENT}"/>'
        f'<text x="{x}" y="{y + 21}" font-size="11.5" fill="{SOFT}">{100 * stage.limit:.0f} % {esc(stage.limit_name)}</text>'
    )


def _arrow(x: float, y: float, last_in_row: bool, width: float) -> str:
    middle = y + HEIGHT / 2
    if not last_in_row:
        start, tip = x + CARD + 4, x + CARD + GAP - 4
        return (
            f'<path d="M{start} {middle}H{tip}" stroke="{SOFT}" stroke-width="1.6"/>'
            f'<path d="M{tip - 6} {middle - 5}L{tip} {middle}L{tip - 6} {middle + 5}" fill="none" stroke="{SOFT}" stroke-width="1.6"/>'
        )
    centre, left = x + CARD / 2, CARD / 2
    top, turn, tip = y + HEIGHT + 4, y + HEIGHT + (GAP + 10) / 2, y + HEIGHT + GAP + 6
    return (
        f'<path d="M{centre} {top}V{turn}H{left}V{tip}" fill="none" stroke="{SOFT}" stroke-width="1.6"/>'
        f'<path d="M{left - 5} {tip - 6}L{left} {tip}L{left + 5} {tip - 6}" fill="none" stroke="{SOFT}" stroke-width="1.6"/>'
    )
