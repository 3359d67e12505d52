"""The picture behind a reading: plates and lines in the photo's crop, each field's source, every reason for
review.
"""

from __future__ import annotations

import unicodedata

from PIL import Image, ImageDraw, ImageFont

from ocr_pipeline.pipeline import Inspection
from ocr_pipeline.reading import FIELDS
from ocr_pipeline.stages import LineClass

COLOURS = {
    LineClass.NAMEPLATE: (46, 160, 67),
    LineClass.METER: (219, 109, 40),
    LineClass.POLE: (130, 80, 223),
    LineClass.TELECOM: (207, 34, 46),
    LineClass.OTHER: (140, 149, 159),
}
SIDE = 900
PANEL = 640
FONT_SIZE = 15
ROW = 20


def picture(inspection: Inspection) -> Image.Image:
    """The photo with its plates, the upright crop with its lines, and a list of the fields."""
    font = ImageFont.load_default(FONT_SIZE)
    photo = Image.fromarray(inspection.photo.pixels)
    factor = min(1.0, SIDE / 2 / max(photo.size))
    small = photo.resize((max(1, round(photo.width * factor)), max(1, round(photo.height * factor))))
    draw = ImageDraw.Draw(small)
    for plate in inspection.plates:
        box = plate.box.scaled(factor)
        draw.rectangle((box.left, box.top, box.right, box.bottom), outline=(255, 210, 0), width=2)
        draw.text(
            (box.left + 2, box.top + 1),
            f"{plate.kind or 'text'} {plate.score:.2f}",
            fill=(255, 210, 0),
            font=font,
        )
    box = inspection.crop.scaled(factor)
    draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), outline=(0, 150, 255), width=2)
    crop = Image.fromarray(inspection.turned_crop)
    grow = min(1.5, SIDE / max(crop.size))
    crop = crop.resize((max(1, round(crop.width * grow)), max(1, round(crop.height * grow))))
    draw = ImageDraw.Draw(crop)
    for at, line in enumerate(inspection.lines):
        if line.box is None:
            continue
        box = line.box.scaled(grow)
        draw.rectangle((box.left, box.top, box.right, box.bottom), outline=COLOURS[line.kind], width=2)
        draw.text((box.left, max(0.0, box.top - FONT_SIZE)), str(at), fill=COLOURS[line.kind], font=font)
    rows = told(inspection)
    height = max(small.height + crop.height + 30, ROW * (len(rows) + 2))
    sheet = Image.new("RGB", (max(small.width, crop.width) + PANEL + 30, height), "white")
    sheet.paste(small, (10, 10))
    sheet.paste(crop, (10, small.height + 20))
    draw = ImageDraw.Draw(sheet)
    left = max(small.width, crop.width) + 20
    for at, (text, colour) in enumerate(rows):
        draw.text((left, 10 + at * ROW), drawn(text), fill=colour, font=font)
    return sheet


def drawn(text: str) -> str:
    """Without accents, which the font has not: `POTENCIA`, `No`."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def told(inspection: Inspection) -> list[tuple[str, tuple[int, int, int]]]:
    """The list beside the picture: fields with their source lines, reasons, lines with their classes."""
    black, red, grey = (31, 35, 40), (207, 34, 46), (110, 119, 129)
    reading = inspection.reading
    rows = [(f"context: {inspection.context}", grey)]
    for name in FIELDS:
        value = getattr(reading, name)
        source = inspection.sources.get(name)
        sure = reading.confidence.get(name)
        where = f"   line {source}" if source is not None else ""
        about = [reason for reason in reading.reasons if reason.endswith(f":{name}")]
        rows.append(
            (f"{name}: {value}{where}{f', {sure:.2f}' if sure is not None else ''}", red if about else black)
        )
    rows.append((f"needs review: {reading.needs_review}", red if reading.needs_review else black))
    rows += [(f"  {reason}", red) for reason in reading.reasons]
    rows += [
        (f"{at} {line.kind}: {line.text[:60]} ({line.weakest:.2f})", COLOURS[line.kind])
        for at, line in enumerate(inspection.lines)
    ]
    return rows
