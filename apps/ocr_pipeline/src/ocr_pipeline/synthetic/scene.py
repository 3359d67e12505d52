"""A nameplate in a field photo: tank, pole, meter, telecom label, sun and dirt. Each field knows whether it
can be read.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocr_pipeline.synthetic import plates
from ocr_pipeline.synthetic.plates import Drawn, Pixels, Style, font

IDENTIFICATION = "placa_identificacao"
TRANSFORMER = "placa_transformador"
DIFFICULTIES = ("easy", "medium", "hard")
QUALITY = {"easy": (85, 95), "medium": (65, 90), "hard": (50, 85)}  # of the JPEG
LEAST_HEIGHT = 9.0  # pixels of a capital letter: below it nobody reads a number
COVERED = 0.10  # of a value's area under glare or dirt
BLURRED = 0.20  # standard deviation of the blur, of the letter's height


@dataclass
class Sample:
    """A photo with its answers. `boxes` are upright rectangles in the photo as a person sees it."""

    pixels: Pixels
    difficulty: str
    kind: str  # nameplate, transformer_plate, negative
    values: dict[str, Any]
    legible: dict[str, bool]
    boxes: list[tuple[str, tuple[float, float, float, float]]] = field(default_factory=list)
    orientation: int = 1
    quality: int = 90

    def jpeg(self) -> bytes:
        """The file: JPEG, the sensor's picture turned as the EXIF orientation says."""
        stored = {
            1: self.pixels,
            3: np.rot90(self.pixels, 2),
            6: np.rot90(self.pixels, 1),
            8: np.rot90(self.pixels, -1),
        }[self.orientation]
        exif = Image.Exif()
        exif[0x0112] = self.orientation
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(stored)).save(
            buffer, "JPEG", quality=self.quality, exif=exif.tobytes()
        )
        return buffer.getvalue()


