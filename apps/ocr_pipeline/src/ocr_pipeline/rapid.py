"""Stage 1 without a server: PP-OCRv6 in onnxruntime, with the models that the package rapidocr carries.

rapidocr's own detector finds the lines of text. From there on this module does what its loop does not: the
whole crop is
turned upright at once (by most lines' shape, then by the direction classifier on the longest ones),
recognition gives
the certainty of each character over the alphabet of a nameplate, and a line with a doubtful character is
read again from
other cuts. Widths are rounded up to steps: the memory of a worker grows with each new size of
input.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ocr_pipeline.geometry import Box
from ocr_pipeline.images import Pixels
from ocr_pipeline.stages import Deadline, Line, Seen
from ocr_pipeline.words import squeezed

HEIGHT = 48  # of a line that is recognised
WIDTH_STEP = 160
WIDEST = 1600
BATCH = 6
SIDE_STEP = 160  # the picture is padded to multiples of this
LOOKED_AT = 5  # lines that tell whether the crop stands on its head
PLAIN = 0.25  # below it, or above 1 less it, the share of lines on their heads decides
DOUBTFUL = 0.90  # a line with a less sure character is read again, from other cuts
SURE = 0.97  # a reading that another one's digits do not put in doubt
DISPUTED = 0.75  # certainty at most where they do
SMOOTH = 0.05  # standard deviation of the blur, of a line's height
TOUCHING = 0.25  # of a line's height: nearer to the crop's side it may be cut off
STRIP = 0.5  # of a line's height: how far beside it is looked for a patch
PATCH = 0.45  # of a line's contrast: nothing beside 268 codes that were read right was so far from the ground
LEAST_TILT = 1.0  # degrees: less changes no row
LEAST = 0.45  # a line less sure than this is no text
ALPHABET = frozenset(
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzÁÀÂÃÇÉÊÍÓÔÕÚÜáàâãçéêíóôõúü"
    " .,:;/\\-+()[]%º°ª#&*_=<>'\"!?@|~Øø²³φΦ"
)
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Recognised:
    """One cut's text, and how sure each character is."""

    text: str
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean certainty; 0 without text."""
        return float(np.mean(self.weights)) if self.weights else 0.0

    @property
    def weakest(self) -> float:
        """The least sure letter's or digit's certainty; 0 without one."""
        sure = [weight for sign, weight in zip(self.text, self.weights, strict=True) if sign.isalnum()]
        return min(sure, default=0.0)


class RapidVision:
    """The embedded vision stage. Models are loaded once; `warm` loads them now."""

    def __init__(self, threads: int = 2) -> None:
        self.threads = threads
        self._parts: _Parts | None = None

    def warm(self) -> None:
        """Load the models now, so that the first photo does not wait for them."""
        self._loaded()

    def _loaded(self) -> _Parts:
        if self._parts is None:
            self._parts = _Parts(self.threads)
        return self._parts

    def read(self, pixels: Pixels, deadline: Deadline) -> Seen:
        """All lines of a crop, in reading order, the crop turned upright."""
        started = time.perf_counter()
        parts = self._loaded()
        quads = parts.detect(pixels)
        deadline.check("text detection")
        if not len(quads):
            return Seen((), 0, time.perf_counter() - started)
        touched = sides_touched(quads, pixels.shape[1], pixels.shape[0])
        turned = 90 if _mostly_upright(quads) else 0
        picture = np.ascontiguousarray(np.rot90(pixels)) if turned else pixels
        if turned:
            quads = _turned(quads, pixels.shape[1])
        cuts = [_cut(picture, quad) for quad in quads]
        if parts.upside_down(cuts, deadline):
            turned += 180
            height, width = picture.shape[:2]
            quads = np.array([[width, height] - np.roll(quad, 2, axis=0) for quad in quads], dtype=np.float32)
            picture = np.ascontiguousarray(np.rot90(picture, 2))
            cuts = [np.ascontiguousarray(cut[::-1, ::-1]) for cut in cuts]
        tilt = tilt_of(quads)
        if abs(tilt) > LEAST_TILT:
            picture, quads = straightened(picture, quads, tilt)
            cuts = [_cut(picture, quad) for quad in quads]
        deadline.check("text direction")
        readings = [[found] for found in parts.recognise(cuts, deadline)]
        for look in (_sharpened, _smoothed):
            again = [at for at, found in enumerate(readings) if _worth_another_look(found)]
            if not again:
                break
            others = parts.recognise([look(picture, quads[at]) for at in again], deadline)
            for at, other in zip(again, others, strict=True):
                readings[at].append(other)
        lines = [
            self._line(picture, quad, *agreed(found)) for quad, found in zip(quads, readings, strict=True)
        ]
        kept = [line for line in lines if line.text.strip() and line.confidence >= LEAST]
        seconds = time.perf_counter() - started
        return Seen(tuple(in_reading_order(kept)), turned % 360, seconds, picture, touched)

    @staticmethod
    def _line(picture: Pixels, quad: Floats, found: Recognised, second: str) -> Line:
        box = Box(*(float(side) for side in (*quad.min(axis=0), *quad.max(axis=0))))
        beside = patches(picture, box)
        return Line(found.text, box, found.mean, found.weakest, found.weights, second=second, beside=beside)


class TextFinder:
    """Where text is, without reading it: for the detector that clusters text boxes."""

    def __init__(self, vision: RapidVision) -> None:
        self._vision = vision

    def boxes(self, pixels: Pixels) -> list[Box]:
        """Upright boxes of all lines of text."""
        quads = self._vision._loaded().detect(pixels)
        return [Box(*(float(side) for side in (*quad.min(axis=0), *quad.max(axis=0)))) for quad in quads]


class _Parts:
    """The three models in onnxruntime, and what the recogniser's outputs mean."""

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        rapidocr: Any = importlib.import_module("rapidocr")
        models = Path(str(rapidocr.__file__)).parent / "models"
        self._finder = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.use_rec": False,
                "Global.max_side_len": 2000,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "Det.limit_side_len": 640,
            }
        )
        self._direction = session(models / "ch_ppocr_mobile_v2.0_cls_mobile.onnx", threads)
        self._recogniser = session(models / "PP-OCRv6_rec_small.onnx", threads)
        described = self._recogniser.get_modelmeta().custom_metadata_map["character"].splitlines()
        alphabet = ["", *described, " "]  # 0 is the blank, the last is the space
        self._kept = np.array(
            [at for at, sign in enumerate(alphabet) if at == 0 or sign in ALPHABET], dtype=np.int64
        )
        self._signs = [alphabet[at] for at in self._kept]

    def detect(self, pixels: Pixels) -> Floats:
        """Quadrilaterals of lines of text: n x 4 x 2, clockwise from each line's top left."""
        height, width = pixels.shape[:2]
        high, wide = -(-height // SIDE_STEP) * SIDE_STEP, -(-width // SIDE_STEP) * SIDE_STEP
        padded = cv2.copyMakeBorder(
            pixels, 0, high - height, 0, wide - width, cv2.BORDER_CONSTANT, value=(127, 127, 127)
        )
        found = self._finder(
            cv2.cvtColor(np.asarray(padded), cv2.COLOR_RGB2BGR), use_det=True, use_cls=False, use_rec=False
        )
        boxes = getattr(found, "boxes", None)
        return np.zeros((0, 4, 2), np.float32) if boxes is None else np.asarray(boxes, dtype=np.float32)

    def upside_down(self, cuts: Sequence[Pixels], deadline: Deadline) -> bool:
        """Whether the longest lines stand on their heads; where that is not plain, both ways are read."""
        longest = sorted(cuts, key=lambda cut: -cut.shape[1] / max(1, cut.shape[0]))[:LOOKED_AT]
        batch = np.stack([_normal(cut, 192) for cut in longest])
        shares = self._direction.run(None, {self._direction.get_inputs()[0].name: batch})[0]
        chance = float(np.mean(shares[:, 1]))
        if not PLAIN < chance < 1 - PLAIN:
            return chance > 0.5
        turned = [np.ascontiguousarray(cut[::-1, ::-1]) for cut in longest]
        ways = [self.recognise(cuts, deadline) for cuts in (longest, turned)]
        this, other = (sum(found.mean for found in way) for way in ways)
        return other > this

    def recognise(self, cuts: Sequence[Pixels], deadline: Deadline) -> list[Recognised]:
        """The text of every cut. Cuts of one width go together."""
        widths = [
            min(
                WIDEST,
                -(-max(1, round(cut.shape[1] * HEIGHT / max(1, cut.shape[0]))) // WIDTH_STEP) * WIDTH_STEP,
            )
            for cut in cuts
        ]
        order = sorted(range(len(cuts)), key=lambda at: widths[at])
        results: list[Recognised] = [Recognised("", ())] * len(cuts)
        while order:
            batch = [at for at in order[:BATCH] if widths[at] == widths[order[0]]]
            order = order[len(batch) :]
            stacked = np.stack([_normal(cuts[at], widths[at]) for at in batch])
            shares = self._recogniser.run(None, {self._recogniser.get_inputs()[0].name: stacked})[0]
            for at, share in zip(batch, shares, strict=True):
                results[at] = self._decode(share[:, self._kept])
            deadline.check("text recognition")
        return results

    def _decode(self, shares: Floats) -> Recognised:
        """Greedy CTC over the alphabet of nameplates."""
        best = shares.argmax(axis=1)
        sure = shares.max(axis=1)
        text: list[str] = []
        weights: list[float] = []
        before = 0
        for place, sign in enumerate(best):
            if sign and sign != before:
                text.append(self._signs[sign])
                weights.append(float(sure[place]))
            elif sign and weights:
                weights[-1] = max(weights[-1], float(sure[place]))
            before = int(sign)
        joined = "".join(text)
        lead = len(joined) - len(joined.lstrip())
        kept = joined.strip()
        return Recognised(kept, tuple(weights[lead : lead + len(kept)]))


@lru_cache(maxsize=8)
def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A model on the CPU, without the arena that keeps the memory of the largest input."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _normal(cut: Pixels, width: int) -> Floats:
    """A cut at the recogniser's height, padded on the right, from -1 to 1, channels first."""
    scaled = min(width, max(1, round(cut.shape[1] * HEIGHT / max(1, cut.shape[0]))))
    small = np.asarray(cv2.resize(cut, (scaled, HEIGHT)), dtype=np.float32)[:, :, ::-1]
    padded = np.zeros((3, HEIGHT, width), np.float32)
    padded[:, :, :scaled] = small.transpose(2, 0, 1) / 127.5 - 1.0
    return padded


def _cut(picture: Pixels, quad: Floats, *, grow: float = 0.0) -> Pixels:
    """The line in a quadrilateral, straightened. `grow`: a margin as a share of its height."""
    width = max(float(np.linalg.norm(quad[0] - quad[1])), float(np.linalg.norm(quad[2] - quad[3])), 1.0)
    height = max(float(np.linalg.norm(quad[0] - quad[3])), float(np.linalg.norm(quad[1] - quad[2])), 1.0)
    margin = grow * height
    goal = np.array(
        [
            [margin, margin],
            [width + margin, margin],
            [width + margin, height + margin],
            [margin, height + margin],
        ],
        np.float32,
    )
    size = (max(1, round(width + 2 * margin)), max(1, round(height + 2 * margin)))
    matrix = cv2.getPerspectiveTransform(quad.astype(np.float32), goal)
    return np.asarray(
        cv2.warpPerspective(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE),
        dtype=np.uint8,
    )


def _mostly_upright(quads: Floats) -> bool:
    """Whether most text runs up or down: the boxes are taller than wide, weighed by their length."""
    wide = np.linalg.norm(quads[:, 0] - quads[:, 1], axis=1)
    high = np.linalg.norm(quads[:, 0] - quads[:, 3], axis=1)
    longer, shorter = np.maximum(wide, high), np.maximum(1.0, np.minimum(wide, high))
    votes = longer * (longer / shorter > 1.5)
    return float(votes[high > wide].sum()) > float(votes[wide >= high].sum())


def sides_touched(quads: Floats, width: int, height: int) -> tuple[bool, bool, bool, bool]:
    """Whether a line reaches the picture's left, top, right or bottom: it may go on beyond it."""
    low, high = quads.min(axis=1), quads.max(axis=1)
    sides = [np.linalg.norm(quads[:, 0] - quads[:, at], axis=1) for at in (1, 3)]
    near = TOUCHING * np.minimum(*sides)
    return (
        bool((low[:, 0] < near).any()),
        bool((low[:, 1] < near).any()),
        bool((high[:, 0] > width - near).any()),
        bool((high[:, 1] > height - near).any()),
    )


def patches(picture: Pixels, box: Box) -> tuple[bool, bool]:
    """Whether glare, dirt or paint lies right before a line, and right behind it: far brighter or darker than
    the line's own ground.
    """
    own = _grey(picture, box.left, box.right, box.top, box.bottom)
    if not own.size:
        return False, False
    low, ground, high = (float(value) for value in np.percentile(own, (2, 50, 98)))
    far = PATCH * max(20.0, high - low)
    margin, reach = 0.15 * box.height, STRIP * box.height

    def patch(left: float, right: float) -> bool:
        strip = _grey(picture, left, right, box.top + margin, box.bottom - margin)
        return bool(strip.size) and abs(float(np.median(strip)) - ground) > far

    return patch(box.left - reach, box.left), patch(box.right, box.right + reach)


def _grey(picture: Pixels, left: float, right: float, top: float, bottom: float) -> Floats:
    sides = [max(0, int(side)) for side in (top, bottom, left, right)]
    part = picture[sides[0] : sides[1], sides[2] : sides[3]]
    return np.asarray(part.mean(axis=2, dtype=np.float32))


def tilt_of(quads: Floats) -> float:
    """By how many degrees the lines run downhill: the median over the longer ones."""
    ends = quads[:, 1] - quads[:, 0]
    lengths = np.linalg.norm(ends, axis=1)
    long = lengths >= np.median(lengths)
    return float(np.median(np.degrees(np.arctan2(ends[long, 1], ends[long, 0]))))


def straightened(picture: Pixels, quads: Floats, tilt: float) -> tuple[Pixels, Floats]:
    """The picture turned so that its lines are level, with their quadrilaterals; nothing is cut off."""
    height, width = picture.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), tilt, 1.0)
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64) @ matrix.T
    low, high = corners.min(axis=0), corners.max(axis=0)
    matrix[:, 2] -= low
    size = (int(high[0] - low[0]) + 1, int(high[1] - low[1]) + 1)
    level = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    moved = quads @ matrix[:, :2].T + matrix[:, 2]
    return np.asarray(level, dtype=np.uint8), moved.astype(np.float32)


