"""The stages' interfaces and what passes between them. A backend is one implementation, chosen by the
settings.

Detector ─ plates ─▶ Vision ─ lines ─▶ filters ─ nameplate lines ─▶ Reasoner ─ candidates ─▶ Auditor ─ reasons
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ocr_pipeline.errors import DeadlineError
from ocr_pipeline.geometry import Box
from ocr_pipeline.images import Pixels


class PlateClass(StrEnum):
    """What the detector finds, by the names that a customer's export has them under."""

    IDENTIFICATION = "placa_identificacao"  # the manufacturer's nameplate
    TRANSFORMER = "placa_transformador"  # the utility's plate on the tank: asset tag, power


class LineClass(StrEnum):
    """What a line of text belongs to."""

    NAMEPLATE = "nameplate"
    METER = "meter"
    POLE = "pole"
    TELECOM = "telecom"
    OTHER = "other"


class PoleIdContext(StrEnum):
    """What the picture is known to show; it steers the filters.

    NAMEPLATE: a manufacturer's nameplate was detected. TRANSFORMER_PLATE: only the utility's plate was.
    POLE: the
    caller asks for the pole's own marks. UNKNOWN: nothing was detected.
    """

    NAMEPLATE = "nameplate"
    TRANSFORMER_PLATE = "transformer_plate"
    POLE = "pole"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Plate:
    """A plate in the photo. `kind` is None for a cluster of text that nothing has recognised as a plate."""

    kind: PlateClass | None
    box: Box
    score: float


@dataclass(frozen=True)
class Line:
    """A line of text as the vision stage gives it. `box` is None where a model only transcribes.

    `confidence` is the mean over its characters, `weakest` the least sure one's. `weights` has one figure
    for each
    character of `text`, or is empty. `second` is what another reading of the same line gave, where it
    differs. `beside`: whether a patch lies right before its beginning, and right behind its end, that may
    cover more of it.
    """

    text: str
    box: Box | None = None
    confidence: float = 1.0
    weakest: float = 1.0
    weights: tuple[float, ...] = ()
    kind: LineClass = LineClass.NAMEPLATE
    second: str = ""
    beside: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Seen:
    """What the vision stage saw: lines in reading order, and by how many degrees (counter-clockwise) the
    crop had to be
    turned to be upright: 0, 90, 180 or 270. Boxes of the lines are those of `picture`, where it is given.
    `touched`: whether text reaches the left, top, right and bottom of the crop as it was given; None where
    nobody knows.
    """

    lines: tuple[Line, ...]
    turned: int = 0
    seconds: float = 0.0
    picture: Pixels | None = None
    touched: tuple[bool, bool, bool, bool] | None = None


@dataclass(frozen=True)
class Candidate:
    """A field's value as a reasoner gives it: normalised, its line, and how sure it is."""

    value: Any
    raw: str = ""
    line: int | None = None
    confidence: float = 1.0


@dataclass
class Extraction:
    """What a reasoner made of the lines: candidates by field, and reasons for review."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


class Deadline:
    """Seconds from now that a photo may still take; every stage that waits asks it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self._end - self._clock())

    def check(self, stage: str) -> None:
        """Raises DeadlineError when the time is up."""
        if self.left() <= 0:
            raise DeadlineError(f"the time for this photo was up at the stage '{stage}'")


class Detector(Protocol):
    """Stage 0: where the plates are."""

    def detect(self, pixels: Pixels, deadline: Deadline) -> list[Plate]:
        """Plates, the surest first; empty where none is found."""


class Vision(Protocol):
    """Stage 1: transcribes, and nothing else."""

    def read(self, pixels: Pixels, deadline: Deadline) -> Seen:
        """All visible text of a crop."""


class Reasoner(Protocol):
    """Stage 2: lines of a nameplate to fields. It never sees the picture."""

    def extract(self, lines: Sequence[Line], context: PoleIdContext, deadline: Deadline) -> Extraction:
        """Candidates for the fields; a field that is not printed is absent."""


class Auditor(Protocol):
    """Stage 3: holds the fields against what the detector saw."""

    def audit(self, values: dict[str, Any], plates: Sequence[Plate], context: PoleIdContext) -> list[str]:
        """Reasons for review."""
