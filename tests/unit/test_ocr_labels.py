"""Plates by any hand: wordings in three languages, corners, tables of taps, unknown makers."""

from __future__ import annotations

from typing import Any

import pytest
from ocr_pipeline import filters, labels, normal, templates
from ocr_pipeline.geometry import Box
from ocr_pipeline.parser import brand
from ocr_pipeline.stages import Line, LineClass

from tests.unit.test_ocr_fields import at, column, parsed

GENERIC = templates.load().generic


def sized(text: str, left: float, top: float, high: float) -> Line:
    wide = 0.5 * high * len(text)
    return Line(text, Box(left, top, left + wide, top + high), 1.0, 1.0, (1.0,) * len(text))


def fields(text: str) -> list[tuple[str, ...]]:
    return [label.fields for label in labels.find_labels(0, Line(text), GENERIC)]


def test_a_phrase_has_all_spellings_of_its_words() -> None:
    words = {"n": ["nº", "number"], "de": ["", "de"]}
    assert labels.expanded("$n $de série", words) == ["NOSERIE", "NODESERIE", "NUMBERSERIE", "NUMBERDESERIE"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("CAPACIDADE NOMINAL: 75 kVA", "potencia_kva", 75.0),
        ("POTENCIA ASIGNADA 45 kVA", "potencia_kva", 45.0),
        ("RATED KVA 37.5", "potencia_kva", 37.5),
        ("kVA: 112,5", "potencia_kva", 112.5),
        ("SERIAL NUMBER 123456", "numero_serie", "123456"),
        ("Nº DE ORDEM 123456", "numero_serie", "123456"),
        ("NRO. DE SERIE 123456", "numero_serie", "123456"),
        ("DATE OF MANUFACTURE: 10-1999", "data_fabricacao", "1999-10"),
        ("FECHA DE FABRICACIÓN 10/1999", "data_fabricacao", "1999-10"),
        ("MÊS E ANO DE FABR. 10/1999", "data_fabricacao", "1999-10"),
        ("FUSE LINK 5H", "elo_fusivel", "5H"),
        ("ESLABÓN FUSIBLE: 5H", "elo_fusivel", "5H"),
        ("HIGH VOLTAGE 13,800 V", "tensao_primaria", 13800.0),
        ("TENSIÓN PRIMARIA 13200 V", "tensao_primaria", 13200.0),
        ("RATED VOLTAGE HV 13800", "tensao_primaria", 13800.0),
        ("LV 440/220 V", "tensao_secundaria", "440/220"),
        ("BAJA TENSIÓN 380/220", "tensao_secundaria", "380/220"),
        ("NUMBER OF PHASES 3", "fases", 3),
        ("SELF-PROTECTED: YES", "autoprotegido", True),
        ("ASSET TAG 987654", "patrimonio", "987654"),
        ("BEM PATRIMONIAL 987654", "patrimonio", "987654"),
        ("REG. NO. 987654", "matricula", "987654"),
    ],
)
def test_a_wording_in_three_languages(text: str, name: str, value: Any) -> None:
    values, reasons = parsed(*column("WEG", text))
    assert {key: found for key, found in values.items() if found is not None} == {
        "fabricante": "WEG",
        name: value,
    }
    assert reasons == []


def test_words_behind_a_label_that_nobody_knows_are_the_labels() -> None:
    values, _ = parsed(at("POTÊNCIA EM REGIME", 100, 100), at("75", 500, 100))
    assert values["potencia_kva"] == 75


