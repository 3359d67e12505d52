"""A nameplate as a flat picture, with the place of every value on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
FONT_ROOT = Path("/usr/share/fonts/truetype")
# Debian packages fonts-dejavu-core, fonts-liberation2, fonts-lato, fonts-open-sans: free licences, the same
# everywhere.
FONTS = (
    "dejavu/DejaVuSans.ttf",
    "dejavu/DejaVuSans-Bold.ttf",
    "dejavu/DejaVuSansMono.ttf",
    "liberation2/LiberationSans-Regular.ttf",
    "liberation2/LiberationSans-Bold.ttf",
    "liberation2/LiberationMono-Bold.ttf",
    "lato/Lato-Regular.ttf",
    "lato/Lato-Bold.ttf",
    "open-sans/OpenSans-Semibold.ttf",
)
PACKAGES = {
    str(FONT_ROOT / "dejavu/DejaVuSans.ttf"): "fonts-dejavu-core",
    str(FONT_ROOT / "liberation2/LiberationSans-Regular.ttf"): "fonts-liberation2",
    str(FONT_ROOT / "lato/Lato-Regular.ttf"): "fonts-lato",
    str(FONT_ROOT / "open-sans/OpenSans-Semibold.ttf"): "fonts-open-sans",
}
MAKERS = (
    "ROMAGNOLE",
    "WEG",
    "ITAIPU",
    "TRAFO",
    "ABB",
    "SIEMENS",
    "COMTRAFO",
    "UNIÃO",
    "ZILMER",
    "TOSHIBA",
    "BLUTRAFOS",
    "MINUZZI",
    "CEMEC",
    "TRAEL",
    "ITB",
)
LABELS: dict[str, tuple[str, ...]] = {
    "potencia_kva": ("POTÊNCIA", "POTÊNCIA NOMINAL", "POT.", "POTÊNCIA (kVA)"),
    "fabricante": ("FABRICANTE",),
    "numero_serie": ("Nº DE SÉRIE", "Nº SÉRIE", "SÉRIE", "Nº DE FABRICAÇÃO", "N. SÉRIE"),
    "data_fabricacao": ("DATA FABR.", "DATA DE FABRICAÇÃO", "FABRICADO EM", "MÊS/ANO", "DATA FAB."),
    "elo_fusivel": ("ELO FUSÍVEL", "ELO", "FUSÍVEL"),
    "tensao_primaria": ("TENSÃO PRIMÁRIA", "TENSÃO AT", "PRIMÁRIO", "ALTA TENSÃO", "TENSÃO PRIM."),
    "tensao_secundaria": ("TENSÃO SECUNDÁRIA", "TENSÃO BT", "SECUNDÁRIO", "BAIXA TENSÃO", "TENSÃO SEC."),
    "fases": ("FASES", "Nº DE FASES", "NÚMERO DE FASES"),
    "autoprotegido": ("AUTOPROTEGIDO", "AUTO-PROTEGIDO"),
    "patrimonio": ("PATRIMÔNIO", "Nº PATRIMÔNIO", "PATRIM."),
    "matricula": ("MATRÍCULA", "Nº MATRÍCULA", "MATR."),
}
MONTHS = ("JAN", "FEV", "MAR", "ABR", "MAI", "JUN", "JUL", "AGO", "SET", "OUT", "NOV", "DEZ")
THREE_PHASE = (15.0, 30.0, 45.0, 75.0, 112.5, 150.0, 225.0, 300.0)
ONE_PHASE = (5.0, 10.0, 15.0, 25.0, 37.5, 50.0, 75.0)
PRINTED = {
    "potencia_kva": 0.98,
    "fabricante": 0.97,
    "numero_serie": 0.97,
    "data_fabricacao": 0.92,
    "elo_fusivel": 0.7,
    "tensao_primaria": 0.95,
    "tensao_secundaria": 0.95,
    "fases": 0.85,
    "autoprotegido": 0.5,
    "patrimonio": 0.6,
    "matricula": 0.5,
}


@dataclass(frozen=True)
class Value:
    """A field: its normalised value, and how it is printed."""

    value: Any
    printed: str


@dataclass(frozen=True)
class Style:
    """What a plate is drawn with; another generator has another one."""

    labels: dict[str, tuple[str, ...]] = field(default_factory=lambda: LABELS)
    makers: Sequence[str] = MAKERS
    fonts: Sequence[str] = FONTS
    layouts: Sequence[str] = ("lines", "table", "stacked", "pairs")
    inks: Sequence[str] = ("dark", "dark", "light", "etched", "embossed")


@dataclass
class Drawn:
    """A plate's picture and, by field, the rectangle (left, top, right, bottom) of its value."""

    pixels: Pixels
    values: dict[str, Value]
    places: dict[str, tuple[float, float, float, float]]