def _turned(quads: Floats, width: int) -> Floats:
    """The quadrilaterals in the picture turned counter-clockwise by 90 degrees, again from their top left."""
    turned = np.stack([quads[:, :, 1], width - quads[:, :, 0]], axis=2)
    return np.ascontiguousarray(np.roll(turned, -1, axis=1), dtype=np.float32)


def _worth_another_look(readings: Sequence[Recognised]) -> bool:
    """Whether a line with a digit is still doubtful: words alone are matched with tolerance."""
    best, second = agreed(readings)
    return any(sign.isdigit() for sign in best.text) and (best.weakest < DOUBTFUL or bool(second))


def _sharpened(picture: Pixels, quad: Floats) -> Pixels:
    """The line with a margin, its contrast stretched."""
    cut = _cut(picture, quad, grow=0.12)
    low, high = (float(value) for value in np.percentile(cut, (2, 98)))
    if high - low <= 8:
        return cut
    stretched = (cut.astype(np.float32) - low) * (255.0 / (high - low))
    return np.asarray(np.clip(stretched, 0, 255), dtype=np.uint8)


def _smoothed(picture: Pixels, quad: Floats) -> Pixels:
    """The line with a margin, smoothed: an embossed letter's light and shadow become one stroke."""
    cut = _cut(picture, quad, grow=0.06)
    return np.asarray(cv2.GaussianBlur(cut, (0, 0), max(0.3, SMOOTH * cut.shape[0])), dtype=np.uint8)