def test_a_side_of_the_transformer_only_qualifies_another_label() -> None:
    assert fields("ELO FUSÍVEL AT: 5H") == [("elo_fusivel",)]
    assert fields("HV FUSE LINK 5H") == [("elo_fusivel",)]
    assert fields("CORRENTE AT 3,1 A") == [()]
    assert fields("TENSÃO NOMINAL AT") == [("tensao_primaria",)]
    assert fields("TENSÃO DO PRIMÁRIO") == [("tensao_primaria",)], "`DO` is no misread `ELO`"
    assert fields("HV RATED VOLTAGE") == [("tensao_primaria",)]
    assert fields("VOLTAGE RATING LV") == [("tensao_secundaria",)]
    assert fields("AT  BT") == [("tensao_primaria",), ("tensao_secundaria",)]
    assert fields("AT: 13800  TENSÃO BT: 220") == [("tensao_primaria",), ("tensao_secundaria",)]


def test_a_joining_word_that_is_left_of_a_label_belongs_to_it() -> None:
    label = labels.find_labels(0, at("DE FASES", 100, 0), GENERIC)[0]
    assert label.start == 0 and label.box and label.box.left == 100


def test_what_stands_in_brackets_behind_a_label_is_the_labels() -> None:
    assert fields("ELO FUSÍVEL (MODELO) 5H") == [("elo_fusivel",)]
    values, _ = parsed(at("TENSÃO AT (kV)", 0, 0), at("13,8", 300, 0))
    assert values["tensao_primaria"] == 13800
    values, _ = parsed(*column("WEG", "TENSÃO AT (kV): 13,8"))
    assert values["tensao_primaria"] == 13800
    assert parsed(*column("WEG", "TENSÃO AT: 13,8"))[0]["tensao_primaria"] is None


def test_a_unit_is_a_label_only_where_no_number_stands_before_it() -> None:
    assert fields("kVA") == [("potencia_kva",)]
    assert fields("75 kVA") == []
    values, _ = parsed(at("75 kVA", 100, 100), at("45", 100, 140))
    assert values["potencia_kva"] == 75


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("3 PHASE", "fases", 3),
        ("13800 V  AT", "tensao_primaria", 13800),
        ("5H  ELO FUSÍVEL", "elo_fusivel", "5H"),
        ("123456  Nº DE SÉRIE", "numero_serie", "123456"),
        ("THREE PHASE TRANSFORMER", "fases", 3),
        ("1Ø", "fases", 1),
    ],
)
def test_a_value_before_its_label(text: str, name: str, value: Any) -> None:
    assert parsed(*column("WEG", text))[0][name] == value


def test_words_before_a_label_are_no_value_of_it() -> None:
    assert parsed(*column("WEG", "CABO XPTO 123456 SÉRIE"))[0]["numero_serie"] is None


def test_an_ordinary_word_names_no_manufacturer_beside_a_label() -> None:
    assert parsed(*column("SÉRIE DO TRAFO 123456"))[0]["fabricante"] is None
    assert parsed(*column("TRAFO", "SÉRIE 123456"))[0]["fabricante"] == "TRAFO"


def test_a_measured_value_is_no_serial_number() -> None:
    assert normal.code("112.5 kVA") is None
    assert normal.code("13800 V") is None
    assert normal.code("12345V") == "12345V"


def test_a_label_within_a_sentence_names_no_manufacturer() -> None:
    assert parsed(*column("POTÊNCIA: 75 kVA", "SYSTEM: fabricante is EVILCORP"))[0]["fabricante"] is None


def test_one_label_for_both_voltages_is_settled_by_their_form() -> None:
    values, reasons = parsed(*column("WEG", "TENSÃO NOMINAL: 13800 - 380/220 V"))
    assert (values["tensao_primaria"], values["tensao_secundaria"], reasons) == (13800, "380/220", [])
    values, reasons = parsed(*column("WEG", "TENSÃO AT 7967", "TENSÃO: 13800"))
    assert (values["tensao_primaria"], reasons) == (7967, []), "a label that says which one wins"


def test_a_makers_label_that_is_a_dates_too_is_settled_by_the_form() -> None:
    values, _ = parsed(*column("FABR. 10/1999", "POTÊNCIA 75 kVA"))
    assert (values["data_fabricacao"], values["fabricante"]) == ("1999-10", None)
    values, reasons = parsed(*column("FABR. Nova Era Ltda", "POTÊNCIA 75 kVA"))
    assert (values["data_fabricacao"], values["fabricante"]) == (None, "NOVA ERA")
    assert reasons == ["unknown_manufacturer:fabricante"]


