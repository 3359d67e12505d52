"""Labels: what a plate writes before, above or beside a value, found although some letters are wrong.

The wordings are data, `labels.yml`, beside the manufacturer's own ones. A label names one field, or several
that the value's form tells apart, or none (`OTHER`). Labels that stand side by side are one: `ELO FUSÍVEL AT`
is no `AT`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import product

import yaml

from ocr_pipeline.geometry import Box
from ocr_pipeline.normal import ONLY_MONTH, WEEK_YEAR, YEAR_WEEK, month_of
from ocr_pipeline.stages import Line
from ocr_pipeline.templates import Template
from ocr_pipeline.words import distance, fold, squeezed

OTHER = "_other"
BOTH_VOLTAGES, SIDES, WORDS, WEEKS, MONTHS = "_both_voltages", "_sides", "_words", "_weeks", "_months"
ANOTHER = "_another"
VOLTAGES = ("tensao_primaria", "tensao_secundaria")
DATE, MAKER = "data_fabricacao", "fabricante"
FIELDS_OF = {BOTH_VOLTAGES: VOLTAGES, WEEKS: (DATE,), MONTHS: (DATE,), OTHER: (), ANOTHER: ()}
UNIT = r"KVA|KV|V|VOLTS?|A|HZ|KG|L|%"
BARE = re.compile(rf"^[\s\W]*(?:\(?\s*(?:{UNIT})\s*\)?)?[\s\W]*$")  # nothing, or only a unit
ANSWERS = ("SIM", "NAO", "YES")  # values, never a label's words: `AUTOPROT. NÃO   FASES: 3`
VALUE = re.compile(r"[2-9]|[0-9]{2}")  # digits that no letter was misread for
NUMBER_BEFORE = re.compile(r"[0-9][OIl|]{0,2}\s*\W?\s*$")  # `75 kVA`: a unit, no label
VALUE_BEFORE = re.compile(r"[0-9]\s*[kK]?VA?$")  # `300 kVASÉRIE`
# `(kV)`, `(MÊS/ANO)`: the label's; `( )` and `(X)` are boxes of its values.
MONTH = re.compile(r"(?<![A-Z0-9])([A-Z0-9]{3}[A-Z]*?)\.?\s*[/\-. ]?\s*(?:DE\s*)?[0-9]{2}")
NAMED = re.compile(r"(?<![A-Z])(?:MES|MONTH)\W*([A-Z0-9]{3,})")  # `MÊS ABR ANO 2015`: no misread `FABR. ANO`
MISREAD_YEAR = re.compile(r"\s*/\s*([A-Z][A-Z0-9]{1,2})(?![A-Z0-9/])")  # `MÊS/AMO`
IN_BRACKETS = re.compile(r"[\s.:]*[(\[](?!\s*[Xx]?\s*[)\]])[^()\[\]0-9]{0,14}(?:[)\]]|$)")
# `-2010`: the month is covered; ` ,5 kVA`: what stood before the comma is.
TO_THE_VALUE = re.compile(r"(?:[\s:;=_)\]·•…*|]|[.,](?![0-9])|(?<![\s:])[.,]|-(?![0-9]))*")
JOINING = re.compile(
    r"(?:D[EOA]|OF)\b", re.IGNORECASE
)  # never a label's first word: `DE FABRICAÇÃO` is no `Nº FABRICAÇÃO`
TOGETHER = re.compile(r"[\s.,/\-]*(?:\b(?:D[EOA]|OF)\b\s*)?", re.IGNORECASE)  # between words of one label
LETTER_FOR = {"0": "O", "1": "I", "5": "S"}  # in a word of a label
OF_A_YEAR = re.compile(r"[^\W\d]{3}\W*/\s*$")  # `LOTE/` before `ANO`: what stands beside the year is no month
SHORTEST_END, LONGEST_END = 4, 20  # letters of a label that is left where its beginning is cut off
WRONG = 3  # letters of a wording that one wrong letter outweighs: `PATRIMONIAL TR-1` has no misread `Nº`
SHORT = 2  # letters: behind a number they are its unit
YEAR = ("ANO", "YEAR")
HEAD = 3  # letters by which a misread label is looked up


@dataclass(frozen=True)
class Label:
    """A label in a line: from `start` to `end` of its text; `rest` is what follows up to the next label.

    `fields` are those that it may name, none for `OTHER`; `unit` what stands behind it in brackets, and
    `SEM/ANO` where its value is a week and year, `--MM` where it is a month alone.
    """

    fields: tuple[str, ...]
    line: int
    start: int
    end: int
    rest: str
    rest_at: int
    box: Box | None
    unit: str = ""


@dataclass(frozen=True)
class _Span:
    begin: int
    end: int
    fields: tuple[str, ...]
    phrase: str
    unit: str = ""


class Lexicon:
    """Wordings and the fields they name, looked up by what a few wrong letters leave of them."""

    def __init__(self, wordings: Mapping[str, tuple[str, ...]], sides: Iterable[str]) -> None:
        self.sides = frozenset(sides)
        self._exact = dict(wordings)
        self._longest = max(map(len, wordings), default=0)
        self._near: dict[tuple[int, str], list[str]] = defaultdict(list)
        endings: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        whole: set[str] = set()  # endings that are at least half of a label
        for phrase, fields in wordings.items():
            if wrong_letters(phrase):
                for length in range(len(phrase) - 1, len(phrase) + 2):
                    self._near[length, phrase[:HEAD]].append(phrase)
                    self._near[length, phrase[-HEAD:]].append(phrase)
            for length in range(SHORTEST_END, min(LONGEST_END, len(phrase)) + 1):
                endings[phrase[-length:]].add(fields)
                if length < len(phrase) <= 2 * length:
                    whole.add(phrase[-length:])
        self._endings = {end: next(iter(endings[end])) for end in whole if len(endings[end]) == 1}

    def alike(self, part: str) -> Iterable[tuple[str, int]]:
        """Wordings that `part` may be, with the number of its wrong letters."""
        if part in self._exact:
            yield part, 0
        keys = dict.fromkeys(((len(part), part[:HEAD]), (len(part), part[-HEAD:])))
        for phrase in dict.fromkeys(phrase for key in keys for phrase in self._near.get(key, ())):
            if phrase == part or (VALUE.search(part) and not VALUE.search(phrase)):
                continue  # `POTÊNCIA: 75 kVA` is no misread `POTÊNCIA EM kVA`
            wrong = distance(part, phrase, wrong_letters(phrase))
            if wrong <= wrong_letters(phrase):
                yield phrase, wrong

    def longest(self, flat: str, start: int, ends: Sequence[int]) -> tuple[str, int] | None:
        """The longest wording that stands at `start` of squeezed text, as (wording, length).

        `ends`: the least length that a wording must have to end before each sign; 0 where none may.
        """
        best: tuple[float, str, int] | None = None
        for length in range(2, min(self._longest + 1, len(flat) - start) + 1):
            least = ends[start + length]
            if not least:
                continue
            for phrase, wrong in self.alike(flat[start : start + length]):
                score = len(phrase) - WRONG * wrong
                if len(phrase) >= least and (best is None or score > best[0]):
                    best = (score, phrase, length)
        return (best[1], best[2]) if best else None

    def end_of_one(self, flat: str, ends: Sequence[int]) -> tuple[tuple[str, ...], int] | None:
        """A label without its beginning: `TÊNCIA: 75`, where all labels that end so name the same."""
        for length in range(min(len(flat), LONGEST_END), SHORTEST_END - 1, -1):
            fields = self._endings.get(flat[:length])
            if fields is not None and 0 < ends[length] <= length:
                return fields, length
        return None

    def at(self, flat: str, start: int, ends: Sequence[int]) -> tuple[str, tuple[str, ...], int]:
        """The label that stands at `start`, as (wording, fields, length); the length is 0 where none does."""
        if match := self.longest(flat, start, ends):
            return match[0], self._exact[match[0]], match[1]
        if start == 0 and (left := self.end_of_one(flat, ends)):
            return "", *left
        return "", (), 0


def wrong_letters(phrase: str) -> int:
    """How many wrong letters leave a wording recognisable."""
    return 0 if len(phrase) < 6 else 1 if len(phrase) < 9 else 2


def expanded(phrase: str, words: Mapping[str, Sequence[str]]) -> list[str]:
    """All spellings of a phrase, squeezed: `$n` is each of the word's."""
    choices = [words[word[1:]] if word.startswith("$") else [word] for word in phrase.split()]
    return [squeezed("".join(chosen)) for chosen in product(*choices)]


