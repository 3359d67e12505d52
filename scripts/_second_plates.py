"""Nameplates drawn by another hand: to see how much the parser knows of plates and how much of one generator.

Manufacturers, wordings, number formats, layouts and typefaces are those of plates by NBR 5356 and NBR 5440,
and of imported ones by IEEE C57.12.00; none was taken from `ocr_pipeline.synthetic.plates` or from the labels
that the parser knew then. The scene around the plate is `ocr_pipeline.synthetic.scene`. The parser was not
tuned on these until it read half of their fields; it is since, on the seeds 9000 to 9199.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from ocr_pipeline.synthetic import plates, scene
from ocr_pipeline.synthetic.plates import Drawn, Style, Value
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
FOLDER = Path("/usr/share/fonts")
ENGRAVED = ("truetype/opendin/OSP-DIN.ttf", "truetype/osifont/osifont.ttf")
PRINTED = (
    "truetype/freefont/FreeSansBold.ttf",
    "truetype/freefont/FreeSans.ttf",
    "truetype/roboto/unhinted/RobotoCondensed-Bold.ttf",
    "opentype/b612/B612-Regular.otf",
    *ENGRAVED,
)
STAMPED = (
    "truetype/inconsolata/Inconsolata.otf",
    "opentype/b612/B612Mono-Bold.otf",
    "truetype/freefont/FreeMonoBold.ttf",
)
PACKAGES = {
    str(FOLDER / "truetype/opendin/OSP-DIN.ttf"): "fonts-opendin",
    str(FOLDER / "truetype/osifont/osifont.ttf"): "fonts-osifont",
    str(FOLDER / "truetype/freefont/FreeSans.ttf"): "fonts-freefont-ttf",
    str(FOLDER / "truetype/roboto/unhinted/RobotoCondensed-Bold.ttf"): "fonts-roboto-unhinted",
    str(FOLDER / "opentype/b612/B612-Regular.otf"): "fonts-b612",
    str(FOLDER / "truetype/inconsolata/Inconsolata.otf"): "fonts-inconsolata",
}
# As they sign, and as a register would list them.
MAKERS = (
    ("Waltec Equipamentos Elétricos", "WALTEC"),
    ("HITACHI ENERGY", "HITACHI ENERGY"),
    ("HOWARD INDUSTRIES", "HOWARD INDUSTRIES"),
    ("PROLEC GE", "PROLEC GE"),
    ("MAGNETRON", "MAGNETRON"),
    ("TUSCO Transformadores Ltda.", "TUSCO"),
    ("Gazquez", "GAZQUEZ"),
    ("CELTRAFO", "CELTRAFO"),
    ("CARTE", "CARTE"),
    ("Lindsay S.A.", "LINDSAY"),
)
PORTUGUESE = {
    "potencia_kva": ("POT. NOM.", "kVA", "POTÊNCIA CONTÍNUA", "CAPACIDADE NOMINAL"),
    "fabricante": ("FABRICADO POR", "FABR."),
    "numero_serie": ("SÉRIE N.º", "Nº FABRIC.", "Nº DE ORDEM", "N. DE SÉRIE"),
    "data_fabricacao": ("MÊS E ANO DE FABR.", "DATA DE FABRIC.", "FAB. (MÊS/ANO)", "ANO DE FABRICAÇÃO"),
    "elo_fusivel": ("ELO FUS. REC.", "ELO FUSÍVEL AT", "ELO (TIPO)"),
    "tensao_primaria": ("TENSÃO SUPERIOR", "T. PRIM.", "AT", "TENSÃO NOM. AT"),
    "tensao_secundaria": ("TENSÃO INFERIOR", "T. SEC.", "BT", "TENSÃO NOM. BT"),
    "fases": ("N.º FASES", "FASE(S)", "NÚM. DE FASES"),
    "autoprotegido": ("AUTOPROT.", "TRANSF. AUTOPROTEGIDO"),
    "patrimonio": ("Nº DE TOMBAMENTO", "PATRIM. Nº", "BEM PATRIMONIAL"),
    "matricula": ("MATR. Nº", "Nº DE REGISTRO", "MATRÍCULA CONCESS."),
}
ENGLISH = {
    "potencia_kva": ("KVA", "RATED KVA"),
    "fabricante": ("MFR", "MANUFACTURED BY"),
    "numero_serie": ("SERIAL NO.", "SER. NO."),
    "data_fabricacao": ("DATE OF MFG", "MFG DATE"),
    "elo_fusivel": ("FUSE LINK",),
    "tensao_primaria": ("HV", "HIGH VOLTAGE"),
    "tensao_secundaria": ("LV", "LOW VOLTAGE"),
    "fases": ("PHASE", "PHASES"),
    "autoprotegido": ("SELF-PROTECTED",),
    "patrimonio": ("ASSET NO.",),
    "matricula": ("REG. NO.",),
}
OTHERS = {
    True: [
        ("Hz", "60"),
        ("% IZ", "2.1"),
        ("BIL", "95 kV"),
        ("TEMP RISE", "65 C"),
        ("WT", "310 LB"),
        ("OIL", "18 GAL"),
    ],
    False: [
        ("FREQ.", "60 Hz"),
        ("Z a 75 °C", "3,48 %"),
        ("NÍVEL ISOL.", "34/95 kV"),
        ("MASSA ÓLEO", "88 kg"),
        ("MASSA T.", "402 kg"),
        ("LÍQ. ISOL.", "MINERAL A"),
        ("GRUPO LIG.", "Dyn1"),
        ("I. EXC.", "2,9 %"),
        ("ELEV. ENROL.", "65 °C"),
    ],
}
PRESENT = 0.86  # of the fields stand on a plate; power, serial number and voltages on nearly all
OFTEN = 0.97


@dataclass
class _Sheet:
    """A plate in the making: coverage, and where each value is."""

    picture: Image.Image
    places: dict[str, Box]

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.picture)

    def write(self, x: float, y: float, text: str, face: str, size: int, name: str = "") -> float:
        """Write; where it ends."""
        pen = self.pen
        pen.text((x, y), text, fill=255, font=font(face, size))
        box = pen.textbbox((x, y), text, font=font(face, size))
        if name:
            self.places[name] = box
        return float(box[2])

    def stamp(
        self, rng: random.Random, x: float, y: float, text: str, face: str, size: int, name: str = ""
    ) -> float:
        """Strike one character after the other, each a little off; where it ends."""
        left, low, high = x, y + size, y
        for sign in text:
            dy = rng.uniform(-1.6, 1.6)
            self.pen.text((x, y + dy), sign, fill=rng.randint(200, 255), font=font(face, size))
            if sign.strip():
                box = self.pen.textbbox((x, y + dy), sign, font=font(face, size))
                low, high = min(low, box[1]), max(high, box[3])
            x += font(face, size).getlength(sign) + rng.uniform(-0.4, 0.9)
        if name:
            self.places[name] = (left, low, x, high)
        return x


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A typeface. Raises FileNotFoundError that names the packages."""
    return plates.font(str(FOLDER / name), size, tuple(sorted(PACKAGES.values())))