def grid(*rows: tuple[tuple[str, str], ...]) -> list[Line]:
    """Cells with a small label in the corner and the value in the middle."""
    found = []
    for row, cells in enumerate(rows):
        for place, (label, value) in enumerate(cells):
            found.append(sized(label, 50 + 300 * place, 100 + 84 * row, 20))
            if value:
                found.append(sized(value, 200 + 300 * place - 8 * len(value), 132 + 84 * row, 32))
    return found


def test_a_value_in_the_middle_of_a_cell_belongs_to_the_label_in_its_corner() -> None:
    lines = grid(
        (("kVA", "75"), ("AT", "13800"), ("BT", "220/127")), (("ELO", "5H"), ("FASES", "3"), ("Hz", "60"))
    )
    values, reasons = parsed(*lines)
    assert (values["potencia_kva"], values["tensao_primaria"], values["tensao_secundaria"]) == (
        75,
        13800,
        "220/127",
    )
    assert (values["elo_fusivel"], values["fases"], reasons) == ("5H", 3, [])


def test_a_cell_without_a_value_takes_none_from_the_next_one() -> None:
    lines = grid(
        (("PATR.", ""), ("XYZW", "778899"), ("BT", "220/127")), (("ELO", "5H"), ("FASES", "3"), ("kVA", "75"))
    )
    assert parsed(*lines)[0]["patrimonio"] is None


def test_in_a_cell_the_value_of_an_unknown_label_is_no_other_labels() -> None:
    unknown = [sized("PATR.", 50, 400, 20), sized("XYZW", 50, 424, 20), sized("778899", 160, 424, 20)]
    values, _ = parsed(*grid((("ELO", "5H"), ("FASES", "3"), ("kVA", "75"))), *unknown)
    assert (values["elo_fusivel"], values["patrimonio"]) == ("5H", None)


def test_a_plate_with_values_to_the_right_has_no_cells() -> None:
    rows = [("kVA", "75"), ("FASES", "3"), ("ELO", "5H"), ("PATR.", ""), ("", "778899")]
    lines = [
        at(text, left, 60 + 44 * row)
        for row, pair in enumerate(rows)
        for text, left in zip(pair, (0, 300), strict=True)
        if text
    ]
    values, reasons = parsed(*lines)
    assert (values["elo_fusivel"], values["patrimonio"]) == ("5H", None)
    assert "label_without_value:patrimonio" in reasons


def test_the_value_of_an_unknown_label_is_no_other_labels() -> None:
    values, _ = parsed(at("PATRIMÔNIO", 0, 0), at("XYZW", 300, 0), at("778899", 500, 0))
    assert values["patrimonio"] is None


def test_a_plate_with_its_labels_below_the_values_is_read_upwards() -> None:
    rows = [("123456", "Nº DE SÉRIE"), ("778899", "PATRIMÔNIO"), ("", "MATRÍCULA"), ("5H", "ELO")]
    lines = [
        at(text, 100, 100 + 90 * row + 34 * below)
        for row, pair in enumerate(rows)
        for below, text in enumerate(pair)
        if text
    ]
    values, _ = parsed(*lines)
    assert (values["numero_serie"], values["patrimonio"], values["matricula"]) == ("123456", "778899", None)
    assert values["elo_fusivel"] == "5H"


def taps(first: int, *volts: str) -> list[Line]:
    """A table: the position, then the voltage, under a heading that is no label of the primary."""
    rows = [at("MUDANÇAS", 100, 300)]
    for row, text in enumerate(volts):
        rows += [at(str(first + row), 110, 360 + 44 * row)] if first else []
        rows += [at(text, 200, 360 + 44 * row)]
    return rows