@lru_cache(maxsize=256)
def font(
    name: str, size: int, packages: tuple[str, ...] = tuple(sorted(PACKAGES.values()))
) -> ImageFont.FreeTypeFont:
    """A font of this size; `packages` bring what a generator draws with. Raises FileNotFoundError that names
    them.
    """
    path = FONT_ROOT / name
    if not path.is_file():
        raise FileNotFoundError(2, f"no such font; install {', '.join(packages)}", str(path))
    return ImageFont.truetype(str(path), size)


def comma(number: float) -> str:
    """As Brazilians write it: 112,5."""
    return f"{number:g}".replace(".", ",")


def draw_values(rng: random.Random, style: Style) -> dict[str, Value]:
    """Values that fit together; a field that is not printed is absent."""
    phases = rng.choices((3, 1, 2), (0.7, 0.25, 0.05))[0]
    power = rng.choice(THREE_PHASE if phases == 3 else ONE_PHASE)
    taps = rng.choice(
        (
            [13800, 13200, 12600],
            [13800],
            [13200, 12600, 12000],
            [23100, 22000, 20900],
            [34500, 33000, 31500],
            [7967, 7621, 7275],
            [11900, 11400],
            [6600],
        )
    )
    low = (
        rng.choice(("220/127", "380/220"))
        if phases == 3
        else rng.choice(("240/120", "230", "254/127", "220"))
    )
    year, month, day = rng.randint(1985, 2025), rng.randint(1, 12), rng.randint(1, 28)
    shape = rng.choice(("my", "my", "dmy", "y", "mon"))
    when = {
        "my": Value(f"{year}-{month:02d}", f"{month:02d}/{year}"),
        "dmy": Value(f"{year}-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}/{year}"),
        "y": Value(f"{year}", f"{year}"),
        "mon": Value(f"{year}-{month:02d}", f"{MONTHS[month - 1]}/{year}"),
    }[shape]
    fuse = rng.choice(("0,5H", "1H", "2H", "3H", "5H", "6K", "8K", "10K", "12K", "15K", "20K"))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRTUVWXY") for _ in range(rng.choice((0, 0, 0, 1, 2))))
    serial = letters + str(rng.randint(1, 9)) + _digits(rng, rng.randint(4, 8))
    asset, registration = (
        str(rng.randint(1, 9)) + _digits(rng, rng.randint(4, 7)),
        str(rng.randint(1, 9)) + _digits(rng, rng.randint(4, 6)),
    )
    if rng.random() < 0.25:
        registration += f"-{rng.randint(0, 9)}"
    unit = rng.choice((" V", "V", ""))
    kilovolts = rng.random() < 0.12
    first = f"{comma(taps[0] / 1000)} kV" if kilovolts else "/".join(str(tap) for tap in taps) + unit
    maker = rng.choice(style.makers)
    own = rng.random() < 0.3
    everything = {
        "potencia_kva": Value(power, f"{comma(power)}{rng.choice((' kVA', 'kVA', ' KVA'))}"),
        "fabricante": Value(canonical(maker), maker),
        "numero_serie": Value(serial, serial),
        "data_fabricacao": when,
        "elo_fusivel": Value(fuse.replace(",", "."), fuse),
        "tensao_primaria": Value(float(taps[0]), first),
        "tensao_secundaria": Value(low, low + unit),
        "fases": Value(
            phases, rng.choice((str(phases), {1: "MONOFÁSICO", 2: "BIFÁSICO", 3: "TRIFÁSICO"}[phases]))
        ),
        "autoprotegido": Value(own, "SIM" if own else "NÃO"),
        "patrimonio": Value(asset, asset),
        "matricula": Value(registration, registration),
    }
    return {name: value for name, value in everything.items() if rng.random() < PRINTED[name]}


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def canonical(maker: str) -> str:
    """A manufacturer's name without accents."""
    return maker.translate(str.maketrans("ÁÀÂÃÇÉÊÍÓÔÕÚÜ", "AAAACEEIOOOUU")).upper()