def values_of(rng: random.Random, english: bool) -> tuple[dict[str, Value], list[int]]:
    """What is printed, and the taps."""
    phases = rng.choice((1, 3, 3))
    power = rng.choice(
        (10.0, 25.0, 37.5, 50.0, 75.0) if phases == 1 else (30.0, 45.0, 75.0, 112.5, 150.0, 300.0)
    )
    taps = rng.choice(
        ([13800, 13200, 12600, 12000], [23100, 22000, 20900], [7967, 7621], [34500, 33000], [11400, 10800])
    )
    low = rng.choice(("380/220", "220/127") if phases == 3 else ("440/220", "254/127", "230"))
    year, month, day = rng.randint(1979, 2025), rng.randint(1, 12), rng.randint(1, 28)
    dates = [
        (f"{year}-{month:02d}", f"{month:02d}-{year}"),
        (f"{year}-{month:02d}", f"{month:02d}/{year}"),
        (f"{year}-{month:02d}-{day:02d}", f"{day:02d}.{month:02d}.{year}"),
        (f"{year}", f"{year}"),
        (
            f"{year}-{month:02d}",
            f"{plates.MONTHS[month - 1]}/{year % 100:02d}" if not english else f"{year}-{month:02d}",
        ),
    ]
    when, shown = rng.choice(dates)
    number = str(rng.randint(10_000, 9_999_999))
    serial = rng.choice((number, f"{number}-{rng.randint(0, 9)}", f"{year % 100:02d}-{number}", f"T{number}"))
    asset = rng.choice((str(rng.randint(100_000, 99_999_999)), f"TR-{rng.randint(10_000, 999_999)}"))
    registration = str(rng.randint(100_000, 9_999_999))
    size, kind = rng.choice(("1", "2", "3", "5", "6", "10", "15")), rng.choice("HHK")
    maker, canonical = rng.choice(MAKERS)
    star = "Y" if phases == 3 and rng.random() < 0.4 else ""
    kilovolts = "/".join(plates.comma(tap / 1000) for tap in taps) + " kV"
    primary = rng.choice(
        ("/".join(map(str, taps)), f"{taps[0]:,}".replace(",", "." if not english else ","), kilovolts)
    )
    power_shown = f"{power:g}" if english else plates.comma(power)
    own = rng.random() < 0.25
    found = {
        "potencia_kva": Value(power, power_shown),
        "fabricante": Value(canonical, maker),
        "numero_serie": Value(serial, serial),
        "data_fabricacao": Value(when, shown),
        "elo_fusivel": Value(f"{size}{kind}", f"{size}{rng.choice(('', ' '))}{kind}"),
        "tensao_primaria": Value(float(taps[0]), primary),
        "tensao_secundaria": Value(low, low.replace("/", f"{star}/")),
        "fases": Value(phases, str(phases)),
        "autoprotegido": Value(own, ("YES" if own else "NO") if english else ("SIM" if own else "NÃO")),
        "patrimonio": Value(asset, asset),
        "matricula": Value(registration, registration),
    }
    often = {"potencia_kva", "numero_serie", "tensao_primaria", "tensao_secundaria", "fabricante"}
    rare = {"autoprotegido": 0.4, "matricula": 0.4, "patrimonio": 0.6}
    kept = {
        name: value
        for name, value in found.items()
        if rng.random() < (OFTEN if name in often else rare.get(name, PRESENT))
    }
    return kept, taps


