"""Nameplates by a third hand, written without sight of the parser and of the other plates' wordings.

Three fifths are in Portuguese, by NBR 5356 and NBR 5440, a fifth in Spanish, a fifth in English, by IEC 60076
or ANSI C57.12. A label is what a careful person reads, by the contract of the 11 fields (docs/ocr.md): the
higher one of two voltages first, a manufacturer as the templates write it.
Nothing is tuned on these plates; whoever tunes on them needs another generator to measure with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ocr_pipeline.synthetic import plates, scene
from ocr_pipeline.synthetic.plates import Drawn, Style, Value
from PIL import Image, ImageDraw, ImageFont

Texts = tuple[tuple[str, str], ...]  # what is printed, and which field it is: "" for none
Entry = tuple[str, Texts]  # a label and what stands behind it
Entries = Sequence[Entry]

WIDTH, MARGIN = 1040, 44
RIGHT = WIDTH - MARGIN
LANGUAGES = ("Portuguese", "Spanish", "English")
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
FOLDER = Path("/usr/share/fonts")
PRINTED, STAMPED = WORDS["fonts"]["printed"], WORDS["fonts"]["stamped"]
PACKAGES = {str(FOLDER / name): package for name, package in WORDS["fonts"]["packages"].items()}

# --- what is printed ---


@dataclass(frozen=True)
class Unit:
    """A transformer, and how its plate writes numbers."""

    words: dict[str, Any]
    maker: list[str]
    phases: int
    power: float
    low: str
    taps: list[int]  # the first one is the nominal voltage
    high: str  # how the plate has it instead, where there are no taps
    point: bool  # decimals
    thousands: bool
    kilovolts: bool
    glue: str  # between a number and its unit
    in_label: bool  # the unit stands in the label, not behind the number
    between: str  # two taps


@dataclass
class Content:
    """The plate's values, and what its lines say: of fields by name, and the rest."""

    values: dict[str, Value]
    entries: dict[str, Entry]
    rest: list[Entry]
    title: Texts
    logo: Texts
    foot: Texts


def unit_of(rng: random.Random, language: str) -> Unit:
    """A transformer of this language's market."""
    words = WORDS[language]
    phases = rng.choices((3, 1, 2), (0.66, 0.29, 0.05))[0]
    power, low, high = (rng.choice(words["ratings"][phases][what]) for what in ("kva", "low", "high"))
    taps, text = ([], high) if isinstance(high, str) else (high, "")
    kilovolts = not text and rng.random() < 0.1
    point, thousands = rng.random() < words["point"], not kilovolts and rng.random() < 0.14
    glue, in_label = rng.choice((" ", " ", "")), rng.random() < 0.3
    between, maker = rng.choice(("/", "/", " / ", "-", " - ")), rng.choice(words["makers"])
    numbers = (point, thousands, kilovolts, glue, in_label, between)
    return Unit(words, maker, phases, float(power), low, taps, text, *numbers)


def decimal(unit: Unit, text: str) -> str:
    """The number as this plate writes it."""
    return text if unit.point else text.replace(".", ",")


def volts(unit: Unit, tap: int) -> str:
    """One tap: 13800, 13.800 or 13,8."""
    if unit.kilovolts:
        return decimal(unit, f"{tap / 1000:g}")
    return f"{tap:,}".replace(",", "," if unit.point else ".") if unit.thousands else str(tap)


def measured(unit: Unit, label: str, text: str, symbol: str) -> tuple[str, str]:
    """A label and a number with its unit, which stands in one of both."""
    if symbol.upper() in label.upper().split() or "VOLTS" in label:
        return label, text
    return (f"{label} ({symbol})", text) if unit.in_label else (label, f"{text}{unit.glue}{symbol}")


def primary(unit: Unit, label: str) -> tuple[str, Value]:
    """The label and the taps, the first of which is the value."""
    if not unit.taps:
        label, text = measured(unit, label, decimal(unit, unit.high), "V")
        return label, Value(float(unit.high.split("/")[0].split("GRDY")[0].split()[0]), text)
    plain = "VOLTS" in label
    text = unit.between.join(f"{tap}" if plain else volts(unit, tap) for tap in unit.taps)
    label, text = measured(unit, label, text, "kV" if unit.kilovolts and not plain else "V")
    return label, Value(float(unit.taps[0]), text)


