"""A feeder's report: pole by pole, what the photos say against what the records say. For an auditor."""

from __future__ import annotations

import base64
import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib import resources
from typing import Any

import jinja2

from ocr_pipeline.jobs.tables import State
from ocr_pipeline.reading import FIELDS
from ocr_pipeline.records.bank import bank_size, power_agrees
from ocr_pipeline.records.store import PhotoRow, RecordStore

POWER = "potencia_kva"
# What each transformer of a bank has of its own; everything else is the same on all of them.
EACH_ITS_OWN = frozenset({"fabricante", "numero_serie", "patrimonio", "matricula", "data_fabricacao"})
PIECE = 65536  # characters of a page that are handed out together
Picture = Callable[[int], bytes | None]
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class Verdict(StrEnum):
    """How one field of a pole stands."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NOT_READ = "not read"
    NOT_RECORDED = "not in the records"
    CONFLICTING = "photos disagree"
    EMPTY = "neither"


@dataclass(frozen=True)
class Cell:
    """One field: what was read, what the records say. `note` is for a person."""

    field: str
    read: Any
    record: Any
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Crop:
    """A plate's picture beside its fields, by its number: a feeder's pictures together are too many."""

    name: str
    crop_id: int


@dataclass(frozen=True)
class Sent:
    """What the job tables say: the state of the job, "" where it is of all jobs; photos by pole and state."""

    state: str
    poles: Mapping[str, Counter[State]]


@dataclass(frozen=True)
class Unread:
    """Photos that were sent and not read. `sent` is 0 where there was none."""

    sent: int = 0
    failed: int = 0
    cancelled: int = 0
    waiting: int = 0

    @classmethod
    def of(cls, states: Counter[State]) -> Unread:
        """Those of photos by state."""
        waiting = states[State.QUEUED] + states[State.LEASED]
        return cls(states.total(), states[State.FAILED], states[State.CANCELLED], waiting)

    @property
    def count(self) -> int:
        """All of them."""
        return self.failed + self.cancelled + self.waiting

    def __str__(self) -> str:
        """For a person; empty where all were read."""
        told = [f"{self.failed} failed", f"{self.cancelled} cancelled", f"{self.waiting} not yet read"]
        why = ", ".join(part for part in told if not part.startswith("0 "))
        return f"{self.sent - self.count} of {self.sent} photos were read: {why}" if why else ""


@dataclass(frozen=True)
class Pole:
    """A pole of the report. `record_feeder`: under which the register has it, "" where it does not."""

    pole_id: str
    photos: int
    unread: Unread
    transformers: int
    record_feeder: str
    cells: tuple[Cell, ...]
    reasons: tuple[str, ...]
    crops: tuple[Crop, ...]

    @property
    def verdict(self) -> str:
        """In one word: what an auditor has to do here."""
        if not self.photos:
            return "not read" if self.unread.sent else "no photo"
        if not self.record_feeder:
            return "no record"
        verdicts = {cell.verdict for cell in self.cells}
        if verdicts & {Verdict.DIFFERS, Verdict.CONFLICTING}:
            return "differs"
        if self.reasons:
            return "review"
        power = next(cell.verdict for cell in self.cells if cell.field == POWER)
        compared = power is Verdict.AGREES and Verdict.NOT_READ not in verdicts and not self.unread.count
        return "agrees" if compared else "incomplete"


@dataclass(frozen=True)
class Report:
    """A feeder. `state` is the job's; `unread` None where the job tables were not asked."""

    feeder: str
    job_id: str | None
    state: str
    unread: Unread | None
    made_at: datetime
    poles: tuple[Pole, ...]
    picture: Picture

    @property
    def summary(self) -> dict[str, int]:
        """Poles by verdict."""
        return dict(sorted(Counter(pole.verdict for pole in self.poles).items()))

    def stream(self, format: str) -> tuple[Iterator[bytes], str]:  # noqa: A002 - what it is
        """The report as html, csv or json, piece by piece, and its media type. One picture at a time."""
        if format == "csv":
            return iter([_csv(self).encode("utf-8-sig")]), "text/csv; charset=utf-8"
        if format == "json":
            plain = json.dumps(_plain(self), ensure_ascii=False, indent=1) + "\n"
            return iter([plain.encode()]), "application/json"
        return _html(self), "text/html; charset=utf-8"


def build(
    store: RecordStore, feeder: str, job_id: str | None = None, sent: Sent | None = None
) -> Report | None:
    """The report of a feeder, of one job's photos or of all. None where nothing of it is known."""
    photos = store.photos(feeder, job_id)
    states = sent.poles if sent else {}
    register = store.register(feeder, {photo.pole_id for photo in photos} | states.keys())
    if not photos and not states and (job_id is not None or not register):
        return None
    counts = store.bank_counts(feeder)
    by_pole: dict[str, list[PhotoRow]] = {pole: [] for pole in (*register, *states)}
    for photo in photos:
        by_pole.setdefault(photo.pole_id, []).append(photo)
    poles = tuple(
        _pole(
            pole_id,
            found,
            Unread.of(states.get(pole_id, Counter())),
            register.get(pole_id),
            counts.get(pole_id, 0),
        )
        for pole_id, found in sorted(by_pole.items())
    )
    unread = Unread.of(sum(states.values(), Counter())) if sent else None
    return Report(feeder, job_id, sent.state if sent else "", unread, datetime.now(UTC), poles, store.crop)


