"""The deterministic reasoner: labels, units and places to fields. No model, the same answer every time.

1. Every line is searched for labels (`labels`); what follows a label up to the next one is its own text, and
what stands before the only one, `3 PHASE`, where nothing follows.
2. A label without a usable text of its own takes the nearest line to its right, below it, or anywhere in its
cell, that is no label and that no nearer label takes.
3. What has no label is known by its unit (`112,5 kVA`), its form (a table of taps) or its word (TRIFASICO, a
manufacturer's name) alone.
Two different values for one field, or a second reading of the line that gives another value, are for a
person.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import Any

from ocr_pipeline import labels, normal
from ocr_pipeline.filters import clusters
from ocr_pipeline.geometry import Box
from ocr_pipeline.labels import BARE, DATE, MAKER, VOLTAGES, Label, find_labels, part_of
from ocr_pipeline.reading import Reason
from ocr_pipeline.stages import Candidate, Deadline, Extraction, Line, PoleIdContext
from ocr_pipeline.templates import CODES, Template, Templates
from ocr_pipeline.words import distance, fold

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
REACH_RIGHT = 16.0  # of the label's height: a value further off belongs to something else
REACH_BELOW = 1.6
BLANK = 3.0  # of a value's height: digits no further beside it may be its rest
NEAR = 2.5  # of its height: a unit no further behind a number is that number's
COLUMN = 4.0  # of a label's height: labels that begin less than that apart are of one column
LONGEST_TAIL = 20  # signs: `NOMINAL`, `CONTÍNUA`, the rest of a label's own words
PROTECTED = ("autoprotegido",)
NUMBERS = frozenset(PARSERS) - {"fases", "autoprotegido"}  # a word alone is no value of these
LEADERS = re.compile(r"^[\s.]{2,}")  # dots up to a value
WORDED = (*CODES, DATE, "potencia_kva")  # what other things have too
GROUP = re.compile(r"[\s./\\,\-]*[0-9]+(?:[\s./\\,\-]+[0-9]+)*\s?(?:[A-Z]|K?VA?)?[.\s]*")
# `NBR 5440 ANO 2014`, `NORMA/ANO`: what stands before the label of a standard's year.
STANDARD = re.compile(
    r"(?<![A-Z])(?:NORMAS?|ABNT|NBR|IEC|ANSI|IEEE|STANDARDS?)(?:[\W0-9]|NBR|IEC|VERSAO|REV(?:ISAO)?|ED(?:ICAO)?|D[EOA])*$"
)
BARE_DATE = re.compile(r"\W*(?:ANO|DATA|DATE|FECHA|YR|YEAR)\W*")  # it does not say of what
BARE_MONTH = re.compile(r"\W*(?:MES|MONTH)\W*")
BROKEN = (*WORDED, "tensao_secundaria")  # of several taps the first is right all the same
CODE_ALONE = re.compile(r"[A-Z]{0,3}[0-9]{5,9}(?:-[0-9])?")
BARE_NUMBER = re.compile(
    r"\W*(?P<sign>N ?[º°ª.:*'\"]|N[P2](?=[ .:])|N\.?[oO0]\.?(?=[\W\d]|$)|N[rR][oO]?\.?(?=[\W\d]|$)"
    r"|N[uú]m(?:ero)?(?![a-z])|N[UÚ]MERO)"
    r"[\W_]*(?P<rest>(?!CIA)(?:[0-9A-Z]{1,3}[ -]?)?[0-9]{5,10}(?:[/-][0-9A-Z]{1,4})?)?\W*"
)
# Both voltages: `13800 - 380/220 V`, `13,200 V - 220Y/127 V`, `13,8 kV / 220 V`.
BOTH = re.compile(
    r"(?<![0-9.,])(?:[0-9]{1,2}[., ]?[0-9]{3}\s*V?\s*[-/]\s*(?:[0-9]{4,5}\s*V?\s*[-/]\s*)*"
    r"[1-9][0-9]{2}\s*Y?\s*[/-]\s*[1-9][0-9]{2}\s*V"
    r"|[0-9]{1,2}(?:[.,][0-9]{1,3})?\s*KV\s*[-/]\s*[1-9][0-9]{2}\s*(?:Y?\s*[/-]\s*[1-9][0-9]{2}\s*)?V)\b"
)
FORMS = (  # what only one field looks like, its label unread
    ("tensao_primaria", re.compile(r"[0-9]{4,5}(?:\s*[/-]\s*[0-9]{4,5})+\s*V?")),
    ("tensao_primaria", re.compile(r"[0-9]{1,2}[.,]?[0-9]{3}\s*V")),
    (
        "tensao_primaria",
        re.compile(r"[0-9]{1,2}[.,][0-9]{1,3}(?:\s*/\s*[0-9]{1,2}(?:[.,][0-9]{1,3})?)+\s*KV"),
    ),
    ("tensao_secundaria", re.compile(r"[1-4][0-9]{2}\s*Y?\s*/\s*[1-4][0-9]{2}\s*V?")),
)
TAP = re.compile(r"\W*(?:([1-9])[\s.:\-)|]+)?([0-9]{4,5}|[0-9]{1,2}[.,][0-9]{1,3})(?:\s*K?V)?\W*")
TAP_STEP = (0.85, 0.995)  # of a tap to the one before it
# A company's name up to its legal form.
FIRM = re.compile(
    r"([A-Z][A-Z&' .-]{2,60}?)[\s,]+(?:S\.? ?/?A\.?(?: ?S\.?)?|LTDA|LTD|INC|CORP|CO|GMBH|EIRELI"
    r"|(?:Y|&|E) ?CIA|S\.?R\.?L|LLC|PVT|AG|N\.?V|S\.?P\.?A)\.?(?![A-Z])"
)
DENIALS = ("NAO", "NOT", "NON", "NO", "SEM", "SIN", "WITHOUT")
LONG_WORD = 8  # letters: as long as TRIFASICO and more
WORD = 3  # letters: SIM, TRIFASICO
PLATE_LABELS = 3  # below a heading
LARGE = 1.35  # of the usual height of a line
LONG_NAME = 5  # letters
MOST_NAMES = 3  # words of a name
_BETWEEN = "E DE DO DA S A SA AND THE OF Y PARA FOR COM EM IN POR BY"  # words of a name or title
BETWEEN = frozenset(_BETWEEN.split())
UNLABELLED = 0.9  # confidence of what only a unit gives away, beside a labelled value's 1
UNSURE = 0.5  # of what a person must see


@dataclass(frozen=True)
class _Found:
    """A value with all that must be known to choose among several."""

    candidate: Candidate
    cost: float


@dataclass
class _Sheet:
    """The lines of a plate, their labels, and what was found so far."""

    lines: Sequence[Line]
    labels: Sequence[Label]
    found: dict[str, list[_Found]] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)  # lines that are a label's value

    @property
    def labelled(self) -> set[int]:
        """Lines with a label in them."""
        return {label.line for label in self.labels}

    def candidates(self, label: Label, at: int, text: str, start: int) -> dict[str, Candidate]:
        """The values that a text gives for the fields that a label may name."""
        fields = label.fields
        if set(fields) & set(VOLTAGES) and BOTH.search(normal.ones(fold(text))):
            fields = VOLTAGES  # whatever is left of `AT/BT`
        found = {name: _candidate(name, self.lines, at, text, start, label.unit) for name in fields}
        values = {name: candidate for name, candidate in found.items() if candidate is not None}
        if DATE in values and len(values[DATE].value) == 4 and self._of_a_standard(label):
            del values[DATE]
        return values

    def _of_a_standard(self, label: Label) -> bool:
        """Whether a label of a year may be that of the standard before it."""
        text = self.lines[label.line].text
        bare = BARE_DATE.fullmatch(fold(text[label.start : label.end]))
        return bare is not None and STANDARD.search(fold(text[: label.start])) is not None

    def add(self, values: dict[str, Candidate], cost: float) -> None:
        """Note values."""
        for name, candidate in values.items():
            self.found.setdefault(name, []).append(_Found(candidate, cost))

    def add_unlabelled(self, name: str, at: int, text: str) -> None:
        """Note what has no label, a little less sure."""
        candidate = _candidate(name, self.lines, at, text, self.lines[at].text.find(text))
        if candidate is not None:
            sure = min(UNLABELLED, candidate.confidence)
            self.add({name: Candidate(candidate.value, candidate.raw, candidate.line, sure)}, 2.0)


class Parser:
    """The embedded stage 2."""

    def __init__(self, templates: Templates) -> None:
        self.templates = templates

    def extract(self, lines: Sequence[Line], context: PoleIdContext, deadline: Deadline) -> Extraction:
        """Candidates for the fields. See the module."""
        extraction = Extraction()
        usual = _Sheet(lines, all_labels(lines, self.templates.generic))
        maker = self._manufacturer(usual, extraction)
        template = self.templates.of(maker)
        sheet = _Sheet(lines, all_labels(lines, template)) if template.labels else usual
        deadline.check("reasoning")
        _own_text(sheet)
        _neighbours(sheet)
        _unlabelled(sheet)
        groups = clusters([line.box for line in lines])

        def beside(candidate: Candidate) -> int:
            """How many lines stand with a candidate's: a label beside the plate is a small group."""
            return len(groups[candidate.line]) if candidate.line is not None else 0

        if _join_month(sheet):
            extraction.reasons.append(f"{Reason.AMBIGUOUS}:{DATE}")
        for name, values in sheet.found.items():
            _choose(name, values, beside, template, extraction)
        free = set(range(len(lines))) - sheet.labelled - sheet.taken
        if any(CODE_ALONE.fullmatch(fold(lines[at].text)) for at in free):
            extraction.reasons.append(Reason.UNLABELLED_VALUE)
        free -= {found.line for found in extraction.candidates.values() if found.line is not None}
        for name in BROKEN:
            at = found.line if (found := extraction.candidates.get(name)) else None
            if at is not None and any(_next_group(lines[at], lines[other]) for other in free):
                extraction.reasons.append(f"{Reason.AMBIGUOUS}:{name}")
        for label in sheet.labels:
            named = [name for name in label.fields if name != MAKER]
            if named and not any(name in extraction.candidates for name in label.fields):
                extraction.reasons.append(f"{Reason.UNREAD_LABEL}:{named[0]}")
        return extraction

    # --- the manufacturer ---

    def _manufacturer(self, sheet: _Sheet, extraction: Extraction) -> str | None:
        """The manufacturer: after its label, else the highest line that names one, else a heading."""
        for label in sheet.labels:
            if MAKER not in label.fields or not _first(label, sheet):
                continue
            if named := self._labelled_maker(label, sheet):
                at, name, raw, known = named
                if not known:
                    extraction.reasons.append(f"{Reason.UNKNOWN_MANUFACTURER}:{MAKER}")
                extraction.candidates[MAKER] = Candidate(name, raw, at, sheet.lines[at].confidence)
                return name
        names = [
            (at, *found)
            for at, line in enumerate(sheet.lines)
            if (found := self.templates.named_in(line.text)) and _a_maker_s(*found, line.text)
            if not _of_another(at, sheet)
        ]
        if not names:
            return _heading(sheet, extraction) or _signed(sheet, extraction)
        at, name, raw = names[0]
        if any(other != name for _, other, _ in names):
            extraction.reasons.append(f"{Reason.AMBIGUOUS}:{MAKER}")
        sure = sheet.lines[at].confidence
        if raw == name and len(raw) >= LONG_NAME:  # nothing else is read so by chance
            sure = max(sure, UNLABELLED)
        extraction.candidates[MAKER] = Candidate(name, raw, at, sure)
        return name

    def _labelled_maker(self, label: Label, sheet: _Sheet) -> tuple[int, str, str, bool] | None:
        """The name that a label stands for, as (line, name, its words, whether a template knows it)."""
        at, text = label.line, label.rest
        if not re.search(r"[^\W\d]{2}", text):
            near = [
                (place[1], other)
                for other, line in enumerate(sheet.lines)
                if other not in sheet.labelled
                and (len(label.fields) > 1 or not re.search(r"[0-9]", line.text))
                and (place := _place(label, other, sheet, _cell_end(label, sheet)))
                and place[0] != "above"
            ]
            if not near:
                return None
            at = min(near)[1]
            text = sheet.lines[at].text
        if found := self.templates.named_in(text):
            return at, *found, True
        name = brand(text)
        return (at, name, name, False) if name else None


