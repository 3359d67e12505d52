"""Each field from the text that stands for it: the normalised value, or None. And whether a value can be at
all.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ocr_pipeline.words import alike, as_digits, fold

# Rated powers of distribution transformers in kVA: the usual steps, older ones still in use, larger ones.
_POWERS = """3 5 7.5 10 15 20 25 30 37.5 45 50 60 75 88 100 112.5 120 138 150 167 175 200 225 250 300 333 400
500 600 750 1000 1250 1500 2000 2500 3000"""
POWERS = frozenset(float(step) for step in _POWERS.split())
# Distribution voltages in V: the classes' ratings and their usual taps lie within these.
PRIMARY_RANGES = (
    (2_000, 2_500),
    (3_600, 4_400),
    (6_000, 8_000),
    (10_500, 14_700),
    (17_500, 25_500),
    (31_000, 36_300),
)
_SECONDARIES = """220/127 380/220 230/115 240/120 254/127 440/254 440/220 230/133 220/110 216.5/125 400/231
208/120 480/277 460/230 400/230 415/240 433/250 600/347 400 208 480 115 120 127 220 230 240 254 380 440"""
SECONDARIES = frozenset(_SECONDARIES.split())
FUSE = re.compile(r"^(0\.5|[1-9][0-9]?|1[0-9]{2}|200)(H|K|T|EF)$")
_MONTHS = """JANEIRO JANUARY ENERO, FEVEREIRO FEBRUARY FEBRERO, MARCO MARCH MARZO, ABRIL APRIL, MAIO MAY MAYO,
JUNHO JUNE JUNIO, JULHO JULY JULIO, AGOSTO AUGUST, SETEMBRO SEPTEMBER SEPTIEMBRE SETIEMBRE, OUTUBRO OCTOBER
OCTUBRE, NOVEMBRO NOVEMBER NOVIEMBRE, DEZEMBRO DECEMBER DICIEMBRE"""
MONTHS = {name: month for month, names in enumerate(_MONTHS.split(","), 1) for name in names.split()}
_PHASES = {3: "TRIF TRIPH THREEPH", 2: "BIFA BIFS TWOPH", 1: "MONOF SINGLEPH ONEPH"}
PHASE_WORDS = {stem: count for count, stems in _PHASES.items() for stem in stems.split()}
_SHORT_PHASE = "(?:[123]F?|MONO|BI|TRI)"
SEVERAL_PHASES = re.compile(rf"(?<![0-9A-Z.,]){_SHORT_PHASE}\s*(?:/|OU|OR|E)\s*{_SHORT_PHASE}(?![0-9A-Z.,])")
BOX = re.compile(r"[(\[]\s*([Xx]?)\s*[)\]]")  # to tick
FIRST_YEAR = 1940
MONTH_AND_YEAR = re.compile(r"(?:[0-3]?[0-9]/)?[01]?[0-9]/(?:19|20)[0-9]{2}")
# `MAR/2019`, `12 DE MARÇO DE 2019`, `MAR 12, 2019`.
NAMED_MONTH = re.compile(
    r"(?:(?<![0-9/.,\-])(?P<before>[0-3]?[0-9])\s*[/\-. ]?\s*(?:DE\s*)?)?"
    r"(?<![A-Z])(?P<name>[A-Z0-9]{3}[A-Z]*?)\.?"
    r"\s*(?:(?P<after>[0-3]?[0-9])(?:ST|ND|RD|TH)?\s*[, ]\s*(?=(?:19|20)[0-9]{2}))?"
    r"[/\-. ,]?\s*(?:DEL?\s*)?(?P<year>(?:19|20)[0-9]{2}|(?<![0-9])[0-9]{2})(?![0-9])"
)
# `SEM/ANO 10/15`, `WEEK 10/2015`, `W10/2015`: what stands beside the year is no month.
WEEK = re.compile(
    r"(?<![A-Z])(?:SEM(?:ANA|ESTRE)?|WEEK|WK|TRIM(?:ESTRE)?|BIM(?:ESTRE)?|QUARTER|QTR)(?![A-Z])"
    r"|(?<![A-Z0-9])WW? ?[0-5]?[0-9](?![0-9])|(?<![A-Z0-9/.\-])S ?[0-5]?[0-9](?![0-9])"
)
WEEK_YEAR, YEAR_WEEK = "SEM/ANO", "ANO/SEM"
ONLY_MONTH = "--MM"  # what a label of a month alone names, as ISO 8601 writes it
DAY = re.compile(r"(?<![A-Z])DIA\W*[0-9]")
YEAR_FIRST = re.compile(r"(?:ANO|YEAR)\W*(?:E )?(?:SEM|WEEK|TRIM)")
_LETTERS_FOR = str.maketrans({"0": "O", "1": "I", "2": "Z", "5": "S", "8": "B"})
NUMBER_SIGN = re.compile(r"^\s*[Nn](?:[º°ª]|[oO0]?[.:]|[oODQ0]\s)[\s.:]*")  # `PATRIM. Nº 12345`
# `7. 967`: an OCR engine sets a space behind a comma.
VOLTAGE = r"(?<![0-9.,/])[1-9][0-9]? [0-9]{3}(?=\s*(?:V|[/\-]))|"  # `34 500 V`: the dot was not read
VOLTAGE += r"[0-9][0-9OISB]{0,2}[.,] [0-9OISB]{1,3}(?![0-9OISB])|[0-9][0-9OISB]*(?:[.,][0-9OISB]+)*"
CODE = re.compile(r"[0-9A-Z]+(?:[./\-][0-9A-Z]+)*")
BEFORE_CODE = re.compile(r"(?<![0-9A-Z])(?:(?!N[O0R] |D[EOA] |EM )[A-Z]{1,3}[ \-]|[0-9A-Z]{1,3} ?- ?)$")
CHECK_DIGIT = re.compile(r" ?- ?[0-9A-Z]{1,2}(?![0-9A-Z])")
LETTERS_BEHIND = re.compile(r"\W*(?!D[EOA]\b|EM\b)[A-Z]{1,2}(?![0-9A-Z])")
IN_THREES = re.compile(r"[0-9]{1,3} [0-9]{3}(?P<more>(?: [0-9]{3})+)?(?: ?- ?[0-9A-Z]{1,2})?")
MEASURED = re.compile(r"[0-9]\s*(?:K[VU]A?|KG|HZ|%)\W*$|[0-9]\sV\W*$")  # no serial number
FIRST_TAP = re.compile(r"^\W*1[\s.:)|\-]+(?=[0-9]{4,5}(?![0-9]))")  # `1 - 13800`
# `13800 ± 2 x 2,5 %`, its sign misread or not.
REGULATION = re.compile(
    r"[\s(]*(?:±|[+][\s/]*-?|-)?\s*(?<![0-9.,])[1-9]\s*[X*]\s*[0-9](?:\s?[.,]\s?[0-9]+)?\s*%.*"
    r"|[\s(]*(?:±|[+]\s*/?\s*-)\s*[0-9]+(?:[.,][0-9]+)?\s*%.*"
)
CUT = re.compile(r"\W*[/\\]\s*[0-9]|\s*[\-.,][0-9]")  # `/13200`, `-456`: what stood before it was covered
NUMBER = r"[0-9OQISBZL|]+(?: ?[.,] ?[0-9OQISBZL|]+)*"


def number(text: str) -> float | None:
    """`112,5`, `13.800`, `1 500`: as Brazilians write numbers; letters that look like digits are digits."""
    compact = re.sub(r"\s", "", as_digits(fold(text)))
    if not re.fullmatch(r"[0-9]+([.,][0-9]+)*", compact):
        return None
    if re.fullmatch(r"[0-9]{1,3}([.,][0-9]{3})+", compact) and not compact.startswith("0"):
        return float(re.sub(r"[.,]", "", compact))
    parts = re.split(r"[.,]", compact)
    return float(parts[0]) if len(parts) == 1 else float("".join(parts[:-1]) + "." + parts[-1])


SEVERAL_POWERS = re.compile(r"\b[23]\s*X\s*[0-9]|[0-9]\s*/\s*[0-9.,]+\s*K[VU]A\b")


def ones(folded: str) -> str:
    """A text with the digit where an engine read a 1 as a letter: `07/I989`, `I3,8 kV`."""
    folded = re.sub(r"(?<![A-Z0-9])[IL|](?=[0-9])", "1", folded)
    return re.sub(r"(?<=[0-9])[I|](?![A-Z])", "1", folded)


def foreign(folded: str) -> bool:
    """Whether a text has the unit of another quantity behind its number: `302 L`, `480 kg`, `60 Hz`."""
    return re.search(r"[0-9][\s']*(?:KG|HZ|%|L|A|O?C|MM|DB|ANOS?)(?![0-9A-Z])", folded) is not None


def power(text: str) -> float | None:
    """kVA, from `112,5 kVA`, `POT 75`, `112.5KVA`, `5 MVA`; None for two ratings, `112,5/150 kVA`, and for
    several units, `3 x 37,5 kVA`.
    """
    folded = fold(text)
    if foreign(folded) or SEVERAL_POWERS.search(folded):
        return None
    if mega := re.search(rf"(?<![0-9A-Z.,])({NUMBER})\s*M[VU]A\b", folded):
        value = number(mega.group(1))
        return value * 1000 if value else None
    found = re.search(rf"(?<![0-9A-Z.,])({NUMBER})\s*K?\s*[VU]A\b", folded) or re.search(
        r"(?<![0-9A-Z.,])([0-9][0-9OISB]*(?:[.,](?:[0-9OISB]+| [0-9]))?)(?![0-9A-Z%/])", folded
    )
    value = number(found.group(1)) if found else None
    if found is None or value is None or value <= 0 or _rated_twice(folded, found):
        return None
    if value in POWERS:
        return value
    # A comma that was lost: 1125 is no power, 112.5 is.
    tenth = value / 10
    return tenth if tenth in POWERS and tenth != int(tenth) else value


def _rated_twice(folded: str, found: re.Match[str]) -> bool:
    """Whether another power stands beside the one that was found: `45/75`, `75 - 112,5 kVA`."""
    before, behind = folded[: found.start(1)], folded[found.end() :]
    return (
        re.search(r"[0-9]\s*(?:K?[VU]A\b)?\s*[/X\-]\s*$", before) is not None
        or re.match(rf"\s*[/X\-]\s*{NUMBER}\s*(?:K[VU]A\b|$)", behind) is not None
        or re.search(rf"(?<![0-9A-Z.,]){NUMBER}\s*K[VU]A\b", behind) is not None
    )


def voltages(text: str) -> list[float]:
    """All voltages of a text, in V: `13800/13200/12600 V`, `13,8 kV`."""
    folded = ones(re.sub(r"\s+", " ", fold(text)))
    in_kv = re.search(r"\bK\s?[VU]\b|[0-9]K[VU]\b", folded) is not None
    found: list[float] = []
    for raw in re.findall(VOLTAGE, folded):
        value = number(raw)
        if value is None:
            continue
        found.append(value * 1000 if in_kv and value < 1000 else value)
    return found


def primary(text: str) -> float | None:
    """V: the first of several taps; None where the first one cannot be read (`8O0/13200`, `/13200`)."""
    text = REGULATION.sub(" ", fold(text))
    found = [] if foreign(text) or CUT.match(text) else voltages(FIRST_TAP.sub("", text))
    return round(found[0], 1) if found and found[0] >= 1000 else None


def secondary(text: str) -> str | None:
    """`220/127`, `230`: one or two voltages below 1000 V, the higher one first; None for more of them."""
    if foreign(fold(text)) or CUT.match(text):
        return None
    folded = fold(text)
    if "KV" in folded:  # `0,38/0,22 kV`
        folded = re.sub(r"(?<![0-9])0[.,]([0-9]{1,3})(?![0-9])", lambda part: part[1].ljust(3, "0"), folded)
    folded = as_digits(re.sub(r"\b[VY]\b|K?VOLTS?|KV", "", folded))
    if re.search(r"[0-9]{3}\s*[/\\]\s*[0-9]{0,2}\s*$", folded):
        return None  # `380/2`: the second one was covered
    found = re.search(
        r"(?<![0-9.,])(?<![0-9] )([1-9][0-9]{2}(?:[.,][0-9])?)"
        r"(?:\s*[VY]?\s*[/\-X\\]\s*([1-9][0-9]{2}(?:[.,][0-9])?))?(?![0-9])",
        folded,
    )
    if not found:
        glued = re.fullmatch(r"\s*([1-9][0-9]{2})[1I/]?([1-9][0-9]{2})\s*", folded)
        pair = f"{glued.group(1)}/{glued.group(2)}" if glued else ""
        return pair if pair in SECONDARIES else None
    others = re.findall(r"(?<![0-9.,])[1-9][0-9]{2}(?![0-9.,])", folded[found.end() :])
    if {*others} - {*found.groups()} or re.search(r"\b[23]\s*X\s*$", folded[: found.start()]):
        return None  # `380/220 - 220/127`, `2 x 127`
    first = found.group(1).replace(",", ".")
    second = (found.group(2) or "").replace(",", ".")
    if not second:
        return first
    high, low = sorted((first, second), key=float, reverse=True)
    return f"{high}/{low}"


def date(text: str) -> str | None:
    """`2015`, `2015-03`, `2015-03-09`, as precise as printed; None for two dates."""
    folded = fold(text)
    place = 0
    while named := NAMED_MONTH.search(folded, place):
        if month := month_of(named["name"]):
            day = named["before"] or named["after"]
            year = _year(named["year"])
            return _day(year, month, int(day)) if day else f"{year}-{month:02d}"
        place = named.end("name")
    digits = ones(re.sub(r"(?<=[0-9/.\-])[OQ]|[OQ](?=[0-9/.\-])", "0", folded))
    digits = re.sub(r"\s*([/.\-])\s*", r"\1", digits)
    if len(set(re.findall(r"(?<![0-9])[01]?[0-9]/(?:19|20)[0-9]{2}(?![0-9])", digits))) > 1:
        return None  # `03/2015 - 05/2018`
    if found := re.search(
        r"(?<![0-9])([0-9]{1,2})[/.\-]([0-9]{1,2})[/.\-]((?:19|20)?[0-9]{2})(?![/.\-]?[0-9])",
        digits,
    ):
        day, month = int(found.group(1)), int(found.group(2))
        return _day(_year(found.group(3)), month, day)
    if WEEK.search(folded):
        return _year_of_week(digits, YEAR_FIRST.search(folded) is not None)
    if found := re.search(
        r"(?<![0-9])((?:19|20)[0-9]{2})[/.\-]([0-9]{1,2})(?:[/.\-]([0-9]{1,2}))?(?![0-9])", digits
    ):
        if found.group(3):
            return _day(int(found.group(1)), int(found.group(2)), int(found.group(3)))
        return _month(int(found.group(1)), int(found.group(2)))
    if found := re.search(r"(?<![0-9])([0-9]{1,2})[/.\-]((?:19|20)[0-9]{2}|[0-9]{2})(?![0-9])", digits):
        return _month(_year(found.group(2)), int(found.group(1)))
    # `04 2015`, of `MÊS ANO`; `15 04 2015`, of `DIA MÊS ANO`.
    if found := re.fullmatch(r"\W*(?:([0-3]?[0-9])\s+)?(0?[1-9]|1[0-2])\s+((?:19|20)[0-9]{2})\W*", digits):
        month, year = int(found.group(2)), int(found.group(3))
        return _day(year, month, int(found.group(1))) if found.group(1) else _month(year, month)
    if found := re.search(r"(?<![0-9A-Z/\-])((?:19|20)[0-9]{2})(?![0-9A-Z/])", digits):
        return found.group(1)
    return None


def month(text: str) -> str | None:
    """`--04`, from `04`, `ABR`: a month whose year stands elsewhere; a date where one stands with it."""
    whole = date(text)
    if whole and len(whole) > 4:
        return whole
    word = re.sub(r"^\W+|\W+$", "", ones(fold(text)))
    if re.fullmatch(r"0?[1-9]|1[0-2]", word):
        return f"--{int(word):02d}"
    found = month_of(word) if re.fullmatch(r"[0-9A-Z]{3,}", word) else None
    return f"--{found:02d}" if found else None


@lru_cache(maxsize=1024)
def month_of(word: str) -> int | None:
    """The month that a word is the name of or the beginning of one, `SET`, a letter maybe misread, `N0V`;
    None for a town's, `JUNDIAI`, and for what may be two, `JUIHO`.
    """
    if sum(sign.isalpha() for sign in word) < 2:
        return None
    read = "JUL" if word == "JU1" else word.translate(_LETTERS_FOR)
    found = {month for name, month in MONTHS.items() if name.startswith(read)}
    found = found or {month for name, month in MONTHS.items() if alike(read, name)}
    return found.pop() if len(found) == 1 else None


def _year_of_week(digits: str, first: bool) -> str | None:
    """The year beside a week; of two short numbers the `first` one or the last."""
    if found := re.search(r"(?<![0-9A-Z])(?:19|20)[0-9]{2}(?![0-9])", digits):
        return found.group()
    found = re.search(r"(?<![0-9])([0-9]+)[/.\-]([0-9]{2})(?![0-9])", digits)
    return str(_year(found[1 if first else 2])) if found else None


def _year(text: str) -> int:
    year = int(text)
    return year if year > 99 else year + (1900 if year >= 60 else 2000)


def _month(year: int, month: int) -> str | None:
    return f"{year}-{month:02d}" if 1 <= month <= 12 else None


def _day(year: int, month: int, day: int) -> str | None:
    try:
        return datetime.date(year, month, day).isoformat()
    except ValueError:
        return None


def fuse(text: str) -> str | None:
    """`5H`, `0.5H`, `10K`: rating and type of a fuse link; None for several, `5H/8K`."""
    # Dots up to the value are none of it; `.5H` may be what is left of `0.5H`.
    folded = re.sub(r"^[\s.]+(?=[0-46-9]|[0-9]{2})", "", fold(text).replace(",", "."))
    links = r"(?<![0-9A-Z.])([0-9OISZB]{1,3}(?:\.[0-9])?)\s*-?\s*(H|K|T|EF)\b"
    found = {(as_digits(rating), kind) for rating, kind in re.findall(links, folded)}
    if len(found) != 1:
        return None
    rating, kind = found.pop()
    value = rating.lstrip("0") if not rating.startswith("0.") else rating
    return f"{value}{kind}" if value and value[0] != "." else None


def chosen(text: str) -> str:
    """What the only ticked box of a text stands for: `MONOFÁSICO` of `(X) MONOFÁSICO ( ) TRIFÁSICO`; "" where
    none or several are ticked. A text without boxes is all there is to choose.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return text
    ticked = [at for at, box in enumerate(boxes) if box[1]]
    behind = not text[boxes[-1].end() :].strip(" .;")  # `MONOFÁSICO (X)`
    if len(ticked) != 1 or (behind and not text[: boxes[0].start()].strip(" .:;")):
        return ""
    at = ticked[0]
    if behind:
        return text[boxes[at - 1].end() if at else 0 : boxes[at].start()]
    return text[boxes[at].end() : boxes[at + 1].start() if at + 1 < len(boxes) else None]


