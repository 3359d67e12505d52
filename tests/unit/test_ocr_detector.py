"""The weights that this project ships: their layout, their recipe, and a plate found in a photo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ocr_pipeline import build
from ocr_pipeline.detect import SHIPPED, OnnxDetector
from ocr_pipeline.geometry import Box
from ocr_pipeline.rapid import session
from ocr_pipeline.stages import Deadline, PlateClass
from ocr_pipeline.synthetic.plates import FONT_ROOT, FONTS, PACKAGES
from ocr_pipeline.synthetic.scene import Sample, sample

DATA = Path(str(resources.files("ocr_pipeline") / "data"))
LIMIT_BYTES = 1_000_000
SEED, NEGATIVE = 5000, 5011  # neither trained on nor held out
needs_fonts = pytest.mark.skipif(
    not all((FONT_ROOT / font).is_file() for font in FONTS),
    reason=f"the generator's fonts are not installed: {', '.join(sorted(PACKAGES.values()))}",
)


@pytest.fixture(scope="module")
def detector() -> Iterator[OnnxDetector]:
    yield OnnxDetector(threads=1)


def nameplate() -> Sample:
    """The first photo with a nameplate, small enough to be drawn at once."""
    photos = (sample(seed, "medium", scale=0.4) for seed in range(SEED, SEED + 20))
    return next(photo for photo in photos if photo.kind == "nameplate")


def test_the_output_has_the_layout_of_a_yolo_export() -> None:
    weights = DATA / SHIPPED
    assert weights.stat().st_size < LIMIT_BYTES
    loaded = session(weights, 1)
    (given,) = loaded.get_inputs()
    batch = np.zeros(given.shape, np.float32)
    (output,) = loaded.run(None, {given.name: batch})
    assert given.shape[:2] == [1, 3]
    assert output.shape == (1, 4 + len(PlateClass), (given.shape[2] // 16) ** 2)
    assert ((output[:, 4:] >= 0) & (output[:, 4:] <= 1)).all()


def test_its_classes_are_named_in_the_file(detector: OnnxDetector) -> None:
    assert set(detector.names.values()) == {str(kind) for kind in PlateClass}


def test_the_recipe_and_the_held_out_figures_are_beside_it(detector: OnnxDetector) -> None:
    page: dict[str, Any] = json.loads(DATA.joinpath("plates.json").read_text(encoding="utf-8"))
    recipe, held_out = page["recipe"], page["held_out"]
    assert recipe["side"] == detector.side
    assert recipe["seeds"][1] >= recipe["seeds"][0] + recipe["photos"]
    assert sum(held_out["found"].values()) >= 0.9 * sum(held_out["there"].values())


@needs_fonts
def test_it_finds_the_plate_in_a_photo(detector: OnnxDetector) -> None:
    photo = nameplate()
    plates = detector.detect(photo.pixels, Deadline(60))
    (kind, sides) = photo.boxes[0]
    assert plates[0].kind == kind == PlateClass.IDENTIFICATION
    assert plates[0].box.iou(Box(*sides)) > 0.7


@needs_fonts
def test_it_finds_no_nameplate_where_there_is_none(detector: OnnxDetector) -> None:
    photo = sample(NEGATIVE, "easy", scale=0.4)
    assert photo.kind == "negative"
    found = detector.detect(photo.pixels, Deadline(60))
    assert PlateClass.IDENTIFICATION not in {plate.kind for plate in found}


def test_it_is_the_first_detector_of_the_embedded_pipeline() -> None:
    first, *fallback = build.pipeline().detectors
    assert isinstance(first, OnnxDetector)
    assert fallback