def noise_entries(rng: random.Random) -> list[tuple[str, str]]:
    """Labels with values that no field takes."""
    entries = [
        ("FREQUÊNCIA", "60 Hz"),
        ("IMPEDÂNCIA", f"{comma(rng.randint(25, 50) / 10)} %"),
        ("MASSA TOTAL", f"{rng.randint(80, 1400)} kg"),
        ("NBI", f"{rng.choice((95, 125, 150))} kV"),
        ("VOLUME DE ÓLEO", f"{rng.randint(30, 400)} L"),
        ("ELEV. TEMP.", f"{rng.choice((55, 65))} °C"),
        ("LIGAÇÃO", rng.choice(("Dyn1", "Dyn11", "Ii0"))),
        ("NORMA", "NBR 5440"),
        ("TIPO", rng.choice(("ONAN", "CLASSE 15"))),
        ("PROJETO", f"P-{rng.randint(100, 9999)}"),
        ("CORRENTE SEC.", f"{comma(rng.randint(200, 6000) / 10)} A"),
    ]
    return rng.sample(entries, rng.randint(2, 6))


@dataclass
class _Ink:
    """Draws text into a mask of coverage, and notes where."""

    draw: ImageDraw.ImageDraw
    places: dict[str, tuple[float, float, float, float]]

    def text(
        self, x: float, y: float, words: str, face: ImageFont.FreeTypeFont, name: str = ""
    ) -> tuple[float, float, float, float]:
        """Draw words; their box."""
        self.draw.text((x, y), words, fill=255, font=face)
        left, top, right, bottom = self.draw.textbbox((x, y), words, font=face)
        box = (float(left), float(top), float(right), float(bottom))
        if name:
            self.places[name] = box
        return box