def higher_first(volts: str) -> str:
    """`120/240` as the field's value is defined: 240/120."""
    return "/".join(sorted(volts.split("/"), key=float, reverse=True))


def fields(rng: random.Random, unit: Unit) -> tuple[dict[str, Value], dict[str, str]]:
    """The fields that this plate prints, and their labels."""
    utility, words = rng.choice(unit.words["utilities"]), unit.words
    label = {name: rng.choice(texts).format(utility=utility) for name, texts in words["labels"].items()}
    year = rng.randint(1984, 2024)
    serial, (when, short) = serial_number(rng, year), date(rng, unit, year)
    label["data_fabricacao"] = label["year" if short else "data_fabricacao"]
    power, symbol = decimal(unit, f"{unit.power:g}"), rng.choice(("kVA", "kVA", "KVA"))
    label["potencia_kva"], power = measured(unit, label["potencia_kva"], power, symbol)
    label["tensao_primaria"], high = primary(unit, label["tensao_primaria"])
    low = unit.low if "Y" in unit.low else unit.low.replace("/", rng.choice(("/", "/", "/", " / ", "-")))
    label["tensao_secundaria"], low = measured(unit, label["tensao_secundaria"], low, "V")
    fuse, apart = rng.choice(WORDS["fuses"]), " " if rng.random() < 0.15 else ""
    own, phases = rng.random() < 0.5, rng.choice((str(unit.phases), words["phases"][unit.phases - 1]))
    asset = f"{rng.randint(10_000, 9_999_999):0{rng.choice((5, 5, 8))}d}"
    registration = f"{rng.randint(1000, 999_999)}" + rng.choice(("", "", f"-{rng.randint(0, 9)}"))
    everything = {
        "fabricante": (1.0, Value(unit.maker[0], unit.maker[1])),
        "numero_serie": (1.0, Value(serial, serial)),
        "data_fabricacao": (0.94, when),
        "potencia_kva": (1.0, Value(unit.power, power)),
        "fases": (1.0, Value(unit.phases, phases)),
        "tensao_primaria": (1.0, high),
        "tensao_secundaria": (1.0, Value(higher_first(unit.low.replace("Y", "")), low)),
        "elo_fusivel": (0.5, Value(fuse, decimal(unit, fuse[:-1] + apart + fuse[-1]))),
        "autoprotegido": (0.32, Value(own, rng.choice(words["yes" if own else "no"]))),
        "patrimonio": (0.5, Value(asset, asset)),
        "matricula": (0.3, Value(registration, registration)),
    }
    return {name: value for name, (often, value) in everything.items() if rng.random() < often}, label


def serial_number(rng: random.Random, year: int) -> str:
    """As makers number: # is a digit, @ a letter, YY a year."""
    text = rng.choice(WORDS["serials"]).replace("YY", f"{year % 100:02d}")
    drawn = (rng.choice("0123456789" if sign == "#" else "ABCDEFHJKLMNPRTVX") for sign in text)
    return "".join(other if sign in "#@" else sign for sign, other in zip(text, drawn, strict=True))


def date(rng: random.Random, unit: Unit, year: int) -> tuple[Value, bool]:
    """When it was made, and whether only the year tells it."""
    month, day = rng.randint(1, 12), rng.randint(13, 28)  # no month is 13
    name, to_month = unit.words["months"][month - 1], f"{year}-{month:02d}"
    mark, space = rng.choice(("/", "/", "-", ".")), rng.choice(("/", "/", "-", " "))
    shapes = (
        (5, f"{year}", f"{year}"),
        (5, to_month, f"{month:02d}{mark.replace('.', '/')}{year}"),
        (5, to_month, f"{name}{space}{year}"),
        (2, to_month, f"{name}/{year % 100:02d}"),
        (2, f"{to_month}-{day}", f"{day}{mark}{month:02d}{mark}{year}"),
        (1, f"{to_month}-{day}", f"{to_month}-{day}"),
    )
    _, value, text = rng.choices(shapes, [shape[0] for shape in shapes])[0]
    return Value(value, text), value == text == f"{year}"


