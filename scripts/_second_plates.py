"""Nameplates by a second hand, written without sight of the parser and of the other plates' wordings.

They are what hangs on a Brazilian utility's poles: most by NBR 5356 and NBR 5440 in Portuguese, a fifth
imported, in Spanish or English. A label is what a careful person reads, by the contract of the 11 fields.
The parser was tuned on these plates since; what is measured with are those of _third_plates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ocr_pipeline.synthetic import plates, scene
from ocr_pipeline.synthetic.plates import Drawn, Style, Value
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Texts = tuple[tuple[str, str], ...]  # what is printed, and which field it is: "" for none
Entry = tuple[str, Texts]  # a label, maybe empty, and what stands behind it

FOLDER = Path("/usr/share/fonts")
PRINTED = (
    "truetype/routed-gothic/routed-gothic.ttf",
    "truetype/crosextra/Carlito-Bold.ttf",
    "opentype/cabin/Cabin-SemiBold.otf",
    "opentype/urw-base35/NimbusSans-Regular.otf",
    "opentype/urw-base35/NimbusSans-Bold.otf",
    "opentype/urw-base35/NimbusSansNarrow-Regular.otf",
    "opentype/urw-base35/NimbusSansNarrow-Bold.otf",
    "truetype/freefont/FreeSansBold.ttf",
)
STAMPED = ("fonts-go/Go-Mono-Bold.ttf", "opentype/urw-base35/NimbusMonoPS-Bold.otf")
PACKAGES = {
    str(FOLDER / "truetype/routed-gothic/routed-gothic.ttf"): "fonts-routed-gothic",
    str(FOLDER / "truetype/crosextra/Carlito-Bold.ttf"): "fonts-crosextra-carlito",
    str(FOLDER / "opentype/cabin/Cabin-SemiBold.otf"): "fonts-cabin",
    str(FOLDER / "opentype/urw-base35/NimbusSans-Bold.otf"): "fonts-urw-base35",
    str(FOLDER / "truetype/freefont/FreeSansBold.ttf"): "fonts-freefont-ttf",
    str(FOLDER / "fonts-go/Go-Mono-Bold.ttf"): "fonts-go",
}
WIDTH, MARGIN = 1000, 46
ROOM = WIDTH - 2 * MARGIN
LANGUAGES = ("Portuguese", "Spanish", "English")
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))


# --- what is printed ---


@dataclass(frozen=True)
class Unit:
    """A transformer. Its taps begin with the nominal voltage."""

    language: str
    phases: int
    kva: float
    taps: tuple[int, ...]
    low: tuple[int, ...]
    maker: tuple[str, str, str]

    def words(self, what: str) -> list[str]:
        """The language's wordings."""
        return list(WORDS[self.language][what])

    def number(self, value: float) -> str:
        """With the language's decimal sign."""
        return f"{value:g}" if self.language == "English" else plates.comma(value)


@dataclass
class Content:
    """What a plate says: the values, its title, its entries, the table's voltages."""

    values: dict[str, Value]
    title: list[tuple[str, str]]
    entries: list[Entry] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)


def unit_of(rng: random.Random, language: str) -> Unit:
    """A transformer as utilities buy them."""
    phases = rng.choices((3, 1, 2), (0.62, 0.3, 0.08 if language == "Portuguese" else 0))[0]
    kva = rng.choice((15, 30, 45, 75, 112.5, 150, 225, 300) if phases == 3 else (5, 10, 15, 25, 37.5, 50))
    low: tuple[int, ...]
    if language == "Portuguese":
        net, step = rng.choices(((13800, 600), (23100, 1100), (34500, 1500)), (0.7, 0.12, 0.18))[0]
        taps = tuple(net - step * at for at in range(3))
        if phases == 1 and rng.random() < 0.6:  # between a phase and the neutral
            taps = tuple(round(tap / 3**0.5) for tap in taps)
        single = ((230,), (230, 115), (254, 127), (220,))
        low = rng.choice(((220, 127), (220, 127), (380, 220)) if phases == 3 else single)
    else:
        net = rng.choice((13200, 13800, 12470, 34500) if language == "English" else (13200, 13800))
        taps = tuple(round(net * (1 - 0.025 * at)) for at in range(5))
        low = rng.choice(((208, 120), (220, 127), (480, 277) if language == "English" else (400, 231)))
        low = low if phases == 3 else (240, 120)
    return Unit(language, phases, kva, taps, low, rng.choice(WORDS[language]["makers"]))