def draw(rng: random.Random, style: Style | None = None, *, english: bool = False) -> Drawn:
    """A nameplate. `style` is the other generator's, and not looked at."""
    width = 1000
    values, taps = values_of(rng, english)
    words = ENGLISH if english else PORTUGUESE
    layout = rng.choice((leaders, printed_form, grid, taps_table))
    face, value_face = rng.choice(PRINTED), rng.choice(PRINTED)
    sheet = _Sheet(Image.new("L", (width, 1400), 0), {})
    top = heading(rng, sheet, values, face, english, width)
    entries = [
        (rng.choice(words[name]), value.printed, name)
        for name, value in values.items()
        if name not in sheet.places
    ]
    entries = [
        (_with_unit(rng, label, name), _unit(rng, text, name, label), name) for label, text, name in entries
    ]
    entries += [(label, text, "") for label, text in rng.sample(OTHERS[english], rng.randint(3, 6))]
    bottom = layout(_Form(rng, sheet, entries, taps, top, width, face, value_face))
    height = int(bottom + rng.randint(30, 60))
    sheet.pen.rounded_rectangle(
        (6, 6, width - 7, height - 7), radius=rng.choice((0, 26)), outline=190, width=4
    )
    for x in (30, width - 30):
        sheet.pen.ellipse((x - 11, height / 2 - 11, x + 11, height / 2 + 11), fill=170)
    mask = np.asarray(sheet.picture.crop((0, 0, width, height)), dtype=np.float32) / np.float32(255)
    ink = rng.choice(("dark", "dark", "light", "etched"))
    return Drawn(plates.coloured(mask, rng, ink), values, sheet.places)


def heading(
    rng: random.Random, sheet: _Sheet, values: dict[str, Value], face: str, english: bool, width: int
) -> float:
    """The maker's name, at times below a title; where the rest begins."""
    title = (
        "DISTRIBUTION TRANSFORMER"
        if english
        else rng.choice(("TRANSFORMADOR", "TRANSFORMADOR PARA REDES AÉREAS"))
    )
    y = 30.0
    signed = "fabricante" in values and rng.random() < 0.8
    if signed and rng.random() < 0.8:
        text = values["fabricante"].printed
        size = 46
        while font(face, size).getlength(text) > width - 200:
            size -= 2
        sheet.write(
            rng.choice((70, (width - font(face, size).getlength(text)) / 2)),
            y,
            text,
            face,
            size,
            "fabricante",
        )
        y += 68
    sheet.write(70, y, title, face, 28)
    return y + 52


def _with_unit(rng: random.Random, label: str, name: str) -> str:
    """The unit in the label, as plates do whose values are struck in later."""
    units = {"tensao_primaria": "(V)", "tensao_secundaria": "(V)", "potencia_kva": "(kVA)"}
    return (
        f"{label} {units[name]}"
        if name in units and "kva" not in label.lower() and rng.random() < 0.3
        else label
    )