def phase_word(text: str) -> int | None:
    """1, 2 or 3, where a text says it in words or with its unit: `TRIFÁSICO`, `THREE PHASE`, `3Ø`. None where
    it says two things.
    """
    folded = fold(chosen(text))
    letters = re.sub(r"[^A-Z]", "", folded)
    if counts := {count for stem, count in PHASE_WORDS.items() if stem in letters}:
        return counts.pop() if len(counts) == 1 else None
    found = re.search(r"(?<![0-9.,/A-Z])([123])\s*-?\s*(?:PHASES?\b|PH\b|FASES?\b|[ØΦ])", folded)
    found = found or re.fullmatch(r"\W*([123])\s*~\W*", folded)
    return int(found.group(1)) if found else None


def phases(text: str) -> int | None:
    """1, 2 or 3, from `3`, `TRIFASICO`, `3Ø`; None for `1 / 3`."""
    if word := phase_word(text):
        return word
    folded = fold(chosen(text))
    if SEVERAL_PHASES.search(folded):
        return None
    if short := re.search(r"\b(?:(MONO|SINGLE|ONE)|(BI|TWO|DUAS)|TRI|THREE|TRES)\b", folded):
        return short.lastindex or 3
    found = re.search(
        r"(?<![0-9.,/A-Z])0?([123]|^I$)\s*(?:F|[Ø0OΦ~]|\(?[A-Z]{3,4}\)?)?(?![0-9A-Z.,/])", folded
    )
    return int(as_digits(found.group(1))) if found else None