def facts(rng: random.Random, unit: Unit) -> dict[str, Any]:
    """What the other entries tell of this transformer."""
    net = unit.taps[0] * (3**0.5 if unit.taps[0] in (7967, 13337, 19919) else 1)
    level, bil = (15, 95) if net < 15000 else (24.2, 125) if net < 25000 else (36.2, 150)
    amperes = unit.kva * 1000 / (3**0.5 if unit.phases == 3 else 1)
    idle, mass = round(unit.kva * rng.uniform(3, 5)), round(90 + unit.kva * rng.uniform(4, 6))
    return {
        "z": unit.number(rng.choice((3.5, 4, 4.5) if unit.phases == 3 else (2.5, 2.45, 1.9))),
        "oil": round(20 + unit.kva * rng.uniform(1, 1.5)),
        "mass": mass,
        "core": mass // 2,
        "bil": bil,
        "level": unit.number(level),
        "group": rng.choice(("Dyn1", "Dyn1", "Dyn11") if unit.phases == 3 else ("Ii0", "Ii6")),
        "high": unit.number(round(amperes / unit.taps[0], 2)),
        "low": unit.number(round(amperes / unit.low[0], 1)),
        "idle": idle,
        "all": round(idle * rng.uniform(3.5, 4.5)),
        "order": f"45{rng.randrange(10**8):08d}",
        "hertz": 50 if unit.low == (400, 231) else 60,
    }


def others(rng: random.Random, unit: Unit) -> list[Entry]:
    """What else plates say, each thing once."""
    told: list[Entry] = []
    known, seen = facts(rng, unit), {"SUBTRATIVA" if unit.phases == 3 else ""}
    for row in rng.sample(unit.words("others"), rng.randint(6, 10)):
        label, text = row.split(" = ")
        keys = {label[:3], text.partition("}")[0]}
        if not keys & seen:
            told.append((label, ((text.format(**known), ""),)))
        seen |= keys
    return told


def power(rng: random.Random, unit: Unit, label: str) -> str:
    """112,5 kVA."""
    text = unit.number(unit.kva)
    return text if "kVA" in label else text + rng.choices((" kVA", "kVA", " KVA"), (0.7, 0.2, 0.1))[0]


def primary(rng: random.Random, unit: Unit, label: str, most: int = 3) -> str:
    """13.800 V, 13,8 kV, 13800/13200/12600 V."""
    kilo = "(kV)" in label or ("(V)" not in label and rng.random() < 0.35)
    thousands = ("," if unit.language == "English" else ".") if rng.random() < 0.35 else ""
    taps = unit.taps[: rng.choice((1, most))]
    texts = [unit.number(tap / 1000) if kilo else f"{tap:,}".replace(",", thousands) for tap in taps]
    text = rng.choice(("/", "/", " / ", " - ", "-")).join(texts)
    text += "" if "(" in label else " kV" if kilo else " V"
    regulated = unit.language == "Spanish" and most > 1 == len(taps) and rng.random() < 0.5
    return text + " ± 2 x 2,5 %" if regulated else text


def secondary(rng: random.Random, unit: Unit, label: str) -> str:
    """220/127 V, 220-127 V, 380Y/220 V, 0,22/0,127 kV."""
    kilo = "(" not in label and rng.random() < 0.12
    star = "Y/" if unit.phases == 3 and not kilo else "/"
    texts = [unit.number(volts / 1000) if kilo else str(volts) for volts in unit.low]
    text = rng.choices(("/", "-", " / ", star), (0.6, 0.16, 0.12, 0.12))[0].join(texts)
    return text + ("" if "(" in label else " kV" if kilo else " V")