def _a_maker_s(name: str, words: str, text: str) -> bool:
    """Whether a text names this manufacturer: where it is an ordinary word, beside nothing but a company's
    words: `Nº TRAFO 1234` and `TRAFO DE DISTRIBUIÇÃO` name none, nor is `REDE` a misread RHEDE.
    """
    if words != name and all(word in labels.known()["_title"] for word in words.split()):
        return False
    return not _one_of(name, "_title") or all(
        _one_of(word, "_company") for word in _words(text) if word != name
    )


def _of_another(at: int, sheet: _Sheet) -> bool:
    """Whether a line says who made a part, owns or repaired it: `COMUTADOR ABB`, or a cell beside it."""
    others = [label for label in sheet.labels if not label.fields and label.start <= 1]
    return any(
        label.line == at
        or (
            not re.search(r"\w", label.rest)
            and (place := _place(label, at, sheet, _cell_end(label, sheet)))
            and place[0] == "right"
        )
        for label in others
    )


def _first(label: Label, sheet: _Sheet) -> bool:
    """Whether a label begins its line, or follows another one in it: else it is a word of a sentence."""
    return label.start <= 1 or any(
        other.line == label.line and other.start < label.start for other in sheet.labels
    )


def all_labels(lines: Sequence[Line], template: Template) -> list[Label]:
    """The labels of all lines, without units that stand apart behind their number: `75` `kVA`."""
    found = [
        label
        for at, line in enumerate(lines)
        if not (BARE.match(fold(line.text)) and _number_before(line, lines))
        for label in find_labels(at, line, template)
    ]
    number = _bare_number(lines, found)
    return [*found, number] if number else found