HAS = ("POSSUI", "TEM", "TIENE", "POSEE")  # `NÃO POSSUI`
YES, NO = ("SIM", "S", "SI", "YES", "Y", "SLM", "5IM"), ("NAO", "N", "NO", "NA0", "NAQ")


def self_protected(text: str) -> bool | None:
    """true from SIM, S, X; false from NÃO, N; of both the marked one, and None where no box tells which.

    `N/A`, `NÃO INFORMADO`, `NO APLICA` say neither.
    """
    folded = re.sub(r"[^A-Z0-9]", " ", fold(text)).split()
    if {*YES} & {*folded} and {*NO} & {*folded}:
        plain = text.strip(" .:;,_|")
        begins, ends = plain[:1] in ("(", "["), plain[-1:] in (")", "]")
        if folded.count("X") != 1 or begins == ends:
            return None
        at = folded.index("X")  # `( ) SIM  (X) NÃO` or `SIM [ ]  NÃO [X]`
        folded = folded[at + 1 : at + 2] if begins else folded[max(0, at - 1) : at]
    elif "X" in folded[:-1]:
        folded = folded[folded.index("X") + 1 :]
    if not folded or any(word not in HAS for word in folded[1:]):
        return None
    if folded[0] in (*YES, "X"):
        return True
    return False if folded[0] in NO else None