def date(rng: random.Random, unit: Unit) -> tuple[str, Value]:
    """How precise it is, and the date: 03/2019, MAR/2019, 12-05-2019, 2019, 03/19."""
    year, month, day = rng.randint(1988, 2024), rng.randint(1, 12), rng.randint(1, 28)
    name, english = unit.words("months")[month - 1], unit.language == "English"
    how = rng.choices(("number", "name", "year", "day", "short"), (0.34, 0.22, 0.22, 0.15, 0.07))[0]
    if how == "year":
        return how, Value(str(year), str(year))
    if how == "day":
        sign = rng.choice("-/.")
        written = f"{day} {name} {year}" if english else f"{day:02d}{sign}{month:02d}{sign}{year}"
        return how, Value(f"{year}-{month:02d}-{day:02d}", written)
    written = {
        "number": f"{month:02d}{rng.choice('//-')}{year}",
        "name": f"{name}{' ' if english else rng.choice('//- ')}{year}",
        "short": f"{month:02d}/{year % 100:02d}",
    }[how]
    return "month", Value(f"{year}-{month:02d}", written)


def serial(rng: random.Random, year: str) -> str:
    """Digits most; a letter or the year with some makers."""
    digits = str(rng.randint(10**5, 10**6 - 1))
    long, letter = f"10{rng.randrange(10**8):08d}", f"{rng.choice('ABDKT')}{digits}"
    return rng.choices((digits, long, letter, f"{digits[:5]}/{year[2:4]}"), (0.5, 0.25, 0.15, 0.1))[0]


def fuse(unit: Unit) -> str:
    """The usual link for this power."""
    links = ((15, "1H"), (30, "2H"), (45, "3H"), (75, "5H"), (112.5, "6K"), (150, "8K"), (225, "10K"))
    return next((link for most, link in links if unit.kva <= most), "15K")


def content(rng: random.Random, unit: Unit, layout: str) -> Content:
    """What the plate of a transformer says; with a table of taps the voltages stand there."""
    values = {"fabricante": Value(unit.maker[0], unit.maker[0])}
    made = Content(values, [(rng.choice(unit.words("title")), "")])
    bare = layout in ("rows", "running", "stacked")

    def add(name: str, value: Any, write: Callable[[str], str], wording: str = "") -> None:
        label = rng.choice([label for label in unit.words(wording or name) if label or bare])
        label = label.replace("{}", rng.choice(WORDS["utilities"]))
        values[name] = Value(value, write(label))
        made.entries.append((label, ((values[name].printed, name),)))

    def in_title(name: str, value: Any, word: str, at: int) -> None:
        values[name] = Value(value, word)
        made.title.insert(0 if unit.language == "English" else at, (word, name))

    precise, day = date(rng, unit)
    number = serial(rng, day.value)
    add("numero_serie", number, lambda _: number)
    add("potencia_kva", unit.kva, partial(power, rng, unit))
    word = unit.words("phases")[unit.phases - 1]
    if rng.random() < 0.45:
        in_title("fases", unit.phases, word, 1)
    else:
        digit, symbols = str(unit.phases), (f"{unit.phases}Ø", f"{unit.phases}~")
        count = f"{digit} {unit.words('phase')[0]}{'S' * (unit.phases > 1)}"
        labelled, alone = (digit, digit, word, symbols[0]), (word, count, *symbols)
        add("fases", unit.phases, lambda label: rng.choice(labelled if label else alone))
    low = "/".join(map(str, unit.low))
    if layout == "taps":
        thousands = "." if unit.language != "English" and rng.random() < 0.3 else ""
        made.taps = [f"{tap:,}".replace(",", thousands) for tap in unit.taps]
        values |= {"tensao_primaria": Value(unit.taps[0], made.taps[0]), "tensao_secundaria": Value(low, low)}
    elif rng.random() < 0.2:
        first, then = primary(rng, unit, "", 1), secondary(rng, unit, "")
        values |= {"tensao_primaria": Value(unit.taps[0], first), "tensao_secundaria": Value(low, then)}
        between = " / " if "-" in then else " - "
        together = ((first, "tensao_primaria"), (between, ""), (then, "tensao_secundaria"))
        made.entries.append((rng.choice(unit.words("both")), together))
    else:
        add("tensao_primaria", unit.taps[0], partial(primary, rng, unit))
        add("tensao_secundaria", low, partial(secondary, rng, unit))
    if rng.random() < 0.94:
        add("data_fabricacao", day.value, lambda _: day.printed, precise)
    if rng.random() < 0.4:
        add("elo_fusivel", fuse(unit), lambda _: fuse(unit))
    if rng.random() < 0.3:
        name, *answers = unit.words("self")
        if rng.random() < 0.3:
            in_title("autoprotegido", True, name, len(made.title))
        else:
            no = rng.randrange(2)
            values["autoprotegido"] = Value(not no, answers[no])
            made.entries.append((name, ((answers[no], "autoprotegido"),)))
    if rng.random() < 0.45:
        tag = str(rng.randint(10_000, 9_999_999))
        add("patrimonio", tag, lambda _: tag)
    if rng.random() < 0.3:
        mark = rng.choice((f"{rng.randint(100, 999_999):06d}",) * 3 + (f"TR-{rng.randint(1000, 99999)}",))
        add("matricula", mark, lambda _: mark)
    places = [(at + rng.uniform(0, 7), entry) for at, entry in enumerate(made.entries + others(rng, unit))]
    made.entries = [entry for _, entry in sorted(places, key=lambda place: place[0])]
    return made


