"""Stage 0: where the plates are. An ONNX detector by class names, clusters of text boxes, or the photo as it
is.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from ocr_pipeline.errors import SettingsError
from ocr_pipeline.geometry import Box, around
from ocr_pipeline.images import Pixels
from ocr_pipeline.rapid import session
from ocr_pipeline.stages import Deadline, Plate, PlateClass

SHIPPED = "plates.onnx"
NMS_IOU = 0.45
MAX_PLATES = 20
DYNAMIC_SIDE = 640  # of an export that takes any
CHOSEN = 6  # columns of an end-to-end export: two corners, score, class
GREY = 114  # what YOLO exports are trained with around a photo
TEXT_SIDE = 960  # of the photo in which text boxes are looked for
LEAST_LINES = 5  # of a cluster that may be a nameplate


class OnnxDetector:
    """A YOLO-style export: input `[1, 3, H, W]` in RGB from 0 to 1, output `[1, 4 + nc, N]`, boxes as centre
    and size
    in input pixels. The classes are found by name: in the file's own metadata (`names`), else in `classes`.

    What is no such export is refused here, by one grey picture: read as one, it gives plates that are none.
    """

    def __init__(
        self, weights: str = "", classes: Sequence[str] = (), score: float = 0.28, threads: int = 2
    ) -> None:
        path = Path(weights) if weights else Path(str(resources.files("ocr_pipeline") / "data" / SHIPPED))
        self._told = f"detector.weights = {str(path)!r}"
        try:
            path.open("rb").close()
        except OSError as error:
            raise SettingsError(f"{self._told}: {error.strerror}") from None
        try:
            self._session = session(path, threads)
        except Exception as error:  # onnxruntime's errors have no common class but Exception
            raise SettingsError(f"{self._told}: onnxruntime cannot load it: {_first(error)}") from None
        given = self._session.get_inputs()[0]
        self._input = given.name
        if len(given.shape) != 4:
            raise SettingsError(f"{self._told}: its input is {given.shape}, not [1, 3, H, W]")
        if given.type != "tensor(float)":
            raise SettingsError(
                f"{self._told}: its input is {given.type}, not float32; export it without half"
            )
        sides = {side for side in given.shape[2:] if isinstance(side, int)} or {DYNAMIC_SIDE}
        if len(sides) > 1:
            size = " x ".join(str(side) for side in given.shape[2:])
            raise SettingsError(f"{self._told}: its input is {size} pixels; export it square")
        self.side = sides.pop()
        self._score = score
        self.names = _names(self._session.get_modelmeta().custom_metadata_map, classes)
        wanted = {str(kind) for kind in PlateClass}
        if not wanted & set(self.names.values()):
            raise SettingsError(
                f"{self._told}: no class is called {' or '.join(sorted(wanted))}; "
                "name them in the order of its outputs under detector.classes"
            )
        self._check_output()

    def _check_output(self) -> None:
        """Raises SettingsError where what comes out is not what `plates_of` reads."""
        try:
            output = self._run(np.full((self.side, self.side, 3), GREY, np.uint8))
        except Exception as error:
            raise SettingsError(f"{self._told}: it cannot read one picture: {_first(error)}") from None
        shape, named = list(output.shape), 4 + len(self.names)
        if len(shape) == 3 and shape[2] == CHOSEN and (named != CHOSEN or _whole(output[0, :, -1])):
            raise SettingsError(
                f"{self._told}: its output is {shape}, boxes that are chosen already (end-to-end); "
                "export it without nms (nms=False, of YOLOv10 and later end2end=False too)"
            )
        if len(shape) != 3 or shape[0] != 1 or min(shape[1:]) != named:
            raise SettingsError(
                f"{self._told}: its output is {shape}, but {len(self.names)} classes are named, which makes "
                f"[1, {named}, N]; name all of its classes, in order, under detector.classes"
            )

    def _run(self, square: Pixels) -> NDArray[np.float32]:
        batch = square.astype(np.float32).transpose(2, 0, 1)[None] / 255.0
        return np.asarray(self._session.run(None, {self._input: batch})[0])

    def detect(self, pixels: Pixels, deadline: Deadline) -> list[Plate]:
        """Plates of the two classes, the surest first."""
        picture, factor, left, top = letterbox(pixels, self.side)
        output = self._run(picture)
        deadline.check("detector")
        return plates_of(output, self.names, self._score, factor, left, top, pixels.shape[1], pixels.shape[0])


class FindsText(Protocol):
    """What gives boxes of text."""

    def boxes(self, pixels: Pixels) -> list[Box]:
        """Upright boxes of all lines of text."""


class TextDetector:
    """The largest cluster of text is taken for a nameplate: what is left where no detector finds one."""

    def __init__(self, finder: FindsText) -> None:
        self._finder = finder

    def detect(self, pixels: Pixels, deadline: Deadline) -> list[Plate]:
        """At most one plate, with a low score: nobody has recognised it as one."""
        longer = max(pixels.shape[:2])
        factor = min(1.0, TEXT_SIDE / longer)
        size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
        small = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        cluster = densest(self._finder.boxes(small))
        deadline.check("detector")
        return [Plate(None, cluster.scaled(1 / factor), 0.2)] if cluster else []


def densest(boxes: Sequence[Box], reach: float = 2.5) -> Box | None:
    """The box around the cluster with the most lines of text; None where none has enough of them."""
    left = list(boxes)
    best: list[Box] = []
    while left:
        cluster = [left.pop()]
        for box in cluster:
            side = reach * min(box.width, box.height)
            near = Box(box.left - side, box.top - side, box.right + side, box.bottom + side)
            joined = [other for other in left if near.overlap(other) > 0]
            cluster += joined
            left = [other for other in left if other not in joined]
        best = max(best, cluster, key=len)
    return around(best) if len(best) >= LEAST_LINES else None


def letterbox(pixels: Pixels, side: int) -> tuple[Pixels, float, float, float]:
    """The photo within a square of `side`, its factor, and the margins left and above."""
    height, width = pixels.shape[:2]
    factor = side / max(height, width)
    wide, high = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    left, top = (side - wide) // 2, (side - high) // 2
    square = np.full((side, side, 3), GREY, np.uint8)
    square[top : top + high, left : left + wide] = small
    return square, factor, float(left), float(top)


def plates_of(
    output: NDArray[np.float32],
    names: dict[int, str],
    least: float,
    factor: float,
    left: float,
    top: float,
    width: int,
    height: int,
) -> list[Plate]:
    """Plates from an output `[1, 4 + nc, N]`, in pixels of the photo, without those that overlap a surer
    one.
    """
    rows = output[0].T if output.shape[1] < output.shape[2] else output[0]
    scores = rows[:, 4:]
    best = scores.argmax(axis=1)
    sure = scores.max(axis=1)
    found: list[Plate] = []
    wanted = {str(kind) for kind in PlateClass}
    for at in np.argsort(-sure):
        score = float(sure[at])
        if not score >= least or len(found) >= MAX_PLATES:
            break
        name = names.get(int(best[at]), "")
        x, y, wide, high = (float(value) for value in rows[at, :4])
        if name not in wanted or not np.isfinite([x, y, wide, high]).all():
            continue
        box = Box(
            max(0.0, (x - wide / 2 - left) / factor),
            max(0.0, (y - high / 2 - top) / factor),
            min(float(width), (x + wide / 2 - left) / factor),
            min(float(height), (y + high / 2 - top) / factor),
        )
        if box.area > 0 and all(box.iou(plate.box) < NMS_IOU for plate in found):
            found.append(Plate(PlateClass(name), box, min(1.0, score)))
    return found


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _whole(values: NDArray[np.float32]) -> bool:
    """Whether all are whole numbers, as classes are and scores are not."""
    return bool((values == np.round(values)).all())


def _names(metadata: dict[str, str], classes: Sequence[str]) -> dict[int, str]:
    """Class names by index: those given, else those in the file, which YOLO writes as a Python dict."""
    if classes:
        return dict(enumerate(classes))
    try:
        read = ast.literal_eval(metadata.get("names", "{}"))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return {}
    if isinstance(read, dict):
        return {int(key): str(name) for key, name in read.items() if str(key).isdigit()}
    return {at: str(name) for at, name in enumerate(read)} if isinstance(read, list | tuple) else {}
