"""The history of one preset as PNG: a panel for each figure, a dot for each run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from llama_common.presets import Expect
from PIL import Image, ImageDraw, ImageFont

from scripts._chart import BACKGROUND, INK, MARGIN, MARK, PALE, PARTS, SMALL, TEXT, TITLE, TITLE_HEIGHT, WIDTH
from scripts._history import Run

SHOWN = 200  # the newest runs of each panel
PANEL, GAP = 300, 90
DOT, LINE = 6, 3
RIGHT = 260  # for what the lines are
COLOURS = (PARTS[0], PARTS[3], MARK)  # of the lines: median, target, floor
HEADROOM = 1.08  # of the largest value


@dataclass(frozen=True)
class Panel:
    """One figure over time. `lines` are levels, tokens per second, with what they are."""

    title: str
    values: Sequence[float]
    lines: Sequence[tuple[float, str]]
    breaks: Sequence[int]  # before which run another release, driver or length of prompt begins


def panels(expect: Expect, runs: Sequence[Run]) -> list[Panel]:
    """The panels that a preset's runs fill, oldest run first."""
    found = []
    for shape in dict.fromkeys(run.shape for run in runs):
        shown = [run for run in runs if run.shape == shape][-SHOWN:]
        breaks = [number for number, (one, other) in enumerate(pairwise(shown), 1) if not one.alike(other)]
        for name, speed in (("generation", expect.generation_tok_s), ("prefill", expect.prefill_tok_s)):
            values = [float(getattr(run, f"{name}_tok_s")) for run in shown]
            lines = [(median(values[breaks[-1] if breaks else 0 :]), "median")]
            if speed and shape == "short":
                lines += [(speed.target, "target"), *([(speed.floor, "floor")] if speed.floor else [])]
            tokens = round(median([run.prompt_tokens for run in shown]))
            days = f"{shown[0].time[:10]} to {shown[-1].time[:10]}"
            title = f"{name}, {shape} prompt of {tokens} tokens, {len(values)} runs, {days}"
            found.append(Panel(title, values, lines, breaks))
    return found


def draw(title: str, expect: Expect, runs: Sequence[Run]) -> bytes:
    """The chart. Every scale begins at 0. Raises ValueError without runs."""
    shown = panels(expect, runs)
    if not shown:
        raise ValueError("a chart needs at least one run")
    image = Image.new("RGB", (WIDTH, TITLE_HEIGHT + len(shown) * (PANEL + GAP)), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), f"{title}: tokens per second", INK, ImageFont.load_default(TITLE), "lt")
    for number, panel in enumerate(shown):
        _panel(pen, panel, TITLE_HEIGHT + number * (PANEL + GAP))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _panel(pen: ImageDraw.ImageDraw, panel: Panel, top: float) -> None:
    pen.text((MARGIN, top), panel.title, INK, ImageFont.load_default(TEXT), "lt")
    highest = HEADROOM * max([*panel.values, *(value for value, _ in panel.lines)])
    left, right, base = 2 * MARGIN, WIDTH - RIGHT, top + PANEL

    def height(value: float) -> float:
        return base - value / highest * (PANEL - 2 * MARGIN)

    def across(number: float) -> float:
        return left + (number + 0.5) * (right - left) / len(panel.values)

    pen.line((left, base, right, base), PALE, LINE)
    for number in panel.breaks:
        x = across(number - 0.5)
        pen.line((x, top + 2 * MARGIN, x, base), PALE, LINE)
    for row, ((value, name), colour) in enumerate(zip(panel.lines, COLOURS, strict=False)):
        pen.line((left, height(value), right, height(value)), colour, LINE)
        beside = (right + MARGIN, top + 2 * MARGIN + row * 1.5 * SMALL)
        pen.text(beside, f"{name} {value:.1f}", colour, ImageFont.load_default(SMALL), "lt")
    for number, value in enumerate(panel.values):
        x, y = across(number), height(value)
        pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), PARTS[0])
