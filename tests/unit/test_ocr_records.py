"""The records: the bank rule, ±5 % inclusive, the register, and reports that carry any text safely."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ocr_pipeline.api import server
from ocr_pipeline.api.settings import Settings
from ocr_pipeline.database import open_engine
from ocr_pipeline.jobs.reader import PLATE, Read
from ocr_pipeline.jobs.store import Claimed, JobStore, NewItem
from ocr_pipeline.jobs.tables import Kind, State
from ocr_pipeline.reading import FIELDS, Reading
from ocr_pipeline.records import cli, report
from ocr_pipeline.records.bank import bank_size, power_agrees
from ocr_pipeline.records.report import Sent, Verdict, safe_cell
from ocr_pipeline.records.store import RecordsError, RecordStore, RegisterRow, read_register
from ocr_pipeline.records.tables import Tag
from sqlalchemy import func, select

from tests.support import BIN, run

COUNTS = ("photos sent", "photos failed", "photos cancelled", "photos waiting")
HOSTILE = '<script>alert(1)</script>"&\'=HYPERLINK("x")'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    engine = open_engine(f"sqlite:///{tmp_path}/records.sqlite3")
    made = RecordStore(engine)
    made.prepare()
    yield made
    engine.dispose()


def keep(
    store: RecordStore,
    pole: str,
    sha256: str,
    *,
    job: str = "j1",
    feeder: str = "F1",
    tags: tuple[str, ...] = (PLATE,),
    reasons: tuple[str, ...] = (),
    crop: bytes | None = None,
    name: str = "a.jpg",
    **values: Any,
) -> None:
    claimed = Claimed(1, job, Kind.ALT, pole, name, sha256, feeder, "", 1)
    flat = Reading.of(values, list(reasons), {}).flat()
    store.keep(claimed, sha256, Read(flat, tags=tags, crop=crop))


def row(pole: str, **values: Any) -> RegisterRow:
    return RegisterRow(pole_id=pole, feeder="F1", **values)


def cell(made: report.Report, pole: str, field: str) -> report.Cell:
    found = next(entry for entry in made.poles if entry.pole_id == pole)
    return next(entry for entry in found.cells if entry.field == field)


def built(store: RecordStore, job: str | None = None) -> report.Report:
    made = report.build(store, "F1", job)
    assert made is not None
    return made


def rendered(made: report.Report, kind: str) -> bytes:
    return b"".join(made.stream(kind)[0])


# --- the bank ---


@pytest.mark.parametrize(("images", "size"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_two_distinct_photos_confirm_a_bank(images: int, size: int) -> None:
    assert bank_size(images) == size


@pytest.mark.parametrize(
    ("read", "transformers", "record", "agrees"),
    [
        (112.5, 1, 112.5, True),
        (106.875, 1, 112.5, True),  # exactly -5 %
        (118.125, 1, 112.5, True),  # exactly +5 %
        (106.874, 1, 112.5, False),
        (118.126, 1, 112.5, False),
        (37.5, 3, 112.5, True),
        (37.5, 2, 112.5, False),
        (0.95, 1, 1.0, True),
        (1.05, 1, 1.0, True),
        (0.1, 3, 0.3, True),  # in binary 0.1 * 3 is more than 0.3
        (315, 1, 300, True),
        (285, 1, 300, True),
        (15, 1, 0, False),
    ],
)
def test_five_percent_of_the_record_inclusive(
    read: float, transformers: int, record: float, agrees: bool
) -> None:
    assert power_agrees(read, transformers, record) is agrees


def test_the_count_is_of_distinct_photos_with_the_tag(store: RecordStore) -> None:
    keep(store, "P1", "a")
    keep(store, "P1", "a", job="j2")  # the same photo in another job
    keep(store, "P1", "b", tags=("placa_identificacao",))
    assert store.transformer_images("P1") == 1
    keep(store, "P1", "c", tags=(PLATE, "placa_identificacao"))
    assert store.transformer_images("P1") == 2
    assert store.bank_counts("F1") == {"P1": 2}
    assert store.transformer_images("P2") == 0


def test_a_feeders_banks_are_those_of_its_poles_whatever_feeder_a_job_named(store: RecordStore) -> None:
    store.import_rows([row("P1"), row("P2")])
    keep(store, "P1", "a")
    keep(store, "P1", "b", job="j2", feeder="F2")
    keep(store, "P2", "c", job="j2", feeder="F2")
    keep(store, "P3", "d", job="j2", feeder="F2")
    assert store.bank_counts("F1") == {pole: store.transformer_images(pole) for pole in ("P1", "P2")}
    assert store.bank_counts("F1") == {"P1": 2, "P2": 1}


def test_keeping_twice_is_keeping_once(store: RecordStore) -> None:
    for _ in range(2):
        keep(store, "P1", "a", potencia_kva=45.0)
    assert len(store.photos("F1")) == 1


def test_a_banks_power_is_multiplied_and_its_serial_numbers_may_differ(store: RecordStore) -> None:
    store.import_rows([row("P1", potencia_kva=75.0, numero_serie="22")])
    keep(store, "P1", "a", potencia_kva=37.5, numero_serie="11")
    keep(store, "P1", "b", potencia_kva=37.5, numero_serie="22")
    made = built(store)
    power = cell(made, "P1", "potencia_kva")
    assert (power.verdict, power.note) == (Verdict.AGREES, "bank: 37.5 x 2 = 75")
    assert cell(made, "P1", "numero_serie").verdict is Verdict.AGREES


def test_powers_of_a_bank_that_differ_are_no_bank_s_power(store: RecordStore) -> None:
    store.import_rows([row("P1", potencia_kva=75.0)])
    keep(store, "P1", "a", potencia_kva=37.5)
    keep(store, "P1", "b", potencia_kva=45.0)
    assert cell(built(store), "P1", "potencia_kva").verdict is Verdict.CONFLICTING


def test_voltages_and_phases_of_a_bank_are_one(store: RecordStore) -> None:
    """One photo that says what the register says proves nothing of the others."""
    store.import_rows([row("P1", potencia_kva=75.0, tensao_primaria=13800.0, fases=3)])
    keep(store, "P1", "a", potencia_kva=37.5, tensao_primaria=13800.0, fases=3)
    keep(store, "P1", "b", potencia_kva=37.5, tensao_primaria=34500.0, fases=1)
    made = built(store)
    for name in ("tensao_primaria", "fases"):
        assert cell(made, "P1", name).verdict is Verdict.CONFLICTING
    assert made.poles[0].verdict == "differs"


def test_one_photo_twice_is_no_bank(store: RecordStore) -> None:
    store.import_rows([row("P1", potencia_kva=75.0)])
    for job in ("j1", "j2"):
        keep(store, "P1", "a", job=job, potencia_kva=37.5)
    assert cell(built(store), "P1", "potencia_kva").verdict is Verdict.DIFFERS


def test_a_jobs_readings_go_together_when_the_last_is_older_than_they_are_kept(tmp_path: Path) -> None:
    now = [0.0]
    engine = open_engine(f"sqlite:///{tmp_path}/records.sqlite3")
    store = RecordStore(engine, retention_s=100, clock=lambda: now[0])
    store.prepare()
    store.import_rows([row("P1")])
    keep(store, "P1", "a", crop=b"jpeg")
    now[0] = 60
    keep(store, "P1", "b", crop=b"jpeg")
    keep(store, "P1", "c", job="j2")
    now[0] = 120
    keep(store, "P1", "d", job="j3")
    now[0] = 160
    assert store.retire() == 0
    assert len(store.photos("F1")) == 4, "a job's report has all of its photos, or none"
    now[0] = 161
    assert store.retire() == 2
    assert [photo.image_sha256 for photo in store.photos("F1")] == ["d"]
    assert store.bank_counts("F1") == {"P1": 1}
    assert list(store.register("F1")) == ["P1"], "the register is not a reading"
    with engine.begin() as connection:
        assert connection.scalar(select(func.count()).select_from(Tag)) == 1
    engine.dispose()


def test_readings_are_kept_at_least_as_long_as_their_jobs() -> None:
    assert Settings().records_kept() == 30 * 86400
    assert Settings(retention=90 * 86400).records_kept() == 90 * 86400
    assert Settings(records_retention=60 * 86400).records_kept() == 60 * 86400


def test_retiring_goes_on_beside_the_service_and_through_a_failure(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = threading.Event()
    calls: list[int] = []

    def fails_once() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk")
        again.set()
        return 0

    monkeypatch.setattr(store, "retire", fails_once)
    stop = threading.Event()
    thread = store.keep_retiring(stop, every_s=0.01)
    assert again.wait(20)
    stop.set()
    thread.join(20)
    assert thread.daemon
    assert not thread.is_alive()


def test_the_service_retires_what_is_too_old(
    store: RecordStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._clock = lambda: 0.0
    keep(store, "P1", "a", crop=b"jpeg")

    def until_gone(*_: Any, **__: Any) -> None:
        deadline = time.monotonic() + 20
        while store.photos("F1"):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr("uvicorn.run", until_gone)
    server.serve(Settings(state_dir=str(tmp_path)))


# --- the report ---


def test_verdicts_of_fields_and_poles(store: RecordStore) -> None:
    store.import_rows(
        [
            row("P1", fabricante="WEG", data_fabricacao="2011-03", fases=3, elo_fusivel="5H"),
            row("P2", fabricante="WEG"),
            row("P3"),
        ]
    )
    keep(store, "P1", "a", tags=(), fabricante="weg ", data_fabricacao="2011", fases=1, patrimonio="77")
    keep(store, "P4", "b", tags=(), fabricante="WEG")
    keep(store, "P2", "c", tags=(), reasons=("low_confidence:fabricante",), fabricante="WEG")
    made = built(store)
    assert cell(made, "P1", "fabricante").verdict is Verdict.AGREES
    assert cell(made, "P1", "data_fabricacao").verdict is Verdict.AGREES, "as far as both are precise"
    assert cell(made, "P1", "fases").verdict is Verdict.DIFFERS
    assert cell(made, "P1", "elo_fusivel").verdict is Verdict.NOT_READ
    assert cell(made, "P1", "patrimonio").verdict is Verdict.NOT_RECORDED
    assert cell(made, "P1", "matricula").verdict is Verdict.EMPTY
    assert {pole.pole_id: pole.verdict for pole in made.poles} == {
        "P1": "differs",
        "P2": "review",
        "P3": "no photo",
        "P4": "no record",
    }
    assert made.summary == {"differs": 1, "no photo": 1, "no record": 1, "review": 1}


@pytest.mark.parametrize(
    ("recorded", "read", "verdict"),
    [
        ({"potencia_kva": 45.0, "fases": 3}, {"potencia_kva": 45.0, "fases": 3}, "agrees"),
        ({"potencia_kva": 45.0}, {"potencia_kva": 45.0, "patrimonio": "77"}, "agrees"),
        ({"potencia_kva": 45.0, "fases": 3}, {"potencia_kva": 45.0}, "incomplete"),
        ({"potencia_kva": 45.0, "fases": 3}, {"fases": 3}, "incomplete"),
        ({"potencia_kva": 45.0, "fases": 3}, {}, "incomplete"),
        ({"fases": 3}, {"fases": 3}, "incomplete"),  # the power is neither read nor recorded
        ({"fases": 3}, {"fases": 3, "potencia_kva": 45.0}, "incomplete"),  # read, and held against nothing
        ({}, {}, "incomplete"),
        ({"potencia_kva": 45.0, "fases": 3}, {"fases": 1}, "differs"),
    ],
)
def test_a_pole_agrees_only_where_everything_recorded_was_compared(
    store: RecordStore, recorded: dict[str, Any], read: dict[str, Any], verdict: str
) -> None:
    store.import_rows([row("P1", **recorded)])
    keep(store, "P1", "a", tags=(), **read)
    made = built(store)
    assert made.poles[0].verdict == verdict
    assert json.loads(rendered(made, "json"))["summary"] == {verdict: 1}
    assert f'<b class="{verdict}">' in rendered(made, "html").decode()


def test_a_report_says_what_of_the_job_was_not_read(store: RecordStore) -> None:
    """A pole whose photos were not read is not one without a photo, and nobody knows whether it agrees."""
    same: dict[str, Any] = {"potencia_kva": 45.0}
    store.import_rows([row(f"P{number}", **same) for number in (1, 2, 3, 4, 6)])
    keep(store, "P1", "a", **same)
    keep(store, "P6", "b", **same)
    states = {
        "P1": {State.DONE: 1, State.FAILED: 2},
        "P2": {State.CANCELLED: 1},
        "P3": {State.QUEUED: 1, State.LEASED: 1},
        "P5": {State.FAILED: 1},
        "P6": {State.DONE: 1},
    }
    sent = Sent("partial", {pole: Counter(found) for pole, found in states.items()})
    made = report.build(store, "F1", "j1", sent)
    assert made is not None
    assert {pole.pole_id: pole.verdict for pole in made.poles} == {
        "P1": "incomplete",
        "P2": "not read",
        "P3": "not read",
        "P4": "no photo",
        "P5": "not read",
        "P6": "agrees",
    }
    plain = json.loads(rendered(made, "json"))
    assert plain["state"] == "partial"
    assert plain["unread"] == {"sent": 8, "failed": 3, "cancelled": 1, "waiting": 2}
    assert plain["poles"][2]["unread"] == {"sent": 2, "failed": 0, "cancelled": 0, "waiting": 2}
    rows = list(csv.DictReader(io.StringIO(rendered(made, "csv").decode("utf-8-sig"))))
    told = {found["pole"]: [found[name] for name in ("job state", *COUNTS)] for found in rows}
    assert (told["P1"], told["P6"]) == (["partial", "3", "2", "0", "0"], ["partial", "1", "0", "0", "0"])
    page = rendered(made, "html").decode()
    assert "job j1: partial" in page
    assert "2 of 8 photos were read: 3 failed, 1 cancelled, 2 not yet read." in page
    assert "1 of 3 photos were read: 2 failed." in page
    assert "0 of 2 photos were read: 2 not yet read." in page
    assert '<b class="not-read">not read</b>' in page


def test_a_report_that_asked_no_job_tables_says_so(store: RecordStore) -> None:
    keep(store, "P1", "a")
    made = built(store)
    plain = json.loads(rendered(made, "json"))
    assert (plain["state"], plain["unread"], plain["poles"][0]["unread"]) == (None, None, None)
    assert "the job tables were not asked" in rendered(made, "html").decode()
    rows = list(csv.DictReader(io.StringIO(rendered(made, "csv").decode("utf-8-sig"))))
    assert not any(rows[0][name] for name in COUNTS)


def test_a_poles_record_is_found_under_whatever_feeder_the_register_has_it(store: RecordStore) -> None:
    store.import_rows([row("P1", potencia_kva=45.0), row("P2"), row("P3")])
    keep(store, "P1", "a", feeder="ALT", potencia_kva=45.0)
    keep(store, "P9", "b", feeder="ALT", potencia_kva=45.0)
    sent = Sent("partial", {"P1": Counter({State.DONE: 1}), "P2": Counter({State.FAILED: 1})})
    made = report.build(store, "ALT", "j1", sent)
    assert made is not None
    assert {pole.pole_id: pole.verdict for pole in made.poles} == {
        "P1": "agrees",
        "P2": "not read",
        "P9": "no record",
    }, "P3 is a pole of another feeder, and no photo of it was sent"
    assert "The register has it under feeder F1." in rendered(made, "html").decode()
    plain = json.loads(rendered(made, "json"))["poles"]
    assert [pole["record_feeder"] for pole in plain] == ["F1", "F1", None]
    rows = csv.DictReader(io.StringIO(rendered(made, "csv").decode("utf-8-sig")))
    assert {found["pole"]: found["record feeder"] for found in rows} == {"P1": "F1", "P2": "F1", "P9": ""}


def test_photos_that_disagree_are_no_agreement(store: RecordStore) -> None:
    store.import_rows([row("P1", fases=3)])
    keep(store, "P1", "a", tags=(), fases=3)
    keep(store, "P1", "b", tags=(), fases=1)
    made = built(store)
    assert cell(made, "P1", "fases").verdict is Verdict.CONFLICTING
    assert made.poles[0].verdict == "differs"


def test_a_jobs_report_has_its_photos_alone_and_an_unknown_feeder_has_none(store: RecordStore) -> None:
    keep(store, "P1", "a", job="j1")
    keep(store, "P2", "b", job="j2")
    assert [pole.pole_id for pole in built(store, "j2").poles] == ["P2"]
    assert report.build(store, "F1", "j3") is None
    assert report.build(store, "F9") is None


def test_html_shows_any_text_as_text_and_the_crop_beside_it(store: RecordStore) -> None:
    keep(store, HOSTILE, "a", fabricante=HOSTILE[:60], crop=b"\xff\xd8jpeg", name=HOSTILE)
    page = rendered(built(store), "html").decode()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert 'src="data:image/jpeg;base64,/9hqcGVn"' in page
    assert "http" not in page, "it stands alone"


@pytest.mark.parametrize(("kind", "most"), [("html", 25), ("csv", 10), ("json", 10)])
def test_a_report_of_many_pictures_has_few_of_them_in_memory(
    store: RecordStore, kind: str, most: int
) -> None:
    """At most the size of this many pictures; of one there are several copies on its way into the page."""
    size, count = 200_000, 60
    for number in range(count):
        keep(store, f"P{number:03}", str(number), crop=bytes([number]) * size)
    tracemalloc.start()
    try:
        written = sum(len(piece) for piece in built(store).stream(kind)[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most * size
    assert (written > count * size * 4 / 3) == (kind == "html"), "each picture is on the page"


def test_a_picture_that_goes_while_the_report_is_written_leaves_the_rest(store: RecordStore) -> None:
    keep(store, "P1", "a", crop=b"\xff\xd8jpeg", name="a.jpg")
    page = b"".join(replace(built(store), picture=lambda _: None).stream("html")[0]).decode()
    assert "<img" not in page
    assert "<figcaption>a.jpg" in page
    assert page.rstrip().endswith("</html>")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(start: str) -> None:
    assert safe_cell(f"{start}1+1") == f"'{start}1+1"
    assert safe_cell("112.5") == "112.5"


def test_csv_is_whole_and_harmless(store: RecordStore) -> None:
    keep(store, '=cmd|"/C calc"!A0', "a", fabricante='+A"B,C\nD', reasons=("@x",))
    made = built(store)
    content, kind = rendered(made, "csv"), made.stream("csv")[1]
    assert kind.startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    assert [found["field"] for found in rows] == list(FIELDS)
    assert rows[0]["pole"] == '\'=cmd|"/C calc"!A0'
    assert next(found for found in rows if found["field"] == "fabricante")["read"] == "'+A\"B,C\nD"
    assert {found["reasons"] for found in rows} == {"'@x"}


def test_json_has_all_of_it(store: RecordStore) -> None:
    store.import_rows([row("P1", potencia_kva=45.0)])
    keep(store, "P1", "a", potencia_kva=45.0, autoprotegido=False)
    found = json.loads(rendered(built(store), "json"))
    assert found["summary"] == {"agrees": 1}
    assert found["poles"][0]["fields"]["potencia_kva"] == {
        "read": 45.0,
        "record": 45.0,
        "verdict": "agrees",
        "note": "",
    }
    assert found["poles"][0]["fields"]["autoprotegido"]["read"] is False


# --- the register ---


def register(text: str) -> list[RegisterRow]:
    return list(read_register(io.StringIO(text), "r.csv"))


def test_a_register_in_either_dialect() -> None:
    english = register("pole_id,feeder,potencia_kva,fases,autoprotegido\nP1,F1,112.5,3,true\n")
    brazilian = register("pole_id;feeder;potencia_kva;fases;autoprotegido\nP1;F1;112,5;3;sim\n")
    assert english == brazilian == [row("P1", potencia_kva=112.5, fases=3, autoprotegido=True)]
    assert register("pole_id,feeder,fabricante\nP1,F1,\n")[0].fabricante is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("feeder\nF1\n", "line 1: column pole_id is missing"),
        ("pole_id,feeder,kva\n", "column 'kva' is not known"),
        ("pole_id,feeder\nP1,F1,x\n", "line 2: more values than columns"),
        ("pole_id,feeder,fases\nP1,F1,4\n", "line 2: fases = 4"),
        ("pole_id,feeder,potencia_kva\nP1,F1,-5\n", "potencia_kva"),
        ("pole_id,feeder,data_fabricacao\nP1,F1,March\n", "data_fabricacao"),
        ("pole_id,feeder\nP1,F1\nP1,F1\n", "line 3: pole 'P1' is in line 2 too"),
        ('pole_id,feeder\nP1,F1\n"P1 ",F1\n', "line 3: pole 'P1' is in line 2 too"),
        ("pole_id,feeder,fases,fases\nP1,F1,1,3\n", "line 1: column fases is there 2 times"),
        ('pole_id,feeder,fabricante\nP1,F1,"WEG\nP2,F1,WEG\n', "no CSV in UTF-8"),
        ('pole_id,feeder,"fabricante\nP1,F1,WEG\n', "no CSV in UTF-8"),
        ("pole_id,feeder\n,F1\n", "pole_id"),
        ("", "column pole_id is missing"),
    ],
)
def test_a_wrong_register_names_line_and_column(text: str, words: str) -> None:
    with pytest.raises(RecordsError) as caught:
        register(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        (
            "tensao_primaria",
            "13.800",
            13800.0,
        ),  # what a spreadsheet writes where a comma is the decimal point
        ("tensao_primaria", "13.800,0", 13800.0),
        ("tensao_primaria", "7967,43", 7967.43),
        ("potencia_kva", "1.000", 1000.0),
        ("potencia_kva", "112,5", 112.5),
        ("potencia_kva", "112.5", 112.5),  # no three digits behind the dot: it groups nothing
        ("potencia_kva", "90", 90.0),  # a bank of two
        ("potencia_kva", "337,5", 337.5),  # a bank of three
        ("tensao_secundaria", "127/220", "220/127"),
        ("tensao_secundaria", "220 / 127 V", "220/127"),
        ("elo_fusivel", "5 h", "5H"),
        ("data_fabricacao", "9/3/2015", "2015-03-09"),
        ("data_fabricacao", "03/2015", "2015-03"),
        ("data_fabricacao", "2015", "2015"),
        ("numero_serie", "ab-123", "ab-123"),
    ],
)
def test_a_cell_of_the_register_is_what_a_reading_has(column: str, cell: str, value: Any) -> None:
    (found,) = register(f"pole_id;feeder;{column}\nP1;F1;{cell}\n")
    assert getattr(found, column) == value


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("tensao_primaria", "13.8"),  # kV
        ("tensao_primaria", "99999"),
        ("tensao_primaria", "1e4"),
        ("potencia_kva", "113"),
        ("potencia_kva", "nan"),
        ("potencia_kva", "0"),
        ("tensao_secundaria", "13800"),
        ("tensao_secundaria", "220/127/110"),
        ("tensao_secundaria", "220/128"),
        ("elo_fusivel", "5H/8K"),
        ("elo_fusivel", "SH"),  # a reading takes a misread digit for one, a register has none
        ("data_fabricacao", "2015-13"),
        ("data_fabricacao", "31/02/2015"),
        ("data_fabricacao", "03/04/05"),
        ("data_fabricacao", "1066"),
        ("data_fabricacao", "2999-01"),
        ("numero_serie", "12"),
        ("fases", "²"),
    ],
)
def test_what_no_field_can_be_is_refused_by_line_and_column(column: str, cell: str, delimiter: str) -> None:
    head, row = delimiter.join(("pole_id", "feeder", column)), delimiter.join(("P1", "F1", cell))
    with pytest.raises(RecordsError) as caught:
        register(f"{head}\n{row}\n")
    assert str(caught.value).startswith(f"r.csv: line 2: {column} = {cell!r}: ")


def test_a_thousands_dot_in_a_file_of_commas_is_no_voltage() -> None:
    with pytest.raises(RecordsError, match=r"tensao_primaria = '13.800': not a rated primary voltage in V"):
        register("pole_id,feeder,tensao_primaria\nP1,F1,13.800\n")


def test_an_import_is_all_or_nothing_and_replaces(store: RecordStore) -> None:
    store.import_rows([row("P1", fases=1), row("P2")])
    store.import_rows([row("P1", fases=3)])
    assert {pole: fields["fases"] for pole, fields in store.register("F1").items()} == {"P1": 3, "P2": None}


def test_a_register_and_a_report_pass_through_standard_input_and_output(tmp_path: Path) -> None:
    """The service's account may open neither file in the home of who sends the command."""
    program = (BIN / "ocr-records", "--database", f"sqlite:///{tmp_path}/r.sqlite3")
    text = "pole_id;feeder;fabricante\nP1;F1;São José\n"
    taken = run(*program, "import", "-", stdin=f"\ufeff{text}")
    assert (taken.rc, taken.stdout) == (0, "1 poles\n"), taken.tail()
    told = run(*program, "report", "F1", "--format", "json")
    assert json.loads(told.stdout)["poles"][0]["fields"]["fabricante"]["record"] == "São José"
    wrong = run(*program, "import", "-", stdin="x\n")
    assert (wrong.rc, wrong.stderr.splitlines()[0][:40]) == (1, "ocr-records: standard input: line 1: col")


