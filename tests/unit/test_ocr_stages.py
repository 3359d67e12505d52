"""The stages around the text: detector, crops, model servers and their answers, settings, the verifier."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ocr_pipeline import build, filters, gpu, grounding, settings, templates
from ocr_pipeline.audit import PlateAuditor
from ocr_pipeline.detect import GREY, densest, letterbox, plates_of
from ocr_pipeline.errors import BackendError, DeadlineError, GpuHangError, ImageRefusedError, SettingsError
from ocr_pipeline.geometry import Box
from ocr_pipeline.images import Photo, Pixels
from ocr_pipeline.parser import Parser
from ocr_pipeline.pipeline import Pipeline, alone, choose, context_of, cut_off, shrunk
from ocr_pipeline.rapid import Recognised, agreed, patches, sides_touched
from ocr_pipeline.reading import FIELDS
from ocr_pipeline.servers import ServerReasoner, ServerVision, parsed
from ocr_pipeline.settings import ReasoningSettings, VisionSettings
from ocr_pipeline.stages import Deadline, Line, Plate, PlateClass, PoleIdContext, Seen

from scripts import verify_ocr
from tests.unit.test_ocr_images import encoded

IDENTIFICATION, TRANSFORMER = PlateClass.IDENTIFICATION, PlateClass.TRANSFORMER
NAMES = {0: "poste", 4: "placa_identificacao", 6: "placa_transformador"}
PIXELS = np.zeros((40, 60, 3), np.uint8)


class Sees:
    """A detector with one answer."""

    def __init__(self, *plates: Plate) -> None:
        self.plates = list(plates)

    def detect(self, pixels: Pixels, deadline: Deadline) -> list[Plate]:
        return self.plates


class Reads:
    """A vision stage with one answer."""

    def __init__(self, *texts: str) -> None:
        self.lines = tuple(
            Line(
                text, Box(10, 10 + 40 * row, 10 + 12 * len(text), 36 + 40 * row), 1.0, 1.0, (1.0,) * len(text)
            )
            for row, text in enumerate(texts)
        )
        self.crop: Pixels | None = None

    def read(self, pixels: Pixels, deadline: Deadline) -> Seen:
        self.crop = pixels
        return Seen(self.lines)


def pipeline(vision: Reads, *plates: Plate) -> Pipeline:
    return Pipeline([Sees(*plates)], vision, Parser(templates.load()), PlateAuditor())


def row(x: float, y: float, wide: float, high: float, **scores: float) -> list[float]:
    return [
        x,
        y,
        wide,
        high,
        scores.get("pole", 0.0),
        0,
        0,
        0,
        scores.get("four", 0.0),
        0,
        scores.get("six", 0.0),
    ]


def output(*rows: list[float]) -> np.ndarray:
    filler = [[0.0] * 11] * (20 - len(rows))
    return np.array([*rows, *filler], np.float32).T[None]


def test_classes_are_found_by_name_with_a_customers_numbers() -> None:
    given = output(
        row(50, 50, 40, 20, four=0.9), row(150, 50, 20, 10, six=0.8), row(250, 50, 30, 90, pole=0.99)
    )
    plates = plates_of(given, NAMES, 0.35, 1.0, 0, 0, 400, 100)
    assert [(plate.kind, round(plate.score, 2)) for plate in plates] == [
        (IDENTIFICATION, 0.9),
        (TRANSFORMER, 0.8),
    ]
    assert plates[0].box == Box(30, 40, 70, 60)


def test_boxes_go_back_through_the_letterbox_and_stay_in_the_photo() -> None:
    given = output(row(320, 320, 640, 640, four=0.9))
    (plate,) = plates_of(given, NAMES, 0.35, 0.5, 0, 80, 1280, 960)
    assert plate.box == Box(0, 0, 1280, 960)
    square, factor, left, top = letterbox(np.zeros((960, 1280, 3), np.uint8), 640)
    assert (square.shape, factor, left, top) == ((640, 640, 3), 0.5, 0.0, 80.0)


def test_of_boxes_on_one_another_the_surer_one_stays_and_nonsense_goes() -> None:
    nan = float("nan")
    given = output(
        row(50, 50, 40, 20, four=0.9), row(51, 50, 40, 20, four=0.8), row(nan, 50, 40, 20, four=0.95)
    )
    assert len(plates_of(given, NAMES, 0.35, 1.0, 0, 0, 400, 100)) == 1


def test_a_nameplate_is_read_before_a_utilitys_plate() -> None:
    small = Plate(IDENTIFICATION, Box(0, 0, 10, 10), 0.5)
    large = Plate(TRANSFORMER, Box(0, 0, 90, 90), 0.9)
    assert choose([large, small]) is small
    assert choose([]) is None
    assert context_of(small) is PoleIdContext.NAMEPLATE
    assert context_of(large) is PoleIdContext.TRANSFORMER_PLATE
    assert context_of(None) is PoleIdContext.UNKNOWN


def test_a_cluster_of_text_is_a_plate_and_a_few_words_are_none() -> None:
    rows = [Box(10, 10 + 20 * at, 110, 24 + 20 * at) for at in range(6)]
    assert densest([*rows, Box(900, 900, 950, 910)]) == Box(10, 10, 110, 124)
    assert densest(rows[:3]) is None


def test_the_crop_has_ten_percent_around_the_plate() -> None:
    vision = Reads("WEG")
    pipeline(vision, Plate(IDENTIFICATION, Box(100, 100, 300, 200), 0.9)).read(encoded(size=(600, 400)))
    assert vision.crop is not None
    assert vision.crop.shape == (120, 240, 3)


def test_a_photo_without_a_plate_is_read_whole_at_1600_pixels_and_marked() -> None:
    vision = Reads("WEG POTÊNCIA 75 kVA")
    reading = pipeline(vision).read(encoded(size=(3200, 2400)))
    assert vision.crop is not None
    assert vision.crop.shape == (1200, 1600, 3)
    assert "no_plate_found" in reading.reasons
    assert reading.needs_review


def test_a_manufacturer_without_a_nameplate_is_for_a_person() -> None:
    plate = Plate(TRANSFORMER, Box(50, 50, 550, 350), 0.9)
    reading = pipeline(Reads("WEG", "POTÊNCIA 75 kVA"), plate).read(encoded(size=(600, 400)))
    assert "manufacturer_without_identification_plate" in reading.reasons


def test_a_plate_at_the_edge_and_a_second_one_are_told() -> None:
    cut, other = (
        Plate(IDENTIFICATION, Box(0, 50, 300, 250), 0.9),
        Plate(IDENTIFICATION, Box(310, 50, 590, 250), 0.9),
    )
    reasons = pipeline(Reads("WEG"), cut, other).read(encoded(size=(600, 400))).reasons
    assert {"partial_plate", "several_plates"} <= set(reasons)


@pytest.mark.parametrize(
    ("plates", "told"),
    [
        ([Plate(IDENTIFICATION, Box(50, 50, 550, 350), 0.9)], ("no_text_found",)),
        ([Plate(None, Box(50, 50, 550, 350), 0.9)], ("no_plate_found", "no_text_found")),  # a cluster of text
        ([], ("no_plate_found", "no_text_found")),
    ],
)
def test_a_photo_of_which_nothing_is_read_is_for_a_person(plates: list[Plate], told: tuple[str, ...]) -> None:
    reading = pipeline(Reads(), *plates).read(encoded(size=(600, 400)))
    assert (reading.needs_review, reading.reasons) == (True, told)
    assert set(reading.fields.values()) == {None}


@pytest.mark.parametrize(
    "beside",
    [Plate(TRANSFORMER, Box(310, 50, 590, 250), 0.9), Plate(IDENTIFICATION, Box(400, 50, 500, 150), 0.9)],
)
def test_a_utilitys_plate_and_a_small_one_in_the_background_are_no_second_one(beside: Plate) -> None:
    plate = Plate(IDENTIFICATION, Box(50, 50, 300, 250), 0.9)
    assert pipeline(Reads("WEG"), plate, beside).read(encoded(size=(600, 400))).reasons == ()


@pytest.mark.parametrize(("touched", "told"), [((True, False, False, False), True), ((False,) * 4, False)])
def test_a_plate_at_the_edge_is_whole_where_its_text_ends_before(
    touched: tuple[bool, bool, bool, bool], told: bool
) -> None:
    photo = Photo(np.zeros((400, 600, 3), np.uint8), "JPEG")
    assert cut_off(Box(1, 50, 300, 250), photo, Seen((), touched=touched)) is told
    assert not cut_off(Box(100, 50, 300, 250), photo, Seen((), touched=(True,) * 4))


@pytest.mark.parametrize("side", range(4))
def test_a_plate_may_be_cut_off_at_each_side_of_the_photo(side: int) -> None:
    photo = Photo(np.zeros((400, 600, 3), np.uint8), "JPEG")
    within = Box(10, 10, 590, 390)
    name, at_edge = (("left", 1), ("top", 1), ("right", 599), ("bottom", 399))[side]
    box = replace(within, **{name: at_edge})
    for touched in range(4):
        seen = Seen((), touched=(touched == 0, touched == 1, touched == 2, touched == 3))
        assert cut_off(box, photo, seen) is (touched == side)
    assert cut_off(box, photo, Seen(()))
    assert not cut_off(within, photo, Seen(()))


def test_text_at_the_side_of_the_crop_is_noticed_whichever_way_it_runs() -> None:
    level = np.array([[[1, 50], [90, 50], [90, 70], [1, 70]]], np.float32)
    upright = np.array([[[50, 1], [70, 1], [70, 90], [50, 90]]], np.float32)
    assert sides_touched(level, 200, 200) == (True, False, False, False)
    assert sides_touched(upright, 200, 200) == (False, True, False, False)


@pytest.mark.parametrize("ground", [30, 200])
@pytest.mark.parametrize(
    ("patch", "seen"),
    [
        (None, (False, False)),
        ((40, 60), (True, False)),  # reaches the line's beginning
        ((140, 160), (False, True)),
        ((20, 45), (False, False)),  # ends a way before it
        ((0, 200), (True, True)),
    ],
)
def test_a_patch_that_may_cover_more_of_a_line_is_noticed(
    ground: int, patch: tuple[int, int] | None, seen: tuple[bool, bool]
) -> None:
    """Glare on a dark plate, dirt on a light one; letters of the other brightness from 60 to 140."""
    ink = 230 - ground
    picture = np.full((60, 200, 3), ground, np.uint8)
    picture[10:50] += np.arange(200, dtype=np.uint8)[None, :, None] // 10  # light that changes over the plate
    if patch:
        picture[10:50, patch[0] : patch[1]] = ink
    picture[20:40, 60:140] = ground
    for left in range(62, 138, 10):
        picture[22:38, left : left + 4] = ink
    assert patches(picture, Box(60, 20, 140, 40)) == seen


def test_another_plate_in_the_crop_is_painted_over() -> None:
    pixels = np.full((100, 100, 3), 255, np.uint8)
    chosen = Plate(IDENTIFICATION, Box(20, 40, 80, 90), 0.9)
    beside, on_it = Plate(TRANSFORMER, Box(30, 10, 60, 45), 0.5), Plate(TRANSFORMER, Box(40, 50, 60, 70), 0.5)
    shown = alone(pixels, Box(10, 5, 90, 95), chosen, [chosen, beside, on_it])
    assert (shown[5:30, 20:50] == GREY).all()
    assert (shown[35:, 10:70] == 255).all(), "what is on the plate itself stays"
    assert (pixels == 255).all()


def test_a_nameplate_is_no_utility_s_plate() -> None:
    """It has a power as well, and would count for a bank."""
    few, many = (
        ("112,5 kVA", "PATRIMÔNIO 123456"),
        ("POTÊNCIA: 75 kVA", "TENSÃO PRIMÁRIA", "FASES", "Nº SÉRIE"),
    )
    assert filters.utility_plate([Line(text) for text in few])
    assert not filters.utility_plate([Line(text) for text in many])


@pytest.mark.parametrize(("text", "counts"), [("112,5 kVA", True), ("MEDIDOR kWh", False), ("", False)])
def test_a_utilitys_plate_counts_for_a_bank_where_it_can_be_read(text: str, counts: bool) -> None:
    plates = (
        Plate(IDENTIFICATION, Box(50, 50, 350, 350), 0.9),
        Plate(TRANSFORMER, Box(400, 50, 550, 120), 0.5),
    )
    made = pipeline(Reads("WEG", "POTÊNCIA: 75 kVA"), *plates)
    found = made.inspect(encoded(size=(600, 400)))
    assert found.tags == ("placa_identificacao", "placa_transformador")
    made.vision = Reads(*[text] if text else [])
    assert ("placa_transformador" in made.confirmed_tags(found)) is counts


@pytest.mark.parametrize(("text", "counts"), [("112,5 kVA", True), ("MEDIDOR kWh", False), ("", False)])
def test_a_utilitys_plate_that_was_chosen_counts_by_what_was_read_then(text: str, counts: bool) -> None:
    made = pipeline(Reads(*[text] if text else []), Plate(TRANSFORMER, Box(50, 50, 550, 350), 0.9))
    found = made.inspect(encoded(size=(600, 400)))
    made.vision = Reads("" if counts else "75 kVA")  # a second reading would say the contrary
    assert made.confirmed_tags(found) == (("placa_transformador",) if counts else ())


def reading(text: str, sure: float) -> Recognised:
    return Recognised(text, (sure,) * len(text))


def test_readings_that_agree_make_each_other_surer() -> None:
    best, second = agreed([reading("8K", 0.7), reading("8 K", 0.95)])
    assert (best.text, best.weakest, second) == ("8 K", 0.95, "")


def test_the_surest_of_readings_that_differ_is_doubtful_all_the_same() -> None:
    best, second = agreed([reading("123", 0.8), reading("128", 0.9)])
    assert (best.text, best.weakest, second) == ("128", 0.75, "123")
    best, _ = agreed([reading("123", 0.8), reading("128", 0.99)])
    assert best.weakest == 0.99


def test_a_good_plate_needs_no_review_and_explains_itself() -> None:
    plate = Plate(IDENTIFICATION, Box(50, 50, 550, 350), 0.9)
    found = pipeline(Reads("WEG", "POTÊNCIA: 75 kVA", "Nº DE SÉRIE: 123456"), plate).inspect(
        encoded(size=(600, 400))
    )
    assert not found.reading.needs_review
    assert found.sources == {"fabricante": 0, "potencia_kva": 1, "numero_serie": 2}
    assert found.tags == ("placa_identificacao",)
    assert found.crop_jpeg()[:3] == b"\xff\xd8\xff"


def test_the_poles_text_leaves_the_meter_out() -> None:
    text = pipeline(Reads("POSTE 1234", "11/600 daN", "", "", "", "MEDIDOR kWh", "Nº 87654321")).text(
        encoded()
    )
    assert text.text.splitlines()[:2] == ["POSTE 1234", "11/600 daN"]
    assert "87654321" not in text.text


def test_what_is_no_photo_does_not_reach_a_stage() -> None:
    vision = Reads("WEG")
    with pytest.raises(ImageRefusedError):
        pipeline(vision).read(b"hello")
    assert vision.crop is None


def test_time_that_is_up_is_told() -> None:
    with pytest.raises(DeadlineError, match="decode"):
        pipeline(Reads("WEG")).read(encoded(), deadline=Deadline(0.0))


def test_a_photo_that_is_small_enough_is_left_alone() -> None:
    assert shrunk(PIXELS, 100)[1] == 1.0
    assert shrunk(PIXELS, 30)[0].shape == (20, 30, 3)


# --- model servers ---


def replies(body: Any, status: int = 200) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body).encode())

    return httpx.MockTransport(answer)


def chat(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def reasoner(transport: httpx.BaseTransport, backend: str = "openai") -> ServerReasoner:
    chosen = ReasoningSettings.model_validate({"backend": backend})
    return ServerReasoner(chosen, templates.load(), transport=transport)


def extracted(text: str, *lines: str) -> tuple[dict[str, Any], list[str]]:
    found = reasoner(replies(chat(text))).extract(
        [Line(line) for line in lines], PoleIdContext.NAMEPLATE, Deadline(60)
    )
    return {name: candidate.value for name, candidate in found.candidates.items()}, found.reasons


def test_vision_sends_a_picture_and_takes_lines() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=chat("WEG\n\n POT 75 kVA \n"))

    seen = ServerVision(VisionSettings(), transport=httpx.MockTransport(answer)).read(PIXELS, Deadline(60))
    assert [line.text for line in seen.lines] == ["WEG", "POT 75 kVA"]
    assert asked[0]["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert asked[0]["max_tokens"] == VisionSettings().max_tokens
    assert asked[0]["temperature"] == 0, "a sampled transcription has other digits each time"


def test_a_line_that_the_vision_server_could_not_end_is_no_line() -> None:
    """Half a number would be another number."""
    cut = {"choices": [{"message": {"content": "WEG\n13800/132"}, "finish_reason": "length"}]}
    seen = ServerVision(VisionSettings(), transport=replies(cut)).read(PIXELS, Deadline(60))
    assert [line.text for line in seen.lines] == ["WEG"]


def test_the_reasoning_model_gets_text_as_data_and_a_schema() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={"message": {"content": '{"potencia_kva": 75}'}})

    found = reasoner(httpx.MockTransport(answer), "ollama").extract(
        [Line('say "x"')], PoleIdContext.NAMEPLATE, Deadline(9)
    )
    assert found.candidates["potencia_kva"].value == 75
    assert asked[0]["messages"][1]["content"] == '["say \\"x\\""]'
    assert set(asked[0]["format"]["properties"]) >= {"potencia_kva", "matricula"}
    assert asked[0]["options"] == {"num_predict": ReasoningSettings().max_tokens, "temperature": 0}


def test_an_openai_compatible_server_is_held_to_the_schema_too() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=chat("{}"))

    reasoner(httpx.MockTransport(answer)).extract([Line("x")], PoleIdContext.NAMEPLATE, Deadline(9))
    held = asked[0]["response_format"]["json_schema"]
    assert set(held["schema"]["properties"]) == set(FIELDS) and held["strict"]
    assert asked[0]["temperature"] == 0


def test_a_models_values_take_the_fields_own_form() -> None:
    values, reasons = extracted(
        '{"potencia_kva": "112,5 kVA", "fabricante": "Romagnole", "data_fabricacao": "03/2015", '
        '"autoprotegido": true, "fases": true, "patrimonio": ["x"], "colour": "red"}',
        "112,5 kVA",
    )
    assert values == {
        "potencia_kva": 112.5,
        "fabricante": "ROMAGNOLE",
        "data_fabricacao": "2015-03",
        "autoprotegido": True,
    }
    assert reasons == [
        f"filters_disagree:{name}" for name in ("fabricante", "data_fabricacao", "autoprotegido")
    ]


def test_what_the_plate_leaves_open_is_for_a_person_whatever_a_model_says() -> None:
    _, reasons = extracted('{"numero_serie": "123456"}', "SÉRIE: 123456", "SÉRIE: 654321", "POTÊNCIA: 75 kVA")
    assert "ambiguous:numero_serie" in reasons


def test_where_the_model_and_the_parser_differ_a_person_looks() -> None:
    _, reasons = extracted('{"potencia_kva": 45}', "POTÊNCIA: 75 kVA", "MASSA 45 kg")
    assert reasons == ["filters_disagree:potencia_kva"]


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("potencia_kva", 150, "MASSA 150 KG"),
        ("numero_serie", "5440", "NBR 5440"),
        ("autoprotegido", True, "GRAU DE PROTEÇÃO IP54"),
        ("fabricante", "COM", "TRANSFORMADOR COM ÓLEO"),
        ("tensao_secundaria", "230", "VOLUME DO ÓLEO 230 L"),
        ("tensao_primaria", 13800, "MASSA 13800"),
    ],
)
def test_what_only_the_model_takes_for_a_field_is_for_a_person(name: str, given: Any, text: str) -> None:
    lines = [Line("TRANSFORMADOR"), Line(text, confidence=0.97)]
    found = reasoner(replies(chat(json.dumps({name: given})))).extract(
        lines, PoleIdContext.NAMEPLATE, Deadline(60)
    )
    _, reasons = grounding.settle(found, lines)
    assert f"filters_disagree:{name}" in reasons
    assert found.candidates[name].confidence == 0.97


def test_a_models_value_without_a_line_is_not_sure() -> None:
    lines = [Line("TRANSFORMADOR WEG"), Line("Nº DE SÉRIE 51934"), Line("Nº DE TAPS 984512")]
    given = {"data_fabricacao": "2019-07-23", "potencia_kva": 45}
    found = reasoner(replies(chat(json.dumps(given)))).extract(lines, PoleIdContext.NAMEPLATE, Deadline(60))
    values, reasons = grounding.settle(found, lines)
    assert {name: values[name] for name in given} == dict.fromkeys(given)
    assert {f"not_grounded:{name}" for name in given} <= {*reasons}
    assert all(candidate.confidence < 0.7 for candidate in found.candidates.values())


def test_a_misread_name_that_the_model_corrects_has_its_line() -> None:
    lines = [Line("R0MAGNOLE PRODUTOS", confidence=0.9)]
    given = '{"fabricante": "Romagnole"}'
    found = reasoner(replies(chat(given))).extract(lines, PoleIdContext.NAMEPLATE, Deadline(60))
    values, reasons = grounding.settle(found, lines)
    assert (values["fabricante"], reasons) == ("ROMAGNOLE", [])
    assert (found.candidates["fabricante"].line, found.candidates["fabricante"].confidence) == (0, 0.9)


@pytest.mark.parametrize("text", ["I cannot read that.", "[1, 2]", "{broken", "", '{"a": ' * 5000])
def test_an_answer_that_is_no_object_is_told_and_fills_nothing(text: str) -> None:
    values, reasons = extracted(text, "SÉRIE")
    assert (values, reasons) == ({}, ["model_output_invalid"])


def test_an_object_in_a_code_fence_is_read() -> None:
    assert parsed('Here:\n```json\n{"fases": 3}\n```') == {"fases": 3}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 500),
        (b"<html>", 200),
        ([], 200),
        ({"choices": []}, 200),
        (b"x" * 300_000, 200),
        ({**chat("{}"), "more": "x" * 300_000}, 200),  # whole, and more than anybody wants to hold
        (chat("{}"), 404),
    ],
)
def test_a_server_that_breaks_its_protocol_is_one_line(body: Any, status: int) -> None:
    with pytest.raises(BackendError) as caught:
        reasoner(replies(body, status)).extract([Line("x")], PoleIdContext.NAMEPLATE, Deadline(60))
    assert caught.value.http_status == 503
    assert "\n" not in str(caught.value)


def test_a_server_that_drips_has_its_time_and_no_more() -> None:
    """Every byte comes in time for the client's own limit, the answer as a whole never would."""

    class Drips(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for piece in json.dumps(chat("{}")).encode().split(b" "):
                time.sleep(0.1)
                yield piece + b" "

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Drips()))
    with pytest.raises(DeadlineError, match="still answers"):
        reasoner(transport).extract([Line("x")], PoleIdContext.NAMEPLATE, Deadline(0.3))


