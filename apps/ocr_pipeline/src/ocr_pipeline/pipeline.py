"""The stages in order: one photo's bytes to one Reading, with all that explains it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ocr_pipeline import filters, grounding, images
from ocr_pipeline.detect import GREY
from ocr_pipeline.geometry import Box
from ocr_pipeline.images import Limits, Photo, Pixels
from ocr_pipeline.reading import FIELDS, Reading, Reason
from ocr_pipeline.stages import (
    Auditor,
    Deadline,
    Detector,
    Line,
    LineClass,
    Plate,
    PlateClass,
    PoleIdContext,
    Reasoner,
    Seen,
    Vision,
)

PADDING = 0.10
WHOLE_PHOTO = 1600  # pixels of the longer side where no plate was found
CROP_SIDE = 1600  # and of a crop at most: its text is large enough then
EDGE = 0.004  # a plate nearer to the photo's edge than this share of its side may be cut off
OVERLAPPING = 0.3  # of another plate's area on the one that is read: then it is no neighbour
BIG_BESIDE = 0.5  # a second nameplate of this share of the first one's area is not background


@dataclass(frozen=True)
class Inspection:
    """Everything about one photo: the reading, and what it was made of.

    `turned_crop` is what the vision stage read, upright; boxes of `lines` are in it. `crop` is where it lies
    in the
    photo. `sources` has the index of the line that each field came from.
    """

    reading: Reading
    photo: Photo
    plates: tuple[Plate, ...]
    crop: Box
    turned_crop: Pixels
    lines: tuple[Line, ...]
    context: PoleIdContext
    sources: dict[str, int]
    seconds: dict[str, float]

    @property
    def tags(self) -> tuple[str, ...]:
        """The classes that the detector saw."""
        return tuple(sorted({str(plate.kind) for plate in self.plates if plate.kind}))

    def crop_jpeg(self, quality: int = 85) -> bytes:
        """The upright crop as a JPEG, for a report."""
        done, data = cv2.imencode(
            ".jpg", cv2.cvtColor(self.turned_crop, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
        )
        if not done:
            raise ValueError("the crop cannot be encoded")
        return bytes(data)


@dataclass(frozen=True)
class PoleText:
    """The raw text of a photo for a pole: `lines` passed the pole's filters, `left_out` did not."""

    lines: tuple[Line, ...]
    left_out: tuple[Line, ...]

    @property
    def text(self) -> str:
        """The lines, one below the other."""
        return "\n".join(line.text for line in self.lines)


class Pipeline:
    """One photo at a time. Parts are given; `ocr_pipeline.build.pipeline` makes them from settings.

    Not safe for several threads at once: the OCR engine is not. A worker is a process with one of these.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        vision: Vision,
        reasoner: Reasoner,
        auditor: Auditor,
        *,
        limits: Limits | None = None,
        seconds_per_image: float = 120.0,
    ) -> None:
        self.detectors = tuple(detectors)
        self.vision = vision
        self.reasoner = reasoner
        self.auditor = auditor
        self.limits = limits or Limits()
        self.seconds_per_image = seconds_per_image

    def read(
        self, data: bytes, *, pole_id_context: PoleIdContext | None = None, deadline: Deadline | None = None
    ) -> Reading:
        """The reading of one photo. Raises OcrError: image refused, backend away, GPU hung, time up."""
        return self.inspect(data, pole_id_context=pole_id_context, deadline=deadline).reading

    def text(self, data: bytes, *, deadline: Deadline | None = None) -> PoleText:
        """All text of the whole photo, through the pole's filters. Raises OcrError as `read` does."""
        deadline = deadline or Deadline(self.seconds_per_image)
        photo = images.load(data, self.limits)
        pixels, _ = shrunk(photo.pixels, WHOLE_PHOTO)
        seen = self.vision.read(pixels, deadline)
        lines = filters.classify(seen.lines, PoleIdContext.POLE)
        kept = tuple(line for line in lines if line.kind in (LineClass.POLE, LineClass.OTHER))
        return PoleText(kept, tuple(line for line in lines if line not in kept))

    def inspect(
        self, data: bytes, *, pole_id_context: PoleIdContext | None = None, deadline: Deadline | None = None
    ) -> Inspection:
        """The reading with all that explains it. Raises OcrError as `read` does."""
        deadline = deadline or Deadline(self.seconds_per_image)
        seconds: dict[str, float] = {}
        started = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal started
            now = time.perf_counter()
            seconds[stage] = now - started
            started = now
            deadline.check(stage)

        photo = images.load(data, self.limits)
        lap("decode")
        plates = self._detect(photo, deadline)
        chosen = choose(plates)
        context = pole_id_context or context_of(chosen)
        lap("detector")
        crop = chosen.box.padded(PADDING, photo.width, photo.height) if chosen else _whole(photo)
        pixels, _ = shrunk(alone(photo.pixels, crop, chosen, plates), CROP_SIDE if chosen else WHOLE_PHOTO)
        seen = self.vision.read(pixels, deadline)
        lap("vision")
        lines = filters.classify(seen.lines, context)
        nameplate = [at for at, line in enumerate(lines) if line.kind is LineClass.NAMEPLATE]
        extraction = self.reasoner.extract([lines[at] for at in nameplate], context, deadline)
        lap("reasoning")
        values, reasons = grounding.settle(extraction, [lines[at] for at in nameplate])
        reasons += self._seen_reasons(photo, plates, chosen, seen)
        reasons += self.auditor.audit(values, plates, context)
        candidates = extraction.candidates
        confidence = {
            name: candidates[name].confidence
            for name in FIELDS
            if values.get(name) is not None and name in candidates
        }
        lap("audit")
        return Inspection(
            reading=Reading.of(values, reasons, confidence),
            photo=photo,
            plates=tuple(plates),
            crop=crop,
            turned_crop=seen.picture if seen.picture is not None else turn(pixels, seen.turned),
            lines=tuple(lines),
            context=context,
            sources={
                name: nameplate[found.line]
                for name, found in candidates.items()
                if found.line is not None and values.get(name) is not None
            },
            seconds=seconds,
        )

    def confirmed_tags(self, found: Inspection, *, deadline: Deadline | None = None) -> tuple[str, ...]:
        """The classes that a bank may be counted by: `placa_transformador` only where such a plate is read.

        The detector takes a meter's or a pole's label for one at times; two of these would make a bank.
        """
        deadline = deadline or Deadline(self.seconds_per_image)
        if any(
            self._is_read(plate, found, deadline)
            for plate in found.plates
            if plate.kind is PlateClass.TRANSFORMER
        ):
            return found.tags
        return tuple(tag for tag in found.tags if tag != PlateClass.TRANSFORMER)

    def _is_read(self, plate: Plate, found: Inspection, deadline: Deadline) -> bool:
        """Whether a utility's plate shows what such a plate shows."""
        if plate is choose(found.plates):
            return filters.utility_plate(found.lines)
        photo = found.photo
        pixels = cut(photo.pixels, plate.box.padded(PADDING, photo.width, photo.height))
        seen = self.vision.read(shrunk(pixels, CROP_SIDE)[0], deadline)
        return filters.utility_plate(filters.classify(seen.lines, PoleIdContext.TRANSFORMER_PLATE))

    def _detect(self, photo: Photo, deadline: Deadline) -> list[Plate]:
        """What the first detector that finds anything finds."""
        for detector in self.detectors:
            if plates := detector.detect(photo.pixels, deadline):
                return plates
        return []

    def _seen_reasons(
        self, photo: Photo, plates: Sequence[Plate], chosen: Plate | None, seen: Seen
    ) -> list[str]:
        """Reasons that the picture itself gives."""
        reasons: list[str] = []
        if not seen.lines:
            reasons.append(Reason.NO_TEXT)
        if chosen is None or chosen.kind is None:
            return [*reasons, Reason.NO_PLATE]
        if cut_off(chosen.box, photo, seen):
            reasons.append(Reason.PARTIAL_PLATE)
        rivals = [
            plate
            for plate in plates
            if plate is not chosen
            and plate.kind is chosen.kind
            and plate.box.area > BIG_BESIDE * chosen.box.area
        ]
        if rivals:
            reasons.append(Reason.SEVERAL_PLATES)
        return reasons


