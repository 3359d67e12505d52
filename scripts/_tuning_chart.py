"""The points of a search as PNG: a panel for each setting, a dot for each point."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from scripts._chart import BACKGROUND, INK, MARGIN, MARK, PALE, PARTS, SMALL, TEXT, TITLE, TITLE_HEIGHT, WIDTH
from scripts._search import Setting
from scripts._tuning import Goal, Point

PANEL, GAP = 360, 120
DOT, LINE = 8, 3
LEFT = 110  # for the scale
HEADROOM = 1.08  # of the largest value
GRID = "#d8dee4"
LABELS = 16  # of the values below a panel, at most


def draw(title: str, points: Sequence[Point], best: Setting, goal: Goal) -> bytes:
    """The chart. Every scale begins at 0; without points it says so."""
    shown = [point for point in points if not point.again]
    names = [name for name in best if len({point.setting[name] for point in shown}) > 1] or list(best)[:1]
    image = Image.new("RGB", (WIDTH, TITLE_HEIGHT + len(names) * (PANEL + GAP) + MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TITLE), "lt")
    for number, name in enumerate(names):
        _panel(pen, shown, best, name, goal, TITLE_HEIGHT + number * (PANEL + GAP))
    legend = "line: everything else as in the best point; pale: other settings beside it; cross: does not fit"
    pen.text((MARGIN, image.height - MARGIN), legend, PALE, ImageFont.load_default(SMALL), "ls")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _panel(
    pen: ImageDraw.ImageDraw, points: Sequence[Point], best: Setting, name: str, goal: Goal, top: float
) -> None:
    small = ImageFont.load_default(SMALL)
    base, right = top + PANEL, WIDTH - 2 * MARGIN
    values = sorted({point.setting[name] for point in points})
    highest = HEADROOM * max((point.speed(goal) or 0.0 for point in points), default=0.0) or 1.0

    def across(value: int) -> float:
        # Places, not amounts: ubatch doubles from one value to the next.
        return LEFT + (values.index(value) + 0.5) * (right - LEFT) / len(values)

    def height(speed: float) -> float:
        return base - speed / highest * (PANEL - 2 * MARGIN)

    pen.text((LEFT, top), name, INK, ImageFont.load_default(TEXT), "lt")
    pen.line((LEFT, base, right, base), PALE, LINE)
    peak = max((point.speed(goal) or 0.0 for point in points), default=0.0)
    for mark in (peak / 2, peak):
        pen.line((LEFT, height(mark), right, height(mark)), GRID, 1)
        pen.text((LEFT - 12, height(mark)), f"{mark:.1f}", PALE, small, "rm")
    for value in values[:: -(-len(values) // LABELS)] if values else ():
        pen.text((across(value), base + 12), str(value), PALE, small, "mt")
    along = sorted(
        (
            point
            for point in points
            if all(point.setting[other] == best[other] for other in best if other != name)
        ),
        key=lambda point: point.setting[name],
    )
    line = [
        (across(point.setting[name]), height(speed))
        for point in along
        if (speed := point.speed(goal)) is not None
    ]
    if len(line) > 1:
        pen.line(line, PARTS[0], LINE)
    for point in [*(point for point in points if point not in along), *along]:
        x, speed = across(point.setting[name]), point.speed(goal)
        if speed is None:
            for way in (-1, 1):
                pen.line(
                    (x - DOT, base - 2 * DOT - way * DOT, x + DOT, base - 2 * DOT + way * DOT), MARK, LINE
                )
            continue
        colour = MARK if point.setting == best else PARTS[0] if point in along else PARTS[1]
        pen.ellipse((x - DOT, height(speed) - DOT, x + DOT, height(speed) + DOT), colour)