def _bare_number(lines: Sequence[Line], found: Sequence[Label]) -> Label | None:
    """`Nº 123456`, `Nº` beside its number: the serial number's, where nothing else is called so and the plate
    says more than a utility's. Below another number's label it is the rest of that one.
    """
    named = {label.line for label in found}
    if len(named) < PLATE_LABELS or any("numero_serie" in label.fields for label in found):
        return None
    bare: list[Label] = []
    for at, line in enumerate(lines):
        first = min((label.start for label in found if label.line == at), default=len(line.text))
        sign = BARE_NUMBER.fullmatch(line.text[:first])
        if not sign or any(_waits_above(label, line, lines) for label in found):
            continue
        if not sign["rest"] and first < len(line.text):
            continue  # `Nº CONTRATO`: the sign is that label's
        end = sign.end("sign")
        box = part_of(line, 0, max(1, end))
        rest, begin = sign["rest"] or "", max(end, sign.start("rest"))
        bare.append(Label(("numero_serie",), at, 0, end, rest, begin, box))
    return bare[0] if len(bare) == 1 else None


def _waits_above(label: Label, line: Line, lines: Sequence[Line]) -> bool:
    """Whether a label whose value must stand elsewhere ends right above a line: `PATRIMÔNIO`, `Nº 1234`."""
    if label.box is None or line.box is None:
        return label.line == lines.index(line) - 1 and not label.rest
    over = min(label.box.right, line.box.right) - max(label.box.left, line.box.left)
    below = line.box.middle[1] > label.box.middle[1]
    near = line.box.top - label.box.bottom < REACH_BELOW * label.box.height
    named = set(label.fields) & {"patrimonio", "matricula"} or not label.fields
    return bool(named) and below and near and over > 0 and BARE.match(fold(label.rest)) is not None


