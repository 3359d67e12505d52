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
from ocr_pipeline.errors import SettingsError
from ocr_pipeline.rapid import session
from ocr_pipeline.settings import DetectorSettings
from ocr_pipeline.stages import Deadline, PlateClass

from tests.ocr import onnx_file

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


# --- a customer's export ---

SEVEN = dict(enumerate(("poste", "placa_identificacao", "x", "y", "z", "w", "placa_transformador")))
TWO = {0: "placa_identificacao", 1: "placa_transformador"}


def dense(classes: int, *, columns: bool = False) -> Any:
    """A dense output with one plate: the class `classes - 1`, in the middle of 64 pixels."""
    output = np.full((1, 4 + classes, 84), 0.001, np.float32)
    output[0, :4, 7] = [32, 32, 30, 20]
    output[0, -1, 7] = 0.9
    return output.transpose(0, 2, 1) if columns else output


def end_to_end(best: int) -> Any:
    output = np.zeros((1, 300, 6), np.float32)
    output[0, 0] = [10, 10, 60, 60, 0.9, best]
    output[0, 1] = [20, 20, 40, 40, 0.05, 1]
    return output


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("names", [SEVEN, TWO])
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), ("batch", 3, "height", "width")])
def test_an_export_is_read_in_either_layout(
    tmp_path: Path, names: dict[int, str], columns: bool, shape: tuple[int | str, ...]
) -> None:
    weights = onnx_file.write(
        tmp_path / "x.onnx", dense(len(names), columns=columns), names=names, shape=shape
    )
    found = OnnxDetector(weights, threads=1)
    (plate,) = found.detect(np.zeros((64, 64, 3), np.uint8), Deadline(60))
    assert plate.kind is PlateClass.TRANSFORMER
    assert plate.score == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("output", "more", "words"),
    [
        (end_to_end(6), {"names": SEVEN}, r"\[1, 300, 6\], boxes .* export it without nms"),
        (end_to_end(1), {"names": TWO}, r"\[1, 300, 6\], boxes .* export it without nms"),
        (dense(7), {"names": TWO}, r"\[1, 11, 84\], but 2 classes are named, which makes \[1, 6, N\]"),
        (dense(2), {"names": SEVEN}, r"\[1, 6, 84\], but 7 classes are named, which makes \[1, 11, N\]"),
        (dense(7)[0], {"names": SEVEN}, r"\[11, 84\], but 7"),
        (dense(2), {"names": TWO, "shape": (1, 3, 48, 64)}, "48 x 64 pixels; export it square"),
        (
            dense(2),
            {"names": TWO, "kind": onnx_file.FLOAT16},
            "tensor.float16., not float32; .* without half",
        ),
        (dense(2), {"names": TWO, "shape": (8, 3, 64, 64)}, "cannot read one picture: "),
        (dense(2), {"names": TWO, "shape": (1, 3)}, "not .1, 3, H, W."),
        (dense(2), {"names": {0: "plate", 1: "x"}}, "no class is called placa_identificacao or"),
        (dense(2), {}, "no class is called"),
    ],
)
def test_an_export_that_would_be_read_wrongly_is_refused_when_it_is_loaded(
    tmp_path: Path, output: Any, more: dict[str, Any], words: str
) -> None:
    weights = onnx_file.write(tmp_path / "x.onnx", output, **more)
    with pytest.raises(SettingsError, match=words) as told:
        OnnxDetector(weights, threads=1)
    assert str(told.value).startswith(f"detector.weights = {weights!r}: ")
    assert "\n" not in str(told.value)


def test_classes_of_the_settings_count_like_those_of_the_file(tmp_path: Path) -> None:
    weights = onnx_file.write(tmp_path / "x.onnx", dense(7), names=SEVEN)
    assert OnnxDetector(weights, list(SEVEN.values()), threads=1).names == SEVEN
    with pytest.raises(SettingsError, match="2 classes are named"):
        OnnxDetector(weights, list(TWO.values()), threads=1)