def _pole(
    pole_id: str, photos: list[PhotoRow], unread: Unread, record: dict[str, Any] | None, plates: int
) -> Pole:
    transformers = bank_size(plates)
    distinct = list({photo.image_sha256: photo for photo in photos}.values())
    reasons = sorted({reason for photo in distinct for reason in photo.reasons})
    if any(photo.needs_review for photo in distinct) and not reasons:
        reasons = ["review"]
    cells = tuple(
        _cell(name, [photo.fields[name] for photo in distinct], record, transformers) for name in FIELDS
    )
    crops = tuple(Crop(photo.name, photo.crop_id) for photo in distinct if photo.crop_id is not None)
    feeder = record["feeder"] if record else ""
    return Pole(pole_id, len(distinct), unread, transformers, feeder, cells, tuple(reasons), crops)


def _cell(name: str, values: Iterable[Any], record: dict[str, Any] | None, transformers: int) -> Cell:
    found = [value for value in values if value is not None]
    distinct = list({_folded(value): value for value in found}.values())
    recorded = record.get(name) if record else None
    bank = transformers > 1
    if not distinct:
        verdict = Verdict.EMPTY if recorded is None else Verdict.NOT_READ
        return Cell(name, None, recorded, verdict)
    if len(distinct) > 1:
        if not bank or name not in EACH_ITS_OWN:
            return Cell(name, distinct, recorded, Verdict.CONFLICTING)
        agrees = any(_folded(value) == _folded(recorded) for value in distinct)
        known = Verdict.AGREES if agrees else Verdict.DIFFERS
        verdict = Verdict.NOT_RECORDED if recorded is None else known
        return Cell(name, distinct, recorded, verdict, f"bank of {transformers}")
    value = distinct[0]
    if recorded is None:
        return Cell(name, value, None, Verdict.NOT_RECORDED)
    if name == POWER:
        agrees = power_agrees(value, transformers, recorded)
        note = f"bank: {value:g} x {transformers} = {value * transformers:g}" if bank else ""
        return Cell(name, value, recorded, Verdict.AGREES if agrees else Verdict.DIFFERS, note)
    same = _same_date(value, recorded) if name == "data_fabricacao" else _folded(value) == _folded(recorded)
    return Cell(name, value, recorded, Verdict.AGREES if same else Verdict.DIFFERS)


def _folded(value: Any) -> str:
    """Equal for what a person would call the same: case, accents, spaces and 112.50 aside."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        return f"{value:g}"
    plain = unicodedata.normalize("NFKD", str(value))
    return "".join(letter for letter in plain.casefold() if letter.isalnum() or letter == "/")


def _same_date(one: str, other: str) -> bool:
    """Dates agree as far as both are precise."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


# --- what is handed out ---


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "sim" if value else "não"
    if isinstance(value, list):
        return " | ".join(_shown(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def safe_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: a plate may carry any text."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _csv(report: Report) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        [
            "feeder",
            "pole",
            "verdict",
            "photos",
            "transformers",
            "field",
            "read",
            "record",
            "field verdict",
            "note",
            "reasons",
            "record feeder",
            "job state",
            *(f"photos {name}" for name in vars(Unread())),
        ]
    )
    for pole in report.poles:
        for cell in pole.cells:
            row = [
                report.feeder,
                pole.pole_id,
                pole.verdict,
                pole.photos,
                pole.transformers,
                cell.field,
                _shown(cell.read),
                _shown(cell.record),
                cell.verdict.value,
                cell.note,
                " ".join(pole.reasons),
                pole.record_feeder,
                report.state,
                *(vars(pole.unread).values() if report.unread else ()),
            ]
            writer.writerow([safe_cell(str(value)) for value in row])
    return out.getvalue()


def _plain(report: Report) -> dict[str, Any]:
    return {
        "feeder": report.feeder,
        "job": report.job_id,
        "state": report.state or None,
        "unread": vars(report.unread) if report.unread else None,
        "made_at": report.made_at.isoformat(timespec="seconds"),
        "summary": report.summary,
        "poles": [
            {
                "pole": pole.pole_id,
                "verdict": pole.verdict,
                "photos": pole.photos,
                "unread": vars(pole.unread) if report.unread else None,
                "record_feeder": pole.record_feeder or None,
                "transformers": pole.transformers,
                "reasons": list(pole.reasons),
                "fields": {
                    cell.field: {
                        "read": cell.read,
                        "record": cell.record,
                        "verdict": cell.verdict.value,
                        "note": cell.note,
                    }
                    for cell in pole.cells
                },
                "crops": [crop.name for crop in pole.crops],
            }
            for pole in report.poles
        ],
    }


def _html(report: Report) -> Iterator[bytes]:
    source = (resources.files("ocr_pipeline.records") / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["shown"] = _shown

    def address(crop: Crop) -> str:
        """For a page that stands alone; empty where the picture has gone meanwhile."""
        jpeg = report.picture(crop.crop_id)
        return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() if jpeg else ""

    piece, size = [], 0
    for text in environment.from_string(source).generate(report=report, address=address):
        piece.append(text)
        size += len(text)
        if size >= PIECE:
            yield "".join(piece).encode()
            piece, size = [], 0
    yield "".join(piece).encode()
