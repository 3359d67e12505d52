"""Horizontal bar charts as PNG, all bars of a chart on one scale that begins at 0."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from PIL import Image, ImageDraw, ImageFont

# Pixels of a picture that is shown at half its size, so that it is sharp on every screen.
WIDTH = 1520
MARGIN = 32
TITLE, TEXT, SMALL = 34, 28, 24
TITLE_HEIGHT, FOOT_HEIGHT = 100, 64
BAR, GAP = 48, 28
WHISKER, CAP = 4, 12
BACKGROUND, INK, PALE = "#ffffff", "#1b1f24", "#57606a"
PARTS = ("#2f6f9f", "#8fb8d4", "#c9a227", "#7a8f4c", "#a05a7c")
MARK = "#d9822b"


@dataclass(frozen=True)
class Bar:
    """One bar: its parts end to end from 0, and a whisker from one value to another where there is one.

    A bar with a `limit` has a line there, and says how much of it is taken.
    """

    label: str
    parts: tuple[float, ...]
    whisker: tuple[float, float] | None = None
    limit: float | None = None

    @classmethod
    def of(cls, label: str, values: Sequence[float]) -> Bar:
        """The median of what was measured, with a whisker from the smallest to the largest value."""
        return cls(label, (median(values),), (min(values), max(values)))

    @property
    def length(self) -> float:
        """Where the bar ends."""
        return sum(self.parts)

    @property
    def reach(self) -> float:
        """Where the bar, its whisker or its limit ends."""
        return max(self.length, self.whisker[1] if self.whisker else 0.0, self.limit or 0.0)

    def text(self, unit: str, digits: int) -> str:
        """`13.6 of 16.0 GiB`."""
        of = f" of {self.limit:.{digits}f}" if self.limit is not None else ""
        return f"{self.length:.{digits}f}{of} {unit}"


def bar_chart(title: str, unit: str, bars: Sequence[Bar], parts: Sequence[str] = ()) -> bytes:
    """The chart as PNG. `parts` names the parts of stacked bars; without it bars are medians with whiskers.

    Raises ValueError without a positive value, and when a bar has more parts than there are names for.
    """
    names = len(parts) or 1
    if any(len(bar.parts) > names for bar in bars):
        raise ValueError(f"a bar has more parts than the {names} that are named")
    if names > len(PARTS):
        raise ValueError(f"a chart can tell {len(PARTS)} parts apart, not {names}")
    top = max((bar.reach for bar in bars), default=0.0)
    if top <= 0:
        raise ValueError("a chart needs at least one positive value")
    text = ImageFont.load_default(TEXT)
    values = [bar.text(unit, 2 if top < 10 else 1) for bar in bars]
    left = 2 * MARGIN + max(text.getlength(bar.label) for bar in bars)
    right = WIDTH - 2 * MARGIN - max(text.getlength(value) for value in values)
    scale = (right - left) / top
    height = TITLE_HEIGHT + len(bars) * (BAR + GAP) + FOOT_HEIGHT
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TITLE), "lt")
    for number, (bar, value) in enumerate(zip(bars, values, strict=True)):
        y = TITLE_HEIGHT + number * (BAR + GAP)
        middle = y + BAR // 2
        draw.text((left - MARGIN, middle), bar.label, INK, text, "rm")
        begin = 0.0
        for length, colour in zip(bar.parts, PARTS, strict=False):
            _box(draw, (left + begin * scale, y, left + (begin + length) * scale, y + BAR), colour)
            begin += length
        if bar.whisker:
            low, high = (left + end * scale for end in bar.whisker)
            _box(draw, (low, middle - WHISKER / 2, high, middle + WHISKER / 2), MARK)
            for end in (low, high):
                _box(draw, (end - WHISKER / 2, middle - CAP, end + WHISKER / 2, middle + CAP), MARK)
        if bar.limit is not None:
            end = left + bar.limit * scale
            _box(draw, (end - WHISKER / 2, y - CAP, end + WHISKER / 2, y + BAR + CAP), INK)
        draw.text((left + bar.reach * scale + MARGIN / 2, middle), value, INK, text, "lm")
    _foot(draw, left, height - FOOT_HEIGHT / 2, parts)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _box(draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], colour: str) -> None:
    """A rectangle that ends before its right and lower edge, where Pillow's includes them."""
    x, y, x_end, y_end = (round(corner) for corner in corners)
    if x_end > x and y_end > y:
        draw.rectangle((x, y, x_end - 1, y_end - 1), colour)


def _foot(draw: ImageDraw.ImageDraw, x: float, y: float, parts: Sequence[str]) -> None:
    """What the colours mean."""
    font = ImageFont.load_default(SMALL)
    if not parts:
        draw.text((x, y), "bar: median; whisker: smallest to largest", PALE, font, "lm")
    for name, colour in zip(parts, PARTS, strict=False):
        _box(draw, (x, y - SMALL / 2, x + SMALL, y + SMALL / 2), colour)
        draw.text((x + 1.5 * SMALL, y), name, PALE, font, "lm")
        x += 1.5 * SMALL + font.getlength(name) + MARGIN
