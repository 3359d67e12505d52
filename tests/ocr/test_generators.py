"""What the generators draw, and a plate found in a photo. `make test-ocr` installs their typefaces."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from ocr_pipeline.detect import OnnxDetector
from ocr_pipeline.geometry import Box
from ocr_pipeline.reading import FIELDS
from ocr_pipeline.stages import Deadline, PlateClass
from ocr_pipeline.synthetic import plates
from ocr_pipeline.synthetic.plates import Drawn, Value
from ocr_pipeline.synthetic.scene import Sample, sample

from lab import packages
from scripts import _second_plates, _third_plates

SEED, NEGATIVE = 5000, 5011  # neither trained on nor held out
PACKAGES = plates.PACKAGES | _second_plates.PACKAGES | _third_plates.PACKAGES
OTHERS = [
    *(
        pytest.param(
            partial(_second_plates.draw, language=language, layout=layout), id=f"second-{language}-{layout}"
        )
        for language in _second_plates.LANGUAGES
        for layout in _second_plates.LAYOUTS
    ),
    *(
        pytest.param(
            partial(_third_plates.draw, language=language, layout=layout), id=f"third-{language}-{layout}"
        )
        for language in _third_plates.LANGUAGES
        for layout in _third_plates.LAYOUTS
    ),
]
ALWAYS = {"fabricante", "potencia_kva", "numero_serie", "tensao_primaria", "tensao_secundaria", "fases"}


@pytest.fixture(scope="module", autouse=True)
def typefaces() -> None:
    """Skips where they are missing, with the packages' names."""
    missing = packages.missing(PACKAGES)
    if missing:
        pytest.skip(f"typefaces are not installed: {' '.join(missing)}")


@pytest.fixture(scope="module")
def detector() -> OnnxDetector:
    return OnnxDetector(threads=1)


def nameplate() -> Sample:
    """The first photo with a nameplate, small enough to be drawn at once."""
    photos = (sample(seed, "medium", scale=0.4) for seed in range(SEED, SEED + 20))
    return next(photo for photo in photos if photo.kind == "nameplate")


def second(seed: int, language: str) -> dict[str, Value]:
    """What stands on a plate of the second generator, without a picture."""
    rng = random.Random(f"second {seed}")  # noqa: S311 - plates of a test
    layout = rng.choice(tuple(_second_plates.LAYOUTS))
    return _second_plates.content(rng, _second_plates.unit_of(rng, language), layout).values


def third(seed: int, language: str) -> dict[str, Value]:
    """What stands on a plate of the third generator, without a picture."""
    rng = random.Random(f"third {seed}")  # noqa: S311 - plates of a test
    layout = rng.choice(tuple(_third_plates.LAYOUTS))
    return _third_plates.content(rng, _third_plates.unit_of(rng, language), layout).values


def number(text: str) -> float:
    """A voltage as a person reads it: three digits behind a point or a comma are thousands."""
    whole, _, rest = re.findall(r"(\d+)([.,]?)(\d*)", text)[0]
    if len(rest) == 3:
        return float(whole + rest)
    return float(f"{whole}.{rest or 0}") * (1000 if float(whole) < 100 else 1)


def read_third(name: str, printed: str, language: str) -> Any:
    """As `read_second`, of the third generator's plates."""
    words = _third_plates.WORDS[language]
    if name == "potencia_kva":
        return float(re.findall(r"[\d.,]+", printed)[0].replace(",", "."))
    if name == "tensao_primaria":
        return round(number(printed))
    if name == "tensao_secundaria":
        return "/".join(sorted(re.findall(r"\d+", printed), key=int, reverse=True))
    if name == "fases":
        return words["phases"].index(printed) + 1 if printed in words["phases"] else int(printed)
    if name == "autoprotegido":
        return printed not in words["no"]
    if name == "elo_fusivel":
        return printed.replace(",", ".").replace(" ", "")
    if name == "fabricante":
        makers = [maker for maker, *texts in words["makers"] if printed in texts]
        return makers[0] if len(makers) == 1 else makers
    if name == "data_fabricacao":
        parts = re.findall(r"\w+", printed)
        *rest, year = parts if len(parts[-1]) == 4 or len(parts) < 3 else reversed(parts)
        year = year if len(year) == 4 else ("19" if year > "24" else "20") + year
        months = {month: f"{at:02d}" for at, month in enumerate(words["months"], 1)}
        return "-".join([year, *(months.get(text, text) for text in reversed(rest))])
    return printed


