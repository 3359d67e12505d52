"""Readings go in, the register is imported, a feeder comes out."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from pydantic import ConfigDict, ValidationError, field_validator
from sqlalchemy import Engine, delete, func, insert, select, union
from sqlalchemy.exc import IntegrityError

from ocr_pipeline import normal
from ocr_pipeline.database import migrate, reading
from ocr_pipeline.jobs.reader import PLATE, Read
from ocr_pipeline.jobs.store import Claimed
from ocr_pipeline.reading import FIELDS, Fields
from ocr_pipeline.records.tables import Reading, Record, Tag
from ocr_pipeline.words import fold

log = logging.getLogger(__name__)
BATCH = 500
RETIRE_S = 3600.0


class RecordsError(Exception):
    """A register that cannot be imported; the text is one line with file, row and column."""


class RegisterRow(Fields):
    """A row of the register: the pole, its feeder, and the fields as the register has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pole_id: str
    feeder: str

    @field_validator("pole_id", "feeder")
    @classmethod
    def _named(cls, name: str) -> str:
        if not 0 < len(name) <= 128 or not name.isprintable():
            raise ValueError("must be 1 to 128 printable characters")
        return name


@dataclass(frozen=True)
class PhotoRow:
    """A photo of a pole, as it was read."""

    pole_id: str
    name: str
    image_sha256: str
    fields: dict[str, Any]
    needs_review: bool
    reasons: tuple[str, ...]
    confidence: dict[str, float]
    crop_id: int | None  # of its picture, for `crop`; None without one