def sample(
    seed: int,
    difficulty: str | None = None,
    style: Style | None = None,
    scale: float = 1.0,
    drawer: Any = plates.draw,
) -> Sample:
    """The photo of a seed. `scale` shrinks it, for the detector's training."""
    rng = random.Random(f"nameplate {seed}")  # noqa: S311  (the same seed gives the same photo)
    level = difficulty or rng.choice(DIFFICULTIES)
    kind = rng.choices(("nameplate", "transformer_plate", "negative"), (0.88, 0.06, 0.06))[0]
    large = level == "hard" and rng.random() < 0.4
    size = (4000, 3000) if large else rng.choice(((1600, 1200), (2000, 1500), (1200, 1600)))
    size = (round(size[0] * scale), round(size[1] * scale))
    canvas = background(rng, size)
    noise = np.random.default_rng(rng.randrange(1 << 30))
    drawn: Drawn | None = None
    covered = np.zeros((size[1], size[0]), np.uint8)
    boxes: list[tuple[str, tuple[float, float, float, float]]] = []
    places: dict[str, NDArray[np.float32]] = {}
    values: dict[str, Any] = {}
    taken: list[tuple[float, float, float, float]] = []
    turn = 0
    if kind == "nameplate":
        drawn = drawer(rng, style)
        values = {name: value.value for name, value in drawn.values.items()}
        share = {"easy": (0.55, 0.8), "medium": (0.42, 0.75), "hard": (0.34, 0.6)}[level]
        turn = rng.choice((0, 0, 0, 0, 1, 2, 3)) if level != "easy" else rng.choice((0,) * 9 + (2,))
        tilt = {"easy": 2, "medium": 6, "hard": 10}[level]
        skew = {"easy": 0.01, "medium": 0.04, "hard": 0.07}[level]
        cut_off = level == "hard" and rng.random() < 0.08
        quad = _place(
            rng,
            drawn.pixels.shape[1] / drawn.pixels.shape[0],
            size,
            rng.uniform(*share),
            turn,
            tilt,
            skew,
            cut_off,
        )
        matrix = _paste(canvas, drawn.pixels, quad)
        box = _around(quad, size)
        boxes.append((IDENTIFICATION, box))
        taken.append(box)
        for name, (left, top, right, bottom) in drawn.places.items():
            corners = np.array([[[left, top], [right, top], [right, bottom], [left, bottom]]], np.float32)
            places[name] = cv2.perspectiveTransform(corners, matrix)[0]
    if kind == "transformer_plate" or (kind == "nameplate" and rng.random() < 0.3):
        main = kind == "transformer_plate"
        face, printed = _small_plate(rng)
        for _ in range(1 if main else rng.choice((1, 1, 2))):
            part = rng.uniform(0.3, 0.45) if main else rng.uniform(0.12, 0.2)
            spot = _free_spot(rng, size, part, face.shape[0] / face.shape[1], taken)
            if spot is None:
                continue
            matrix = _paste(canvas, face, spot)
            box = _around(spot, size)
            boxes.append((TRANSFORMER, box))
            taken.append(box)
            if main:
                values = {name: value for name, (value, _) in printed.items()}
                for name, (_, (left, top, right, bottom)) in printed.items():
                    corners = np.array(
                        [[[left, top], [right, top], [right, bottom], [left, bottom]]], np.float32
                    )
                    places[name] = cv2.perspectiveTransform(corners, matrix)[0]
    for maker, chance in ((_meter, 0.2), (_telecom, 0.2), (_engraving, 0.25)):
        if rng.random() < chance + (0.3 if kind == "negative" else 0.0):
            face = maker(rng)
            spot = _free_spot(rng, size, rng.uniform(0.12, 0.25), face.shape[0] / face.shape[1], taken)
            if spot is not None:
                _paste(canvas, face, spot)
                taken.append(_around(spot, size))
    if level != "easy" and boxes:
        _spoil(rng, canvas, covered, boxes[0][1], level)
    blur = (
        {"easy": rng.uniform(0, 0.5), "medium": rng.uniform(0.2, 1.0), "hard": rng.uniform(0.6, 1.9)}[level]
        * max(0.5, size[0] / 2000)
        * (1.0 if scale == 1 else scale)
    )
    light = {"easy": (0.9, 1.1), "medium": (0.7, 1.2), "hard": (0.5, 1.3)}[level]
    picture = canvas.astype(np.float32) * rng.uniform(*light)
    if level != "easy":
        ramp = np.linspace(rng.uniform(0.75, 1.0), rng.uniform(0.85, 1.15), size[0], dtype=np.float32)
        picture *= ramp[None, :, None]
    if blur > 0.2:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), blur), dtype=np.float32)
    grain = {"easy": 1.5, "medium": 4.0, "hard": 7.0}[level]
    picture += noise.normal(0, grain, (size[1], size[0], 1)).astype(np.float32)
    legible = {}
    for name in values:
        found = places.get(name)
        legible[name] = found is not None and _legible(found, covered, size, blur)
    return Sample(
        np.clip(picture, 0, 255).astype(np.uint8),
        level,
        kind,
        values,
        legible,
        boxes,
        orientation=rng.choice((1, 1, 1, 3, 6, 8)),
        quality=rng.randint(*QUALITY[level]),
    )


def _legible(corners: NDArray[np.float32], covered: Pixels, size: tuple[int, int], blur: float) -> bool:
    """Whether a person could read what stands in this quadrilateral."""
    height = min(
        float(np.linalg.norm(corners[0] - corners[3])), float(np.linalg.norm(corners[1] - corners[2]))
    )
    inside = (corners >= 0).all() and (corners[:, 0] < size[0]).all() and (corners[:, 1] < size[1]).all()
    if not inside or height * 0.95 < LEAST_HEIGHT or blur > BLURRED * height:
        return False
    mask = np.zeros_like(covered)
    cv2.fillConvexPoly(mask, corners.astype(np.int32), 1)
    area = int(mask.sum())
    return area > 0 and int((covered & mask).sum()) / area < COVERED