def _number_before(line: Line, lines: Sequence[Line]) -> Line | None:
    """The number that stands right before a line in its row."""
    for other in lines:
        if other.box is None or line.box is None or not re.search(r"[0-9]\W*$", other.text):
            continue
        gap = (line.box.left - other.box.right) / max(1.0, line.box.height)
        if _one_row(other.box, line.box) and -0.5 < gap < NEAR:
            return other
    return None


def _next_group(line: Line, other: Line) -> bool:
    """Whether digits stand in the row of a value, no further than a wide blank from it: maybe its rest."""
    if line.box is None or other.box is None or not GROUP.fullmatch(fold(other.text)):
        return False
    gap = max(other.box.left - line.box.right, line.box.left - other.box.right)
    return _one_row(line.box, other.box) and gap < BLANK * line.box.height


def _heading(sheet: _Sheet, extraction: Extraction) -> str | None:
    """A manufacturer in no template: large words above all labels, or a company's. For a person."""
    tops = [
        label.box.top
        for label in sheet.labels
        if label.box and label.start <= 1 and label.fields not in (("fases",), PROTECTED)
    ]
    if len(tops) < PLATE_LABELS:
        return None
    usual = median(line.box.height for line in sheet.lines if line.box)
    for at, line in enumerate(sheet.lines):
        if line.box is None or line.box.middle[1] > min(tops):
            continue
        name, words = brand(line.text), _words(line.text)
        if not name or len(name.split()) > MOST_NAMES or _rest_of_title(name):
            continue
        company = any(word in labels.known()["_company"] for word in words)
        large = line.box.height > LARGE * usual or (len(name) > WORD and _above_title(line.box, sheet))
        if company or (large and not _titled(line.text)):
            extraction.candidates[MAKER] = Candidate(name, name, at, line.confidence)
            extraction.reasons.append(f"{Reason.UNKNOWN_MANUFACTURER}:{MAKER}")
            return name
    return None


def _signed(sheet: _Sheet, extraction: Extraction) -> str | None:
    """A manufacturer in no template that signs in full, `Lider Transformadores Ltda. - Itu`. For a person."""
    if len({label.line for label in sheet.labels}) < PLATE_LABELS:
        return None
    for at, line in enumerate(sheet.lines):
        found = FIRM.match(fold(line.text).strip())
        name = brand(found[1]) if found and not _titled(found[1]) else None
        if name and len(name.split()) <= MOST_NAMES:
            extraction.candidates[MAKER] = Candidate(name, name, at, line.confidence)
            extraction.reasons.append(f"{Reason.UNKNOWN_MANUFACTURER}:{MAKER}")
            return name
    return None


def _in_title(text: str) -> bool:
    """Whether a text is the rest of a plate's title: `DISTRIBUTION TRANSFORMER`."""
    words = _words(text)
    kinds = ("TRANSFORMADOR", "TRANSFORMER", "TRAFO")
    return any(kind in "".join(words) for kind in kinds) and all(_one_of(word, "_title") for word in words)


def _titled(text: str) -> bool:
    """Whether a text has a word of a title in it."""
    return any(_one_of(word, "_title") for word in _words(text))


def _rest_of_title(name: str) -> bool:
    """Whether a name is what is left of a title's long words: `TRANS` where a spot covers TRANSFORMADOR."""
    long = [word for word in labels.known()["_title"] if len(word) >= LONG_WORD]
    return all(len(part) > WORD and any(part in word for word in long) for part in name.split())


def _above_title(box: Box, sheet: _Sheet) -> bool:
    """Whether a title stands right below a box: `TRANSFORMADOR`."""
    return any(
        -0.5 * box.height < line.box.top - box.bottom < REACH_BELOW * box.height
        for line in sheet.lines
        if line.box and _titled(line.text) and brand(line.text) is None
    )