@lru_cache(maxsize=1)
def known() -> dict[str, tuple[str, ...]]:
    """The wordings of `labels.yml`, squeezed, by what they stand for."""
    source = resources.files("ocr_pipeline") / "data" / "labels.yml"
    data = yaml.safe_load(source.read_text(encoding="utf-8"))
    words: dict[str, list[str]] = data.pop(WORDS)
    return {
        name: tuple(dict.fromkeys(spelt for phrase in phrases for spelt in expanded(phrase, words)))
        for name, phrases in data.items()
    }


@lru_cache(maxsize=32)
def _lexicon(own: tuple[tuple[str, str], ...]) -> Lexicon:
    fields: dict[str, list[str]] = defaultdict(list)
    for name, phrases in known().items():
        if name not in (SIDES, "_rest", "_company", "_title"):
            for phrase in phrases:
                fields[phrase] += FIELDS_OF.get(name, (name,))
    wordings = {phrase: tuple(dict.fromkeys(names)) for phrase, names in fields.items()}
    return Lexicon(wordings | {squeezed(phrase): (name,) for name, phrase in own}, known()[SIDES])


def lexicon(template: Template) -> Lexicon:
    """The usual wordings and a manufacturer's own ones, which win."""
    return _lexicon(tuple((name, phrase) for name, phrases in template.labels.items() for phrase in phrases))


