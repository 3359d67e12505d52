"""The deterministic reasoner: labels, units and places to fields. No model, the same answer every time.

1. Every line is searched for labels; what follows a label up to the next one is its own text.
2. A label without a usable text of its own takes the nearest line to its right, or below it, that is no
label and
   that no nearer label takes.
3. What has no label is known by its unit (`112,5 kVA`) or its word (TRIFASICO, a manufacturer's name) alone.
Two different values for one field, or a second reading of the line that gives another value, are for a
person.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ocr_pipeline import normal
from ocr_pipeline.filters import clusters
from ocr_pipeline.geometry import Box
from ocr_pipeline.reading import Reason
from ocr_pipeline.stages import Candidate, Deadline, Extraction, Line, PoleIdContext
from ocr_pipeline.templates import CODES, Template, Templates, labels
from ocr_pipeline.words import alike, distance, fold

OTHER = "_other"
PARSERS: dict[str, Callable[[str], Any]] = {
    "potencia_kva": normal.power,
    "numero_serie": normal.code,
    "data_fabricacao": normal.date,
    "elo_fusivel": normal.fuse,
    "tensao_primaria": normal.primary,
    "tensao_secundaria": normal.secondary,
    "fases": normal.phases,
    "autoprotegido": normal.self_protected,
    "patrimonio": normal.code,
    "matricula": normal.code,
}
BARE = re.compile(
    r"^[\s\W]*(?:\(?\s*(?:KVA|KV|V|VOLTS?|A|HZ|KG|L|%)\s*\)?)?[\s\W]*$"
)  # nothing, or only a unit
ANSWER = re.compile(r"(?:SIM|NAO)(?![A-Z])")  # a value, never a label's first word: `NÃO   FASES: 3`
VALUE = re.compile(r"[2-9]|[0-9]{2}")  # digits that no letter was misread for
REACH_RIGHT = 16.0  # of the label's height: a value further off belongs to something else
REACH_BELOW = 1.6
SHORTEST_END, LONGEST_END = 4, 20  # letters of a label that is left where its beginning is cut off
NUMBERS = frozenset(PARSERS) - {"fases", "autoprotegido"}  # a word alone is no value of these
CODE_ALONE = re.compile(r"[A-Z]{0,3}[0-9]{5,9}(?:-[0-9])?")
FORMS = (  # what only one field looks like, its label unread
    ("tensao_primaria", re.compile(r"[0-9]{4,5}(?:\s*[/-]\s*[0-9]{4,5})+\s*V?")),
    ("tensao_secundaria", re.compile(r"[1-4][0-9]{2}\s*/\s*[1-4][0-9]{2}\s*V?")),
)
WORD = 3  # letters: SIM, TRIFASICO
_COMPANY = "TRANSFORMADORES EQUIPAMENTOS ELETRICOS ELETRICA PRODUTOS COMERCIO LTDA ENERGIA INDUSTRIAL"
_TITLE = """TRANSFORMADOR DISTRIBUICAO INDUSTRIA BRASILEIRA BRASIL TRIFASICO MONOFASICO BIFASICO PLACA
IDENTIFICACAO FABRICADO NORMA ABNT NBR OLEO MINERAL VEGETAL IMERSO AUTOPROTEGIDO"""
COMPANY = tuple(_COMPANY.split())
TITLE = tuple(_TITLE.split())  # words that stand above a nameplate and name nobody
NO_NAME = (*COMPANY, *TITLE)
PLATE_LABELS = 3  # below a heading
LARGE = 1.35  # of the usual height of a line
MOST_NAMES = 3  # words of a name
UNLABELLED = 0.9  # confidence of what only a unit gives away, beside a labelled value's 1


@dataclass(frozen=True)
class Label:
    """A label in a line: from `start` to `end` of its text; `rest` is what follows up to the next label."""

    field: str
    line: int
    start: int
    end: int
    rest: str
    rest_at: int
    box: Box | None


@dataclass(frozen=True)
class _Found:
    """A value with all that must be known to choose among several."""

    candidate: Candidate
    cost: float


class Parser:
    """The embedded stage 2."""

    def __init__(self, templates: Templates) -> None:
        self.templates = templates

    def extract(self, lines: Sequence[Line], context: PoleIdContext, deadline: Deadline) -> Extraction:
        """Candidates for the fields. See the module."""
        extraction = Extraction()
        maker = self._manufacturer(lines, extraction)
        template = self.templates.of(maker)
        found_labels = [label for at, line in enumerate(lines) for label in find_labels(at, line, template)]
        deadline.check("reasoning")
        found: dict[str, list[_Found]] = {}
        taken: set[tuple[int, int]] = set()
        self._own_text(found_labels, lines, found, taken)
        self._neighbours(found_labels, lines, found, taken)
        self._by_unit(found_labels, lines, found, taken)
        groups = clusters([line.box for line in lines])

        def beside(candidate: Candidate) -> int:
            """How many lines stand with a candidate's: a label beside the plate is a small group."""
            return len(groups[candidate.line]) if candidate.line is not None else 0

        for name, values in found.items():
            self._choose(name, values, beside, template, extraction)
        labelled = {label.line for label in found_labels}
        if any(
            CODE_ALONE.fullmatch(fold(line.text)) and at not in labelled and (at, 0) not in taken
            for at, line in enumerate(lines)
        ):
            extraction.reasons.append(Reason.UNLABELLED_VALUE)
        for label in found_labels:
            if label.field not in (OTHER, "fabricante") and label.field not in extraction.candidates:
                extraction.reasons.append(f"{Reason.UNREAD_LABEL}:{label.field}")
        return extraction

    # --- the three ways to a value ---

    def _own_text(
        self,
        found_labels: Sequence[Label],
        lines: Sequence[Line],
        found: dict[str, list[_Found]],
        taken: set[tuple[int, int]],
    ) -> None:
        for label in found_labels:
            if label.field == "fabricante" or _says_nothing(label):
                continue
            taken.add((label.line, label.rest_at))
            if label.field == OTHER:
                continue
            candidate = _candidate(label.field, lines, label.line, label.rest, label.rest_at)
            if candidate is not None:
                found.setdefault(label.field, []).append(_Found(candidate, 0.0))

    def _neighbours(
        self,
        found_labels: Sequence[Label],
        lines: Sequence[Line],
        found: dict[str, list[_Found]],
        taken: set[tuple[int, int]],
    ) -> None:
        labelled = {label.line for label in found_labels}
        pairs: list[tuple[float, int, int]] = []
        for at, label in enumerate(found_labels):
            if label.field == "fabricante" or not _says_nothing(label):
                continue
            for other, line in enumerate(lines):
                if other in labelled or other == label.line:
                    continue
                cost = _far(label, line, other - label.line)
                if cost is not None:
                    pairs.append((cost, at, other))
        done: set[int] = set()
        used: set[int] = set()
        for cost, at, other in sorted(pairs):
            label = found_labels[at]
            if at in done or other in used:
                continue
            if label.field == OTHER:
                if re.search(r"[0-9]", lines[other].text):
                    done.add(at)
                    used.add(other)
                    taken.add((other, 0))
                continue
            candidate = _candidate(label.field, lines, other, lines[other].text, 0) or _second(
                label.field, lines, other
            )
            if candidate is not None:
                done.add(at)
                used.add(other)
                taken.add((other, 0))
                found.setdefault(label.field, []).append(_Found(candidate, 1.0 + cost))

    def _by_unit(
        self,
        found_labels: Sequence[Label],
        lines: Sequence[Line],
        found: dict[str, list[_Found]],
        taken: set[tuple[int, int]],
    ) -> None:
        free = []
        for at, line in enumerate(lines):
            first = min((label.start for label in found_labels if label.line == at), default=len(line.text))
            if (at, 0) not in taken and first > 0:
                free.append((at, line.text[:first]))
        everything = [(at, line.text) for at, line in enumerate(lines)]
        for at, text in free:
            folded = fold(text)
            if "potencia_kva" not in found and re.search(r"[0-9]\s*K[VU]A\b", folded):
                self._add("potencia_kva", lines, at, text, found)
            if re.search(
                r"[0-9]{4,5}\s*(?:[-/]\s*[0-9]{4,5}\s*)*[-/]\s*[0-9]{3}\s*/\s*[0-9]{3}\s*V\b", folded
            ):
                # `13800 - 380/220 V`: both voltages in one line.
                for name in ("tensao_primaria", "tensao_secundaria"):
                    if name not in found:
                        part = text if name == "tensao_primaria" else re.split(r"[-/]", text, maxsplit=1)[1]
                        self._add(name, lines, at, part, found)
            for name, form in FORMS:
                if name not in found and form.fullmatch(folded.strip()):
                    self._add(name, lines, at, text, found)
        for at, text in everything:
            folded = fold(text)
            if "fases" not in found and re.search(r"TRIF\w?[AS]|MONOF\w?[AS]|BIF\w?[AS]IC", folded):
                self._add("fases", lines, at, text, found)
        if "autoprotegido" not in found:
            for label in found_labels:
                # The word alone, as a type: `TRANSFORMADOR AUTOPROTEGIDO`.
                if label.field == "autoprotegido" and label.start > 0 and BARE.match(fold(label.rest)):
                    line = lines[label.line]
                    found["autoprotegido"] = [
                        _Found(Candidate(True, line.text, label.line, min(UNLABELLED, line.weakest)), 2.0)
                    ]

    def _add(
        self, name: str, lines: Sequence[Line], at: int, text: str, found: dict[str, list[_Found]]
    ) -> None:
        candidate = _candidate(name, lines, at, text, lines[at].text.find(text))
        if candidate is not None:
            sure = min(UNLABELLED, candidate.confidence)
            found[name] = [_Found(Candidate(candidate.value, candidate.raw, candidate.line, sure), 2.0)]

    # --- choosing ---

    def _choose(
        self,
        name: str,
        values: list[_Found],
        beside: Callable[[Candidate], int],
        template: Template,
        extraction: Extraction,
    ) -> None:
        values.sort(key=lambda value: (-beside(value.candidate), value.cost, -value.candidate.confidence))
        best = values[0].candidate
        if any(other.candidate.value != best.value for other in values[1:]):
            extraction.reasons.append(f"{Reason.AMBIGUOUS}:{name}")
        if name in CODES:
            pattern = template.patterns.get(name)  # type: ignore[call-overload]
            if pattern is not None and not re.fullmatch(pattern, str(best.value)):
                extraction.reasons.append(f"{Reason.OUT_OF_DOMAIN}:{name}")
        if name in template.absent:
            extraction.reasons.append(f"{Reason.FILTERS_DISAGREE}:{name}")
        extraction.candidates[name] = best

    def _manufacturer(self, lines: Sequence[Line], extraction: Extraction) -> str | None:
        """The manufacturer: after its label, else the highest line that names one."""
        for at, line in enumerate(lines):
            label = re.match(r"\W*(?:FABRICANTE|FABRICADO POR|MARCA)\b[\s:.\-]*(.+)", fold(line.text))
            if label and (value := label.group(1).strip(" .:-")):
                known = self.templates.named_in(value)
                name = known[0] if known else value[:40]
                if known is None:
                    extraction.reasons.append(f"{Reason.UNKNOWN_MANUFACTURER}:fabricante")
                extraction.candidates["fabricante"] = Candidate(
                    name, known[1] if known else value[:40], at, line.confidence
                )
                return name
        names: list[tuple[int, str, str]] = []
        for at, line in enumerate(lines):
            if known := self.templates.named_in(line.text):
                names.append((at, *known))
        if not names:
            return self._heading(lines, extraction)
        at, name, raw = names[0]
        if any(other != name for _, other, _ in names):
            extraction.reasons.append(f"{Reason.AMBIGUOUS}:fabricante")
        extraction.candidates["fabricante"] = Candidate(name, raw, at, lines[at].confidence)
        return name

    def _heading(self, lines: Sequence[Line], extraction: Extraction) -> str | None:
        """A manufacturer in no template: large words above all labels, or a company's. For a person."""
        labelled = [
            line.box.top
            for at, line in enumerate(lines)
            if line.box and find_labels(at, line, self.templates.generic)
        ]
        if len(labelled) < PLATE_LABELS:
            return None
        usual = median(line.box.height for line in lines if line.box)
        for at, line in enumerate(lines):
            if line.box is None or line.box.middle[1] > min(labelled):
                continue
            words = re.findall(r"[0-9A-Z&]+", fold(line.text))
            own = [word for word in words if not any(alike(word, known) for known in NO_NAME)]
            titled = any(alike(word, known) for word in words for known in TITLE)
            company = any(word in COMPANY for word in words)
            name = " ".join(word for word in own if word not in ("E", "DE", "DO", "DA", "S", "A"))
            if not re.fullmatch(r"[A-Z&][A-Z& ]{2,39}", name) or len(own) > MOST_NAMES:
                continue
            if company or (line.box.height > LARGE * usual and not titled):
                extraction.candidates["fabricante"] = Candidate(name, name, at, line.confidence)
                extraction.reasons.append(f"{Reason.UNKNOWN_MANUFACTURER}:fabricante")
                return name
        return None