def content(rng: random.Random, unit: Unit, layout: str) -> Content:
    """What the plate says, and where: some fields stand in the heading or in the last line."""
    values, label = fields(rng, unit)
    if layout == "taps" and unit.taps:
        values["tensao_primaria"] = Value(float(unit.taps[0]), str(unit.taps[0]))
    words, own_line, rest = unit.words, unit.maker[2], list[Entry]()
    for labels, text in rng.sample(words["noise"], rng.randint(4, 9)):
        said = rng.choice(text)
        if not isinstance(text[0], str):
            said = decimal(unit, f"{rng.uniform(text[0], text[1]):.{text[2]}f}") + text[3]
        said = said.format(group=rng.choice(words["groups"][unit.phases]))
        rest.append((rng.choice(labels), ((said, ""),)))
    where = rng.choices(("logo", "label", "foot"), (0.68, 0.16, 0.16))[0]
    if where == "foot":
        values["fabricante"] = Value(unit.maker[0], own_line)
    maker = ((values["fabricante"].printed, "fabricante"),)
    foot = rng.choice(((), ((rng.choice(words["feet"]), ""),), ((own_line, ""),) if where == "logo" else ()))
    title = [(rng.choice(words["plain"]), "")]
    if rng.random() < 0.6:
        before, _, after = rng.choice(words["titles"]).partition("{phases}")
        values["fases"] = Value(unit.phases, words["phases"][unit.phases - 1])
        title = [(before, ""), (values["fases"].printed, "fases"), (after, "")]
    if values.get("autoprotegido", Value(False, "")).value and rng.random() < 0.4:
        values["autoprotegido"] = Value(True, words["self"])
        title += [(" ", ""), (words["self"], "autoprotegido")]
    taken = {name for _, name in title} | ({"fabricante"} if where != "label" else set())
    entries: dict[str, Entry] = {name: (label[name], ((values[name].printed, name),)) for name in values}
    entries = {name: entry for name, entry in entries.items() if name not in taken}
    logo, foot = maker if where == "logo" else (), maker if where == "foot" else foot
    return Content(values, entries, rest, tuple(title), logo, foot)


# --- where it stands ---


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Raises FileNotFoundError that names the packages."""
    return plates.font(str(FOLDER / name), size, tuple(PACKAGES.values()))


class Sheet:
    """A plate under the pen. Text is measured, shrunk to its room, and noted where it is a field's."""

    def __init__(self, rng: random.Random, unit: Unit, told: Content) -> None:
        self.rng, self.unit, self.told = rng, unit, told
        self.picture = Image.new("L", (WIDTH, 2400), 0)
        self.pen = ImageDraw.Draw(self.picture)
        self.places: dict[str, tuple[float, float, float, float]] = {}
        self.face = rng.choice(PRINTED)
        self.stamped = rng.random() < 0.35
        self.value = rng.choice(STAMPED) if self.stamped else rng.choice((self.face, rng.choice(PRINTED)))
        self.size = rng.randint(26, 30)
        self.line = rng.choice((120, 190, 240))

    def width(self, texts: Texts, face: str, size: int) -> float:
        return sum(font(face, size).getlength(text) for text, _ in texts)

    def write(
        self, x: float, y: float, texts: Texts, face: str, size: int, room: float, at: float = 0.0
    ) -> float:
        """Write on the base line `y`, in a room that begins at `x`; `at` 0.5 is its middle. Where it ends."""
        while size > 15 and self.width(texts, face, size) > room:
            size -= 1
        x += max(0.0, room - self.width(texts, face, size)) * at
        used = font(face, size)
        for text, name in texts:
            if name:
                left, top, right, bottom = self.pen.textbbox((x, y), text, font=used, anchor="ls")
                self.places[name] = (float(left), float(top), float(right), float(bottom))
            punched = self.stamped and face == self.value
            for part in text if punched else (text,):  # letter by letter, as punches fall
                rise = self.rng.uniform(-0.05, 0.05) * size if punched else 0
                fill = self.rng.randint(200, 255) if punched else 255
                self.pen.text((x, y + rise), part, fill=fill, font=used, anchor="ls")
                x += used.getlength(part)
        return x

    def box(self, left: float, top: float, right: float, bottom: float) -> None:
        self.pen.rectangle((left, top, right, bottom), outline=self.line, width=2)

    def lines(self, *, leave: Sequence[str] = ()) -> list[Entry]:
        """The plate's entries in the order they are printed: as a maker sorts them, or another."""
        mine = [entry for name, entry in self.told.entries.items() if name not in leave]
        head, tail = mine[:4], mine[4:] + self.told.rest
        if self.rng.random() < 0.5:
            self.rng.shuffle(tail)
        return (self.rng.sample(head, len(head)) if self.rng.random() < 0.3 else head) + tail