def read_second(name: str, printed: str, language: str) -> Any:
    """A field as a person takes it from its own text; written apart from what writes it."""
    words = _second_plates.WORDS[language]
    if name in ("potencia_kva", "tensao_primaria", "tensao_secundaria"):
        decimals = {",": "", ".": "."} if language == "English" else {".": "", ",": "."}
        texts = re.findall(r"\d+(?:[.,]\d+)*", printed)
        numbers = [float(text.translate(str.maketrans(decimals))) for text in texts]
        if name == "potencia_kva":
            return numbers[0]
        volts = [round(number * 1000 if number < 100 else number) for number in numbers]
        return volts[0] if name == "tensao_primaria" else "/".join(map(str, volts))
    if name == "fases":
        return words["phases"].index(printed) + 1 if printed in words["phases"] else int(printed[0])
    if name == "autoprotegido":
        return printed != words["self"][2]
    if name == "data_fabricacao":
        *rest, year = re.findall(r"\w+", printed)
        century = "" if len(year) == 4 else "19" if year > "24" else "20"
        months = {month: f"{at:02d}" for at, month in enumerate(words["months"], 1)}
        return "-".join([century + year, *(months.get(text, text.zfill(2)) for text in reversed(rest))])
    return printed


def test_every_typeface_has_its_package() -> None:
    """What a package list leaves out is missing on somebody else's machine."""
    used = {
        (plates.FONT_ROOT, plates.FONTS),
        (_second_plates.FOLDER, (*_second_plates.PRINTED, *_second_plates.STAMPED)),
        (_third_plates.FOLDER, (*_third_plates.PRINTED, *_third_plates.STAMPED)),
    }
    drawn = {str((folder / name).parent) for folder, names in used for name in names}
    assert drawn == {path.rpartition("/")[0] for path in PACKAGES}


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


@pytest.mark.parametrize(
    "make",
    [partial(sample, scale=0.2), _second_plates.sample, _third_plates.sample],
    ids=["first", "second", "third"],
)
def test_a_seed_is_one_photo(make: Callable[..., Sample]) -> None:
    one, again, other = (make(seed, "medium") for seed in (SEED, SEED, SEED + 1))
    assert one.jpeg() == again.jpeg() != other.jpeg()
    assert one.values == again.values


@pytest.mark.parametrize("draw", OTHERS)
def test_every_value_of_another_generator_has_its_place(draw: Callable[..., Drawn]) -> None:
    for seed in range(2):
        drawn = draw(random.Random(f"{seed}"))  # noqa: S311 - plates of a test
        height, width = drawn.pixels.shape[:2]
        assert drawn.places.keys() == drawn.values.keys()
        for left, top, right, bottom in drawn.places.values():
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


@pytest.mark.parametrize("language", _second_plates.LANGUAGES)
def test_every_maker_and_every_field_of_the_second_generator_appears(language: str) -> None:
    told = [second(seed, language) for seed in range(150)]
    makers = {maker[0] for maker in _second_plates.WORDS[language]["makers"]}
    assert {values["fabricante"].value for values in told} == makers
    assert len(makers) >= 4
    assert {name for values in told for name in values} == set(FIELDS)
    assert {name for name in FIELDS if all(name in values for values in told)} == ALWAYS


@pytest.mark.parametrize("language", _second_plates.LANGUAGES)
def test_a_label_of_the_second_generator_is_what_its_plate_says(language: str) -> None:
    for seed in range(150):
        for name, value in second(seed, language).items():
            assert read_second(name, value.printed, language) == value.value, (seed, name, value)


def test_plates_of_the_second_generator_are_most_in_portuguese() -> None:
    told = [_second_plates.language_of(seed) for seed in range(11000, 11045)]
    assert 0.75 <= told.count("Portuguese") / len(told) <= 0.8
    assert set(told) == set(_second_plates.LANGUAGES)


@pytest.mark.parametrize("language", _third_plates.LANGUAGES)
def test_every_maker_and_every_field_of_the_third_generator_appears(language: str) -> None:
    told = [third(seed, language) for seed in range(150)]
    makers = {maker[0] for maker in _third_plates.WORDS[language]["makers"]}
    assert {values["fabricante"].value for values in told} == makers
    assert {name for values in told for name in values} == set(FIELDS)
    assert {name for name in FIELDS if all(name in values for values in told)} == ALWAYS


@pytest.mark.parametrize("language", _third_plates.LANGUAGES)
def test_a_label_of_the_third_generator_is_what_its_plate_says(language: str) -> None:
    for seed in range(150):
        for name, value in third(seed, language).items():
            assert read_third(name, value.printed, language) == value.value, (seed, name, value)


def test_plates_of_the_third_generator_are_three_fifths_in_portuguese() -> None:
    told = [_third_plates.language_of(seed) for seed in range(45)]
    assert [told.count(language) for language in _third_plates.LANGUAGES] == [27, 9, 9]