def find_labels(at: int, line: Line, template: Template) -> list[Label]:
    """The labels of a line from left to right, none overlapping another."""
    text = line.text
    signs = [
        (place, sign)
        for place, original in enumerate(text)
        for sign in fold(original)
        if sign.isalnum() and sign.isascii()
    ]
    flat = "".join(sign for _, sign in signs)
    spans: list[tuple[int, int, str]] = []
    start = 0
    while start < len(flat):
        place = signs[start][0]
        if not _begins(text, place) or ANSWER.match(fold(text[place : place + 4])):
            start += 1
            continue
        match = _longest(flat, start, text, signs, template)
        if match is None and start == 0:
            match = _end_of_one(flat, text, signs, template)
        if match is None:
            start += 1
            continue
        name, length = match
        spans.append((place, signs[start + length - 1][0] + 1, name))
        start += length
    found = []
    for number, (begin, end, name) in enumerate(spans):
        until = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        rest = text[end:until]
        skipped = re.match(r"[\s:;.,=_\-)\]]*(?:\(\s*[A-Za-z%]{1,4}\s*\)[\s:;.=_\-]*)?", rest)
        offset = skipped.end() if skipped else 0
        found.append(
            Label(name, at, begin, end, rest[offset:].rstrip(" :;,_|"), end + offset, _part(line, begin, end))
        )
    return found


