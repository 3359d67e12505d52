"""The weights that this project ships: their layout and their recipe."""

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
from ocr_pipeline.rapid import session
from ocr_pipeline.settings import DetectorSettings
from ocr_pipeline.stages import PlateClass

DATA = Path(str(resources.files("ocr_pipeline") / "data"))
LIMIT_BYTES = 1_000_000


@pytest.fixture(scope="module")
def detector() -> Iterator[OnnxDetector]:
    yield OnnxDetector(threads=1)


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
    assert held_out["score"] == DetectorSettings().score, "figures of what the service takes for a plate"
    assert sum(held_out["found"].values()) >= 0.9 * sum(held_out["there"].values())


def test_it_is_the_first_detector_of_the_embedded_pipeline() -> None:
    first, *fallback = build.pipeline().detectors
    assert isinstance(first, OnnxDetector)
    assert fallback