# --- how it is drawn ---


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A typeface. Raises FileNotFoundError that names the packages."""
    return plates.font(str(FOLDER / name), size, tuple(sorted(PACKAGES.values())))


def length(texts: Texts, face: str, size: int) -> float:
    """How long they are in a row."""
    return sum(font(face, size).getlength(text) for text, _ in texts)


@dataclass
class Sheet:
    """A plate in the making: coverage, and where each value is."""

    rng: random.Random
    unit: Unit
    told: Content
    face: str
    value: str
    picture: Image.Image = field(default_factory=lambda: Image.new("L", (WIDTH, 2000), 0))
    places: dict[str, Box] = field(default_factory=dict)

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.picture)

    def write(self, x: float, y: float, texts: Texts, face: str, size: int, room: float = ROOM) -> float:
        """Write, smaller where there is no room; where it ends."""
        while length(texts, face, size) > room:
            size, y = size - 1, y + 0.6
        for text, name in texts:
            at, letters = (x, y + 0.9 * size), font(face, size)
            self.pen.text(at, text, fill=255, font=letters, anchor="ls")
            if name:
                self.places[name] = self.pen.textbbox(at, text, font=letters, anchor="ls")
            x += letters.getlength(text)
        return x

    def centred(self, x: float, y: float, texts: Texts, face: str, size: int, room: float = ROOM) -> None:
        """Write in the middle of the room."""
        self.write(x + max(0.0, room - length(texts, face, size)) / 2, y, texts, face, size, room)


def heading(sheet: Sheet) -> float:
    """The maker's mark and the title, or the title alone; where it ends."""
    rng, (mark, signed, town), y = sheet.rng, sheet.unit.maker, 34.0
    name, logo = ((mark, "fabricante"),), rng.choice(PRINTED[1:])
    title = tuple(part for word in sheet.told.title for part in (word, (" ", "")))[:-1]
    how = rng.choices(("mark", "beside", "foot", "entry"), (0.45, 0.25, 0.2, 0.1))[0]
    if how == "beside":
        end = sheet.write(MARGIN + 14, y + 6, name, logo, 50, 330)
        sheet.pen.rounded_rectangle((MARGIN, y, end + 14, y + 72), radius=8, outline=230, width=3)
        room = WIDTH - MARGIN - end - 34
        if length(title, sheet.face, 26) < room:
            sheet.centred(end + 34, y + 18, title, sheet.face, 34, room)
            return y + 92
        y += 84
    if how == "mark":
        size = rng.choice((56, 66, 76))
        sheet.centred(MARGIN, y, name, logo, size)
        y += size * 1.3
        if rng.random() < 0.6:
            sheet.centred(MARGIN, y, ((f"{signed} - {town}", ""),), sheet.face, 22)
            y += 36
    if how == "entry":
        sheet.told.entries.insert(0, (rng.choice(sheet.unit.words("fabricante")), name))
    sheet.centred(MARGIN, y, title, sheet.face, rng.choice((34, 40)))
    return y + 62