def agreed(readings: Sequence[Recognised]) -> tuple[Recognised, str]:
    """The surest of several readings of a line, and another one that has other letters or digits, or "".

    Readings of one text make each other surer. Where digits differ, the surest one is doubtful all the same.
    """
    groups: dict[str, list[Recognised]] = {}
    for found in readings:
        groups.setdefault(squeezed(found.text), []).append(found)
    surest = [_merged(group) for group in groups.values()]
    surest.sort(key=lambda found: (-found.weakest, -found.mean))
    best = surest[0]
    if len(surest) == 1:
        return best, ""
    if best.weakest < SURE and len({re.sub(r"[^0-9]", "", found.text) for found in surest}) > 1:
        best = Recognised(best.text, tuple(min(weight, DISPUTED) for weight in best.weights))
    return best, surest[1].text


def _merged(group: Sequence[Recognised]) -> Recognised:
    """The surest of readings of one text, each sign as sure as in the reading where it is surest."""
    best = max(group, key=lambda found: (found.weakest, found.mean))
    same = [found.weights for found in group if len(found.text) == len(best.text)]
    return Recognised(best.text, tuple(max(weights) for weights in zip(*same, strict=True)))


def in_reading_order(lines: Sequence[Line]) -> list[Line]:
    """Rows from top to bottom, each from left to right."""
    placed = [line for line in lines if line.box is not None]
    placed.sort(key=lambda line: line.box.middle[1] if line.box else 0.0)
    rows: list[list[Line]] = []
    for line in placed:
        assert line.box is not None
        last = rows[-1][-1].box if rows else None
        if last is not None and abs(line.box.middle[1] - last.middle[1]) < 0.5 * min(
            line.box.height, last.height
        ):
            rows[-1].append(line)
        else:
            rows.append([line])
    ordered = [
        line for row in rows for line in sorted(row, key=lambda line: line.box.left if line.box else 0.0)
    ]
    return ordered + [line for line in lines if line.box is None]
