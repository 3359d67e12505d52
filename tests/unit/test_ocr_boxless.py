"""Lines of a vision server have no boxes: what stands behind a foreign mark is that label's."""

from __future__ import annotations

from ocr_pipeline.filters import classify
from ocr_pipeline.stages import Line, LineClass, PoleIdContext


def test_without_boxes_a_meters_number_is_no_nameplates() -> None:
    texts = ("WEG", "POTÊNCIA: 75 kVA", "Nº DE SÉRIE:", "MEDIDOR ELETRÔNICO kWh", "87654321", "FASES: 3", "9")
    kinds = [line.kind for line in classify([Line(text) for text in texts], PoleIdContext.NAMEPLATE)]
    own, meter = LineClass.NAMEPLATE, LineClass.METER
    assert kinds == [own, own, own, meter, meter, own, own]