def code(text: str) -> str | None:
    """A serial number, asset tag or registration: one word with at least three digits, as printed; one in
    groups of three, `12 345 678`, without its blanks.
    """
    best = _code(text)[0]
    return best if best.strip("0.-/") else None  # `000000` is a form that nobody filled in


def goes_on(text: str) -> bool:
    """Whether a text has more than its code, maybe the rest of that number: other digits, `301 4567`, or
    letters behind it, `123456 A`. A month and year beside it are none of it.
    """
    _, before, behind = _code(text)
    digits = [word for word in CODE.findall(f"{before} {behind}") if re.search("[0-9]", word)]
    return not all(_dated(word) for word in digits) or LETTERS_BEHIND.match(behind) is not None


def cut(text: str) -> bool:
    """Whether a text begins or ends in the middle of a value: `/03/2015`, `-456`, `123456-`."""
    return CUT.match(text) is not None or re.search(r"[0-9A-Za-z][/\\\-]\s*$", text) is not None


def before_code(text: str) -> str:
    """What stands before the code in a text."""
    return _code(text)[1]


def _code(text: str) -> tuple[str, str, str]:
    """The code in a text, or "", and what stands before and behind it."""
    if MEASURED.search(fold(text)):
        return "", "", ""
    cleaned = fold(NUMBER_SIGN.sub("", text)).strip(" .:;,=_*|'\"")
    if groups := IN_THREES.fullmatch(cleaned):
        # Two may also be what a spot leaves of one number, or the numbers of two columns.
        return cleaned.replace(" ", ""), "", "" if groups["more"] else cleaned
    for word in CODE.finditer(cleaned):
        if sum(sign.isdigit() for sign in word.group()) >= 3 and not _dated(word.group()):
            # `A 12345`, `22 - 12345`, `12345 - 6`: what stands before it or a check digit behind it.
            begin = BEFORE_CODE.search(cleaned[: word.start()]) or word
            end = CHECK_DIGIT.match(cleaned, word.end()) or word
            whole = cleaned[begin.start() : end.end()]
            joined = re.sub(r"\s*-\s*", "-", whole).replace(" ", "")
            return joined, cleaned[: begin.start()], cleaned[end.end() :]
    return "", "", ""


