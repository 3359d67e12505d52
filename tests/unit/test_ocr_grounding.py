"""A number is a whole word of the text, and a place of the text belongs to one number."""

from __future__ import annotations

from typing import Any

import pytest
from ocr_pipeline import grounding
from ocr_pipeline.stages import Candidate, Extraction, Line


@pytest.mark.parametrize(
    ("code", "text", "there"),
    [
        ("12345", "Nº DE SÉRIE: 12345", True),
        ("12345", "Nº DE SÉRIE: 123456", False),
        ("23456", "Nº DE SÉRIE: 123456", False),
        ("12345", "SÉRIE 12345-6", False),
        ("12345", "SÉRIE A12345", False),
        ("26805", "MATRÍCULA TR-26805", False),
        ("22922/14", "SÉRIE 22922/14", True),
        ("22922", "SÉRIE 22922/14", False),
        ("1234567", "PATRIMÔNIO 12 345 67", True),  # the engine split it
        ("AB-123", "SERIE AB 123", True),
        ("617032", "SÉRIE617032", True),  # the engine left the space out
        ("736944", "Nº FAB.:736944", True),
        ("123456", "No.123456", True),
        ("N778427088", "N. SÉRIE: N778427088", True),
    ],
)
def test_a_code_is_grounded_by_a_whole_word(code: str, text: str, there: bool) -> None:
    assert grounding.grounded("numero_serie", code, [Line(text)]) is there


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("elo_fusivel", "8K", "ELO FUSÍVEL8K"),
        ("tensao_secundaria", "220/127", "SECUNDÁRIO220/127V"),
        ("autoprotegido", True, "AUTOPR0TEGIDO: SIM"),
    ],
)
def test_a_value_that_is_glued_to_its_label_is_grounded(name: str, value: Any, text: str) -> None:
    assert grounding.grounded(name, value, [Line(text)])


@pytest.mark.parametrize(
    ("name", "text", "beside", "marked"),
    [
        ("matricula", "77280-8", (True, False), True),
        ("matricula", "77280-8", (False, True), True),
        ("matricula", "77280-8", (False, False), False),
        ("matricula", "MATR. 77280-8", (True, False), False),  # before the label
        ("matricula", "MATR. 77280-8", (False, True), True),
        ("matricula", "77280-8 CEMIG", (False, True), False),
        ("tensao_primaria", "13800", (True, True), False),
    ],
)
def test_a_code_that_may_go_on_below_a_patch_is_for_a_person(
    name: str, text: str, beside: tuple[bool, bool], marked: bool
) -> None:
    value = 13800.0 if name == "tensao_primaria" else "77280-8"
    found = Extraction({name: Candidate(value, text.strip("MATR. CEIG"), 0)})
    values, reasons = grounding.settle(found, [Line(text, beside=beside)])
    assert values[name] == value
    assert reasons == ([f"low_confidence:{name}"] if marked else [])


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (["Nº DE SÉRIE: 123456"], ["numero_serie", "patrimonio"]),
        (["Nº DE SÉRIE: 123456", "PATRIMÔNIO: 123456"], []),
        (["Nº DE SÉRIE: 123456   PATRIMÔNIO: 123456"], []),
    ],
)
def test_two_numbers_from_one_place_are_for_a_person(texts: list[str], shared: list[str]) -> None:
    both = Extraction({name: Candidate("123456") for name in ("numero_serie", "patrimonio")})
    values, reasons = grounding.settle(both, [Line(text) for text in texts])
    assert values["numero_serie"] == values["patrimonio"] == "123456"
    assert reasons == [f"shared_source:{name}" for name in shared]


