"""Words of a plate that look like a value of one field and are of another: null or right, never wrong."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ocr_pipeline import normal, templates
from ocr_pipeline.grounding import grounded
from ocr_pipeline.parser import Parser
from ocr_pipeline.servers import ServerReasoner
from ocr_pipeline.settings import ReasoningSettings
from ocr_pipeline.stages import Deadline, Line, PoleIdContext

from tests.unit.test_ocr_fields import at, column, parsed


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("AUTOPROTEGIDO: ( ) SIM (X) NÃO", "autoprotegido", False),
        ("AUTOPROTEGIDO: (X) SIM ( ) NÃO", "autoprotegido", True),
        ("AUTOPROTEGIDO SIM [ ] NÃO [X]", "autoprotegido", False),
        ("AUTOPROTEGIDO SIM [X] NÃO [ ]", "autoprotegido", True),
        ("AUTOPROTEGIDO SIM X NÃO", "autoprotegido", None),
        ("AUTOPROTEGIDO SIM NÃO", "autoprotegido", None),
        ("TRANSFORMADOR NÃO AUTOPROTEGIDO", "autoprotegido", False),
        ("TRANSFORMADOR AUTOPROTEGIDO", "autoprotegido", True),
        ("TRAFO DE DISTRIBUIÇÃO", "fabricante", None),
        ("TIPO: TRAFO TRIFÁSICO", "fabricante", None),
        ("TRAFO EQUIPAMENTOS ELÉTRICOS", "fabricante", "TRAFO"),
        ("RECUPERADO POR ITB", "fabricante", None),
        ("REFORMA: TRAEL LTDA 2019", "fabricante", None),
        ("COMUTADOR ABB TIPO X", "fabricante", None),
        ("ÓLEO ISOLANTE WEG", "fabricante", None),
        ("PROPRIEDADE TOSHIBA", "fabricante", None),
        ("CLIENTE: WEG", "fabricante", None),
        ("WEG EQUIPAMENTOS ELÉTRICOS", "fabricante", "WEG"),
        ("AUTOPROTEGIDO: N/A", "autoprotegido", None),
        ("AUTOPROTEGIDO: N.A.", "autoprotegido", None),
        ("AUTOPROTEGIDO: NÃO INFORMADO", "autoprotegido", None),
        ("AUTOPROTEGIDO: NO APLICA", "autoprotegido", None),
        ("AUTOPROTEGIDO: S/ INFORMAÇÃO", "autoprotegido", None),
        ("AUTOPROTEGIDO: NÃO POSSUI", "autoprotegido", False),
        ("ELO FUSÍVEL: 5H/8K", "elo_fusivel", None),
        ("ELO FUSÍVEL: 5H OU 6K", "elo_fusivel", None),
        ("ELO FUSÍVEL: 5H", "elo_fusivel", "5H"),
        ("TENSÃO DE ENSAIO: 34500 V", "tensao_primaria", None),
        ("POTÊNCIA DE CURTO CIRCUITO: 500 kVA", "potencia_kva", None),
        ("MATRÍCULA: 000000", "matricula", None),
        ("DATA REFORMA: 03/2019", "data_fabricacao", None),
        ("DATA DO ENSAIO: 03/2019", "data_fabricacao", None),
        ("DATA DE VENC. GARANTIA: 03/2019", "data_fabricacao", None),
        ("DATA: 03/2019", "data_fabricacao", "2019-03"),
        ("POTÊNCIA: 5 MVA", "potencia_kva", 5000.0),
        ("POTÊNCIA: 112,5/150 kVA", "potencia_kva", None),
        ("POTÊNCIA: 3 x 37,5 kVA", "potencia_kva", None),
        ("MAT. ENROLAMENTO: ALUMÍNIO 1350", "matricula", None),
        ("MAT. 135067", "matricula", "135067"),
        ("( ) AUTOPROTEGIDO", "autoprotegido", None),
        ("(X) AUTOPROTEGIDO", "autoprotegido", True),
        ("(X) CONVENCIONAL ( ) AUTOPROTEGIDO", "autoprotegido", False),
        ("( ) CONVENCIONAL (X) AUTOPROTEGIDO", "autoprotegido", True),
        ("CONVENCIONAL (X) AUTOPROTEGIDO ( )", "autoprotegido", False),
        ("CONVENCIONAL [ ] AUTOPROTEGIDO [X]", "autoprotegido", True),
        ("CONVENCIONAL [X] AUTOPROTEGIDO [X]", "autoprotegido", None),
        ("TIPO: CONVENCIONAL / AUTOPROTEGIDO", "autoprotegido", None),
        ("POTÊNCIA (kVA): 45/75", "potencia_kva", None),
        ("POTÊNCIA: 75 - 112,5 kVA", "potencia_kva", None),
        ("POTÊNCIA: 75 kVA 45 kVA", "potencia_kva", None),
        ("POTÊNCIA: 75 kVA / 112,5 kVA", "potencia_kva", None),
        ("POTÊNCIA: 25 x 3 kVA", "potencia_kva", None),
        ("75 kVA - 13800/220 V", "potencia_kva", 75.0),
        ("POTÊNCIA: 75 / 13,8 kV", "potencia_kva", 75.0),
        ("TENSÃO SECUNDÁRIA: 380/220-220/127 V", "tensao_secundaria", None),
        ("TENSÃO SECUNDÁRIA: 380/220 220/127 V", "tensao_secundaria", None),
        ("TENSÃO SECUNDÁRIA: 220/127 V OU 380/220 V", "tensao_secundaria", None),
        ("TENSÃO SECUNDÁRIA: 380/220/127 V", "tensao_secundaria", None),
        ("BT: FF 220 FN 127", "tensao_secundaria", None),
        ("BT: 2 x 127 V", "tensao_secundaria", None),
        ("BT: 220/127 V (220/127)", "tensao_secundaria", "220/127"),
        ("DATA: 03/2015 - 05/2018", "data_fabricacao", None),
    ],
)
def test_a_value_is_read_for_what_it_is(text: str, name: str, value: Any) -> None:
    values, _ = parsed(*column(text, "FASES: 3", "Nº DE SÉRIE: 998877"))
    assert values.get(name) == value
    assert values["numero_serie"] == "998877"


@pytest.mark.parametrize("label", ["COMUTADOR", "RECUPERADO POR", "PARA-RAIOS", "PROPRIEDADE DE"])
def test_who_made_a_part_or_repaired_it_is_not_the_manufacturer(label: str) -> None:
    """In a table, the label in one cell and the name in the next."""
    rows = [("POTÊNCIA", "75 kVA"), ("Nº DE SÉRIE", "998877"), (label, "ABB"), ("FASES", "3")]
    lines = [
        at(text, left, 60 * row)
        for row, cells in enumerate(rows)
        for left, text in zip((0, 260), cells, strict=True)
    ]
    values, _ = parsed(*lines)
    assert (values["fabricante"], values["numero_serie"], values["fases"]) == (None, "998877", 3)
    assert parsed(at("ABB", 0, -60), *lines)[0]["fabricante"] == "ABB"


def test_a_former_number_is_none_of_the_plate_s() -> None:
    assert (
        parsed(*column("Nº SÉRIE ANTERIOR: 11111", "POTÊNCIA: 75 kVA", "FASES: 3"))[0]["numero_serie"] is None
    )


def test_a_box_that_nobody_marked_says_nothing() -> None:
    assert normal.self_protected("( ) SIM ( ) NÃO") is None
    assert normal.self_protected("(X) SIM (X) NÃO") is None


@pytest.mark.parametrize(("text", "marked"), [("POTÊNCIA: 1125 kVA", True), ("POTÊNCIA: 112,5 kVA", False)])
def test_a_comma_that_was_guessed_is_for_a_person(text: str, marked: bool) -> None:
    values, reasons = parsed(*column(text, "FASES: 3", "Nº DE SÉRIE: 998877"))
    assert values["potencia_kva"] == 112.5
    assert ("low_confidence:potencia_kva" in reasons) is marked


@pytest.mark.parametrize(
    ("value", "text", "there"),
    [(30.0, "300 KW", False), (112.5, "POTÊNCIA 1125 kVA", True), (75.0, "POT 75 kVA AT 13800", True)],
)
def test_a_tenth_of_a_number_is_no_power_that_was_printed(value: float, text: str, there: bool) -> None:
    assert grounded("potencia_kva", value, [Line(text)]) is there


def test_a_model_s_values_are_as_sure_as_their_lines_and_the_plate_s_doubts_are_told() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        content = '{"numero_serie": "998877", "potencia_kva": 75}'
        return httpx.Response(200, json={"choices": [{"message": {"content": content}}]})

    settings = ReasoningSettings(backend="openai")
    reasoner = ServerReasoner(settings, templates.load(), transport=httpx.MockTransport(answer))
    lines = [
        Line("Nº DE SÉRIE: 998877", None, 0.3),
        Line("Nº DE SÉRIE: 112233"),
        Line("75 kVA"),
        Line("445566"),
    ]
    found = reasoner.extract(lines, PoleIdContext.NAMEPLATE, Deadline(10))
    assert found.candidates["numero_serie"].confidence == 0.3
    assert found.candidates["potencia_kva"].confidence == 1.0
    alone = Parser(templates.load()).extract(lines, PoleIdContext.NAMEPLATE, Deadline(10)).reasons
    assert {"ambiguous:numero_serie", "value_without_label"} <= {*alone}
    assert {"ambiguous:numero_serie", "value_without_label"} <= {*found.reasons}


@pytest.mark.parametrize(
    ("text", "value", "marked"),
    [
        ("12 345 678", "12345678", False),
        ("12 345 678-9", "12345678-9", False),
        ("123 456", "123456", True),
        ("77 280", "77280", True),
        ("301 4567", "301", True),
        ("2019 12345", "2019", True),
        ("12345 2015", "12345", True),
        ("12345 / 2015", "12345", True),
        ("12345 - 678", "12345", True),
        ("123456 A", "123456", True),
        ("123456 / A", "123456", True),
        ("12345 6", "12345", True),
        ("12345 - 6", "12345-6", False),
        ("22 - 12345", "22-12345", False),
        ("A 12345", "A12345", False),
        ("COPEL Nº 12345", "12345", False),
        ("12345 10/2015", "12345", False),
        ("12345 MAR/2015", "12345", False),
        ("12345 DE", "12345", False),
        ("INTERNO 12345", "12345", True),
    ],
)
@pytest.mark.parametrize(
    ("label", "name"),
    [("Nº DE SÉRIE", "numero_serie"), ("PATRIMÔNIO", "patrimonio"), ("MATRÍCULA", "matricula")],
)
@pytest.mark.parametrize("layout", ["{label}: {text}", "{label}\n{text}"])
def test_a_number_in_several_groups_is_whole_or_for_a_person(
    text: str, value: str, marked: bool, label: str, name: str, layout: str
) -> None:
    told = layout.format(label=label, text=text).split("\n")
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", "FASES: 3", *told))
    assert values[name] == value
    assert (f"ambiguous:{name}" in reasons) is marked


@pytest.mark.parametrize(
    ("text", "gap", "rest", "name", "value", "marked"),
    [
        ("Nº SÉRIE 301", 60, "4567", "numero_serie", "301", True),
        ("Nº SÉRIE 301", 25, "4567 A", "numero_serie", "301", True),
        ("Nº SÉRIE 12345", 25, "6", "numero_serie", "12345", True),
        ("Nº SÉRIE 301", 150, "4567", "numero_serie", "301", False),
        ("Nº SÉRIE 301", 25, "CST", "numero_serie", "301", False),
        ("Nº SÉRIE 301", 25, "3~", "numero_serie", "301", False),
        ("TENSÃO SECUNDÁRIA 380", 60, "/ 220 V", "tensao_secundaria", "380", True),
        ("TENSÃO SECUNDÁRIA 220", 60, "127", "tensao_secundaria", "220", True),
        ("POTÊNCIA 15", 25, "0 kVA", "potencia_kva", 15.0, True),
        ("DATA 05/03", 25, "/15", "data_fabricacao", "2003-05", True),
        ("TENSÃO PRIMÁRIA 13800", 25, "13200", "tensao_primaria", 13800.0, False),
    ],
)
def test_digits_a_wide_blank_beside_a_value_may_be_its_rest(
    text: str, gap: int, rest: str, name: str, value: Any, marked: bool
) -> None:
    first = at(text, 0, 0)
    assert first.box
    values, reasons = parsed(
        first, at(rest, first.box.right + gap, 0), *column("FASES: 3", "ELO FUSÍVEL: 5H")
    )
    assert values[name] == value
    assert (f"ambiguous:{name}" in reasons) is marked


def test_a_model_s_part_of_a_number_is_for_a_person_too() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, json={"choices": [{"message": {"content": '{"numero_serie": "301 4567"}'}}]}
        )

    settings = ReasoningSettings(backend="openai")
    reasoner = ServerReasoner(settings, templates.load(), transport=httpx.MockTransport(answer))
    found = reasoner.extract([Line("Nº DE SÉRIE: 301 4567")], PoleIdContext.NAMEPLATE, Deadline(10))
    assert found.candidates["numero_serie"].value == "301"
    assert "ambiguous:numero_serie" in found.reasons


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("FABRICADO EM JUNDIAÍ 05/2015", "2015-05"),
        ("FAB. MARÍLIA 05/15", "2015-05"),
        ("DATA MARINGÁ 05/2015", "2015-05"),
        ("DATA SÃO PAULO, 15 DE MARÇO DE 2015", "2015-03-15"),
        ("DATA JUNDIAÍ MAI/2015", "2015-05"),
        ("DATA SETEMBR 2015", "2015-09"),
        ("DATA SEPT 2015", "2015-09"),
        ("DATA JUIHO/2015", None),
        ("DATA 12 DE MARÇODE2019", "2019-03-12"),
    ],
)
def test_a_town_is_no_month(text: str, value: str | None) -> None:
    values, _ = parsed(*column(text, "FASES: 3", "Nº DE SÉRIE: 998877"))
    assert values["data_fabricacao"] == value


@pytest.mark.parametrize(
    ("label", "text", "value"),
    [
        ("SEM/ANO", "10/15", "2015"),
        ("SEM/ANO", "42/15", "2015"),
        ("SEMANA/ANO", "10/2015", "2015"),
        ("SEMANA / ANO", "42/2015", "2015"),
        ("SEMANA", "10/2015", "2015"),
        ("ANO/SEMANA", "2015/10", "2015"),
        ("ANO/SEM", "15/10", "2015"),
        ("SEMANA DE FABRICAÇÃO", "10/2015", "2015"),
        ("SEM/ANO DE FABRICAÇÃO", "10/2015", "2015"),
        ("DATA FABRICAÇÃO (SEM/ANO)", "10/15", "2015"),
        ("DATA DE FABRICAÇÃO", "SEM 10/2015", "2015"),
        ("DATA", "SEMANA 10 DE 2015", "2015"),
        ("DATA", "10ª SEMANA/2015", "2015"),
        ("DATA", "W10/2015", "2015"),
        ("DATA", "WK 10/15", "2015"),
        ("DATA", "2015-W10", "2015"),
        ("DATA", "1º TRIM. 03/2015", "2015"),
        ("WEEK/YEAR", "10/2015", "2015"),
        ("WEEK", "10/2015", "2015"),
        ("TRIM/ANO", "03/2015", "2015"),
        ("MÊS/ANO", "10/15", "2015-10"),
        ("FABR./ANO", "10/2015", "2015-10"),
        ("DATA", "SEM 10 - 05/03/2015", "2015-03-05"),
    ],
)
@pytest.mark.parametrize("layout", ["{label}: {text}", "{label}\n{text}"])
def test_a_week_is_no_month(label: str, text: str, value: str, layout: str) -> None:
    told = layout.format(label=label, text=text).split("\n")
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", *told, "FASES: 3"))
    assert (values["data_fabricacao"], reasons) == (value, [])


@pytest.mark.parametrize("text", ["LOTE/ANO: 10/15", "SEMAMA/ANO 10/15"])
def test_what_stands_beside_a_year_by_any_other_name_is_no_month(text: str) -> None:
    assert parsed(*column("POTÊNCIA: 75 kVA", text, "FASES: 3"))[0]["data_fabricacao"] == "2015"


@pytest.mark.parametrize(("value", "there"), [("2015", True), ("2015-10", False)])
def test_a_model_s_month_is_not_grounded_in_a_week(value: str, there: bool) -> None:
    assert grounded("data_fabricacao", value, [Line("FABRICADO SEM 10/2015")]) is there


@pytest.mark.parametrize(
    "text",
    [
        "CÓD. MAT. 10004567",
        "CÓDIGO DO MATERIAL: 10004567",
        "MATERIAL Nº 10004567",
        "REG. ANEEL 12345",
        "REGISTRO DE OBJETO 001234/2014",
        "Nº REGISTRO DE OBJETO 001234/2014",
        "REG. INMETRO 001234/2014",
        "REGISTRO CREA 12345",
        "REG. OCP 0012",
        "REGISTRO DE PRODUTO 123456",
        "CADASTRO ICMS 123456",
        "Nº OF 123456",
        "Nº O.S. 123456",
        "Nº DA OP 123456",
        "ORDEM DE FABRICAÇÃO 123456",
        "ORDEM FABRICAÇÃO Nº 123456",
        "Nº DE ORDEM DE FABRICAÇÃO 123456",
        "ORDEM DE SERVIÇO 123456",
        "ORDEM INTERNA 123456",
        "ORDEM DE VENDA 123456",
        "NOTA FISCAL 123456",
        "MATRÍCULA DO EMPREGADO 99887",
        "MATR. RESP. 99887",
        "PATRIMÔNIO ANTERIOR 123456",
        "PATR. ANT. 123456",
        "Nº DE SÉRIE ORIGINAL 123456",
        "MATRÍCULA ANTERIOR 123456",
        "DATA MANUTENÇÃO 03/2018",
        "DATA DA ÚLTIMA MANUTENÇÃO: 03/18",
        "DATA REBOBINAGEM 03/18",
        "DATA RECOND. 03/2018",
        "ANO RECUP. 2018",
        "DATA PINTURA 03/18",
        "DATA DE VALIDADE 05/2020",
        "DATA CALIBRAÇÃO 03/2018",
        "DATA DE ENERGIZAÇÃO 03/18",
        "DATA TROCA DE ÓLEO 03/2018",
        "REBOBINADO EM 03/2018",
        "TEST DATE 03/2018",
        "DATE OF TEST 03/2018",
        "POTÊNCIA ANTIGA 45 kVA",
        "TENSÃO ORIGINAL 13200 V",
        "REBOBINADO POR TRAFOMINAS",
        "RECONDICIONADO POR TRAEL",
        "MANUTENÇÃO: WEG",
        "ASSISTÊNCIA TÉCNICA WEG",
        "SOB LICENÇA WESTINGHOUSE",
        "FABRICANTE DO ÓLEO: WEG",
        "ITAIPU BINACIONAL",
    ],
)
@pytest.mark.parametrize("below", [False, True])
def test_what_a_label_says_of_another_thing_fills_no_field(text: str, below: bool) -> None:
    """Its value beside the label or, where that is a number, in the cell below."""
    words = text.rpartition(" ")
    told = [words[0], words[2]] if below and any(sign.isdigit() for sign in words[2]) else [text]
    values, reasons = parsed(*column("FASES: 3", *told, "ELO FUSÍVEL: 5H"))
    given = {name: value for name, value in values.items() if value is not None}
    assert (given, reasons) == ({"fases": 3, "elo_fusivel": "5H"}, [])


@pytest.mark.parametrize(
    ("text", "name", "value", "marked"),
    [
        ("DATA DA COLETA 03/2018", "data_fabricacao", "2018-03", True),
        ("DATA DE FABRICAÇÃO MAR/2018", "data_fabricacao", "2018-03", False),
        ("MATRÍCULA DO ZELADOR 12345", "matricula", "12345", True),
        ("PATRIMÔNIO COPEL 12345", "patrimonio", "12345", False),
        ("PATRIMÔNIO DA EMPRESA: 12345", "patrimonio", "12345", False),
        ("POTÊNCIA MÁXIMA 100 kVA", "potencia_kva", 100.0, True),
        ("POTÊNCIA EM REGIME CONTÍNUO 100 kVA", "potencia_kva", 100.0, False),
    ],
)
def test_a_word_that_nobody_wrote_down_before_a_value_is_for_a_person(
    text: str, name: str, value: Any, marked: bool
) -> None:
    values, reasons = parsed(*column("FASES: 3", text, "ELO FUSÍVEL: 5H"))
    assert values[name] == value
    assert (f"ambiguous:{name}" in reasons) is marked


@pytest.mark.parametrize(
    "label", ["CONTRATO", "PEDIDO", "DESENHO", "MODELO", "LOTE", "CLIENTE", "CERTIFICADO", "PROJETO"]
)
@pytest.mark.parametrize("below", [False, True])
def test_a_number_sign_before_another_label_is_that_label_s(label: str, below: bool) -> None:
    told = [f"Nº {label}", "4600070696"] if below else [f"Nº {label}: 4600070696"]
    values, reasons = parsed(*column("FASES: 3", *told, "ELO FUSÍVEL: 5H"))
    assert (values["numero_serie"], reasons) == (None, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(X) MONOFÁSICO ( ) BIFÁSICO ( ) TRIFÁSICO", 1),
        ("( ) MONOFÁSICO ( ) BIFÁSICO (X) TRIFÁSICO", 3),
        ("MONOFÁSICO (X) TRIFÁSICO ( )", 1),
        ("( ) MONOFÁSICO ( ) TRIFÁSICO", None),
        ("MONOFÁSICO / TRIFÁSICO", None),
        ("FASES: ( )1 ( )2 (X)3", 3),
        ("FASES 1 ( ) 2 ( ) 3 (X)", 3),
        ("FASES: 1 [X] 2 [ ] 3 [ ]", 1),
        ("FASES: 1 / 3", None),
        ("FASES: MONO OU TRI", None),
        ("FASES: 3", 3),
        ("FASES: 3 (TRÊS)", 3),
    ],
)
def test_of_boxes_to_tick_the_ticked_one_says_the_phases(text: str, value: int | None) -> None:
    values, _ = parsed(*column(text, "POTÊNCIA: 75 kVA", "Nº DE SÉRIE: 998877"))
    assert values["fases"] == value


def test_words_for_two_numbers_of_phases_are_for_a_person() -> None:
    lines = column("USAR EM BANCO TRIFÁSICO", "MONOFÁSICO", "POTÊNCIA: 75 kVA", "Nº DE SÉRIE: 998877")
    assert "ambiguous:fases" in parsed(*lines)[1]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("TENSÃO PRIMÁRIA: /13200/12600 V", "tensao_primaria", None),
        ("TENSÃO PRIMÁRIA: -13200-12600 V", "tensao_primaria", None),
        ("TENSÃO PRIMÁRIA - 13800/13200 V", "tensao_primaria", 13800.0),
        ("TENSÃO SECUNDÁRIA: /220 V", "tensao_secundaria", None),
        ("TENSÃO SECUNDÁRIA: - 380/220 V", "tensao_secundaria", "380/220"),
        ("POTÊNCIA: ,5 kVA", "potencia_kva", None),
        ("POT.75 kVA", "potencia_kva", 75.0),
        ("DATA: /03/2015", "data_fabricacao", "2015-03"),
        ("Nº SÉRIE: -456", "numero_serie", "456"),
        ("Nº SÉRIE: 123456-", "numero_serie", "123456"),
        ("Nº SÉRIE: 123456 -", "numero_serie", "123456"),
        ("Nº SÉRIE .234.567", "numero_serie", "234.567"),
        ("Nº SÉRIE.234567", "numero_serie", "234567"),
        ("Nº SÉRIE......234567", "numero_serie", "234567"),
        ("PATRIMÔNIO: /123456", "patrimonio", "123456"),
    ],
)
def test_a_value_whose_beginning_or_end_was_covered_is_none_or_for_a_person(
    text: str, name: str, value: Any
) -> None:
    values, reasons = parsed(*column("FASES: 3", text, "ELO FUSÍVEL: 5H"))
    assert values[name] == value
    covered = any(text.endswith(end) for end in ("/03/2015", "-456", "6-", " .234.567", "/123456"))
    assert bool(reasons) is (covered or value is None)


@pytest.mark.parametrize(
    "text",
    [
        "NBR 5440 ANO 2014",
        "NBR 5440-1 ANO: 2014",
        "NORMA 5440 ANO 2014",
        "ABNT NBR 5440 ANO 2014",
        "NORMA/ANO NBR5440/2014",
        "NORMA/ANO|NBR5440/2014",
        "FABRICADO CONFORME NBR 5440 ANO 2014",
        "IEC 60076 DATA 2011",
    ],
)
def test_a_standard_s_year_is_no_date(text: str) -> None:
    told = text.split("|")
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", *told, "FASES: 3"))
    assert (values["data_fabricacao"], {*reasons}) == (None, {"label_without_value:data_fabricacao"})
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", *told, "DATA FABR.: 03/2019", "FASES: 3"))
    assert (values["data_fabricacao"], reasons) == ("2019-03", [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("NBR 5440 ANO DE FABRICAÇÃO 2014", "2014"),
        ("NBR 5440 FABR. 2014", "2014"),
        ("NBR 5440 DATA 03/2019", "2019-03"),
        ("NORMA NBR 5440 MASSA 480 kg ANO 2014", "2014"),
        ("NBR 5440/2014|ANO 2019", "2019"),
    ],
)
def test_a_date_beside_a_standard_is_still_the_date(text: str, value: str) -> None:
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", *text.split("|"), "FASES: 3"))
    assert (values["data_fabricacao"], reasons) == (value, [])


@pytest.mark.parametrize(
    "text",
    [
        "CLASSE TENSÃO AT 24,2 kV",
        "CLASSE DE TENSÃO AT 24,2 kV",
        "U MÁX AT 24,2 kV",
        "Um AT 24,2 kV",
        "U MÁX. DE OPERAÇÃO 24,2 kV",
        "TENSÃO MÁX. AT 24,2 kV",
        "TENSÃO MÁX. OPERAÇÃO AT 24,2 kV",
        "TENSÃO MÁXIMA DO SISTEMA AT 24,2 kV",
        "TENSÃO MÁXIMA DO EQUIPAMENTO 24,2 kV",
        "MÁX. TENSÃO AT 24,2 kV",
        "TENSÃO AT MÁX. 24,2 kV",
        "MAXIMUM VOLTAGE HV 24,2 kV",
    ],
)
def test_the_highest_voltage_and_the_class_are_no_rated_voltage(text: str) -> None:
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", text, "FASES: 3"))
    assert (values["tensao_primaria"], reasons) == (None, [])
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", text, "TENSÃO AT: 23100 V", "FASES: 3"))
    assert (values["tensao_primaria"], reasons) == (23100.0, [])


@pytest.mark.parametrize(
    "text",
    [
        "CLASSE TENSÃO 15 kV AT 13800 V",
        "TENSÃO MÁX. 15 kV TENSÃO AT 13,8 kV",
        "TENSÃO PRIMAR. 13,8 kV",
        "PRIMAR: 13800 V",
        "ALTA TENSÃO 13,8 kV",
        "MÉDIA TENSÃO 13,8 kV",
        "TENSÃO DE OPERAÇÃO AT 13,8 kV",
    ],
)
def test_the_rated_voltage_is_read_beside_words_like_the_highest_one_s(text: str) -> None:
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", text, "FASES: 3"))
    assert (values["tensao_primaria"], reasons) == (13800.0, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ORDEM: 4567", None),
        ("ORDEM 2012/45", None),
        ("ORDEM|4567", None),
        ("ORDEM Nº 4567", None),
        ("Nº DE ORDEM: 4567", "4567"),
        ("Nº ORDEM 4567", "4567"),
        ("N. ORDEM|4567", "4567"),
    ],
)
def test_an_order_is_the_serial_number_only_with_its_number_sign(text: str, value: str | None) -> None:
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", *text.split("|"), "FASES: 3"))
    assert (values["numero_serie"], reasons) == (value, [])
