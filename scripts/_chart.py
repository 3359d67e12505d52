"""A bar chart as SVG, without any library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
LABEL_WIDTH = 250
VALUE_WIDTH = 150
BAR = 26
GAP = 16
TOP = 52
BOTTOM = 34


@dataclass(frozen=True)
class Bar:
    """One bar: its median, with a whisker from the smallest to the largest value."""

    label: str
    low: float
    middle: float
    high: float


def bar_chart(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars on one scale that begins at 0. Raises ValueError without a positive value."""
    top = max((bar.high for bar in bars), default=0.0)
    if top <= 0:
        raise ValueError("a chart needs at least one positive value")
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / top
    height = TOP + len(bars) * (BAR + GAP) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="14" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" font-weight="bold" fill="#1b1f24">{escape(title)}</text>',
    ]
    for number, bar in enumerate(bars):
        y = TOP + number * (BAR + GAP)
        middle = y + BAR / 2
        low, end, high = (LABEL_WIDTH + value * scale for value in (bar.low, bar.middle, bar.high))
        parts += [
            f'<text x="{LABEL_WIDTH - 12}" y="{middle + 5:g}" text-anchor="end" fill="#1b1f24">'
            f"{escape(bar.label)}</text>",
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{end - LABEL_WIDTH:.1f}" height="{BAR}" '
            'fill="#2f6f9f"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 6}v12M{high:.1f} {middle - 6}v12" '
            'stroke="#d9822b" stroke-width="2" fill="none"/>',
            f'<text x="{high + 10:.1f}" y="{middle + 5:g}" fill="#1b1f24">'
            f"{bar.middle:.1f} {escape(unit)}</text>",
        ]
    parts += [
        f'<text x="{LABEL_WIDTH}" y="{height - 12}" font-size="12" fill="#57606a">'
        "bar: median; whisker: smallest to largest</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