def brand(text: str) -> str | None:
    """The name in what a company calls itself: `Líder Transformadores Ltda` is LIDER."""
    own = [word for word in _words(text) if not (_one_of(word, "_company") or _one_of(word, "_title"))]
    name = " ".join(own)
    return name if re.fullmatch(r"[A-Z&][A-Z& -]{2,39}", name) else None


def _words(text: str) -> list[str]:
    words = re.findall(r"[0-9A-Z&]+(?:-[0-9A-Z&]+)*", fold(text))
    for at in range(len(words) - 1, 0, -1):
        if _one_of(words[at - 1] + words[at], "_title"):  # `TRANSFORMAD OR`
            words[at - 1 : at + 1] = [words[at - 1] + words[at]]
    return [word for word in words if word not in BETWEEN]


@lru_cache(maxsize=4096)
def _one_of(word: str, name: str) -> bool:
    """Whether a word is one of a list, a long one with a wrong letter, or several of them without a space."""
    return any(
        word == known
        or (len(known) > 6 and distance(word, known, 1) <= 1)
        or (len(known) > WORD and word.startswith(known) and _one_of(word[len(known) :], name))
        for known in labels.known()[name]
    )


# --- the three ways to a value ---


def _own_text(sheet: _Sheet) -> None:
    for label in sorted(sheet.labels, key=lambda label: label.fields == VOLTAGES):
        if label.fields == (MAKER,) or (label.fields == PROTECTED and _two_kinds(sheet.lines[label.line])):
            continue
        if not _says_nothing(label):
            values = sheet.candidates(label, label.line, label.rest, label.rest_at)
        else:
            values = _before(label, sheet)
        if label.fields == VOLTAGES:  # only where no label says which one
            values = {name: value for name, value in values.items() if name not in sheet.found}
        sheet.add(values, 0.0)


def _two_kinds(line: Line) -> bool:
    """Whether a line has both kinds of transformer to choose from: `CONVENCIONAL / AUTOPROTEGIDO`."""
    return "CONVENC" in fold(line.text)


def _before(label: Label, sheet: _Sheet) -> dict[str, Candidate]:
    """What stands before a line's only label: `3 PHASE`, `13800 V  AT`."""
    if label.start == 0 or sum(other.line == label.line for other in sheet.labels) > 1:
        return {}
    text = sheet.lines[label.line].text[: label.start].rstrip(" :-")
    letters = sum(sign.isalpha() for sign in text)
    return sheet.candidates(label, label.line, text, 0) if letters < WORD else {}


def _neighbours(sheet: _Sheet) -> None:
    waiting = [
        label
        for label in sheet.labels
        if label.fields != (MAKER,) and _says_nothing(label) and not _before(label, sheet)
    ]
    free = [at for at in range(len(sheet.lines)) if at not in sheet.labelled]
    pairs: list[tuple[float, int, int, str]] = []
    usual: list[str] = []  # where each label has its value
    for at, label in enumerate(waiting):
        end = _cell_end(label, sheet)
        places = {other: place for other in free if (place := _place(label, other, sheet, end))}
        usable = [place for other, place in places.items() if _fits(label, other, sheet)]
        if label.fields and usable:
            usual.append(min(usable, key=lambda place: place[1])[0])
        pairs += [(cost, at, other, where) for other, (where, cost) in places.items()]
    left_out = set()  # a plate is laid out in one way
    if usual.count("right") * 2 >= len(usual):
        left_out.add("cell")
    left_out |= {"below", "cell"} if usual.count("above") * 2 > len(usual) else {"above"}
    done: set[int] = set()
    for cost, at, other, where in sorted(pairs):
        label = waiting[at]
        if at in done or other in sheet.taken or where in left_out:
            continue
        values = _fits(label, other, sheet)
        if values or (not label.fields and re.search(r"[0-9]", sheet.lines[other].text)):
            done.add(at)
            sheet.taken.add(other)
            sheet.add(values, 1.0 + cost)


def _fits(label: Label, at: int, sheet: _Sheet) -> dict[str, Candidate]:
    """The values that a line gives for a label, or its second reading alone: that one for a person."""
    line = sheet.lines[at]
    values = sheet.candidates(label, at, line.text, 0)
    if not values and line.second:
        sure = min(UNSURE, line.weakest)
        second = {name: _value(name, line.second, label.unit) for name in label.fields}
        values = {
            name: Candidate(value, line.second, at, sure)
            for name, value in second.items()
            if value is not None
        }
    return values