def background(rng: random.Random, size: tuple[int, int]) -> Pixels:
    """Sky, leaves, wall or tank: coarse noise in a few colours."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    tone = np.array(
        rng.choice(((120, 130, 125), (150, 165, 185), (90, 100, 80), (140, 135, 128), (100, 105, 115))),
        np.float32,
    )
    coarse = noise.normal(0, 22, (rng.randint(4, 24), rng.randint(4, 24), 3)).astype(np.float32)
    grown = np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC))
    picture = tone + grown
    for _ in range(rng.randint(0, 5)):  # fins, cables, edges
        x = rng.randint(0, size[0])
        thickness = max(1, rng.randint(2, 40) * size[0] // 2000)
        shade = rng.randint(40, 170)
        cv2.line(picture, (x, 0), (x + rng.randint(-300, 300), size[1]), (shade, shade, shade), thickness)
    return np.asarray(np.clip(picture, 0, 255), dtype=np.uint8)


def _place(
    rng: random.Random,
    ratio: float,
    size: tuple[int, int],
    share: float,
    turn: int,
    tilt: float,
    skew: float,
    cut_off: bool,
) -> NDArray[np.float32]:
    """The four corners of a plate in the photo, from its own top left, clockwise."""
    wide, high = (ratio, 1.0) if turn % 2 == 0 else (1.0, ratio)
    factor = min(share * size[0] / wide, 0.86 * size[1] / high)
    half = np.array([ratio, 1.0], np.float32) * factor / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32) * half
    corners += np.array(
        [[rng.uniform(-skew, skew) * 2 * half[0], rng.uniform(-skew, skew) * 2 * half[1]] for _ in range(4)],
        np.float32,
    )
    angle = np.deg2rad(90 * turn + rng.uniform(-tilt, tilt))
    spin = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    corners = corners @ spin
    reach = np.abs(corners).max(axis=0)
    middle = [
        rng.uniform(r + 4, s - r - 4) if s > 2 * r + 8 else s / 2 for r, s in zip(reach, size, strict=True)
    ]
    if cut_off:
        middle[0] = float(reach[0]) * rng.uniform(0.6, 0.85)
    return np.asarray(corners + np.array(middle, np.float32), dtype=np.float32)


def _paste(canvas: Pixels, face: Pixels, quad: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put a face into the canvas; the matrix from the face's pixels to the photo's."""
    height, width = face.shape[:2]
    target = float(np.linalg.norm(quad[0] - quad[1]))
    shrink = min(1.0, max(0.05, 1.2 * target / width))
    small = (
        face
        if shrink > 0.95
        else np.asarray(cv2.resize(face, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA))
    )
    own = np.array(
        [[0, 0], [small.shape[1], 0], [small.shape[1], small.shape[0]], [0, small.shape[0]]], np.float32
    )
    matrix = cv2.getPerspectiveTransform(own, quad.astype(np.float32))
    size = (canvas.shape[1], canvas.shape[0])
    warped = cv2.warpPerspective(small, matrix, size, flags=cv2.INTER_LINEAR)
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillConvexPoly(mask, quad.astype(np.int32), 1)
    np.copyto(canvas, np.asarray(warped, dtype=np.uint8), where=mask[:, :, None].astype(bool))
    whole = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    return np.asarray(cv2.getPerspectiveTransform(whole, quad.astype(np.float32)), dtype=np.float32)


def _around(quad: NDArray[np.float32], size: tuple[int, int]) -> tuple[float, float, float, float]:
    low, high = quad.min(axis=0), quad.max(axis=0)
    return (
        max(0.0, float(low[0])),
        max(0.0, float(low[1])),
        min(float(size[0]), float(high[0])),
        min(float(size[1]), float(high[1])),
    )


def _free_spot(
    rng: random.Random,
    size: tuple[int, int],
    share: float,
    ratio: float,
    taken: list[tuple[float, float, float, float]],
) -> NDArray[np.float32] | None:
    """A place for a face that overlaps nothing, or None."""
    wide = share * size[0]
    high = wide * ratio
    for _ in range(12):
        left, top = rng.uniform(0, max(1.0, size[0] - wide)), rng.uniform(0, max(1.0, size[1] - high))
        gap = 0.01 * size[0]
        if top + high <= size[1] and all(
            left > right + gap or left + wide < other - gap or top > bottom + gap or top + high < above - gap
            for other, above, right, bottom in taken
        ):
            return np.array(
                [[left, top], [left + wide, top], [left + wide, top + high], [left, top + high]], np.float32
            )
    return None