def _dated(word: str) -> bool:
    """Whether a word is a month with its year: beside a label that was cut, no number."""
    if MONTH_AND_YEAR.fullmatch(word):
        return True
    named = NAMED_MONTH.fullmatch(word)
    return named is not None and month_of(named["name"]) is not None


def problem(name: str, value: Any, today: datetime.date | None = None) -> bool:
    """Whether a value is outside of what its field can be."""
    match name:
        case "potencia_kva":
            return value not in POWERS
        case "tensao_primaria":
            return not any(low <= value <= high for low, high in PRIMARY_RANGES) or not _rated(value)
        case "tensao_secundaria":
            return value not in SECONDARIES
        case "elo_fusivel":
            return FUSE.match(value) is None
        case "data_fabricacao":
            day = today or datetime.datetime.now(datetime.UTC).date()
            return not int(value[:4]) >= FIRST_YEAR or value > day.isoformat()[: len(value)]
        case "numero_serie" | "patrimonio" | "matricula":
            return not 3 <= len(value) <= 24
        case _:
            return False


def _rated(volts: float) -> bool:
    """Whether a primary voltage can be a rated one: a multiple of 50 V, or of 100 V between phases."""
    between = volts * 3**0.5
    return volts % 50 == 0 or abs(between - 100 * round(between / 100)) < 2


def inconsistent(values: Mapping[str, Any]) -> list[str]:
    """Fields that contradict another one: the phases against the voltages, a fuse link against the power."""
    found: list[str] = []
    phases_, second, kva = values.get("fases"), values.get("tensao_secundaria"), values.get("potencia_kva")
    if phases_ == 3 and second in ("115", "120", "127", "240/120", "230/115"):
        found.append("fases")
    if phases_ == 1 and kva is not None and kva > 167:
        found.append("fases")
    if phases_ == 1 and second in ("380/220", "220/127"):
        found.append("fases")
    first = values.get("tensao_primaria")
    if first is not None and second is not None and float(second.split("/")[0]) >= first:
        found.append("tensao_primaria")
    return found