def test_a_register_that_is_not_utf8_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "register.csv"
    file.write_bytes("pole_id;feeder;fabricante\nP1;F1;São José\n".encode("latin-1"))
    assert cli.main(["--database", f"sqlite:///{tmp_path}/r.sqlite3", "import", str(file)]) == 1
    assert "register.csv: no CSV in UTF-8" in capsys.readouterr().err


def test_the_command_asks_the_job_tables_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(state_dir=str(tmp_path))
    file = tmp_path / "service.json"
    file.write_text(json.dumps({"state_dir": str(tmp_path)}))
    jobs = JobStore(open_engine(settings.url("database")), settings.limits())
    jobs.prepare()
    taken = jobs.submit(Kind.ALT, "me", [NewItem("P1", "a.jpg", "a", b"a")], feeder="F1")
    jobs.cancel(taken.job_id)
    for more, state in (["--job", taken.job_id], "cancelled"), ([], None):
        assert cli.main(["--settings", str(file), "report", "F1", "--format", "json", *more]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["state"], told["summary"]) == (state, {"not read": 1})
        assert told["unread"]["cancelled"] == 1
    assert cli.main(["--settings", str(file), "report", "F1", "--job", "j9"]) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = ["--database", f"sqlite:///{tmp_path}/r.sqlite3"]
    file = tmp_path / "register.csv"
    file.write_text("pole_id,feeder,fases\nP1,F1,3\n")
    assert cli.main([*database, "import", str(file)]) == 0
    assert (
        cli.main([*database, "report", "F1", "--format", "json", "--output", str(tmp_path / "r.json")]) == 0
    )
    assert json.loads((tmp_path / "r.json").read_text())["summary"] == {"no photo": 1}
    assert cli.main([*database, "report", "F9"]) == 1
    file.write_text("x\n")
    assert cli.main([*database, "import", str(file)]) == 1
    assert cli.main(["--database", "mysql://u:word@h/d", "migrate"]) == 2
    assert cli.main([*database, "import", str(tmp_path / "none.csv")]) == 1
    said = capsys.readouterr().err
    assert "column pole_id is missing" in said
    assert "Traceback" not in said
    assert "word" not in said
