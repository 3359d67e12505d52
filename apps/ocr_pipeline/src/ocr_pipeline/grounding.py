"""No value without the text that it stands in: what a model gives is looked for in what the vision stage
read.

A value that does not occur there becomes null and is logged. Whoever wrote the text on a plate can still not
put a
value into a field that the plate does not show, nor leave the schema.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ocr_pipeline import normal
from ocr_pipeline.labels import Label, find_labels
from ocr_pipeline.reading import FIELDS, Fields, Reason
from ocr_pipeline.stages import Candidate, Extraction, Line
from ocr_pipeline.templates import CODES, GENERIC, Template
from ocr_pipeline.words import fold, squeezed

log = logging.getLogger(__name__)

NUMBER_SIGN = re.compile(
    r"(?<![0-9A-Z])N(?:[O0][.:]*|RO?[.:]*|UM[.:]*|[.:]+)(?=[0-9])"
)  # `Nº12345`, `No.12345`
MOST_PARTS = 4  # of a code that is read in pieces
MOST_WORDS = 6  # of a date or a name: `12 DE MARÇO DE 2019`
# Nothing but a date: `03/2015`, `15.03.15`, `2015-03`, `2015`.
DATE = re.compile(
    r"(?:[0-3]?[0-9][/.\-])?[01]?[0-9][/.\-](?:(?:19|20)[0-9]{2}|[0-9]{2})"
    r"|(?:19|20)[0-9]{2}(?:[/.\-][01]?[0-9](?:[/.\-][0-3]?[0-9])?)?"
)
# A number as it is printed, with its unit or without: `13800`, `220Y`, `75KVA`; in `TR13800` is none.
MEASURE = re.compile(r"[0-9OQISBZL|]*[0-9][0-9OQISBZL|]*(?:Y|[KM]?[VU]A?)?|[KM]?[VU]A?|Y")
RATED = ("potencia_kva", "tensao_primaria", "tensao_secundaria")
DOUBTFUL = 0.85  # a value whose least sure character is below this is for a person
DOUBTFUL_CODE = 0.90  # and a number that nothing else confirms
DOUBTFUL_KNOWN = 0.70  # and one that is a rated power or voltage, as few misread ones are


def grounded(name: str, value: Any, lines: Sequence[Line], raw: str = "") -> bool:
    """Whether the value of a field occurs in the text, after normalisation.

    `raw` is what the parser cut out of a line for this value. Without it, as for what only a model gives, a
    number, date or name must be whole words of one line.
    """
    texts = [_apart(line.text) for line in lines]
    if not raw and name in (*RATED, "data_fabricacao"):
        texts += [label.rest for text in texts for label in _labels(text)]  # `FAB.03/2015`
    if not raw and name in RATED:
        texts = [_without_codes(text) for text in texts]
    joined = " ".join(texts)
    match name:
        case "potencia_kva":
            shown = normal.power(raw) == value and squeezed(raw) in squeezed(joined)
            return shown or any(_number(text, float(value)) or normal.power(text) == value for text in texts)
        case "tensao_primaria":
            # `13,8` where the label has the unit, kV.
            found = [volts for text in texts for volts in normal.voltages(text)]
            return any(float(value) in (round(volts, 1), round(1000 * volts, 1)) for volts in found)
        case "tensao_secundaria":
            wanted = {part for part in str(value).split("/") if part}
            texts = texts if raw else [_numbers(text) for text in texts]
            return any(
                wanted <= set(re.findall(r"[0-9]+(?:\.[0-9])?", _digits(text).replace(",", ".")))
                for text in texts
            ) or any(normal.secondary(text) == value for text in texts)
        case "data_fabricacao":
            if _of_two_labels(str(value), texts):
                return True
            if not raw:
                return any(str(value) == date for text in texts for date in _dates(text))
            shown = [*texts, raw]
            # That it is a week's year, its label tells.
            shown += [f"{order} {one}" for one in shown for order in (normal.WEEK_YEAR, normal.YEAR_WEEK)]
            read = any(str(value) == normal.date(text) for text in shown)
            return read and str(value)[2:4] in _digits(joined)
        case "fases":
            return any(normal.phases(text) == value for text in texts)
        case "autoprotegido":
            said = re.search("PROTE[GC]|AUTOPROT|SELFPROT", squeezed(joined)) is not None
            return said or any(name in label.fields for text in texts for label in _labels(text))
        case "elo_fusivel":
            return any(normal.fuse(text) == value for text in texts)
        case "fabricante":
            if raw:
                return squeezed(raw) in squeezed(joined)
            words = (re.findall("[0-9A-Z]+", fold(text)) for text in texts)
            return squeezed(str(value)) in {"".join(run) for some in words for run in _neighbours(some)}
        case _:
            wanted_code = squeezed(str(value))
            return bool(wanted_code) and any(wanted_code in codes(line.text) for line in lines)


def _apart(text: str) -> str:
    """A text with a space where an OCR engine left none: `ELO FUSÍVEL8K`."""
    return re.sub(r"(?<=[^\W\d_]{2})(?=[0-9])", " ", text)


def _without_codes(text: str) -> str:
    """A text without its codes: the digits of `TR-13800` or `A13800` are no number."""
    words = fold(text).split()
    return " ".join(word for word in words if not re.search("[0-9]", word) or not _is_code(word))


def _is_code(word: str) -> bool:
    return not all(MEASURE.fullmatch(part) for part in re.split(r"[^0-9A-Z|]+", word) if part)


def _numbers(text: str) -> str:
    """The words of a text that have a digit, and kV: other letters alone are no misread number."""
    return " ".join(word for word in text.split() if re.search("[0-9]|KV", word))


def _dates(text: str) -> Iterator[str | None]:
    """What whole words of a text give as a date: a part of a number, `07/19` of `5193-07/19`, is none."""
    folded = fold(text)
    if normal.WEEK.search(folded):
        yield normal.date(text)
        return
    for spaced in (folded, re.sub(r"\s*([/.\-])\s*", r"\1", folded)):
        for run in _neighbours(re.findall(r"[^\s:;=()\[\]]+", spaced)):
            shown = " ".join(run).strip(" .,-/|")
            digits = normal.ones(re.sub("[OQ]", "0", shown))
            if DATE.fullmatch(digits) or normal.NAMED_MONTH.fullmatch(shown):
                yield normal.date(shown)


def _of_two_labels(value: str, texts: Sequence[str]) -> bool:
    """Whether a month's label shows a date's month, and the text its year: `MÊS: 04 ANO: 2015`."""
    year, _, month = value.partition("-")
    found = [label for text in texts for label in _labels(text)]
    if len(month) != 2 or not any(label.unit.endswith(normal.ONLY_MONTH) for label in found):
        return False
    shown = [*texts, *(label.rest for label in found)]
    return f"--{month}" in map(normal.month, shown) and year in map(normal.date, shown)


def _neighbours(words: Sequence[str]) -> Iterator[Sequence[str]]:
    """Each run of neighbouring words."""
    for begin in range(len(words)):
        for end in range(begin + 1, min(begin + MOST_WORDS, len(words)) + 1):
            yield words[begin:end]


def _labels(text: str) -> Sequence[Label]:
    return find_labels(0, Line(text), Template(name=GENERIC))


def codes(text: str) -> list[str]:
    """What a line shows as a whole: each of its words, and each run of neighbouring ones, as an engine splits
    a code. `12345` is none of `12345-6` and `A12345`; a label that is glued to a code is no part of it. Once
    for each place.
    """
    found = _runs(text)
    return found + [one for label in _labels(text) for one in _runs(label.rest) if one not in found]


def _runs(text: str) -> list[str]:
    words = normal.CODE.findall(NUMBER_SIGN.sub(" ", fold(text)))
    return [
        squeezed("".join(words[begin:end]))
        for begin in range(len(words))
        for end in range(begin + 1, min(begin + MOST_PARTS, len(words)) + 1)
    ]


def shared(values: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    """Numbers that more fields have than the text shows them: one of these has another's."""
    held = {name: squeezed(values[name]) for name in CODES if values.get(name) is not None}
    shown = [one for line in lines for one in codes(line.text)]
    return [name for name, one in held.items() if [*held.values()].count(one) > max(1, shown.count(one))]