def _says_nothing(label: Label) -> bool:
    """Whether the value stands elsewhere: what follows the label is nothing, a unit, or the rest of its own
    words (`DATA F` beside a date).
    """
    return BARE.match(fold(label.rest)) is not None or (
        label.field in NUMBERS and re.fullmatch(r"[A-Z]{1,2}\W*", fold(label.rest)) is not None
    )


def _begins(text: str, place: int) -> bool:
    """Whether a word may begin here: at the start, or after what is no letter or digit."""
    return (
        place == 0 or not text[place - 1].isalnum() or (text[place - 1].isdigit() and text[place].isalpha())
    )


def _longest(
    flat: str, start: int, text: str, signs: Sequence[tuple[int, str]], template: Template
) -> tuple[str, int] | None:
    """The longest label that stands at `start`, as (field, length), with few wrong letters."""
    best: tuple[float, str, int] | None = None
    for name, phrase in _phrases(template):
        allowed = 0 if len(phrase) < 6 else 1 if len(phrase) < 9 else 2
        for length in (len(phrase), len(phrase) - 1, len(phrase) + 1) if allowed else (len(phrase),):
            end = start + length
            if length < 2 or end > len(flat):
                continue
            part = flat[start:end]
            if part != phrase and (not allowed or not _might_be(part, phrase)):
                continue
            if part != phrase and VALUE.search(part) and not VALUE.search(phrase):
                continue  # `POTÊNCIA: 75 kVA` is no misread `POTÊNCIA EM kVA`
            if part != phrase and phrase[0] == "N" and part.startswith("DE"):
                continue  # `DE FABRICAÇÃO`, the rest of a date's label, is no misread `Nº FABRICAÇÃO`
            wrong = 0 if part == phrase else distance(part, phrase, allowed)
            if wrong > allowed or not _ends(text, signs, end, len(phrase)):
                continue
            score = len(phrase) - 1.5 * wrong
            if best is None or score > best[0]:
                best = (score, name, length)
    return (best[1], best[2]) if best else None


