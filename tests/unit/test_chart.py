"""The chart, read back pixel by pixel."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from scripts import _chart
from scripts._chart import Bar, bar_chart


def picture(content: bytes) -> Image.Image:
    """A chart as an image. It is a PNG."""
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG" and image.width == _chart.WIDTH
    return image


def runs(image: Image.Image, colour: str, y: int) -> list[int]:
    """Lengths of the runs of a colour in one line of pixels."""
    wanted = tuple(bytes.fromhex(colour[1:]))
    line = [image.getpixel((x, y)) == wanted for x in range(image.width)]
    text = "".join("#" if pixel else " " for pixel in line)
    return [len(run) for run in text.split()]


def row(number: int) -> int:
    """A line near the upper edge of a bar: above its whisker."""
    return _chart.TITLE_HEIGHT + number * (_chart.BAR + _chart.GAP) + 2


def test_bars_are_as_long_as_their_medians() -> None:
    image = picture(bar_chart("t", "s", [Bar.of("a & b", [1, 2, 4]), Bar.of("c", [1])]))
    [first], [second] = (runs(image, _chart.PARTS[0], row(number)) for number in (0, 1))
    assert first == pytest.approx(2 * second, abs=2) and second > 100


def test_the_whisker_reaches_from_the_smallest_to_the_largest_value() -> None:
    image = picture(bar_chart("t", "s", [Bar.of("a", [1, 2, 4])]))
    [bar] = runs(image, _chart.PARTS[0], row(0))
    [whisker] = runs(image, _chart.MARK, _chart.TITLE_HEIGHT + _chart.BAR // 2)
    assert whisker == pytest.approx(bar * 3 / 2, abs=2 * _chart.WHISKER)


def test_parts_are_stacked_and_named() -> None:
    bars = [Bar("a", (3.0, 1.0)), Bar("b", (2.0,))]
    image = picture(bar_chart("VRAM", "GiB", bars, ["weights", "KV cache"]))
    lengths = [runs(image, colour, row(0))[0] for colour in _chart.PARTS[:2]]
    assert lengths[0] == pytest.approx(3 * lengths[1], abs=3)
    foot = image.height - _chart.FOOT_HEIGHT // 2
    assert [runs(image, colour, foot) for colour in _chart.PARTS[:3]] == [[_chart.SMALL], [_chart.SMALL], []]


def test_a_limit_is_a_line_inside_or_behind_the_bar() -> None:
    image = picture(
        bar_chart("VRAM", "GiB", [Bar("a", (4.0,), limit=2.0), Bar("b", (1.0,), limit=2.0)], ["w"])
    )
    left, right = runs(image, _chart.PARTS[0], row(0))
    assert left == pytest.approx(right, abs=_chart.WHISKER)
    ends = []
    for number in (0, 1):
        line = [image.getpixel((x, row(number))) for x in range(image.width)]
        ends.append(line.index(tuple(bytes.fromhex(_chart.INK[1:])), int(image.width / 4)))
    assert ends[0] == ends[1]
    assert Bar("a", (4.0,), limit=2.0).text("GiB", 1) == "4.0 of 2.0 GiB"


def test_the_same_figures_give_the_same_file() -> None:
    bars = [Bar.of("a", [1, 2, 3])]
    assert bar_chart("t", "s", bars) == bar_chart("t", "s", bars)


@pytest.mark.parametrize(
    ("bars", "parts", "said"),
    [
        ([], (), "positive"),
        ([Bar.of("a", [0.0])], (), "positive"),
        ([Bar("a", (1.0, 2.0))], (), "more parts than the 1"),
        ([Bar("a", (1.0,))], [str(number) for number in range(9)], "can tell 5 parts apart"),
    ],
)
def test_what_cannot_be_drawn_is_refused(bars: list[Bar], parts: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bar_chart("t", "s", bars, parts)