def foot(sheet: Sheet, y: float) -> float:
    """Who made it, if nothing said so yet, and what else stands there; where it ends."""
    rng, (mark, signed, town) = sheet.rng, sheet.unit.maker
    lines: list[Texts] = []
    if "fabricante" not in sheet.places:
        lines.append(((signed[: len(mark)], "fabricante"), (f"{signed[len(mark) :]} - {town}", "")))
    if rng.random() < 0.55:
        digits = f"{rng.randrange(10**8):08d}"
        cnpj = f"{digits[:2]}.{digits[2:5]}.{digits[5:]}/0001-{rng.randrange(100):02d}"
        text = rng.choice(sheet.unit.words("foot")).replace("{}", rng.choice(WORDS["utilities"]))
        lines.append(((text.replace("{cnpj}", cnpj), ""),))
    for line in lines:
        sheet.centred(MARGIN, y + 10, line, sheet.face, 24)
        y += 40
    return y


def rows(sheet: Sheet, y: float, *, fields: bool = False) -> float:
    """Two columns of labels and values; as a form the values are stamped on lines."""
    half, colon, column = (ROOM - 36) / 2, sheet.rng.choice((":", "")), 0
    face = sheet.rng.choice(STAMPED) if fields else sheet.value
    for label, texts in sheet.told.entries:
        head: Texts = ((f"{label}{colon} " if label else "", ""),)
        short = length(head, sheet.face, 24) + 10 + length(texts, face, 28) <= half
        if column and not short:
            column, y = 0, y + 48
        x = MARGIN + column * (half + 36)
        end = x + half if short else WIDTH - MARGIN
        after = sheet.write(x, y + 4, head, sheet.face, 24) + 10
        sheet.write(after, y, texts, face, 28, end - after)
        if fields:
            sheet.pen.line((after - 4, y + 35, end, y + 35), fill=140, width=2)
        column = 1 if short and not column else 0
        y += 0 if column else 48
    return y + 48 * column + 6