def _end_of_one(
    flat: str, text: str, signs: Sequence[tuple[int, str]], template: Template
) -> tuple[str, int] | None:
    """A label without its beginning: `TÊNCIA: 75`, where all labels that end so are of one field."""
    for length in range(min(len(flat), LONGEST_END), SHORTEST_END - 1, -1):
        ending = [(name, phrase) for name, phrase in _phrases(template) if phrase.endswith(flat[:length])]
        if not any(length < len(phrase) <= 2 * length for _, phrase in ending):
            continue
        if len({name for name, _ in ending}) == 1 and _ends(text, signs, length, length):
            return ending[0][0], length
    return None


def _phrases(template: Template) -> list[tuple[str, str]]:
    from ocr_pipeline.words import squeezed

    own = [(name, squeezed(phrase)) for name, phrases in template.labels.items() for phrase in phrases]
    return own + [(name, phrase) for name, phrases in labels().items() for phrase in phrases]


def _might_be(part: str, phrase: str) -> bool:
    """A cheap look before the distance is computed: one of three pieces is the same."""
    third = len(phrase) // 3
    return (
        part[:third] == phrase[:third]
        or phrase[third : 2 * third] in part
        or part[-third:] == phrase[-third:]
    )


def _ends(text: str, signs: Sequence[tuple[int, str]], end: int, size: int) -> bool:
    """Whether a label may end before the sign `end`: no letter follows at once, nor a digit a short one."""
    if end >= len(signs):
        return True
    place, before = signs[end][0], signs[end - 1][0]
    if place > before + 1:
        return True
    return text[place].isdigit() and size >= 4