@pytest.mark.parametrize(
    ("name", "value", "sure", "told"),
    [
        ("elo_fusivel", "5H", 0.84, ["low_confidence"]),
        ("elo_fusivel", "5H", 0.86, []),
        ("numero_serie", "123456", 0.89, ["low_confidence"]),
        ("numero_serie", "123456", 0.91, []),
        ("potencia_kva", 75.0, 0.69, ["low_confidence"]),
        ("potencia_kva", 75.0, 0.71, []),
        ("potencia_kva", 76.0, 0.84, ["out_of_domain", "low_confidence"]),  # no rated one
        ("potencia_kva", 76.0, 0.86, ["out_of_domain"]),
    ],
)
def test_how_sure_a_value_must_be(name: str, value: Any, sure: float, told: list[str]) -> None:
    values, reasons = grounding.settle(
        Extraction({name: Candidate(value, confidence=sure)}), [Line("5H"), Line("123456"), Line("75 76 kVA")]
    )
    assert values[name] == value
    assert reasons == [f"{reason}:{name}" for reason in told]


def test_values_that_contradict_each_other_mark_the_reading() -> None:
    found = Extraction({"fases": Candidate(1), "tensao_secundaria": Candidate("220/127")})
    values, reasons = grounding.settle(found, [Line("FASES: 1"), Line("220/127 V")])
    assert (values["fases"], values["tensao_secundaria"]) == (1, "220/127")
    assert reasons == ["inconsistent:fases"]


@pytest.mark.parametrize(
    ("name", "value", "text", "there"),
    [
        ("potencia_kva", 45.0, "Nº DE SÉRIE 984512", False),
        ("potencia_kva", 45.0, "SÉRIE TR-45", False),
        ("potencia_kva", 10.0, "PRIMÁRIO", False),  # IO is no misread 10 within a word
        ("potencia_kva", 112.0, "TIPO 112,5X", False),
        ("potencia_kva", 75.0, "AT 13800 V 75kVA", True),
        ("potencia_kva", 75.0, "POT.75 kVA", True),
        ("tensao_primaria", 13800.0, "SÉRIE TR-13800", False),
        ("tensao_primaria", 13800.0, "SÉRIE A13800B", False),
        ("tensao_primaria", 13800.0, "13800/13200-380/220 V", True),
        ("tensao_primaria", 34500.0, "PRIMÁRIO (kV) 34,5", True),
        ("tensao_secundaria", "220", "TIPO A220B", False),
        ("tensao_secundaria", "110", "ILO DE ÓLEO", False),
        ("tensao_secundaria", "220/127", "13800 V - 220Y/127 V", True),
        ("data_fabricacao", "2019-07-23", "Nº DE SÉRIE 51934", False),
        ("data_fabricacao", "2019-07", "SÉRIE 5193-07/19", False),
        ("data_fabricacao", "2015-03-09", "FAB.09/03/2015", True),
        ("data_fabricacao", "2015-03", "DATA: 03 / 2015", True),
        ("data_fabricacao", "2019-03-12", "12 DE MARÇO DE 2019", True),
        ("data_fabricacao", "2019", "SÉRIE 51934 ANO 2019", True),
        ("fabricante", "COM", "COMUM", False),
        ("fabricante", "WEG", "WEG EQUIPAMENTOS", True),
    ],
)
def test_what_only_a_model_gives_is_grounded_by_whole_words_of_a_line(
    name: str, value: Any, text: str, there: bool
) -> None:
    assert grounding.grounded(name, value, [Line("IMPEDÂNCIA"), Line(text)]) is there


@pytest.mark.parametrize(
    ("name", "value", "raw"),
    [
        ("data_fabricacao", "2019-07-23", "2019-07-23"),
        ("potencia_kva", 45.0, "45"),
        ("fabricante", "ABB", "51934"),
    ],
)
@pytest.mark.parametrize("line", [None, 1])
def test_a_candidates_own_words_are_no_text_of_the_plate(
    name: str, value: Any, raw: str, line: int | None
) -> None:
    lines = [Line("Nº DE SÉRIE 51934 984512 193"), Line("13800 V")]
    values, reasons = grounding.settle(Extraction({name: Candidate(value, raw, line)}), lines)
    assert (values[name], reasons) == (None, [f"not_grounded:{name}"])