def _digits(text: str) -> str:
    from ocr_pipeline.words import as_digits

    return as_digits(fold(text))


def _number(text: str, value: float) -> bool:
    """Whether a text shows a number as a word of its own: not `45` of `984512`, nor 10 of `PRIMARIO`."""
    whole = rf"(?<![0-9A-Z])(?<![0-9][.,])({normal.NUMBER})(?=[KM]?[VU]A\b|(?![.,]?[0-9A-Z]))"
    found = (raw for raw in re.findall(whole, fold(text)) if re.search("[0-9]", raw))
    return any(normal.number(raw) == value for raw in found)


def _cut_from(candidate: Candidate, lines: Sequence[Line]) -> str:
    """The words that a value was cut from, where its own line has them: no others are the plate's."""
    if candidate.line is None:
        return ""
    line, wanted = lines[candidate.line], squeezed(candidate.raw)
    shown = bool(wanted) and (wanted in squeezed(line.text) or wanted in squeezed(line.second))
    return candidate.raw if shown else ""


def _may_go_on(candidate: Candidate, lines: Sequence[Line]) -> bool:
    """Whether a patch lies where a value begins or ends: `77280-8` may be the rest of `2977280-8`.

    Voltages and powers show it by their form; a code has none.
    """
    if candidate.line is None:
        return False
    line, raw = lines[candidate.line], squeezed(candidate.raw)
    before, behind = line.beside
    text = squeezed(line.text)
    return (before and text.startswith(raw)) or (behind and text.endswith(raw))


def settle(extraction: Extraction, lines: Sequence[Line]) -> tuple[dict[str, Any], list[str]]:
    """The values that stand, all 11 keys, and the reasons for review."""
    reasons = list(extraction.reasons)
    values: dict[str, Any] = dict.fromkeys(FIELDS)
    for name, candidate in extraction.candidates.items():
        if candidate.value is None or name not in values:
            continue
        try:
            value = getattr(Fields.model_validate({name: candidate.value}), name)
        except ValidationError:
            log.warning("%s: a value that the schema refuses was dropped", name)
            reasons.append(f"{Reason.MODEL_OUTPUT_INVALID}:{name}")
            continue
        if not grounded(name, value, lines, _cut_from(candidate, lines)):
            log.warning("%s: a value that the text does not show was dropped", name)
            reasons.append(f"{Reason.NOT_GROUNDED}:{name}")
            continue
        values[name] = value
        impossible = normal.problem(name, value)
        if impossible:
            reasons.append(f"{Reason.OUT_OF_DOMAIN}:{name}")
        known = name in RATED and not impossible
        least = DOUBTFUL_CODE if name in CODES else DOUBTFUL_KNOWN if known else DOUBTFUL
        if candidate.confidence < least or (name in CODES and _may_go_on(candidate, lines)):
            reasons.append(f"{Reason.LOW_CONFIDENCE}:{name}")
    reasons += [f"{Reason.SHARED_SOURCE}:{name}" for name in shared(values, lines)]
    reasons += [f"{Reason.INCONSISTENT}:{name}" for name in normal.inconsistent(values)]
    return values, reasons