def draw(rng: random.Random, style: Style | None = None, width: int = 1000) -> Drawn:
    """A nameplate, `width` pixels wide."""
    style = style or Style()
    values = draw_values(rng, style)
    layout = rng.choice(list(style.layouts))
    entries: list[tuple[str, str, str]] = []
    heading = "fabricante" in values and rng.random() < 0.75
    for name, value in values.items():
        if name == "fabricante" and heading:
            continue
        label = rng.choice(style.labels[name])
        printed = value.printed
        if "(kVA)" in label:
            printed = printed.upper().replace("KVA", "").strip()
        entries.append((label, printed, name))
    rest = [(label, printed, "") for label, printed in noise_entries(rng)]
    entries += rest
    if rng.random() < 0.5:
        rng.shuffle(entries)
    face, bold = rng.choice(list(style.fonts)), rng.choice(list(style.fonts))
    columns = {"lines": 1, "table": rng.choice((1, 2)), "stacked": rng.choice((2, 3)), "pairs": 2}[layout]
    rows = -(-len(entries) // columns)
    size = {1: 30, 2: 25, 3: 25}[columns] if layout != "stacked" else 24
    pitch = size * (3.0 if layout == "stacked" else rng.uniform(1.7, 2.1))
    top = 150.0
    height = int(top + rows * pitch + 50)
    mask = Image.new("L", (width, height), 0)
    ink = _Ink(ImageDraw.Draw(mask), {})
    if heading:
        ink.text(rng.choice((40, 300)), 22, values["fabricante"].printed, font(bold, 54), "fabricante")
    title = "TRANSFORMADOR DE DISTRIBUIÇÃO" if rng.random() < 0.7 else "TRANSFORMADOR"
    ink.text(40, 98, title, font(face, 26))
    if layout == "pairs" and rng.random() < 0.5:
        ink.text(660, 98, "INDÚSTRIA BRASILEIRA", font(face, 22))
    cell = (width - 80) / columns
    rules = layout in ("table", "stacked")
    for at, (label, printed, name) in enumerate(entries):
        x, y = 40 + (at // rows) * cell, top + (at % rows) * pitch
        if layout == "stacked":
            ink.text(x + 8, y + 4, label, font(face, size - 6))
            ink.text(x + 8, y + size + 6, printed, font(bold, size + 2), name)
        elif layout == "table":
            words = _fitting(label, cell * 0.5, face, size)
            ink.text(x + 8, y + 5, words, _sized(words, cell * 0.5 - 8, face, size))
            ink.text(x + cell * 0.53, y + 5, printed, _sized(printed, cell * 0.45, bold, size), name)
        else:
            words = label + rng.choice((": ", ":  ", " "))
            box = ink.text(x, y + 5, words, font(face, size))
            room = cell - (box[2] - x) - 14
            ink.text(
                max(box[2] + 6, x),
                y + 5,
                printed,
                _sized(printed, room, bold if rng.random() < 0.5 else face, size),
                name,
            )
        if rules:
            ink.draw.rectangle((x, y, x + cell, y + pitch), outline=150, width=2)
            if layout == "table":
                ink.draw.line((x + cell * 0.515, y, x + cell * 0.515, y + pitch), fill=150, width=2)
    ink.draw.rectangle((8, 8, width - 9, height - 9), outline=200, width=3)
    for corner in ((24, 24), (width - 24, 24), (24, height - 24), (width - 24, height - 24)):
        ink.draw.ellipse((corner[0] - 8, corner[1] - 8, corner[0] + 8, corner[1] + 8), fill=180)
    pixels = coloured(np.asarray(mask, dtype=np.float32) / np.float32(255), rng, rng.choice(list(style.inks)))
    return Drawn(pixels, values, ink.places)


def _sized(text: str, room: float, face: str, size: int) -> ImageFont.FreeTypeFont:
    """The font, smaller where the text would not fit."""
    while size > 12 and font(face, size).getlength(text) > room:
        size -= 1
    return font(face, size)


def _fitting(text: str, room: float, face: str, size: int) -> str:
    """The text, or its abbreviation where it would not fit."""
    return (
        text
        if font(face, size).getlength(text) <= room
        else text.replace("TENSÃO ", "T. ").replace("NÚMERO", "Nº")
    )


def coloured(mask: NDArray[np.float32], rng: random.Random, ink: str) -> Pixels:
    """A metal plate with this ink: printed dark or light, etched (weak), embossed (light and shadow only)."""
    height, width = mask.shape
    noise = np.random.default_rng(rng.randrange(1 << 30))
    brushed = noise.normal(0, 4, (height, 1)).astype(np.float32) + noise.normal(0, 3, (height, width)).astype(
        np.float32
    )
    if ink == "light":
        ground, text = (
            np.array(rng.choice(((25, 25, 28), (20, 40, 80), (70, 20, 20)))),
            np.array((225, 225, 220)),
        )
    else:
        ground = np.array(rng.choice(((188, 190, 192), (205, 203, 196), (170, 172, 170), (210, 190, 120))))
        text = np.array((28, 28, 30)) if ink == "dark" else ground * 0.45
    plain = np.broadcast_to(ground.astype(np.float32), (height, width, 3)) + brushed[:, :, None]
    if ink == "embossed":
        relief = np.zeros_like(mask)
        relief[2:, 2:] += mask[:-2, :-2]
        relief[:-2, :-2] -= mask[2:, 2:]
        result = (
            plain
            - 95 * np.clip(relief, 0, 1)[:, :, None]
            + 45 * np.clip(-relief, 0, 1)[:, :, None]
            - 30 * mask[:, :, None]
        )
    else:
        result = plain * (1 - mask[:, :, None]) + text.astype(np.float32) * mask[:, :, None]
    return np.asarray(np.clip(result, 0, 255), dtype=np.uint8)
