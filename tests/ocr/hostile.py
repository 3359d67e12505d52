"""Files that are no photos, and some that only pretend: each must be a clear 4xx, fast and small."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from PIL import Image

from tests.ocr.service import photo


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG that says it has that size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG that says it has that size."""
    plain = photo(64, 48)
    at = plain.index(b"\xff\xc0") + 5  # its SOF0: length and precision come before the size
    return plain[:at] + struct.pack(">HH", height, width) + plain[at + 4 :]


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as a file."""
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def exif_bomb() -> bytes:
    """A JPEG with as much EXIF as its segments hold, many times over."""
    plain = photo(64, 48)
    segment = b"\xff\xe1\xff\xff" + b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\xff\xff" * 32759 + b"\xff"
    return plain[:2] + segment[: 2 + 65535] * 40 + plain[2:]


def zipped() -> bytes:
    """A ZIP file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("run.sh", "reboot")
    return out.getvalue()


def png_text_bomb() -> bytes:
    """A PNG whose compressed text chunk says that it is 100 MB."""
    plain = saved(Image.new("RGB", (64, 64)), "PNG")
    content = b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9)
    kind = b"zTXt"
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return plain[:33] + chunk + plain[33:]


def files() -> dict[str, tuple[bytes, str]]:
    """Name to bytes and the MIME type that is claimed."""
    jpeg = photo(400, 300)
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    bomb = zlib.compress(b"\0" * (7000 * 7000 * 3 + 7000), 9)
    return {
        "empty after base64": (b"\0", "image/jpeg"),
        "50,000 x 50,000 by its header": (png_header(50_000, 50_000), "image/png"),
        "decompression bomb of 147 MB": (png_header(7000, 21_000, data=bomb), "image/png"),
        "truncated JPEG": (jpeg[: len(jpeg) // 2], "image/jpeg"),
        "JPEG cut in its header": (jpeg[:20], "image/jpeg"),
        "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64, "image/heic"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "image/svg+xml"),
        "SVG that claims to be a JPEG": (b"<?xml version='1.0'?><svg/>", "image/jpeg"),
        "polyglot: a PDF before a JPEG": (b"%PDF-1.7\n" + jpeg, "image/jpeg"),
        "polyglot: a ZIP behind a JPEG": (jpeg + zipped(), "image/jpeg"),
        "polyglot: a PDF within a JPEG": (
            jpeg[:2] + b"\xff\xfe\x00\x0b%PDF-1.7\n" + jpeg[2:],
            "image/jpeg",
        ),
        "polyglot: JavaScript in a GIF": (b"GIF89a/*" + b"\0" * 64 + b"*/=alert(1)", "image/gif"),
        "HTML": (b"<!doctype html><script>alert(1)</script>", "image/png"),
        "GIF, animated": (
            saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "image/gif",
        ),
        "WebP, animated": (
            saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
            "image/webp",
        ),
        "PNG, animated": (
            saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            "image/png",
        ),
        "CMYK JPEG": (saved(Image.new("CMYK", (64, 64)), "JPEG"), "image/jpeg"),
        "16-bit grey PNG": (saved(Image.new("I;16", (64, 64)), "PNG"), "image/png"),
        "16-bit RGB PNG": (png_header(64, 64, 16, data=zlib.compress(b"\0" * 64 * 385)), "image/png"),
        "EXIF bomb": (exif_bomb(), "image/jpeg"),
        "2 x 2": (saved(Image.new("RGB", (2, 2)), "PNG"), "image/png"),
        "zeros": (b"\0" * 100_000, "image/jpeg"),
        "not an image's MIME type": (jpeg, "application/pdf"),
        "another image's MIME type": (jpeg, "image/png"),
        "PNG with a text of 100 MB, compressed": (png_text_bomb(), "image/png"),
    }