def _part(line: Line, begin: int, end: int) -> Box | None:
    """Where the characters from `begin` to `end` of a line lie, as if all were of one width."""
    if line.box is None or not line.text:
        return line.box
    unit = line.box.width / len(line.text)
    return Box(line.box.left + begin * unit, line.box.top, line.box.left + end * unit, line.box.bottom)


def _far(label: Label, line: Line, after: int) -> float | None:
    """How far a line is from a label that it may be the value of, in heights; None where it cannot be."""
    if label.box is None or line.box is None:
        return 0.5 if after == 1 else None  # only text: the value stands in the next line
    height = max(1.0, min(label.box.height, line.box.height))
    common = min(label.box.bottom, line.box.bottom) - max(label.box.top, line.box.top)
    gap = line.box.left - label.box.right
    if common > 0.5 * height and -0.6 * height < gap < REACH_RIGHT * label.box.height:
        return max(0.0, gap) / label.box.height * 0.25
    drop = line.box.top - label.box.bottom
    across = min(label.box.right, line.box.right) - max(label.box.left, line.box.left)
    if -0.5 * height < drop < REACH_BELOW * label.box.height and across > 0.3 * min(
        label.box.width, line.box.width
    ):
        aligned = abs(line.box.left - label.box.left) / label.box.height
        centred = abs(line.box.middle[0] - label.box.middle[0]) / label.box.height
        return 0.6 + max(0.0, drop) / label.box.height + 0.15 * min(aligned, centred)
    return None


def _candidate(name: str, lines: Sequence[Line], at: int, text: str, start: int) -> Candidate | None:
    """The value of a field in a text of a line, as sure as the least sure character of that text."""
    value = PARSERS[name](text)
    if value is None:
        return None
    return Candidate(value, text, at, sureness(lines[at], max(0, start), text))


def _second(name: str, lines: Sequence[Line], at: int) -> Candidate | None:
    """The value that only the second reading of a line gives: for a person."""
    value = PARSERS[name](lines[at].second) if lines[at].second else None
    return None if value is None else Candidate(value, lines[at].second, at, min(0.5, lines[at].weakest))


def sureness(line: Line, start: int, text: str) -> float:
    """The least sure letter or digit of a part of a line; the mean of a word: most of its letters name it."""
    weights = line.weights[start : start + len(text)]
    sure = [weight for weight, sign in zip(weights, text, strict=False) if sign.isalnum()]
    if not sure:
        return line.weakest
    word = sum(sign.isalpha() for sign in text) >= WORD and not any(sign.isdigit() for sign in text)
    return sum(sure) / len(sure) if word else min(sure)