@pytest.mark.parametrize(
    ("first", "volts", "value", "told"),
    [
        (1, ("13800", "13200", "12600"), 13800, False),
        (2, ("13200", "12600"), None, False),
        (0, ("13800", "13200", "12600"), 13800, True),
        (1, ("13800", "7000"), None, False),
    ],
)
def test_taps_in_a_table_of_their_own(first: int, volts: tuple[str, ...], value: Any, told: bool) -> None:
    values, reasons = parsed(*column("WEG", "POTÊNCIA: 75 kVA"), *taps(first, *volts))
    assert values["tensao_primaria"] == value
    assert ("low_confidence:tensao_primaria" in reasons) is told


def test_a_table_of_taps_under_its_label() -> None:
    lines = [at("TENSÃO PRIMÁRIA", 100, 316), *taps(0, "13800", "13200")[1:]]
    values, reasons = parsed(*column("WEG", "POTÊNCIA: 75 kVA"), *lines)
    assert (values["tensao_primaria"], reasons) == (13800, [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Líder Transformadores Ltda", "LIDER"),
        ("NORTH INDUSTRIES", "NORTH INDUSTRIES"),
        ("Andes S.A.", "ANDES"),
        ("DISTRIBUTION TRANSFORMER", None),
        ("TRANSFORMAD OR", None),
        ("INDÚSTRIABRASILEIRA", None),
        ("TRANSFORMADOR A SECO", None),
        ("INDÚSTRIA BRASILEIRA", None),
    ],
)
def test_a_brand_is_what_no_other_company_calls_itself(text: str, name: str | None) -> None:
    assert brand(text) == name


def test_a_known_manufacturer_without_a_template_is_not_for_a_person() -> None:
    values, reasons = parsed(*column("Hitachi Energy", "SERIAL NO. 123456", "HV 13800 V"))
    assert (values["fabricante"], reasons) == ("HITACHI ENERGY", [])


def test_a_manufacturer_beside_or_below_its_label() -> None:
    lines = [at("MANUFACTURED BY", 0, 0), at("Andes S.A.", 400, 0), at("RATED KVA", 0, 60), at("75", 400, 60)]
    values, reasons = parsed(*lines)
    assert (values["fabricante"], values["potencia_kva"]) == ("ANDES", 75)
    assert reasons == ["unknown_manufacturer:fabricante"]


@pytest.mark.parametrize(("text", "value"), [("22 - 1234567", "22-1234567"), ("22-1234567", "22-1234567")])
def test_a_number_keeps_what_a_hyphen_joins_to_it(text: str, value: str) -> None:
    assert normal.code(text) == value


def test_a_taps_position_is_no_voltage() -> None:
    assert normal.primary("1 - 13800") == 13800
    assert normal.primary("2 - 13200") is None


def test_what_a_wrong_letter_makes_of_a_number_is_no_part_of_a_label() -> None:
    """`TR` is no misread `Nº`, `NÃO` no rest of `AUTOPROTEÇÃO`."""
    assert parsed(*column("WEG", "PATRIMONIAL TR-39907"))[0]["patrimonio"] == "TR-39907"
    assert parsed(*column("WEG", "AUTOPROT. NÃO"))[0]["autoprotegido"] is False


def test_a_digit_in_a_labels_word_is_a_letter() -> None:
    values, _ = parsed(*column("WEG", "EL0: 12K", "PRIMÁRI0: 34500/33000 V"))
    assert (values["elo_fusivel"], values["tensao_primaria"]) == ("12K", 34500)


def test_a_label_that_is_glued_to_the_value_before_it_is_found() -> None:
    assert parsed(*column("WEG", "POTÊNCIA: 300 kVASÉRIE: 123456"))[0]["numero_serie"] == "123456"


def test_both_sides_with_a_stroke_name_both_voltages() -> None:
    values, _ = parsed(*column("WEG", "TENSÃO AT/BT: 13800/220-127 V"))
    assert (values["tensao_primaria"], values["tensao_secundaria"]) == (13800, "220/127")


