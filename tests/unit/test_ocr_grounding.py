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
