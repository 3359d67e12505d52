"""A month in a cell of its own, apart from its year: the date has both or is for a person."""

from __future__ import annotations

import pytest
from ocr_pipeline.grounding import grounded
from ocr_pipeline.stages import Line

from tests.unit.test_ocr_fields import column, parsed


@pytest.mark.parametrize(
    ("text", "value", "told"),
    [
        ("MÊS: 04 ANO: 2015", "2015-04", False),
        ("ANO: 2015 MÊS: 04", "2015-04", False),
        ("MÊS: 04|ANO: 2015", "2015-04", False),
        ("ANO: 2015|MÊS: 04", "2015-04", False),
        ("MÊS|04|ANO|2015", "2015-04", False),
        ("DATA DE FABRICAÇÃO MÊS: 04 ANO: 2015", "2015-04", False),
        ("MÊS DE FABRICAÇÃO 04|ANO DE FABRICAÇÃO 2015", "2015-04", False),
        ("MÊS FABR. 04|ANO FABR. 2015", "2015-04", False),
        ("MÊS: 04 ANO DE FABRICAÇÃO: 2015", "2015-04", False),
        ("MÊS ABR ANO 2015", "2015-04", False),
        ("FABRICADO MÊS ABRIL ANO 2015", "2015-04", False),
        ("MÊS ANO|04 2015", "2015-04", False),
        ("DIA MÊS ANO|15 04 2015", "2015-04-15", False),
        ("MÊS/AMO: 04/2015", "2015-04", False),  # `ANO` was misread
        ("MÊS/ABR ANO 2015", "2015-04", False),
        ("MÊS: 04/2015", "2015-04", False),
        ("MÊS: 04|DATA FABR.: 15/04/2015", "2015-04-15", False),
        ("MÊS REVISÃO 04|ANO 2015", "2015", False),
        ("GARANTIA 12 MESES|ANO 2015", "2015", False),
        ("MÊS: 13 ANO: 2015", "2015", True),
        ("MÊS:|ANO: 2015", "2015", True),
        ("MÊS: 05|DATA FABR.: 04/2015", "2015-04", True),
        ("MÊS: 04|MÊS: 05|ANO: 2015", "2015", True),
        ("DIA 15 MÊS 04 ANO 2015", "2015-04", True),
        # The month of something else is for a person.
        ("GARANTIA ATÉ MÊS 06|ANO DE FABRICAÇÃO: 2015", "2015-06", True),
        ("GARANTIA ATÉ|MÊS: 06|ANO DE FABRICAÇÃO: 2015", "2015-06", True),
        ("ANO DE FABRICAÇÃO: 2015|PRÓXIMA MANUTENÇÃO|MÊS: 06", "2015-06", True),
        ("ÓLEO MÊS: 12|ANO: 2015", "2015-12", True),
    ],
)
def test_a_month_apart_from_its_year_is_the_date_s(text: str, value: str, told: bool) -> None:
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", *text.split("|"), "FASES: 3"))
    assert (values["data_fabricacao"], bool(reasons)) == (value, told)
    assert {*reasons} <= {"ambiguous:data_fabricacao"}


def test_a_month_without_a_year_is_no_date() -> None:
    values, reasons = parsed(*column("POTÊNCIA: 75 kVA", "MÊS: 04", "FASES: 3"))
    assert (values["data_fabricacao"], reasons) == (None, ["label_without_value:data_fabricacao"])


@pytest.mark.parametrize(
    ("value", "text", "there"),
    [
        ("2015-04", "MÊS: 04 ANO: 2015", True),
        ("2015-05", "MÊS: 04 ANO: 2015", False),
        ("2016-04", "MÊS: 04 ANO: 2015", False),
        ("2015-04", "TAP: 04 ANO: 2015", False),
    ],
)
def test_a_model_s_month_is_grounded_in_its_label(value: str, text: str, there: bool) -> None:
    assert grounded("data_fabricacao", value, [Line(text)]) is there