def find_labels(at: int, line: Line, template: Template) -> list[Label]:
    """The labels of a line from left to right, none overlapping another."""
    text, words = line.text, lexicon(template)
    signs = [
        (place, sign)
        for place, original in enumerate(text)
        for sign in fold(LETTER_FOR.get(original, original) if _in_word(text, place) else original)
        if sign.isalnum() and sign.isascii()
    ]
    flat = "".join(sign for _, sign in signs)
    folded = "".join(fold(sign)[:1] or " " for sign in text)
    named = [found.start(1) for found in NAMED.finditer(folded) if month_of(found[1])]
    months = [found.start() for found in MONTH.finditer(folded) if month_of(found[1])] + named
    ends = [_least(text, signs, end) for end in range(len(signs) + 1)]
    values = sorted(number for number, (place, _) in enumerate(signs) if place in months)
    answers = [
        number
        for number, (place, _) in enumerate(signs)
        if _begins(text, place)
        and (place in named or fold(re.split(r"[\W\d_]", text[place:], maxsplit=1)[0]) in ANSWERS)
    ]
    spans: list[_Span] = []
    start = 0
    while start < len(flat):
        place = signs[start][0]
        if not _begins(text, place) or start in answers or JOINING.match(text, place):
            start += 1
            continue
        # `MÊS/ANO: ABR 2012` is no misread `MÊS/ANO FABR`: the month is the value's.
        stop = next((number for number in values if number > start), len(flat))
        phrase, fields, length = words.at(flat[:stop], start, ends)
        # `13800 V ± 2`, `55 ºC`
        unit = BARE.match(phrase) or (len(phrase) <= SHORT and phrase not in words.sides)
        if not length or (unit and NUMBER_BEFORE.search(text[:place])):
            start += length or 1
            continue
        end, told = signs[start + length - 1][0] + 1, ""
        if bracket := IN_BRACKETS.match(text, end):
            end, told = bracket.end(), bracket.group(0).strip(" ()[]")
        if phrase in known()[WEEKS]:
            told += f" {YEAR_WEEK if phrase.startswith(YEAR) else WEEK_YEAR}"
        elif phrase in known()[MONTHS]:
            year = MISREAD_YEAR.match(folded, end)
            if year and not month_of(year[1]):
                end = year.end()
            else:
                told += f" {ONLY_MONTH}"
        elif phrase in YEAR and OF_A_YEAR.search(text[:place]) and not (spans and DATE in spans[-1].fields):
            told += f" {WEEK_YEAR}"
        begin = 0 if JOINING.fullmatch(text[:place].strip()) else place
        spans.append(_Span(begin, end, fields, phrase, told))
        start += length
        while start < len(signs) and signs[start][0] < end:
            start += 1
    spans = _together(spans, text, words.sides)
    found = []
    for number, span in enumerate(spans):
        until = spans[number + 1].begin if number + 1 < len(spans) else len(text)
        skipped = TO_THE_VALUE.match(text, span.end, until)
        rest_at = skipped.end() if skipped else span.end
        rest = text[rest_at:until].rstrip(" :;,_|")
        box = part_of(line, span.begin, span.end)
        found.append(Label(span.fields, at, span.begin, span.end, rest, rest_at, box, span.unit))
    return found


