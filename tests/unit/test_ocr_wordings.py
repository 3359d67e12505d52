"""What plates by NBR, IEC and IEEE say in three languages, and how an OCR engine misreads it."""

from __future__ import annotations

from typing import Any

import pytest
from ocr_pipeline import normal, templates
from ocr_pipeline.grounding import settle
from ocr_pipeline.parser import Parser
from ocr_pipeline.stages import Deadline, Line, PoleIdContext

from tests.unit.test_ocr_fields import at, column, parsed

USUAL = ("MASSA TOTAL: 480 kg", "FREQUÊNCIA: 60 Hz", "ELO FUSÍVEL: 5H", "PCB: ISENTO")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("MÊS/ANO: ABR 2012", "data_fabricacao", "2012-04"),  # no misread `MÊS/ANO FABR`
        ("MFG. DATE: 18 JUL 1989", "data_fabricacao", "1989-07-18"),
        ("FECHA DE FABRICACIÓN: 12 DE MARZO DE 2019", "data_fabricacao", "2019-03-12"),
        ("DATE: MAR 12, 2019", "data_fabricacao", "2019-03-12"),
        ("DATA: N0V/2005", "data_fabricacao", "2005-11"),
        ("MÊS/ANO 07/I989", "data_fabricacao", "1989-07"),
        ("DATA DA REVISÃO: 03/2019", "data_fabricacao", None),
        ("RATING: 225", "potencia_kva", 225.0),
        ("POTÊNCIA I5O kVA", "potencia_kva", 150.0),
        ("TENSIÓN PRIMARIA 13.200 V ± 2 x 2,5 %", "tensao_primaria", 13200.0),
        ("TENSIÓN PRIMARIA 13800 2x2,5%", "tensao_primaria", 13800.0),
        ("TENSÃO AT: I3,8/I3,2 kV", "tensao_primaria", 13800.0),
        ("PRIMARY VOLTAGE: 34 500 V", "tensao_primaria", 34500.0),
        ("LADO DE BAIXA: 220/127 V", "tensao_secundaria", "220/127"),
        ("BT: 0,4 kV", "tensao_secundaria", "400"),
        ("SELF-PROTECTED THREE PHASE DISTRIBUTION TRANSFORMER", "autoprotegido", True),
        ("NON SELF-PROTECTED DISTRIBUTION TRANSFORMER", "autoprotegido", False),
        ("3~", "fases", 3),
        ("PROPERTY OF LIGHT", "patrimonio", None),
        ("CROMPTON GREAVES", "fabricante", "CROMPTON GREAVES"),
        ("TRANSFORMADOR DE REDE", "fabricante", None),  # no misread RHEDE
    ],
)
def test_a_wording_is_read(text: str, name: str, value: Any) -> None:
    usual = [line for line in USUAL if name != "elo_fusivel" or "ELO" not in line]
    values, reasons = parsed(*column(text, *usual, "Nº DE SÉRIE: 998877"))
    assert values[name] == value
    assert reasons == []


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("TENSIONES: 13,2 kV - 208/120 V", 13200.0, "208/120"),
        ("TENSÃO AT/ST: 34 500V-220/127V", 34500.0, "220/127"),  # `BT` was misread
        ("VOLTAGE RATING: 13,200 V - 220Y/127 V", 13200.0, "220/127"),
        ("13.800 V - 380/220 V", 13800.0, "380/220"),
    ],
)
def test_both_voltages_in_one_line(text: str, first: float, second: str) -> None:
    values, _ = parsed(*column(text, *USUAL))
    assert (values["tensao_primaria"], values["tensao_secundaria"]) == (first, second)


@pytest.mark.parametrize("text", ["Nº: 366129", "N° 366129", "NP: 366129", "N: 366129", "No. 366129"])
def test_a_number_sign_alone_is_the_serial_number_s(text: str) -> None:
    values, reasons = parsed(*column(text, *USUAL))
    assert values["numero_serie"] == "366129"
    assert reasons == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("Nº CIA 123456", "123456"), ("Nº DA CIA.: 123456", "123456"), ("N. CIA 123456", None)],
)
def test_a_utility_s_number_is_no_serial_number(text: str, value: str | None) -> None:
    values, reasons = parsed(*column(text, *USUAL))
    assert (values["numero_serie"], values["matricula"], reasons) == (None, value, [])


def test_a_number_sign_is_no_serial_number_below_another_label_or_beside_a_serial_number() -> None:
    for texts in (("PATRIMÔNIO", "Nº 445566"), ("Nº DE SÉRIE: 998877", "Nº 445566")):
        values, _ = parsed(*column(*USUAL, *texts))
        assert values["numero_serie"] in (None, "998877")


def test_a_number_sign_names_nothing_where_another_label_does_or_where_it_stands_twice() -> None:
    values, reasons = parsed(*column(*USUAL, "Nº DE SÉRIE: 998877", "Nº 445566"))
    assert values["numero_serie"] == "998877"
    assert "ambiguous:numero_serie" not in reasons
    assert parsed(*column(*USUAL, "Nº 445566", "Nº 778899"))[0]["numero_serie"] is None


def test_a_maker_in_no_template_signs_below_the_plate_and_is_for_a_person() -> None:
    values, reasons = parsed(*column(*USUAL, "Montanha Transformadores Ltda. - Itu - SP"))
    assert values["fabricante"] == "MONTANHA"
    assert reasons == ["unknown_manufacturer:fabricante"]


def test_a_unit_is_no_label_that_takes_the_value_below() -> None:
    lines = [
        at("ELEV. TEMP.", 0, 0),
        at("50/55 ºC", 400, 0),
        at("PATR.", 0, 60),
        at("8045102", 400, 60),
    ]
    assert parsed(*lines)[0]["patrimonio"] == "8045102"


def test_a_value_s_word_ends_no_column() -> None:
    lines = [
        at("POT.", 500, 0),
        at("15 kVA", 660, 50),
        at("DATA FABR.", 500, 100),
        at("11-2020", 660, 150),
        at("EFICIÊNCIA", 500, 200),
        at("NÍVEL C", 660, 250),
    ]
    assert parsed(*lines)[0]["data_fabricacao"] == "2020-11"


def test_a_short_month_is_no_code_and_a_bad_day_no_date() -> None:
    assert normal.date("31 FEV 2010") is None
    assert normal.month_of("123") is None


def test_lines_without_boxes_are_read_too() -> None:
    lines = [Line(text) for text in ("TENSIONES: 13,2 kV - 208/120 V", *USUAL)]
    found = Parser(templates.load()).extract(lines, PoleIdContext.NAMEPLATE, Deadline(10))
    assert settle(found, lines)[0]["tensao_primaria"] == 13200.0