def _unlabelled(sheet: _Sheet) -> None:
    lines, found = sheet.lines, sheet.found
    free = []
    for at, line in enumerate(lines):
        first = min((label.start for label in sheet.labels if label.line == at), default=len(line.text))
        if at not in sheet.taken and first > 0:
            free.append((at, line.text[:first]))
    for at, text in free:
        folded = fold(text)
        if re.fullmatch(r"\W*K[VU]A\W*", folded) and (number := _number_before(lines[at], lines)):
            sheet.taken.add(lines.index(number))
            if "potencia_kva" not in found:
                sheet.add_unlabelled("potencia_kva", lines.index(number), number.text)
        if "potencia_kva" not in found and re.search(r"[0-9]\s*K[VU]A\b", folded):
            sheet.add_unlabelled("potencia_kva", at, text)
        if BOTH.search(folded):
            # `13800 - 380/220 V`: both voltages in one line.
            for name in VOLTAGES:
                if name not in found:
                    part = text if name == "tensao_primaria" else re.split(r"[-/]", text, maxsplit=1)[1]
                    sheet.add_unlabelled(name, at, part)
        for name, form in FORMS:
            value = PARSERS[name](text) if name not in found and form.fullmatch(folded.strip()) else None
            if value is not None and not normal.problem(name, value):
                sheet.add_unlabelled(name, at, text)
    _taps(sheet)
    if "fases" not in found:
        for at, line in enumerate(lines):
            if normal.phase_word(line.text):
                sheet.add_unlabelled("fases", at, line.text)
    if "autoprotegido" not in found:
        for label in sheet.labels:
            # The word alone, as a type: `TRANSFORMADOR AUTOPROTEGIDO`.
            # or before what it is: `SELF-PROTECTED DISTRIBUTION TRANSFORMER`.
            line = lines[label.line]
            ends = label.start > 0 and BARE.match(normal.BOX.sub("", fold(label.rest)))
            if label.fields != PROTECTED or not (ends or _in_title(line.text[label.end :])):
                continue
            marked = normal.chosen(line.text)
            if not marked or (marked == line.text and _two_kinds(line)):
                continue  # a form that nobody filled in
            denied = "".join(_words(line.text[: label.start])[-1:]) in DENIALS
            value = "PROT" in fold(marked) and not denied
            sure = min(UNLABELLED, line.weakest)
            found["autoprotegido"] = [_Found(Candidate(value, line.text, label.line, sure), 2.0)]


# --- a table of taps ---


def _taps(sheet: _Sheet) -> None:
    """The primary's taps in a table of their own: the first one, where plainly none stands before."""
    rows = [(at, *tap) for at, line in enumerate(sheet.lines) if (tap := _tap(line)) and line.box]
    for column in _series(rows, sheet.lines):
        at, volts, position = column[0]
        top = sheet.lines[at].box
        others = {other for other, _, _ in column}
        sheet.taken |= others
        if "tensao_primaria" in sheet.found or top is None:
            continue
        position = position or _position(at, sheet)
        above = any(
            label.box
            and label.fields in (("tensao_primaria",), VOLTAGES)
            and -0.5 * top.height < top.top - label.box.bottom < REACH_BELOW * top.height
            for label in sheet.labels
        )
        if position not in ("", "1"):
            continue
        line = sheet.lines[at]
        sure = min(UNLABELLED, line.weakest) if position or above else min(UNSURE, line.weakest)
        sheet.add({"tensao_primaria": Candidate(volts, line.text, at, sure)}, 2.0)


def _tap(line: Line) -> tuple[float, str] | None:
    """The voltage of a line that is nothing else, and its tap's position."""
    found = TAP.fullmatch(fold(line.text))
    if not found:
        return None
    volts = normal.primary(found.group(2)) or normal.primary(f"{found.group(2)} KV")
    if volts is None or normal.problem("tensao_primaria", volts):
        return None
    return volts, found.group(1) or ""


def _series(
    rows: Sequence[tuple[int, float, str]], lines: Sequence[Line]
) -> list[list[tuple[int, float, str]]]:
    """Two or more voltages, one below or right of the other, each a step lower."""
    series: list[list[tuple[int, float, str]]] = []
    for row in rows:
        for taps in series:
            last, volts, _ = taps[-1]
            if TAP_STEP[0] < row[1] / volts < TAP_STEP[1] and _next(lines[last].box, lines[row[0]].box):
                taps.append(row)
                break
        else:
            series.append([row])
    return [taps for taps in series if len(taps) > 1]


def _next(one: Box | None, other: Box | None) -> bool:
    """Whether a box is the next one of a column or a row."""
    if one is None or other is None:
        return False
    if _one_row(one, other):
        return 0 < other.left - one.right < 4 * one.height
    down = other.middle[1] - one.middle[1]
    return abs(one.right - other.right) < one.height and 0 < down < 2.5 * one.height


def _position(at: int, sheet: _Sheet) -> str:
    """The tap's number in the cell to the left, or ""."""
    box = sheet.lines[at].box
    for line in sheet.lines:
        if box and line.box and re.fullmatch(r"\W*[1-9I]\W*", line.text):
            gap = box.left - line.box.right
            if _one_row(box, line.box) and 0 < gap < REACH_RIGHT * box.height:
                return re.sub(r"\W", "", line.text).replace("I", "1")
    return ""


# --- choosing ---