def _together(spans: Sequence[_Span], text: str, sides: frozenset[str]) -> list[_Span]:
    """The spans, those that stand side by side as one label as one."""
    joined: list[_Span] = []
    for span in spans:
        before = joined[-1] if joined else None
        if before is not None and TOGETHER.fullmatch(text, before.end, span.begin):
            between = text[before.end : span.begin]
            slash = "/" in between
            both = slash and {*before.fields, *span.fields} == {*VOLTAGES}  # `AT/BT`
            fields = VOLTAGES if both else _in_common(before, span, sides)
            if before.fields == (MAKER,) and not span.fields and JOINING.match(between.strip()):
                fields = ()  # `FABRICANTE DO ÓLEO`
            if fields is not None:
                phrase = before.phrase + span.phrase
                joined[-1] = _Span(before.begin, span.end, fields, phrase, span.unit or before.unit)
                continue
        joined.append(span)
    return joined


def _in_common(one: _Span, other: _Span, sides: frozenset[str]) -> tuple[str, ...] | None:
    """What two neighbouring labels name together, or None where each stands for itself.

    A side of the transformer settles which voltage is meant, and only qualifies anything else.
    """
    if one.fields == other.fields:
        return one.fields
    if DATE in one.fields and DATE in other.fields and {one.phrase, other.phrase} & {*known()[MONTHS]}:
        return (DATE,)  # `MÊS FABR.`
    another = known()[ANOTHER]
    if other.phrase in another or (one.phrase in another and other.fields == (DATE,)):
        return ()
    if (one.phrase in sides) == (other.phrase in sides):
        return None
    side, named = (one, other) if one.phrase in sides else (other, one)
    if named.fields == VOLTAGES:
        return side.fields
    return None if set(named.fields) & set(VOLTAGES) else named.fields


def _begins(text: str, place: int) -> bool:
    """Whether a word may begin here: at the start, after what is no letter or digit, or glued to a value."""
    if place == 0 or not text[place - 1].isalnum():
        return True
    glued = text[place - 1].isdigit() or VALUE_BEFORE.search(text[:place]) is not None
    return glued and text[place : place + HEAD].isalpha()  # `5H` has no label in it


def _in_word(text: str, place: int) -> bool:
    """Whether a sign ends a word's letters, no number: `EL0`, `PRIMÁRI0`."""
    return place > 1 and text[place - 2 : place].isalpha() and not text[place + 1 : place + 2].isdigit()


def _least(text: str, signs: Sequence[tuple[int, str]], end: int) -> int:
    """How long a label must be to end before the sign `end`: a letter may not follow at once (0), a digit
    only a longer one.
    """
    if end >= len(signs) or end == 0 or signs[end][0] > signs[end - 1][0] + 1:
        return 1
    return 4 if text[signs[end][0]].isdigit() else 0


def part_of(line: Line, begin: int, end: int) -> Box | None:
    """Where the characters from `begin` to `end` of a line lie, as if all were of one width."""
    if line.box is None or not line.text:
        return line.box
    unit = line.box.width / len(line.text)
    return Box(line.box.left + begin * unit, line.box.top, line.box.left + end * unit, line.box.bottom)
