"""Boxes in a photo, in pixels; x to the right, y down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """An upright rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Pixels from left to right, never negative."""
        return max(0.0, self.right - self.left)

    @property
    def height(self) -> float:
        """Pixels from top to bottom, never negative."""
        return max(0.0, self.bottom - self.top)

    @property
    def area(self) -> float:
        """Square pixels."""
        return self.width * self.height

    @property
    def middle(self) -> tuple[float, float]:
        """The centre."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def padded(self, share: float, width: float, height: float) -> Box:
        """The box grown by `share` of its size on every side, within a picture of this size."""
        dx, dy = self.width * share, self.height * share
        return Box(
            max(0.0, self.left - dx),
            max(0.0, self.top - dy),
            min(width, self.right + dx),
            min(height, self.bottom + dy),
        )

    def moved(self, dx: float, dy: float) -> Box:
        """The box shifted."""
        return Box(self.left + dx, self.top + dy, self.right + dx, self.bottom + dy)

    def scaled(self, factor: float) -> Box:
        """The box in a picture that is `factor` times as large."""
        return Box(self.left * factor, self.top * factor, self.right * factor, self.bottom * factor)

    def overlap(self, other: Box) -> float:
        """Square pixels that both share."""
        common = Box(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )
        return common.area

    def iou(self, other: Box) -> float:
        """Intersection over union: 1 for the same box, 0 for boxes apart."""
        common = self.overlap(other)
        whole = self.area + other.area - common
        return common / whole if whole > 0 else 0.0

    def inside(self, other: Box) -> float:
        """The share of this box that lies in `other`."""
        return self.overlap(other) / self.area if self.area > 0 else 0.0


def around(boxes: list[Box]) -> Box:
    """The smallest box around all of these. Raises ValueError without any."""
    return Box(
        min(box.left for box in boxes),
        min(box.top for box in boxes),
        max(box.right for box in boxes),
        max(box.bottom for box in boxes),
    )