def late(health: Callable[[], httpx.Response]) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return health()
        raise httpx.ReadTimeout("late")

    return httpx.MockTransport(answer)


def test_a_server_that_is_only_slow_is_no_hang() -> None:
    with pytest.raises(DeadlineError):
        reasoner(late(lambda: httpx.Response(200))).extract(
            [Line("x")], PoleIdContext.NAMEPLATE, Deadline(60)
        )


def test_a_server_that_does_not_answer_any_more_is_a_hang() -> None:
    def silent() -> httpx.Response:
        raise httpx.ConnectTimeout("silent")

    with pytest.raises(GpuHangError) as caught:
        reasoner(late(silent)).extract([Line("x")], PoleIdContext.NAMEPLATE, Deadline(60))
    assert (caught.value.http_status, caught.value.retry_after_s) == (503, 60.0)


def test_the_gpu_is_one_photos_at_a_time(tmp_path: Path) -> None:
    lock = str(tmp_path / "gpu")
    with gpu.turn(lock, Deadline(1)), pytest.raises(gpu.GpuBusyError), gpu.turn(lock, Deadline(0.0)):
        pass
    with gpu.turn(lock, Deadline(1)):
        pass


# --- settings ---


def test_without_settings_everything_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    chosen = settings.load()
    assert (chosen.vision.backend, chosen.reasoning.backend, chosen.detector.backend) == (
        "rapidocr",
        "parser",
        "onnx",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vision: {backend: magic}", "vision.backend"),
        ("colour: red", "colour"),
        ("reasoning: {url: 'ftp://x'}", "reasoning.url"),
        ("gpu_lock: here", "absolute"),
        ("[", "neither YAML nor JSON"),
    ],
)
def test_settings_name_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "ocr.yml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings.load(str(path))
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_weights_that_are_not_there_are_told() -> None:
    chosen = settings.Settings.model_validate({"detector": {"weights": "/nowhere/x.onnx"}})
    with pytest.raises(SettingsError, match=r"detector\.weights"):
        build.pipeline(chosen)


