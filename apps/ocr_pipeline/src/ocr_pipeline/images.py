"""Bytes from outside become pixels here, and nowhere else.

Bounded in bytes, pixels, time and memory: the header is looked at before anything is decoded, what is larger
than a
photo of today's phones is refused, and a large JPEG is decoded at half or a quarter of its size. JPEG, PNG
and WebP are
read, upright by their EXIF orientation. HEIC, SVG, animations, CMYK and 16 bits a channel are refused by
name.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ocr_pipeline.errors import ImageRefusedError, ImageTooLargeError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP")
READ_AS = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: the JPEG with a second picture that some phones write
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
DECODED_PIXELS = 16_000_000  # a larger photo is made smaller: a nameplate keeps enough of them
MAX_EXIF = 512 * 1024
MAX_SCANS = 100  # of a JPEG; encoders write about 10, and each is a pass over all pixels
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # not a stuffed byte, a fill byte or a restart
JPEG_START, JPEG_END, JPEG_SCAN, JPEG_BARE = 0xD8, 0xD9, 0xDA, 0x01
ZIP_END, ZIP_END_MAX = b"PK\5\6", 22 + 0xFFFF  # its last record, with a comment of at most 64 KB
OURS = ("a JPEG", "a PNG", "a WebP")
KNOWN = (
    (b"%PDF", 0, "a PDF"),
    (b"GIF8", 0, "a GIF"),
    (b"BM", 0, "a BMP"),
    (b"II*\0", 0, "a TIFF"),
    (b"MM\0*", 0, "a TIFF"),
    (b"PK\3\4", 0, "a ZIP file"),
    (b"ftyphei", 4, "HEIC"),
    (b"ftyphev", 4, "HEIC"),
    (b"ftypmif", 4, "HEIC"),
    (b"ftypmsf", 4, "HEIC"),
    (b"ftypavi", 4, "AVIF"),
    (b"ftyp", 4, "a video"),
    (b"\0\0\0\x0cJXL ", 0, "JPEG XL"),
    (b"\xff\x0a", 0, "JPEG XL"),
)


@dataclass(frozen=True)
class Limits:
    """What is read at most."""

    max_bytes: int = 25_000_000
    max_pixels: int = 64_000_000
    max_side: int = 16_000
    min_side: int = 32


@dataclass(frozen=True)
class Photo:
    """A decoded photo, upright: RGB, 8 bits a channel. `format` is what the bytes were."""

    pixels: Pixels
    format: str

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.pixels.shape[0])


def load(data: bytes, limits: Limits | None = None) -> Photo:
    """Decode one photo. Raises ImageRefusedError, ImageTooLargeError for what is not read."""
    limits = limits or Limits()
    if not data:
        raise ImageRefusedError("EMPTY_IMAGE", "the image is empty")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(
            "IMAGE_TOO_LARGE", f"the image has {len(data)} bytes; at most {limits.max_bytes} are read"
        )
    if other := also(data):
        raise ImageRefusedError("POLYGLOT", f"the file is {other} as well as an image; send the photo alone")
    if scans(data) > MAX_SCANS:
        raise ImageRefusedError("TOO_MANY_SCANS", f"the JPEG has more than {MAX_SCANS} scans; save it anew")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused below anyway
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check(picture, limits)
                return Photo(_decode(picture), str(picture.format))
    except UnidentifiedImageError:
        seems = kind(data)
        if seems in OURS:
            raise _damaged(seems) from None
        raise ImageRefusedError(
            "UNSUPPORTED_FORMAT", f"the file is {seems}; send JPEG, PNG or WebP"
        ) from None
    except Image.DecompressionBombError:
        raise ImageTooLargeError(
            "TOO_MANY_PIXELS", f"the image has more than {limits.max_pixels} pixels; send a smaller one"
        ) from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        ArithmeticError,
        LookupError,
        TypeError,
        struct.error,
    ):
        raise _damaged(kind(data)) from None


def also(data: bytes) -> str:
    """What else a file is that begins like a photo, or "". What phones put behind a JPEG is nothing of it."""
    if kind(data) not in OURS:
        return ""
    if b"%PDF-" in data[:1024]:  # readers of PDF look that far
        return "a PDF"
    end = data.rfind(ZIP_END, -ZIP_END_MAX)
    if end >= 0 and end + 22 + int.from_bytes(data[end + 20 : end + 22], "little") == len(data):
        return "a ZIP file"
    return ""


def scans(data: bytes) -> int:
    """How many times a decoder goes over the pixels of a JPEG; counted up to one more than are read.

    Segments are skipped by their length: the thumbnail in one is no scan, nor is what follows the JPEG's end.
    """
    if kind(data) != "a JPEG":
        return 0
    count, at = 0, 2
    while count <= MAX_SCANS and (found := MARKER.search(data, at)):
        code = found.group(1)[0]
        at = found.end()
        if code == JPEG_END:
            break
        if code not in (JPEG_START, JPEG_BARE):
            count += code == JPEG_SCAN
            at += int.from_bytes(data[at : at + 2], "big")
    return count


def _damaged(seems: str) -> ImageRefusedError:
    return ImageRefusedError(
        "DAMAGED_IMAGE", f"the file begins like {seems} and cannot be decoded: damaged or cut short"
    )


def kind(data: bytes) -> str:
    """What a file seems to be, for a person."""
    if data[:3] == b"\xff\xd8\xff":
        return "a JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "a PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP"
    for magic, at, name in KNOWN:
        if data[at : at + len(magic)] == magic:
            return name
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "an SVG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return "of no known image format"


def _check(picture: ImageFile.ImageFile, limits: Limits) -> None:
    """Refuse by the header alone."""
    width, height = picture.size
    if picture.format not in READ_AS:
        raise ImageRefusedError("UNSUPPORTED_FORMAT", f"{picture.format} is not read; send JPEG, PNG or WebP")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageTooLargeError(
            "TOO_MANY_PIXELS",
            f"the image has {width} x {height} pixels; at most {limits.max_pixels} in all and "
            f"{limits.max_side} a side are read",
        )
    if min(width, height) < limits.min_side:
        raise ImageRefusedError(
            "IMAGE_TOO_SMALL",
            f"the image has {width} x {height} pixels; at least {limits.min_side} a side are needed",
        )
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise ImageRefusedError("ANIMATED_IMAGE", "the image is an animation; send one picture")
    if picture.mode not in MODES or "16" in _raw_mode(picture):
        raise ImageRefusedError(
            "UNSUPPORTED_COLOUR",
            f"the image's colour mode is {_mode_name(picture)}; send RGB or grey with 8 bits a channel",
        )
    exif = picture.info.get("exif", b"")
    if len(exif) > MAX_EXIF:
        raise ImageRefusedError(
            "EXIF_TOO_LARGE", f"the image carries {len(exif)} bytes of EXIF; at most {MAX_EXIF} are read"
        )


def _raw_mode(picture: ImageFile.ImageFile) -> str:
    """How Pillow unpacks the pixels (`RGB;16B`): it reads 16-bit colour as 8 bits without a word."""
    tiles: list[Any] = list(picture.tile)
    return str(tiles[0].args) if tiles else ""


def _mode_name(picture: ImageFile.ImageFile) -> str:
    return "16 bits a channel" if "16" in picture.mode or "16" in _raw_mode(picture) else picture.mode


def _decode(picture: ImageFile.ImageFile) -> Pixels:
    """The pixels, upright, no more than DECODED_PIXELS of them."""
    width, height = picture.size
    shrink = (DECODED_PIXELS / (width * height)) ** 0.5
    if shrink < 0.75:  # libjpeg decodes at 1/2 and 1/4 for less than the whole costs; others ignore the wish
        part = 2 if shrink > 0.375 else 4
        picture.draft("RGB", (width // part, height // part))
    picture.load()
    try:
        upright: Image.Image = ImageOps.exif_transpose(picture)
    except Exception:  # EXIF that cannot be read says nothing about the pixels
        upright = picture
    if upright.mode in ("RGBA", "LA", "P") and (upright.mode != "P" or "transparency" in upright.info):
        coloured = upright.convert("RGBA")
        upright = Image.new("RGB", coloured.size, "white")
        upright.paste(coloured, mask=coloured.getchannel("A"))
    elif upright.mode != "RGB":
        upright = upright.convert("RGB")
    if upright.width * upright.height > DECODED_PIXELS * 1.05:
        shrink = (DECODED_PIXELS / (upright.width * upright.height)) ** 0.5
        size = (round(upright.width * shrink), round(upright.height * shrink))
        upright = upright.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.ascontiguousarray(upright)
