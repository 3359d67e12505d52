"""The Gemini-style envelope: what a request carries, and what its answer looks like.

Clients write the keys in camelCase or in snake_case, and mix both in one object (google-genai sends
`inlineData` with `mime_type` in it); they send standard or URL-safe base64, with or without padding, with
line breaks. All of it is read. Text parts are counted and dropped here: nothing that a client writes reaches
a model.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ocr_pipeline.api.errors import invalid

TOKENS_PER_IMAGE = 258  # what Gemini counts for one small picture; old clients add these figures up
CHARACTERS_PER_TOKEN = 4
MAX_PARTS = 64
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\v\f"
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")
_MIME = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}")
# Other names that cameras and browsers have for them.
_ALIASES = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/jpe": "image/jpeg",
    "image/mpo": "image/jpeg",
    "image/x-png": "image/png",
}
# The types of photos that are read, and how each begins.
_MAGIC = {
    "image/jpeg": (0, b"\xff\xd8\xff"),
    "image/png": (0, b"\x89PNG\r\n\x1a\n"),
    "image/webp": (8, b"WEBP"),
}


@dataclass(frozen=True)
class Picture:
    """One photo of a request, decoded from base64 and not yet looked at."""

    data: bytes
    mime_type: str


@dataclass(frozen=True)
class Asked:
    """A generateContent request: its pictures, and how much text came with them."""

    pictures: tuple[Picture, ...]
    characters: int

    @property
    def tokens(self) -> int:
        """An estimate in Gemini's terms."""
        return len(self.pictures) * TOKENS_PER_IMAGE + -(-self.characters // CHARACTERS_PER_TOKEN)

    def emptied(self) -> Asked:
        """The same without the photos' bytes: what waits for its answer does not hold them."""
        return Asked(tuple(Picture(b"", each.mime_type) for each in self.pictures), self.characters)


def snake(key: str) -> str:
    """`inlineData`, `inline_data`: the same key."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).lower()


def fields(value: object, where: str) -> dict[str, Any]:
    """An object's fields under their snake_case names; null is not there. Raises Refusal: not an object, or a
    field twice."""
    if not isinstance(value, Mapping):
        raise invalid("BAD_ENVELOPE", f"{where}: must be an object, not {_kind(value)}")
    found: dict[str, Any] = {}
    for key, item in value.items():
        if item is None:  # as protobuf's JSON has it, and as serializers write what is not set
            continue
        name = snake(key)
        if name in found:
            raise invalid(
                "BAD_ENVELOPE", f"{where}: {name!r:.40} is there twice, in two spellings; leave one"
            )
        found[name] = item
    return found


def items(value: object, where: str, *, at_most: int = MAX_PARTS) -> list[Any]:
    """A list of 1 to `at_most` things. Raises Refusal."""
    if not isinstance(value, list):
        raise invalid("BAD_ENVELOPE", f"{where}: must be a list, not {_kind(value)}")
    if not 0 < len(value) <= at_most:
        raise invalid("BAD_ENVELOPE", f"{where}: {len(value)} entries; 1 to {at_most} are allowed")
    return value


def decode_base64(text: object, where: str) -> bytes:
    """The bytes of base64 text in either alphabet, padded or not. Raises Refusal."""
    if not isinstance(text, str):
        raise invalid("BAD_BASE64", f"{where}: must be base64 text, not {_kind(text)}")
    try:
        packed = text.encode("ascii").translate(_URL_SAFE, _WHITESPACE)
    except UnicodeEncodeError:
        raise invalid("BAD_BASE64", f"{where}: not base64: it holds characters outside ASCII") from None
    stripped = packed.rstrip(b"=")
    wrong = _NOT_BASE64.search(stripped)
    if wrong:
        shown = ascii(wrong.group().decode("ascii", "replace"))
        hint = "; send the base64 alone, without `data:`" if packed.startswith(b"data:") else ""
        raise invalid("BAD_BASE64", f"{where}: not base64: {shown} at position {wrong.start()}{hint}")
    if not stripped:
        raise invalid("BAD_BASE64", f"{where}: empty; send the photo's bytes as base64")
    if len(stripped) % 4 == 1 or len(packed) - len(stripped) > 2:
        raise invalid("BAD_BASE64", f"{where}: not base64: {len(stripped)} characters cannot be whole bytes")
    try:
        return binascii.a2b_base64(stripped + b"=" * (-len(stripped) % 4))
    except binascii.Error as error:
        raise invalid("BAD_BASE64", f"{where}: not base64: {error}") from None


def picture(value: object, where: str) -> Picture:
    """An `inline_data` object. Raises Refusal."""
    found = fields(value, where)
    mime = found.get("mime_type", "")
    if not isinstance(mime, str) or not _MIME.fullmatch(mime.strip().lower()):
        raise invalid("BAD_ENVELOPE", f"{where}.mime_type = {mime!r:.60}: must be like image/jpeg")
    claimed, data = mime.strip().lower(), decode_base64(found.get("data"), f"{where}.data")
    real = next((name for name, (at, magic) in _MAGIC.items() if data[at : at + len(magic)] == magic), "")
    if not claimed.startswith("image/"):
        raise invalid("UNSUPPORTED_FORMAT", f"{where}.mime_type = {claimed!r}: must be an image's")
    if real and _ALIASES.get(claimed, claimed) != real:
        raise invalid("WRONG_MIME_TYPE", f"{where}.mime_type = {claimed!r}: the bytes are {real}")
    return Picture(data, claimed)


def asked(body: object) -> Asked:
    """A generateContent or countTokens request. Raises Refusal."""
    top = fields(body, "the request")
    if "contents" not in top and "generate_content_request" in top:  # countTokens has a form that wraps it
        top = fields(top["generate_content_request"], "generateContentRequest")
    if "contents" not in top:
        raise invalid("BAD_ENVELOPE", "contents is missing; send contents[].parts[].inlineData")
    given = top["contents"]
    contents = [given] if isinstance(given, Mapping) else items(given, "contents")
    pictures: list[Picture] = []
    characters = 0
    for part, where in _parts(contents):
        kinds = part.keys() & {"text", "inline_data", "file_data"}
        if "file_data" in kinds:
            raise invalid("FILE_NOT_FETCHED", f"{where}.fileData: files are not fetched; send inlineData")
        if not kinds:
            raise invalid("BAD_ENVELOPE", f"{where}: neither text nor inlineData; nothing else is read")
        if "text" in part:
            if not isinstance(part["text"], str):
                raise invalid("BAD_ENVELOPE", f"{where}.text: must be text, not {_kind(part['text'])}")
            characters += len(part["text"])
        if "inline_data" in part:
            pictures.append(picture(part["inline_data"], f"{where}.inlineData"))
    return Asked(tuple(pictures), characters)


def the_picture(request: Asked) -> Picture:
    """The one photo of a request. Raises Refusal for none, and for several."""
    if not request.pictures:
        raise invalid("NO_IMAGE", "no photo in contents[].parts[].inlineData; send one")
    if len(request.pictures) > 1:
        many = f"{len(request.pictures)} photos in one request"
        raise invalid("TOO_MANY_IMAGES", f"{many}; send one each, or all as a job: POST /api/v41/ocr/jobs")
    return request.pictures[0]


def _parts(contents: list[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for number, content in enumerate(contents):
        where = f"contents[{number}]"
        entry = fields(content, where)
        if "parts" not in entry:
            raise invalid("BAD_ENVELOPE", f"{where}.parts is missing")
        given = entry["parts"]
        for index, part in enumerate(
            [given] if isinstance(given, Mapping) else items(given, f"{where}.parts")
        ):
            yield fields(part, f"{where}.parts[{index}]"), f"{where}.parts[{index}]"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


# --- answers ---


def answer(text: str, request: Asked, model: str, response_id: str) -> dict[str, Any]:
    """The answer to generateContent; a stream has it as its one chunk."""
    produced = -(-len(text) // CHARACTERS_PER_TOKEN)
    return {
        "candidates": [
            {
                "content": {"parts": [{"text": text}], "role": "model"},
                "finishReason": "STOP",
                "index": 0,
            }
        ],
        "usageMetadata": {
            "promptTokenCount": request.tokens,
            "candidatesTokenCount": produced,
            "totalTokenCount": request.tokens + produced,
        },
        "modelVersion": model,
        "responseId": response_id,
    }


def model_entry(name: str, version: str) -> dict[str, Any]:
    """One entry of the list of models."""
    return {
        "name": f"models/{name}",
        "baseModelId": name,
        "version": version,
        "displayName": name,
        "description": "Reads the nameplate of an electrical transformer: 11 fields, as JSON.",
        "inputTokenLimit": TOKENS_PER_IMAGE + 1_000_000 // CHARACTERS_PER_TOKEN,
        "outputTokenLimit": 8192,
        "supportedGenerationMethods": ["generateContent", "streamGenerateContent", "countTokens"],
    }