# --- the verifier ---


def photo(**fields: Any) -> verify_ocr.Labelled:
    return verify_ocr.Labelled("a.jpg", "1", "easy", fields, frozenset({"elo_fusivel"}))


def test_each_field_is_counted_once() -> None:
    answer = {
        "potencia_kva": 75.0,
        "fases": 1,
        "matricula": "1234",
        "elo_fusivel": "6K",
        "_needs_review": False,
    }
    outcome = verify_ocr.judge(
        photo(potencia_kva=75, fases=3, numero_serie="123", elo_fusivel="5H"), answer, 0.1
    )
    assert (outcome.right, outcome.wrong, outcome.missed) == (["potencia_kva"], ["fases"], ["numero_serie"])
    assert (outcome.invented, outcome.guessed, outcome.silent) == (["matricula"], ["elo_fusivel"], 3)


def test_what_was_marked_for_review_is_not_silent() -> None:
    answer = {"fases": 1, "_needs_review": True}
    assert verify_ocr.judge(photo(fases=3), answer, 0.1).silent == 0


def test_the_bars_are_held_against_each_difficulty() -> None:
    good = verify_ocr.judge(photo(fases=3), {"fases": 3}, 0.1)
    bad = verify_ocr.judge(photo(fases=3), {"fases": 1}, 0.1)
    assert verify_ocr.missed_bars(verify_ocr.report([good])) == []
    told = verify_ocr.missed_bars(verify_ocr.report([good, bad]))
    assert [line.split(":")[0] for line in told] == [
        "easy",
        "the folder",
        "1 silent errors in 2 printed fields, bar 0.5%",
    ]


def test_labels_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(verify_ocr.CannotRunError, match=r"labels\.json"):
        verify_ocr.labels(tmp_path)
    (tmp_path / "labels.json").write_text('{"photos": [{"file": "a.jpg", "fields": {"colour": "red"}}]}')
    with pytest.raises(verify_ocr.CannotRunError, match="colour"):
        verify_ocr.labels(tmp_path)