def heading(sheet: Sheet) -> float:
    """The logo and what the thing is; where the rest begins."""
    rng, told, y, room, bold = sheet.rng, sheet.told, 70.0, RIGHT - MARGIN, sheet.rng.choice(PRINTED)
    beside, at, large = told.logo and rng.random() < 0.5, rng.choice((0.0, 0.5)), rng.randint(50, 70)
    if beside:
        end = sheet.write(MARGIN + 12, y + 22, told.logo, bold, large, 0.36 * room)
        sheet.write(end + 24, y + 10, told.title, sheet.face, 30, RIGHT - end - 24, 0.7)
    elif told.logo:
        sheet.write(MARGIN, y + 20, told.logo, bold, large, room, at)
        y += 66
    if not beside:
        sheet.write(MARGIN, y + 8, told.title, rng.choice((sheet.face, bold)), rng.randint(28, 36), room, at)
    y += 62 if beside else 34
    if rng.random() < 0.5:
        sheet.pen.line((MARGIN, y, RIGHT, y), fill=sheet.line, width=3)
    return y + 14


def pairs(
    sheet: Sheet, y: float, some: Entries = (), right: float = RIGHT, *, columns: int = 1, rule: bool = False
) -> float:
    """The label before its value, in columns; `rule` puts both into cells."""
    entries = some or sheet.lines()
    rng, size = sheet.rng, sheet.size - (0, 0, 3)[columns]
    pitch, across = size * rng.uniform(1.55, 1.95), (right - MARGIN) / columns
    rows, by_row, split = -(-len(entries) // columns), rng.random() < 0.5, rng.uniform(0.46, 0.54)
    style = "rule" if rule else rng.choice(("tab", "follow", "follow", "dots", "slot"))
    mark = rng.choice((":", ":", "", " -")) if style not in ("rule", "dots") else ""
    tab = style in ("rule", "tab", "dots")
    for at, (label, texts) in enumerate(entries):
        column, row = (at % columns, at // columns) if by_row else (at // rows, at % rows)
        x, base = MARGIN + column * across, y + row * pitch + size * 1.12
        if rule:
            sheet.box(x, y + row * pitch, x + across, y + (row + 1) * pitch)
            sheet.box(x, y + row * pitch, x + across * split, y + (row + 1) * pitch)
        room = across * (split - 0.03 if tab else 0.6) - 8
        end = sheet.write(x + 8, base, ((label + mark, ""),), sheet.face, size, room)
        start = x + across * split + 10 if tab else end + size * 0.45
        if style == "dots":
            count = int((start - end - 12) / font(sheet.face, size).getlength("."))
            sheet.write(end + 4, base, (("." * count, ""),), sheet.face, size, start - end)
        elif style == "slot":
            sheet.pen.line((start - 4, base + 6, x + across - 16, base + 6), fill=sheet.line, width=2)
        sheet.write(start, base, texts, sheet.value, size + 1, x + across - start - 12)
    return y + rows * pitch + 10


def boxes(sheet: Sheet, y: float, entries: Entries = (), *, rule: bool = True) -> float:
    """Cells as wide as their texts want, the label small above the value."""
    rng, small, size = sheet.rng, sheet.size - 6, sheet.size + 2
    room, high, at = RIGHT - MARGIN, sheet.size * 2.7, rng.choice((0.0, 0.5))
    rows: list[list[tuple[Entry, float]]] = [[]]
    for entry in entries or sheet.lines():
        widths = sheet.width(((entry[0], ""),), sheet.face, small), sheet.width(entry[1], sheet.value, size)
        want = max(*widths, 110) + 44
        if rows[-1] and (len(rows[-1]) == 5 or sum(wide for _, wide in rows[-1]) + want > room):
            rows.append([])
        rows[-1].append((entry, want))
    for row in rows:
        spare, x = (room - sum(wide for _, wide in row)) / len(row), float(MARGIN)
        for (label, texts), wide in row:
            across = wide + spare
            if rule:
                sheet.box(x, y, x + across, y + high)
            sheet.write(x + 10, y + small * 1.1, ((label, ""),), sheet.face, small, across - 18)
            sheet.write(x + 10, y + high - 14, texts, sheet.value, size, across - 20, at)
            x += across
        y += high + (0 if rule else 6)
    return y + 10


def running(sheet: Sheet, y: float) -> float:
    """Several in a line, one after the other, as old plates are."""
    x, size, mark = float(MARGIN + 8), sheet.size, sheet.rng.choice((" ", ": ", ": "))
    for name, texts in sheet.lines():
        label = ((name + mark, ""),)
        want = sheet.width(label, sheet.face, size) + sheet.width(texts, sheet.value, size)
        if x > MARGIN + 8 and x + want > RIGHT:
            x, y = float(MARGIN + 8), y + size * 1.75
        end = sheet.write(x, y + size, label, sheet.face, size, RIGHT - x)
        x = sheet.write(end + 2, y + size, texts, sheet.value, size, RIGHT - end - 2) + 34
    return y + size * 1.9


def grid(sheet: Sheet, y: float, table: list[list[Texts]], left: float, widths: list[float]) -> float:
    """A ruled table; its first line and its first column are labels."""
    high = sheet.size * 1.75
    for row, line in enumerate(table):
        x = left
        for texts, wide in zip(line, widths, strict=True):
            sheet.box(x, y, x + wide, y + high)
            base, face = y + sheet.size * 1.2, sheet.value if row else sheet.face
            sheet.write(x + 8, base, texts, face, sheet.size, wide - 16, 0.5)
            x += wide
        y += high
    return y + 14


def sides(sheet: Sheet, y: float) -> float:
    """High and low voltage as two columns or two lines of a table, the rest around it."""
    rng, told, words, unit = sheet.rng, sheet.told, sheet.unit.words, sheet.unit
    (high, low), (voltage, current) = rng.choice(words["sides"]), words["quantities"]
    flow = unit.power * 1000 / (3**0.5 if unit.phases == 3 else 1)
    first = flow / told.values["tensao_primaria"].value
    second = flow / float(unit.low.partition("/")[0].rstrip("Y"))
    amps = [decimal(unit, text) for text in (f"{current} (A)", f"{first:.2f}", f"{second:.1f}")]
    volt = [((told.values[name].printed, name),) for name in ("tensao_primaria", "tensao_secundaria")]
    table: list[list[Texts]] = [
        [((text, ""),) for text in ("", high, low)],
        [((f"{voltage} (V)" if unit.in_label else voltage, ""),), *volt],
        [((text, ""),) for text in amps],
    ]
    room, shares = RIGHT - MARGIN, (0.24, 0.46, 0.3)
    if rng.random() < 0.5:
        table, shares = [list(line) for line in zip(*table, strict=True)], (0.3, 0.45, 0.25)
    rest = sheet.lines(leave=("tensao_primaria", "tensao_secundaria"))
    part = rng.choice((0, 4))
    y = boxes(sheet, y, rest[:part]) if part else y
    y = grid(sheet, y, table, MARGIN, [room * share for share in shares])
    return pairs(sheet, y, rest[part:], columns=2, rule=rng.random() < 0.4)


def taps(sheet: Sheet, y: float) -> float:
    """What a tap changer gives, in a table on the right, and the terminals; the rest on the left."""
    rng, unit = sheet.rng, sheet.unit
    middle, right, down = WIDTH * 0.62, float(RIGHT), y
    rest = sheet.lines(leave=("tensao_primaria",) if unit.taps else ())
    if unit.taps:
        table: list[list[Texts]] = [[((text, ""),) for text in rng.choice(unit.words["taps"])]]
        for at, tap in enumerate(unit.taps):
            table.append([((str(at + 1), ""),), ((str(tap), "" if at else "tensao_primaria"),)])
        title, wide = ((rng.choice(unit.words["sides"])[0], ""),), right - middle
        sheet.write(middle, y + sheet.size, title, sheet.face, sheet.size, wide, 0.5)
        down = grid(sheet, y + sheet.size * 1.4, table, middle, [wide * 0.4, wide * 0.6])
    down = terminals(sheet, down, middle, right)
    return max(down, pairs(sheet, y, rest, middle - 18, rule=rng.random() < 0.4))


def terminals(sheet: Sheet, y: float, left: float, right: float) -> float:
    """The windings as they are drawn, with their terminals' names."""
    count = 3 if sheet.unit.phases == 3 else 2
    sheet.box(left, y, right, y + 170)
    for letter, first, top, down in (("H", 1, y + 32, 1), ("X", 0 if count == 3 else 1, y + 158, -1)):
        for at in range(first, count + 1):
            x = left + (right - left) * (at - first + 0.5) / (count + 1 - first)
            sheet.write(x - 30, top, ((f"{letter}{at}", ""),), sheet.face, 22, 60, 0.5)
            for turn in range(3):
                middle = top + (14 if down > 0 else -30) + down * turn * 13
                sheet.pen.arc((x - 8, middle - 7, x + 8, middle + 7), -90, 90, fill=220, width=3)
    return y + 184


LAYOUTS: dict[str, Callable[[Sheet, float], float]] = {
    "column": pairs,
    "columns": partial(pairs, columns=2),
    "cells": partial(pairs, columns=2, rule=True),
    "boxes": boxes,
    "above": partial(boxes, rule=False),
    "running": running,
    "sides": sides,
    "taps": taps,
}


def draw(
    rng: random.Random, style: Style | None = None, *, language: str = "Portuguese", layout: str = ""
) -> Drawn:
    """A nameplate. `style` is the first generator's, and not looked at."""
    layout = layout or rng.choice(tuple(LAYOUTS))
    unit = unit_of(rng, language)
    if layout == "sides" and unit.kilovolts:
        unit = replace(unit, in_label=False)  # one heading is for both voltages
    sheet = Sheet(rng, unit, content(rng, unit, layout))
    end = LAYOUTS[layout](sheet, heading(sheet))
    sheet.write(MARGIN + 20, end + 34, sheet.told.foot, sheet.face, 26, RIGHT - MARGIN - 40, 0.5)
    height = int(end) + (82 if sheet.told.foot else 36)
    sheet.pen.rounded_rectangle((7, 7, WIDTH - 8, height - 8), rng.choice((0, 26)), outline=210, width=3)
    for y in rng.choice(((height // 2,), (24, height - 24))):
        for x in (24, WIDTH - 24):
            sheet.pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=170)
    mask = np.asarray(sheet.picture.crop((0, 0, WIDTH, height)), np.float32) / np.float32(255)
    ink = rng.choice(("dark", "dark", "light", "etched", "embossed" if sheet.stamped else "dark"))
    return Drawn(plates.coloured(mask, rng, ink), sheet.told.values, sheet.places)


def language_of(seed: int) -> str:
    """Three plates of five are in Portuguese."""
    return {1: "Spanish", 4: "English"}.get(seed % 5, "Portuguese")


def sample(seed: int, difficulty: str | None = None) -> scene.Sample:
    """The photo of a seed: a plate of this hand in the same kind of scene."""
    return scene.sample(seed, difficulty, drawer=partial(draw, language=language_of(seed)))
