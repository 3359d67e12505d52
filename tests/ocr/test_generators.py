"""What both generators draw, and a plate found in a photo. `make test-ocr` installs their typefaces."""

from __future__ import annotations

import random

import pytest
from ocr_pipeline.detect import OnnxDetector
from ocr_pipeline.geometry import Box
from ocr_pipeline.stages import Deadline, PlateClass
from ocr_pipeline.synthetic import plates
from ocr_pipeline.synthetic.scene import Sample, sample

from lab import packages
from scripts import _second_plates

SEED, NEGATIVE = 5000, 5011  # neither trained on nor held out


@pytest.fixture(scope="module", autouse=True)
def typefaces() -> None:
    """Skips where they are missing, with the packages' names."""
    missing = packages.missing(plates.PACKAGES | _second_plates.PACKAGES)
    if missing:
        pytest.skip(f"typefaces are not installed: {' '.join(missing)}")


@pytest.fixture(scope="module")
def detector() -> OnnxDetector:
    return OnnxDetector(threads=1)


def nameplate() -> Sample:
    """The first photo with a nameplate, small enough to be drawn at once."""
    photos = (sample(seed, "medium", scale=0.4) for seed in range(SEED, SEED + 20))
    return next(photo for photo in photos if photo.kind == "nameplate")


def test_every_typeface_has_its_package() -> None:
    """What a package list leaves out is missing on somebody else's machine."""
    first = {str(plates.FONT_ROOT / name) for name in plates.FONTS}
    second = {
        str(_second_plates.FOLDER / name) for name in (*_second_plates.PRINTED, *_second_plates.STAMPED)
    }
    folders = {path.rpartition("/")[0] for path in plates.PACKAGES | _second_plates.PACKAGES}
    assert {path.rpartition("/")[0] for path in first | second} == folders


def test_it_finds_the_plate_in_a_photo(detector: OnnxDetector) -> None:
    photo = nameplate()
    found = detector.detect(photo.pixels, Deadline(60))
    (kind, sides) = photo.boxes[0]
    assert found[0].kind == kind == PlateClass.IDENTIFICATION
    assert found[0].box.iou(Box(*sides)) > 0.7


def test_it_finds_no_nameplate_where_there_is_none(detector: OnnxDetector) -> None:
    photo = sample(NEGATIVE, "easy", scale=0.4)
    assert photo.kind == "negative"
    found = detector.detect(photo.pixels, Deadline(60))
    assert PlateClass.IDENTIFICATION not in {plate.kind for plate in found}


def test_a_seed_is_one_photo() -> None:
    one, again, other = (sample(seed, "hard", scale=0.2) for seed in (SEED, SEED, SEED + 1))
    assert one.jpeg() == again.jpeg() != other.jpeg()
    assert one.values == again.values


@pytest.mark.parametrize("english", [False, True])
def test_every_value_of_the_other_generator_has_its_place(english: bool) -> None:
    for seed in range(2):
        drawn = _second_plates.draw(random.Random(f"{seed}"), english=english)  # noqa: S311 - plates of a test
        height, width = drawn.pixels.shape[:2]
        assert drawn.places.keys() == drawn.values.keys()
        for left, top, right, bottom in drawn.places.values():
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