def choose(plates: Sequence[Plate]) -> Plate | None:
    """The plate to read: a nameplate before a utility's plate, then the larger and surer one."""
    ranked = sorted(
        plates, key=lambda plate: (plate.kind is PlateClass.IDENTIFICATION, plate.score * plate.box.area**0.5)
    )
    return ranked[-1] if ranked else None


def cut_off(box: Box, photo: Photo, seen: Seen) -> bool:
    """Whether the photo may show only a part of a plate: it lies at a side, and its text goes up to that."""
    near_x, near_y = EDGE * photo.width, EDGE * photo.height
    at_side = (
        box.left < near_x,
        box.top < near_y,
        photo.width - box.right < near_x,
        photo.height - box.bottom < near_y,
    )
    if seen.touched is None:
        return any(at_side)
    return any(here and touched for here, touched in zip(at_side, seen.touched, strict=True))


def context_of(plate: Plate | None) -> PoleIdContext:
    """The detector's class is context."""
    if plate is None or plate.kind is None:
        return PoleIdContext.UNKNOWN
    if plate.kind is PlateClass.IDENTIFICATION:
        return PoleIdContext.NAMEPLATE
    return PoleIdContext.TRANSFORMER_PLATE


def cut(pixels: Pixels, box: Box) -> Pixels:
    """The part of a picture that lies in `box`."""
    left, top = max(0, int(box.left)), max(0, int(box.top))
    return pixels[top : max(top + 1, round(box.bottom)), left : max(left + 1, round(box.right))]


def alone(pixels: Pixels, crop: Box, chosen: Plate | None, plates: Sequence[Plate]) -> Pixels:
    """The part of a photo in `crop`, other plates in it painted over: their numbers are not this one's."""
    part = cut(pixels, crop)
    others = [plate.box for plate in plates if plate is not chosen and plate.box.overlap(crop) > 0]
    if chosen is None or not others:
        return part
    painted, own = part.copy(), cut(part, chosen.box.moved(-crop.left, -crop.top))
    for box in others:
        if box.inside(chosen.box) < OVERLAPPING:
            cut(painted, box.moved(-crop.left, -crop.top))[:] = GREY
    cut(painted, chosen.box.moved(-crop.left, -crop.top))[:] = own
    return painted


def shrunk(pixels: Pixels, side: int) -> tuple[Pixels, float]:
    """The picture with its longer side at most `side`, and the factor."""
    longer = max(pixels.shape[:2])
    if longer <= side:
        return np.ascontiguousarray(pixels), 1.0
    factor = side / longer
    size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8), factor


def turn(pixels: Pixels, degrees: int) -> Pixels:
    """The picture turned counter-clockwise by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(pixels, degrees // 90))


def _whole(photo: Photo) -> Box:
    return Box(0, 0, photo.width, photo.height)
