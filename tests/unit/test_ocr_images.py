"""What the OCR service lets in: photos of three formats, bounded; everything else refused by name."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from ocr_pipeline import images
from ocr_pipeline.errors import ImageRefusedError, ImageTooLargeError
from ocr_pipeline.images import Limits
from PIL import Image


def encoded(
    mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] = (64, 48), exif: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def refused(data: bytes, limits: Limits | None = None) -> ImageRefusedError:
    with pytest.raises(ImageRefusedError) as caught:
        images.load(data, limits)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    return caught.value


def png_header(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"IHDR" + body
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return start + struct.pack(">I", 100) + b"IDAT" + b"x" * 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_three_formats_are_read(kind: str, mode: str) -> None:
    photo = images.load(encoded(mode, kind))
    assert photo.pixels.shape == (48, 64, 3)
    assert photo.pixels.dtype == np.uint8
    assert photo.format == kind


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_paper(mode: str) -> None:
    assert images.load(encoded(mode, "PNG")).pixels.shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("orientation", "shape"), [(1, (48, 64, 3)), (3, (48, 64, 3)), (6, (64, 48, 3)), (8, (64, 48, 3))]
)
def test_a_photo_is_turned_as_its_exif_says(orientation: int, shape: tuple[int, int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert images.load(encoded(exif=exif.tobytes())).pixels.shape == shape


@pytest.mark.parametrize(
    ("orientation", "corner"),  # of the turned photo, in which the white quarter of the file's top left is
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))],
)
def test_each_of_the_eight_orientations_has_its_own_way(orientation: int, corner: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.new("RGB", (64, 64))
    photo.paste((255, 255, 255), (0, 0, 32, 32))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", exif=exif.tobytes())
    pixels = images.load(buffer.getvalue()).pixels
    bright = [(y, x) for y in (0, 1) for x in (0, 1) if pixels[16 + 32 * y, 16 + 32 * x, 0] > 200]
    assert bright == [corner]


def test_exif_that_is_nonsense_does_not_matter() -> None:
    assert images.load(encoded(exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).width == 64


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EMPTY_IMAGE"),
        (b"hello", "UNSUPPORTED_FORMAT"),
        (b"%PDF-1.7 " + b"x" * 100, "UNSUPPORTED_FORMAT"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 100, "UNSUPPORTED_FORMAT"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "UNSUPPORTED_FORMAT"),
        (b"PK\3\4" + encoded(), "UNSUPPORTED_FORMAT"),
        (encoded(kind="GIF"), "UNSUPPORTED_FORMAT"),
        (encoded(kind="BMP"), "UNSUPPORTED_FORMAT"),
        (encoded(kind="TIFF"), "UNSUPPORTED_FORMAT"),
        (encoded("CMYK"), "UNSUPPORTED_COLOUR"),
        (encoded("I;16", "PNG"), "UNSUPPORTED_COLOUR"),
        (encoded(size=(4000, 4))[:3000], "IMAGE_TOO_SMALL"),
        (encoded(size=(400, 400))[:-200], "DAMAGED_IMAGE"),
        (encoded(kind="PNG", size=(400, 400))[:-30], "DAMAGED_IMAGE"),
        (png_header(40, 40), "DAMAGED_IMAGE"),
    ],
)
def test_what_is_no_photo_is_refused_by_name(data: bytes, reason: str) -> None:
    error = refused(data)
    assert error.reason == reason
    assert error.http_status in (400, 413)


def test_heic_is_called_heic_and_svg_svg() -> None:
    assert "HEIC" in str(refused(b"\0\0\0\x18ftypheic" + b"\0" * 100))
    assert "SVG" in str(refused(b"<svg/>"))


def test_sixteen_bits_of_colour_are_refused_though_pillow_would_read_them() -> None:
    raw = zlib.compress(b"".join(b"\0" + b"\1\2" * 3 * 40 for _ in range(40)))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", raw) + chunk(b"IEND", b"")
    assert refused(data).reason == "UNSUPPORTED_COLOUR"


@pytest.mark.parametrize("size", [(50_000, 50_000), (9_000, 9_000), (20_000, 100)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    error = refused(png_header(*size))
    assert isinstance(error, ImageTooLargeError)
    assert error.http_status == 413


def test_more_bytes_than_allowed_are_not_looked_at() -> None:
    assert refused(b"x" * 101, Limits(max_bytes=100)).reason == "IMAGE_TOO_LARGE"


def test_an_animation_is_refused() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    assert refused(buffer.getvalue()).reason == "ANIMATED_IMAGE"


def test_a_large_photo_is_made_smaller_and_keeps_its_shape() -> None:
    photo = images.load(encoded("L", size=(6400, 4800)))
    assert photo.width * photo.height <= images.DECODED_PIXELS * 1.06
    assert abs(photo.width / photo.height - 4 / 3) < 0.01


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_that_is_a_zip_file_too_is_refused(kind: str) -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x.sh", "reboot")
        archive.comment = b"with a comment"
    error = refused(encoded(kind=kind) + zipped.getvalue())
    assert (error.reason, "a ZIP file" in str(error)) == ("POLYGLOT", True)


def test_a_photo_that_is_a_pdf_too_is_refused() -> None:
    jpeg = encoded()
    comment = b"\xff\xfe\x00\x20" + b"%PDF-1.7\n".ljust(30)
    assert images.load(jpeg[:2] + comment.replace(b"%PDF-", b"harml") + jpeg[2:]).width == 64
    assert refused(jpeg[:2] + comment + jpeg[2:]).reason == "POLYGLOT"


def test_bytes_behind_a_jpeg_are_left_alone() -> None:
    assert images.load(encoded() + b"PK\3\4 a phone's own data").width == 64


def progressive(extra: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * extra + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert images.load(progressive(20)).width == 64
    monkeypatch.setattr(images, "_decode", lambda _: pytest.fail("it was decoded"))
    error = refused(progressive(4000))
    assert (error.reason, error.http_status) == ("TOO_MANY_SCANS", 400)


def test_scans_of_thumbnails_and_behind_the_end_cost_nothing() -> None:
    many, jpeg = b"\xff\xda\x00\x02" * 200, encoded()
    segment = b"\xff\xed" + (len(many) + 2).to_bytes(2, "big") + many
    assert images.load(jpeg[:2] + segment + jpeg[2:] + many).width == 64