def _label(
    rng: random.Random, rows: list[tuple[str, int]], ground: tuple[int, int, int], ink: tuple[int, int, int]
) -> tuple[Pixels, list[tuple[float, float, float, float]]]:
    """A small face with rows of text, and the rows' boxes."""
    from PIL import ImageDraw

    face = rng.choice(plates.FONTS[:5])
    width = int(max(font(face, size).getlength(text) for text, size in rows)) + 40
    height = sum(int(size * 1.35) for _, size in rows) + 30
    picture = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((3, 3, width - 4, height - 4), outline=ink, width=2)
    y = 14.0
    boxes: list[tuple[float, float, float, float]] = []
    for text, size in rows:
        draw.text((20, y), text, fill=ink, font=font(face, size))
        left, top, right, bottom = draw.textbbox((20, y), text, font=font(face, size))
        boxes.append((float(left), float(top), float(right), float(bottom)))
        y += int(size * 1.35)
    return np.asarray(picture, dtype=np.uint8).copy(), boxes


def _small_plate(
    rng: random.Random,
) -> tuple[Pixels, dict[str, tuple[Any, tuple[float, float, float, float]]]]:
    """The utility's plate on the tank: power and asset tag."""
    power = rng.choice(plates.THREE_PHASE)
    asset = str(rng.randint(10_000, 9_999_999))
    rows = [(f"{plates.comma(power)} kVA", 70), (f"PATRIMÔNIO {asset}", 44)]
    face, boxes = _label(rng, rows, rng.choice(((240, 200, 30), (235, 235, 230))), (15, 15, 15))
    return face, {"potencia_kva": (power, boxes[0]), "patrimonio": (asset, boxes[1])}


def _meter(rng: random.Random) -> Pixels:
    digits = "".join(rng.choice("0123456789") for _ in range(8))
    rows = [
        ("MEDIDOR ELETRÔNICO kWh", 30),
        (f"Nº {digits}", 34),
        (f"{rng.randint(10000, 99999)} kWh", 46),
        ("240 V 15(100) A 60 Hz CL B", 24),
    ]
    return _label(rng, rows, (225, 228, 225), (20, 20, 20))[0]


def _telecom(rng: random.Random) -> Pixels:
    rows = [
        ("ATENÇÃO", 44),
        ("CABO DE FIBRA ÓPTICA", 36),
        (f"TELECOM {rng.randint(1000, 9999)}", 36),
        (f"0800 {rng.randint(100, 999)} {rng.randint(1000, 9999)}", 32),
    ]
    return _label(rng, rows, rng.choice(((250, 150, 20), (250, 230, 60))), (10, 10, 10))[0]


def _engraving(rng: random.Random) -> Pixels:
    rows = [
        (f"{rng.choice((9, 10, 11, 12))}/{rng.choice((300, 400, 600))} daN", 48),
        (f"POSTE {rng.randint(1000, 99999)}", 40),
        (f"{rng.randint(1990, 2024)}", 40),
    ]
    return _label(rng, rows, (165, 163, 158), (95, 94, 92))[0]


def _spoil(
    rng: random.Random, canvas: Pixels, covered: Pixels, box: tuple[float, float, float, float], level: str
) -> None:
    """Glare and dirt on the plate; what hides a value is noted in `covered`."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    for _ in range(rng.choice((0, 0, 1)) if level == "medium" else rng.choice((0, 1, 1, 2))):
        soft = np.zeros(covered.shape, np.float32)
        middle = (int(rng.uniform(left, right)), int(rng.uniform(top, bottom)))
        axes = (int(wide * rng.uniform(0.04, 0.14)) + 1, int(high * rng.uniform(0.04, 0.14)) + 1)
        cv2.ellipse(soft, middle, axes, rng.uniform(0, 180), 0, 360, 1.0, -1)
        reach = max(1.0, 0.25 * min(axes))
        soft = np.asarray(cv2.GaussianBlur(soft, (0, 0), reach))
        glare = rng.random() < 0.6
        colour = np.array((252, 252, 248) if glare else (85, 68, 50), np.float32)
        blended = canvas * (1 - soft[:, :, None] * 0.97) + colour * soft[:, :, None] * 0.97
        canvas[:] = np.clip(blended, 0, 255).astype(np.uint8)
        covered[soft > 0.35] = 1
    for _ in range(
        rng.randint(0, 12) if level == "hard" else rng.randint(0, 4)
    ):  # specks: they hide nothing whole
        middle = (int(rng.uniform(left, right)), int(rng.uniform(top, bottom)))
        cv2.circle(canvas, middle, max(1, int(wide * rng.uniform(0.001, 0.004))), (70, 60, 45), -1)