class RecordStore:
    """The records database. Readings are kept for `retention_s`; the register until it is replaced."""

    def __init__(
        self, engine: Engine, retention_s: float = math.inf, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._retention_s = retention_s
        self._clock = clock

    def prepare(self) -> None:
        """Make the tables, or bring them up to date."""
        migrate(self._engine, "ocr_pipeline.records")

    def keep(self, claimed: Claimed, image_sha256: str, read: Read) -> None:
        """Write a reading. The same photo of the same job again changes nothing."""
        row = {
            "job_id": claimed.job_id,
            "feeder": claimed.feeder,
            "pole_id": claimed.pole_id,
            "name": claimed.name,
            "image_sha256": image_sha256,
            "reading": json.dumps(read.result, ensure_ascii=False),
            "needs_review": bool(read.result.get("_needs_review")),
            "crop": read.crop,
            "read_at": self._clock(),
        }
        same = (
            Reading.job_id == claimed.job_id,
            Reading.pole_id == claimed.pole_id,
            Reading.image_sha256 == image_sha256,
        )
        try:
            with self._engine.begin() as connection:
                if connection.scalar(select(Reading.id).where(*same)) is not None:
                    return
                made = connection.execute(insert(Reading).values(row))
                key = made.inserted_primary_key
                assert key is not None
                tags = [{"reading_id": key[0], "tag": tag[:64]} for tag in sorted(set(read.tags))]
                if tags:
                    connection.execute(insert(Tag), tags)
        except IntegrityError:
            return  # another worker wrote the same at the same moment

    def retire(self) -> int:
        """Remove readings and pictures of jobs whose last photo was read too long ago. How many jobs."""
        before = self._clock() - self._retention_s
        old = select(Reading.job_id).group_by(Reading.job_id).having(func.max(Reading.read_at) < before)
        with reading(self._engine) as connection:
            jobs = list(connection.scalars(old))
        for job in jobs:  # one by one: workers write between them
            with self._engine.begin() as connection:
                connection.execute(delete(Reading).where(Reading.job_id == job))
        return len(jobs)

    def keep_retiring(self, stop: threading.Event, every_s: float = RETIRE_S) -> threading.Thread:
        """Do so now and then, beside whatever else this process does, until `stop`."""

        def work() -> None:
            while True:
                try:
                    if jobs := self.retire():
                        log.info("readings of %d jobs are no longer kept", jobs)
                except Exception:  # a database that is away comes back
                    log.exception("old readings")
                if stop.wait(every_s):
                    return

        thread = threading.Thread(target=work, name="retire", daemon=True)
        thread.start()
        return thread

    def transformer_images(self, pole_id: str) -> int:
        """DISTINCT photos of a pole, of all jobs, in which the detector saw a transformer's plate."""
        query = (
            select(func.count(Reading.image_sha256.distinct()))
            .join(Tag, Tag.reading_id == Reading.id)
            .where(Reading.pole_id == pole_id, Tag.tag == PLATE)
        )
        with reading(self._engine) as connection:
            return connection.scalar(query) or 0

    def bank_counts(self, feeder: str) -> dict[str, int]:
        """`transformer_images` of every pole of a feeder, by the register or by a photo; 0 is left out."""
        poles = union(
            select(Reading.pole_id).where(Reading.feeder == feeder),
            select(Record.pole_id).where(Record.feeder == feeder),
        )
        query = (
            select(Reading.pole_id, func.count(Reading.image_sha256.distinct()))
            .join(Tag, Tag.reading_id == Reading.id)
            .where(Reading.pole_id.in_(poles), Tag.tag == PLATE)
            .group_by(Reading.pole_id)
        )
        with reading(self._engine) as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def photos(self, feeder: str, job_id: str | None = None) -> list[PhotoRow]:
        """What was read of a feeder, by pole; of one job, or of all."""
        columns = [column for column in Reading.__table__.columns if column.name != "crop"]
        has_crop = Reading.crop.is_not(None).label("has_crop")  # the pictures themselves are for `crop`
        query = select(*columns, has_crop).where(Reading.feeder == feeder)
        if job_id is not None:
            query = query.where(Reading.job_id == job_id)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(Reading.pole_id, Reading.name, Reading.id)).all()
        return [_photo(row) for row in rows]

    def crop(self, crop_id: int) -> bytes | None:
        """The picture of a photo's plate. None where it is no longer kept."""
        with reading(self._engine) as connection:
            return connection.scalar(select(Reading.crop).where(Reading.id == crop_id))

    def register(self, feeder: str, poles: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """The register's poles of a feeder, and of `poles` those that it has under whatever feeder."""
        ids = sorted(poles)
        wanted = [Record.pole_id.in_(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)]
        found: dict[str, dict[str, Any]] = {}
        with reading(self._engine) as connection:
            for which in (Record.feeder == feeder, *wanted):
                for row in connection.execute(select(Record.__table__).where(which)).mappings():
                    found[row["pole_id"]] = {name: row[name] for name in ("feeder", *FIELDS)}
        return found

    def import_rows(self, rows: Iterable[RegisterRow]) -> int:
        """Replace the register's rows of these poles. All of them, or none."""
        found = {row.pole_id: row.model_dump() for row in rows}
        ids = list(found)
        with self._engine.begin() as connection:
            for start in range(0, len(ids), BATCH):
                some = ids[start : start + BATCH]
                connection.execute(delete(Record).where(Record.pole_id.in_(some)))
                connection.execute(insert(Record), [found[pole] for pole in some])
        return len(found)


def _photo(row: Any) -> PhotoRow:
    found = json.loads(row.reading)
    return PhotoRow(
        pole_id=row.pole_id,
        name=row.name,
        image_sha256=row.image_sha256,
        fields={name: found.get(name) for name in FIELDS},
        needs_review=row.needs_review,
        reasons=tuple(found.get("_reasons") or ()),
        confidence=dict(found.get("_confidence") or {}),
        crop_id=row.id if row.has_crop else None,
    )


def read_register(file: TextIO, name: str) -> Iterator[RegisterRow]:
    """The rows of a register in CSV: `pole_id`, `feeder`, any of the 11 fields. Raises RecordsError."""
    try:
        head = file.read(4096).partition("\n")[0]
    except UnicodeDecodeError as error:
        raise RecordsError(f"{name}: no CSV in UTF-8 ({error})") from None
    file.seek(0)
    delimiter = ";" if head.count(";") > head.count(",") else ","
    table = csv.DictReader(file, delimiter=delimiter, strict=True)
    seen: dict[str, int] = {}
    try:
        _check_columns(table.fieldnames or (), f"{name}: line 1")
        for row in table:
            where = f"{name}: line {table.line_num}"
            if None in row:
                raise RecordsError(f"{where}: more values than columns")
            made = _register_row(row, where, delimiter)
            if made.pole_id in seen:
                raise RecordsError(f"{where}: pole {made.pole_id!r} is in line {seen[made.pole_id]} too")
            seen[made.pole_id] = table.line_num
            yield made
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordsError(f"{name}: line {table.line_num}: no CSV in UTF-8 ({error})") from None


def _check_columns(columns: Sequence[str], where: str) -> None:
    known = {"pole_id", "feeder", *FIELDS}
    for column in ("pole_id", "feeder"):
        if column not in columns:
            raise RecordsError(
                f"{where}: column {column} is missing; the columns are {', '.join(sorted(known))}"
            )
    for column, count in sorted(Counter(columns).items()):
        if column not in known:
            raise RecordsError(f"{where}: column {column!r} is not known; rename or remove it")
        if count > 1:
            raise RecordsError(f"{where}: column {column} is there {count} times; remove all but one")


_WORDS = {"true": True, "sim": True, "1": True, "false": False, "nao": False, "não": False, "0": False}
_BANK = (1, 2, 3)  # a register has the power of a bank as a whole
_CODE = "3 to 24 characters"
_EXPECTED = {
    "potencia_kva": "a rated power in kVA (112.5), of one transformer or of up to three alike",
    "tensao_primaria": "a rated primary voltage in V (13800)",
    "tensao_secundaria": "a rated secondary voltage in V (220/127)",
    "data_fabricacao": "a date that has been: YYYY, YYYY-MM, YYYY-MM-DD, MM/YYYY or DD/MM/YYYY",
    "elo_fusivel": "a fuse link (5H)",
    "numero_serie": _CODE,
    "patrimonio": _CODE,
    "matricula": _CODE,
}


def _register_row(row: Mapping[str, str | None], where: str, delimiter: str) -> RegisterRow:
    values: dict[str, Any] = {}
    for column, raw in row.items():
        cell = (raw or "").strip()
        if cell == "":
            continue
        value = _value(column, cell, delimiter)
        if value is None or _impossible(column, value):
            raise RecordsError(f"{where}: {column} = {cell!r:.60}: not {_EXPECTED[column]}")
        values[column] = value
    try:
        return RegisterRow.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column = ".".join(str(part) for part in first["loc"])
        raise RecordsError(f"{where}: {column} = {first['input']!r:.60}: {first['msg']}") from None


def _value(column: str, cell: str, delimiter: str) -> Any:
    """A cell as a reading has its field; None where it cannot be one."""
    match column:
        case "autoprotegido":
            return _WORDS.get(cell.lower(), cell)
        case "fases":
            return int(cell) if re.fullmatch("[0-9]", cell) else cell
        case "potencia_kva" | "tensao_primaria":
            return _number(cell, delimiter)
        case "tensao_secundaria":
            return _all_of(cell, normal.secondary(cell))
        case "data_fabricacao":
            return _all_of(cell, normal.date(cell))
        case "elo_fusivel":
            return _all_of(cell, normal.fuse(cell))
        case _:
            return cell


def _number(cell: str, delimiter: str) -> float | None:
    """Between columns that ; splits a comma is the decimal point, and a dot before three digits groups."""
    if delimiter == ";":
        if re.fullmatch(r"[1-9][0-9]{0,2}(\.[0-9]{3})+(,[0-9]+)?", cell):
            cell = cell.replace(".", "")
        cell = cell.replace(",", ".")
    return float(cell) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", cell) else None


def _all_of(cell: str, value: str | None) -> str | None:
    """What was found in a cell, if that is all of it: a line has words beside its value, a cell has none."""

    def signs(text: str) -> list[str]:
        return sorted(sign for sign in fold(text) if sign.isalnum() and sign not in "0VY")

    return value if value is not None and signs(value) == signs(cell) else None


def _impossible(column: str, value: Any) -> bool:
    if column == "potencia_kva":
        return all(normal.problem(column, value / transformers) for transformers in _BANK)
    return normal.problem(column, value)
