"""Jobs as clients ask for them: TRA, photos on a share; ALT, photos in the request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ocr_pipeline.api.envelope import decode_base64, fields, items
from ocr_pipeline.api.errors import Refusal, invalid
from ocr_pipeline.api.settings import Settings
from ocr_pipeline.jobs.store import NewItem
from ocr_pipeline.jobs.tables import LONGEST_NAME, Kind
from ocr_pipeline.smb.share import Entry, ShareError, checked_path

POLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/-]{0,63}")
FEEDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/-]{0,127}")
# `IMG_0001.jpg`, `20260101_101010.jpg`: one pole would have the photos of all.
CAMERA = re.compile(
    r"(?:IMG|DSC[NF]?|PXL|GOPR|SAM|DJI|MVIMG|PICT|PHOTO|FOTO|IMAGEM?|SCREENSHOT)[_-]?[0-9]|(?:19|20)[0-9]{6}_[0-9]{6}",
    re.IGNORECASE,
)
IDEMPOTENCY = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass(frozen=True)
class Order:
    """A job to submit. A TRA job's photos are listed on its share afterwards."""

    kind: Kind
    feeder: str
    photos: tuple[NewItem, ...] = ()
    share: str = ""
    folder: str = ""

    def fingerprint(self) -> str:
        """The same for the same order: what an idempotency key is bound to."""
        digest = hashlib.sha256(f"{self.kind}\0{self.feeder}\0{self.share}\0{self.folder}\n".encode())
        for photo in self.photos:
            digest.update(f"{photo.pole_id}\0{photo.image_hash}\n".encode())
        return digest.hexdigest()


def order(body: object, settings: Settings) -> Order:
    """The order in a request's body. Raises Refusal. What it has decoded is taken out of `body`."""
    top = fields(body, "the job")
    kind = top.get("type")
    if kind == Kind.TRA:
        return _tra(top)
    if kind == Kind.ALT:
        return Order(Kind.ALT, text(top.get("feeder") or "ALT", "feeder", FEEDER), tuple(_alt(top, settings)))
    raise invalid("BAD_JOB", f"type = {kind!r:.40}: must be TRA or ALT")


def _tra(top: dict[str, Any]) -> Order:
    given = text(top.get("folder"), "folder", re.compile(r"[^\x00-\x1f]{1,512}"))
    try:
        folder = checked_path(given)
    except ShareError as error:
        raise invalid("BAD_JOB", str(error)) from None
    share = text(top.get("share"), "share", re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"))
    return Order(Kind.TRA, text(top.get("feeder"), "feeder", FEEDER), share=share, folder=folder)


def _alt(top: dict[str, Any], settings: Settings) -> Iterator[NewItem]:
    poles = items(top.get("poles"), "poles", at_most=settings.max_poles)
    seen: set[str] = set()
    for number, entry in enumerate(poles):
        where = f"poles[{number}]"
        pole = fields(entry, where)
        pole_id = text(pole.get("id"), f"{where}.id", POLE_ID)
        if pole_id in seen:
            raise invalid("BAD_JOB", f"{where}.id = {pole_id!r}: is there twice; put its images together")
        seen.add(pole_id)
        images = items(pole.get("images"), f"{where}.images", at_most=settings.max_images_per_pole)
        for index, image in enumerate(images):
            place = f"{where}.images[{index}]"
            found = fields(image, place)
            data = decode_base64(found.get("data"), f"{place}.data")
            if isinstance(image, dict):
                image.clear()  # 200 MB of text need not lie beside their bytes
            if len(data) > settings.max_image:
                limit = f"at most {settings.max_image} are read"
                raise invalid("IMAGE_TOO_LARGE", f"{place}: the image has {len(data)} bytes; {limit}", 413)
            name = found.get("name")
            shown = (
                text(name, f"{place}.name", re.compile(r"[^\x00-\x1f]{1,255}")) if name else f"{index + 1}"
            )
            yield NewItem(pole_id, shown, hashlib.sha256(data).hexdigest(), data)


def photos_of(entries: list[Entry], folder: str, settings: Settings) -> list[NewItem]:
    """The photos that a share lists, each with its pole. Raises Refusal."""
    if len(entries) > settings.max_feeder_images:
        many = f"{folder} holds {len(entries)} photos"
        raise invalid("TOO_MANY_IMAGES", f"{many}; at most {settings.max_feeder_images} a job: split it")
    found = []
    for entry in entries:
        if len(entry.path) > LONGEST_NAME:
            long = f"a path of {len(entry.path)} characters; at most {LONGEST_NAME} are kept"
            raise invalid("BAD_JOB", f"{entry.path!r:.120}: {long}: shorten it")
        below = entry.path.removeprefix(f"{folder}/")
        head, slash, _ = below.partition("/")
        pole = head if slash else head.rpartition(".")[0].partition("_")[0]
        if not slash and CAMERA.match(head):
            fix = "put the photos into a folder for each pole, or call them POLE_….jpg"
            raise invalid("BAD_POLE", f"{entry.path!r:.120}: that is a camera's name for it; {fix}")
        if not POLE_ID.fullmatch(pole):
            raise invalid("BAD_POLE", f"{entry.path!r:.120}: {pole!r:.64} is no pole's name; rename it")
        # The bytes are read later: until then a photo is told by where it is, how large, and of when.
        identity = hashlib.sha256(f"{entry.path}\0{entry.size}\0{entry.modified}".encode()).hexdigest()
        found.append(NewItem(pole, entry.path, identity))
    return found


def text(value: object, where: str, pattern: re.Pattern[str]) -> str:
    """Checked text. Raises Refusal."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        shown = f" = {value!r:.60}" if isinstance(value, str) else " is missing or no text"
        raise invalid("BAD_JOB", f"{where}{shown}: must match {pattern.pattern}")
    return value


def idempotency_key(value: str | None) -> str | None:
    """The header, checked. Raises Refusal."""
    if value is not None and not IDEMPOTENCY.fullmatch(value):
        raise Refusal(400, "BAD_IDEMPOTENCY_KEY", f"Idempotency-Key: must match {IDEMPOTENCY.pattern}")
    return value