def _unit(rng: random.Random, text: str, name: str, label: str) -> str:
    """The unit behind the value where the label has none."""
    if name == "potencia_kva" and "kva" not in label.lower():
        return f"{text} kVA"
    if name in ("tensao_primaria", "tensao_secundaria") and "(V)" not in label and "kV" not in text:
        return text + rng.choice((" V", ""))
    return text


@dataclass
class _Form:
    """What a layout fills: the sheet from `top` on with entries (label, text, field or "")."""

    rng: random.Random
    sheet: _Sheet
    entries: Sequence[tuple[str, str, str]]
    taps: list[int]
    top: float
    width: int
    face: str
    value: str


def fitting(face: str, text: str, room: float, size: int) -> int:
    """The largest size up to `size` in which a text fits, 18 at least."""
    while size > 18 and font(face, size).getlength(text) > room:
        size -= 1
    return size


def leaders(form: _Form) -> float:
    """One below the other, dots up to the value."""
    edge, top = form.rng.choice((430, 500)), form.top
    for label, text, name in form.entries:
        x = form.sheet.write(70, top, label, form.face, 28) + 8
        while x < edge - 10:
            x = form.sheet.write(x, top, ".", form.face, 28) + 6
        form.sheet.write(max(x + 8, edge), top, text, form.value, 28, name)
        top += 47
    return top


def printed_form(form: _Form) -> float:
    """A printed form in two columns, values struck in above a line."""
    struck, half = form.rng.choice(STAMPED), (form.width - 140) / 2
    for at, (label, text, name) in enumerate(form.entries):
        x, y = 70 + (at % 2) * (half + 10), form.top + (at // 2) * 62
        begin = form.sheet.write(x, y + 6, label, form.face, 22) + 14
        size = fitting(struck, text, x + half - 6 - begin, 30)
        end = form.sheet.stamp(form.rng, begin, y, text, struck, size, name)
        form.sheet.pen.line((begin - 6, y + 40, max(end, x + half - 10), y + 40), fill=140, width=2)
    return form.top + -(-len(form.entries) // 2) * 62


def grid(form: _Form) -> float:
    """Boxes of three to a row, a small label in the corner, the value in the middle."""
    cell, high = (form.width - 100) / 3, 84
    for at, (label, text, name) in enumerate(form.entries):
        x, y = 50 + (at % 3) * cell, form.top + (at // 3) * high
        form.sheet.pen.rectangle((x, y, x + cell, y + high), outline=150, width=2)
        form.sheet.write(x + 8, y + 6, label, form.face, 20)
        size = fitting(form.value, text, cell - 24, 32)
        left = x + (cell - font(form.value, size).getlength(text)) / 2
        form.sheet.write(left, y + 38, text, form.value, size, name)
    return form.top + -(-len(form.entries) // 3) * high


def taps_table(form: _Form) -> float:
    """Two columns without rules; the primary's taps in a table of their own, the first one rated."""
    sheet, face, value = form.sheet, form.face, form.value
    rest = [entry for entry in form.entries if entry[2] != "tensao_primaria"]
    half = (form.width - 140) / 2
    for at, (label, text, name) in enumerate(rest):
        x, y = 70 + (at % 2) * half, form.top + (at // 2) * 50
        begin = sheet.write(x, y, label + form.rng.choice((":", "")), face, 25) + 12
        sheet.write(begin, y, text, value, fitting(value, text, x + half - 10 - begin, 26), name)
    y = form.top + -(-len(rest) // 2) * 50 + 14
    if len(rest) == len(form.entries):
        return y
    sheet.write(70, y, next(label for label, _, name in form.entries if name == "tensao_primaria"), face, 25)
    y += 40
    for number, tap in enumerate(form.taps, 1):
        sheet.pen.rectangle((70, y, 420, y + 40), outline=150, width=2)
        sheet.pen.line((150, y, 150, y + 40), fill=150, width=2)
        sheet.write(98, y + 6, str(number), value, 25)
        sheet.write(180, y + 6, str(tap), value, 25, "tensao_primaria" if number == 1 else "")
        y += 40
    return y


def in_english(seed: int) -> bool:
    """Every fifth plate is an imported one."""
    return seed % 5 == 4


def sample(seed: int, difficulty: str | None = None) -> scene.Sample:
    """The photo of a seed: another plate in the same kind of scene."""
    return scene.sample(seed, difficulty, drawer=partial(draw, english=in_english(seed)))