def _join_month(sheet: _Sheet) -> bool:
    """Put the month of `MÊS: 04` to the year of `ANO: 2015`; whether a date may still lack month or day, or
    the month may be another thing's.
    """
    ours = [label for label in sheet.labels if DATE in label.fields]
    named = [label for label in ours if label.fields == (DATE,) and label.unit.endswith(normal.ONLY_MONTH)]
    if not named:
        return False
    found = [value.candidate for value in sheet.found.get(DATE, ())]
    months = {one.value[2:]: one for one in found if one.value.startswith("--")}
    dates = [value for value in sheet.found.pop(DATE, ()) if not value.candidate.value.startswith("--")]
    if not dates:
        return False  # the label stays without a value
    number, month = next(iter(months.items()), ("", None))
    joined = False
    for at, value in enumerate(dates):
        year = value.candidate
        if month and len(months) == 1 and len(year.value) == 4:
            sure = min(year.confidence, month.confidence)
            candidate = replace(year, value=f"{year.value}-{number}", confidence=sure)
            dates[at], joined = replace(value, candidate=candidate), True
    sheet.found[DATE] = dates
    read = {value.candidate.value for value in dates}
    if any(len(one) == 4 or (months and one[5:7] not in months) for one in read) or len(months) > 1:
        return True
    if joined and not any(_of_manufacture(label, sheet, ours) for label in named):
        return True
    return any(len(one) == 7 for one in read) and any(
        normal.DAY.search(fold(line.text)) for line in sheet.lines
    )


def _of_manufacture(month: Label, sheet: _Sheet, ours: Sequence[Label]) -> bool:
    """Whether a month's label is no other thing's, `ÓLEO MÊS: 12`, or `MÊS: 12` below GARANTIA: no word that
    is not a date's stands before it, and it says of what it is, or the year does not either.
    """
    whole = text = sheet.lines[month.line].text
    for label in ours:
        if label.line == month.line:
            text = text[: label.start] + " " * (label.end - label.start) + text[label.end :]
    if re.search(r"[^\W\d_]", text[: month.start]):
        return False
    if not BARE_MONTH.fullmatch(fold(whole[month.start : month.end])):
        return True
    years = [label for label in ours if label is not month]
    return any(
        label.line == month.line
        or BARE_DATE.fullmatch(fold(sheet.lines[label.line].text[label.start : label.end]))
        for label in years
    )


def _choose(
    name: str,
    values: list[_Found],
    beside: Callable[[Candidate], int],
    template: Template,
    extraction: Extraction,
) -> None:
    values.sort(key=lambda value: (-beside(value.candidate), value.cost, -value.candidate.confidence))
    best = values[0].candidate
    doubtful = (name in CODES and normal.goes_on(best.raw)) or (name in WORDED and _worded(name, best.raw))
    year = name == DATE and len(str(best.value)) == 4  # `/2015` behind `SEMANA`
    doubtful = doubtful or (name in WORDED and not year and normal.cut(best.raw))
    if doubtful or any(other.candidate.value != best.value for other in values[1:]):
        extraction.reasons.append(f"{Reason.AMBIGUOUS}:{name}")
    if name in CODES:
        pattern = template.patterns.get(name)  # type: ignore[call-overload]
        if pattern is not None and not re.fullmatch(pattern, str(best.value)):
            extraction.reasons.append(f"{Reason.OUT_OF_DOMAIN}:{name}")
    if name in template.absent:
        extraction.reasons.append(f"{Reason.FILTERS_DISAGREE}:{name}")
    extraction.candidates[name] = best


def _worded(name: str, text: str) -> bool:
    """Whether a word that nobody wrote down stands between a label and its value: it may name another thing,
    `DATA MANUTENÇÃO 03/2018`.
    """
    before = normal.before_code(text) if name in CODES else re.split("[0-9]", fold(text), maxsplit=1)[0]
    words = (word for word in _words(before) if len(word) >= WORD and not normal.month_of(word))
    return not all(any(_one_of(word, known) for known in ("_title", "_company", "_rest")) for word in words)


# --- where and how ---


def _says_nothing(label: Label) -> bool:
    """Whether the value stands elsewhere: what follows the label is nothing, a unit, or the rest of its own
    words (`DATA F` beside a date, `CONTÍNUA`).
    """
    if BARE.match(fold(label.rest)):
        return True
    if not NUMBERS.intersection(label.fields) or re.search(r"[0-9]", label.rest):
        return False
    given = any(_value(name, label.rest, label.unit) is not None for name in label.fields)
    return len(label.rest) <= LONGEST_TAIL and not given