def cells(sheet: Sheet, y: float, *, ruled: bool = True) -> float:
    """A grid with the label in each cell's corner; without rules, the label in the middle above its value."""
    columns, high = sheet.rng.choice((2, 3, 3)), 78
    wide, left = ROOM / columns, list(sheet.told.entries)
    while left:
        row: list[Entry] = []
        spans: list[int] = []
        while left:
            need = max(font(sheet.face, 19).getlength(left[0][0]), length(left[0][1], sheet.value, 31)) + 26
            span = min(columns, int(-(-need // wide)))
            if sum(spans) + span > columns:
                break
            row.append(left.pop(0))
            spans.append(span)
        spans[-1] += columns - sum(spans)
        x = float(MARGIN)
        for (label, texts), span in zip(row, spans, strict=True):
            room = wide * span
            if ruled:
                sheet.pen.rectangle((x, y, x + room, y + high), outline=190, width=2)
                sheet.write(x + 9, y + 5, ((label, ""),), sheet.face, 19, room - 18)
            else:
                sheet.centred(x + 9, y + 5, ((label, ""),), sheet.face, 19, room - 18)
            sheet.centred(x + 9, y + 33 if label else y + 20, texts, sheet.value, 31, room - 18)
            x += room
        y += high
    return y + 14


def running(sheet: Sheet, y: float) -> float:
    """Lines of text, one to three things on each."""
    x, count, most = float(MARGIN), 0, sheet.rng.choice((1, 2, 3))
    for label, texts in sheet.told.entries:
        line: Texts = ((f"{label} " if label else "", ""), *texts)
        if count and (count == most or x + length(line, sheet.face, 30) > WIDTH - MARGIN):
            x, y, count = float(MARGIN), y + 47, 0
        x = sheet.write(x, y, line, sheet.face, 30, WIDTH - MARGIN - x) + 48
        count += 1
    return y + 56


def ledger(sheet: Sheet, y: float) -> float:
    """A ruled table: labels on the left, values on the right."""
    middle = MARGIN + 420
    for label, texts in sheet.told.entries:
        sheet.pen.rectangle((MARGIN, y, WIDTH - MARGIN, y + 44), outline=180, width=2)
        sheet.pen.line((middle, y, middle, y + 44), fill=180, width=2)
        sheet.write(MARGIN + 12, y + 8, ((label, ""),), sheet.face, 25, 396)
        sheet.write(middle + 14, y + 6, texts, sheet.value, 28, ROOM - 448)
        y += 44
    return y + 14


def with_taps(sheet: Sheet, y: float) -> float:
    """Rows, and under them a table of the taps; the low voltage stands once, beside all of them."""
    top = rows(sheet, y) + 8
    ends = [MARGIN + at for at in (0, 150, 370, 640, ROOM)]
    head, taps = sheet.unit.words("table"), sheet.told.taps
    lines = [[(word, "") for word in head]]
    lines += [[(str(at), ""), (f"{at + 3}-{at + 6}", ""), (tap, "")] for at, tap in enumerate(taps, 1)]
    lines[1][2] = (taps[0], "tensao_primaria")
    for at, line in enumerate(lines):
        y = top + 42 * at
        for text, left, right in zip(line, ends, ends[1:], strict=False):
            sheet.centred(left + 8, y + 6, (text,), sheet.value if at else sheet.face, 26, right - left - 16)
        sheet.pen.line((ends[0], y, ends[-1 if at < 2 else -2], y), fill=190, width=2)
    bottom = top + 42 * len(lines)
    low = ((sheet.told.values["tensao_secundaria"].printed, "tensao_secundaria"),)
    sheet.centred(ends[3], bottom - 21 * len(taps) - 17, low, sheet.value, 28, ends[4] - ends[3])
    for x in ends:
        sheet.pen.line((x, top, x, bottom), fill=190, width=2)
    sheet.pen.line((ends[0], bottom, ends[-1], bottom), fill=190, width=2)
    return bottom + 14


LAYOUTS: dict[str, Callable[[Sheet, float], float]] = {
    "rows": rows,
    "form": partial(rows, fields=True),
    "grid": cells,
    "stacked": partial(cells, ruled=False),
    "running": running,
    "ledger": ledger,
    "taps": with_taps,
}


def draw(
    rng: random.Random, style: Style | None = None, *, language: str = "Portuguese", layout: str = ""
) -> Drawn:
    """A nameplate. `style` is the first generator's, and not looked at."""
    layout = layout or rng.choice(tuple(LAYOUTS))
    unit = unit_of(rng, language)
    told = content(rng, unit, layout)
    sheet = Sheet(rng, unit, told, rng.choice(PRINTED), rng.choice((*PRINTED, *STAMPED)))
    height = int(foot(sheet, LAYOUTS[layout](sheet, heading(sheet)))) + 40
    border = (6, 6, WIDTH - 7, height - 7)
    sheet.pen.rounded_rectangle(border, radius=rng.choice((0, 20)), outline=200, width=3)
    for x in (25, WIDTH - 25):
        for y in (25, height - 25):
            sheet.pen.ellipse((x - 8, y - 8, x + 8, y + 8), fill=170)
    mask = np.asarray(sheet.picture.crop((0, 0, WIDTH, height)), dtype=np.float32) / np.float32(255)
    ink = rng.choice(("dark", "dark", "dark", "light", "etched", "embossed"))
    return Drawn(plates.coloured(mask, rng, ink), told.values, sheet.places)


def language_of(seed: int) -> str:
    """Eight plates of ten are in Portuguese."""
    return {3: "English", 7: "Spanish"}.get(seed % 10, "Portuguese")


def sample(seed: int, difficulty: str | None = None) -> scene.Sample:
    """The photo of a seed: a plate of this hand in the same kind of scene."""
    return scene.sample(seed, difficulty, drawer=partial(draw, language=language_of(seed)))