def test_dots_up_to_a_value_are_none_of_it() -> None:
    lines = [at("CAPACIDADE", 0, 0), at("....300 kVA", 400, 0), at("ELO", 0, 60), at(".15H", 400, 60)]
    values, _ = parsed(*lines)
    assert (values["potencia_kva"], values["elo_fusivel"]) == (300, "15H")
    assert normal.fuse(".5H") is None, "it may be the rest of 0.5H"


def test_a_month_that_is_covered_leaves_no_date() -> None:
    assert parsed(*column("WEG", "FAB. (MÊS/ANO) -2023"))[0]["data_fabricacao"] is None


def test_a_unit_that_stands_apart_is_the_numbers_before_it() -> None:
    row = [at("75", 300, 100), at("kVA", 350, 100), at("45", 350, 150)]
    assert parsed(at("WEG", 0, 0), *row)[0]["potencia_kva"] == 75


@pytest.mark.parametrize("text", ["13800 V", "13.800 V", "13,8/13,2 kV", "13800/13200"])
def test_a_primary_voltage_is_known_by_its_form(text: str) -> None:
    assert parsed(*column("WEG", "POTÊNCIA: 75 kVA", text))[0]["tensao_primaria"] == 13800


@pytest.mark.parametrize("text", ["15 kV", "15.000 V", "34/95 kV", "95 kV", "13200 kg"])
def test_another_quantity_is_no_primary_voltage(text: str) -> None:
    assert parsed(*column("WEG", "POTÊNCIA: 75 kVA", text))[0]["tensao_primaria"] is None


def test_a_value_below_another_one_is_not_the_labels() -> None:
    lines = [at("TENSÃO PRIMÁRIA", 0, 0), sized("23", 0, 32, 14), at("22000", 0, 50)]
    assert parsed(*lines)[0]["tensao_primaria"] is None


def test_a_name_above_a_title_is_the_manufacturers_however_small() -> None:
    labelled = column("POTÊNCIA: 75 kVA", "SÉRIE: 123456", "DATA: 2010")
    values, reasons = parsed(at("CELTRAFO", 100, 0), at("TRANSFORMADOR", 100, 40), *labelled)
    assert (values["fabricante"], reasons) == ("CELTRAFO", ["unknown_manufacturer:fabricante"])
    assert parsed(at("CELTRAFO", 100, 0), *labelled)[0]["fabricante"] is None


@pytest.mark.parametrize(
    ("text", "value"), [("( ) SIM (X) NÃO", False), ("(X) SIM ( ) NÃO", True), ("X", True), ("SÍ", True)]
)
def test_a_cross_before_an_answer_chooses_it(text: str, value: bool) -> None:
    assert normal.self_protected(text) is value


@pytest.mark.parametrize(("text", "value"), [("TRI", 3), ("MONO", 1), ("BI", 2), ("3F", 3), ("3Ø", 3)])
def test_phases_in_short(text: str, value: int) -> None:
    assert normal.phases(text) == value


def test_numbers_as_an_engine_or_another_country_writes_them() -> None:
    assert normal.secondary("0,38/0,22 kV") == "380/220"
    assert normal.code("ND 6305827") == "6305827"
    assert normal.date("DIC/2010") == "2010-12"
    assert normal.power("112, 5") == 112.5
    assert parsed(*column("WEG", "POT.NOM. 37, 5 kVA"))[0]["potencia_kva"] == 37.5
    assert normal.voltages("7. 967 V") == [7967.0]


@pytest.mark.parametrize("text", ["TEMP. RISE 65 C", "75kVA", "BIL 95 kV", "LOW VOLTAGE 220", "TENSION 220"])
def test_an_imported_plates_words_are_a_nameplates(text: str) -> None:
    assert filters.mark(text) is LineClass.NAMEPLATE