def _place(label: Label, at: int, sheet: _Sheet, cell_end: float) -> tuple[str, float] | None:
    """Where a line stands from a label that it may be the value of, and how far, in heights: right, below,
    above, or in the rest of the label's cell; None where it cannot be.
    """
    line = sheet.lines[at]
    if label.box is None or line.box is None:
        return ("below", 0.5) if at == label.line + 1 else None  # only text: it stands in the next line
    height = max(1.0, min(label.box.height, line.box.height))
    common = min(label.box.bottom, line.box.bottom) - max(label.box.top, line.box.top)
    gap = line.box.left - label.box.right
    if common > 0.5 * height and -0.6 * height < gap < REACH_RIGHT * label.box.height:
        if _worded_before(line.box, label.box.right - 0.6 * height, {at, label.line}, sheet):
            return None
        return "right", max(0.0, gap) / label.box.height * 0.25
    above = line.box.middle[1] < label.box.middle[1]
    drop = label.box.top - line.box.bottom if above else line.box.top - label.box.bottom
    if not -0.5 * height < drop < REACH_BELOW * label.box.height:
        return None
    pair = (line.box, label.box) if above else (label.box, line.box)
    if any(_stands_between(other.box, *pair) for other in sheet.lines if other is not line):
        return None
    across = min(label.box.right, line.box.right) - max(label.box.left, line.box.left)
    aligned = abs(line.box.left - label.box.left) / label.box.height
    centred = abs(line.box.middle[0] - label.box.middle[0]) / label.box.height
    cost = 0.6 + max(0.0, drop) / label.box.height + 0.15 * min(aligned, centred)
    if across > 0.3 * min(label.box.width, line.box.width):
        return "above" if above else "below", cost
    begin = label.box.left - label.box.height
    inside = not above and begin < line.box.left and line.box.middle[0] < cell_end
    if inside and not _worded_before(line.box, begin, {at, label.line}, sheet):
        return "cell", cost
    return None


def _stands_between(box: Box | None, above: Box, below: Box) -> bool:
    """Whether a box stands between two others, above the lower one: then that one is its value."""
    if box is None or not above.middle[1] < box.middle[1] < below.middle[1]:
        return False
    across = min(box.right, below.right) - max(box.left, below.left)
    return across > 0 and not _one_row(box, below) and not _one_row(box, above)


def _one_row(one: Box, other: Box) -> bool:
    """Whether two boxes stand side by side."""
    common = min(one.bottom, other.bottom) - max(one.top, other.top)
    return common > 0.5 * max(1.0, min(one.height, other.height))


def _worded_before(box: Box, begin: float, apart: set[int], sheet: _Sheet) -> bool:
    """Whether words stand in the row of a box between `begin` and the box: then it is their value."""
    for at, line in enumerate(sheet.lines):
        if at in apart or line.box is None or line.box.left < begin or line.box.middle[0] > box.left:
            continue
        if _one_row(box, line.box) and sum(sign.isalpha() for sign in line.text) >= WORD:
            return True
    return False


def _is_column(head: Box, heads: Sequence[Box]) -> bool:
    """Whether other labels begin where this one does: else it is a value's word, `EFICIÊNCIA` / `NÍVEL C`."""
    return sum(abs(head.left - other.left) < head.height for other in heads) > 1


def _cell_end(label: Label, sheet: _Sheet) -> float:
    """Where a label's cell ends at the latest: what begins to the right of it begins another one."""
    if label.box is None:
        return 0.0
    begin = max(label.box.right, label.box.left + COLUMN * label.box.height)
    heads = [other.box for other in sheet.labels if other.box and other.start <= 1]
    edges = [
        head.left
        for head in heads
        if head.left > begin and (_one_row(label.box, head) or _is_column(head, heads))
    ]
    edges += [
        line.box.left
        for line in sheet.lines
        if line.box and line.box.left > begin and _one_row(label.box, line.box)
    ]
    return min(edges, default=label.box.left + REACH_RIGHT * label.box.height)


def _value(name: str, text: str, unit: str = "") -> Any:
    """What a text gives for a field; `unit` stands beside the label: `(kV) 13,8`, `(SEM/ANO) 10/15`."""
    if name not in PARSERS:
        return None
    text = LEADERS.sub("", text)
    if name == DATE and normal.WEEK.search(fold(unit)):
        return PARSERS[name](f"{unit} {text}")
    if name == DATE and unit.endswith(normal.ONLY_MONTH):
        return normal.month(text)
    kilovolts = name in VOLTAGES and re.search(r"KV(?!A)", fold(unit)) is not None
    return PARSERS[name](f"{text} kV" if kilovolts else text)


def _candidate(
    name: str, lines: Sequence[Line], at: int, text: str, start: int, unit: str = ""
) -> Candidate | None:
    """The value of a field in a text of a line, as sure as the least sure character of that text."""
    value = _value(name, text, unit)
    if value is None:
        return None
    sure = sureness(lines[at], max(0, start), text)
    if (
        isinstance(value, float) and value % 1 and not re.search("[.,]", text)
    ):  # `1125 kVA`: its comma is a guess
        sure = min(UNSURE, sure)
    return Candidate(value, text, at, sure)


def sureness(line: Line, start: int, text: str) -> float:
    """The least sure letter or digit of a part of a line; the mean of a word: most of its letters name it."""
    weights = line.weights[start : start + len(text)]
    sure = [weight for weight, sign in zip(weights, text, strict=False) if sign.isalnum()]
    if not sure:
        return line.weakest
    word = sum(sign.isalpha() for sign in text) >= WORD and not any(sign.isdigit() for sign in text)
    return sum(sure) / len(sure) if word else min(sure)
