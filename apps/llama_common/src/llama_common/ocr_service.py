"""What the variables of the role ocr_service may hold: as apps/ocr_pipeline reads them on the box.

Its models are repeated here, and a test holds them together: to import them brings in the libraries that
read photos, 0.9 s in every run of Ansible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llama_common.fields import Checked, Text, refuse, refuse_control_characters

SHARE_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
SQLITE: Final = r"sqlite:////[^\x00-\x20?#]+"
DATABASE: Final = rf"{SQLITE}|postgres(ql)?(\+psycopg)?://[^\s/]*/\S+"
QUEUE: Final = rf"{SQLITE}|rediss?://\S+|unix://\S+"
_POSTGRES = 'leave it empty, or write "postgresql://USER:PASSWORD@HOST/NAME", the password from Vault'
# For values that no refusal may show.
FIXES: Final[Mapping[str, str]] = {
    "ocr_service_database": _POSTGRES,
    "ocr_service_records": _POSTGRES,
    "ocr_service_queue": 'leave it empty, or write "redis://HOST:6379/0"',
    "ocr_service_shares": "write it like field: {server: nas.lan, share: photos, username: ocr, password: …}",
}


def _text(most: int, least: int = 0) -> Callable[[str], str]:
    def check(value: str) -> str:
        refuse_control_characters(value)
        if not least <= len(value) <= most:
            raise refuse(f"must be {least} to {most} characters", "shorten it" if value else "write it")
        return value

    return check


def _address(pattern: str, what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        refuse_control_characters(value)
        if value and not re.fullmatch(pattern, value):
            raise refuse(f"must be {what}", "leave it empty, or write such an address")
        return value

    return check


def _lock(value: str) -> str:
    refuse_control_characters(value)
    if value and not value.startswith("/"):
        raise refuse("must be an absolute path", "leave it out, or write it like /var/lib/ocr/gpu.lock")
    return value


_DATABASES = "sqlite:////FILE or postgresql://USER:PASSWORD@HOST/NAME"
DatabaseAddress = Annotated[str, Checked(_address(DATABASE, _DATABASES))]
QueueAddress = Annotated[str, Checked(_address(QUEUE, "sqlite:////FILE or redis://HOST:PORT/NUMBER"))]
LineOrNothing = Annotated[str, Checked(_text(4096))]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Tokens = Annotated[int, Field(ge=16, le=8192)]
Url = Annotated[
    str,
    Text(
        r"https?://[^\s@]+",
        "an address of http or https, without a password",
        'write it like "http://127.0.0.1:8090"',
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OcrKey(_Strict):
    """A key of the OCR service, by its hash: what `ocr-key new NAME` prints."""

    name: Annotated[
        str,
        Text(
            r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}",
            "a key's name: letters, digits and ._@-",
            "write it like laptop",
        ),
    ]
    sha256: Annotated[
        str, Text(r"[0-9a-fA-F]{64}", "the SHA-256 of the key, 64 hexadecimal digits", "ocr-key new NAME")
    ]


class OcrShare(_Strict):
    """A share that TRA jobs may name."""

    server: Annotated[
        str, Text(r"[A-Za-z0-9][A-Za-z0-9.:-]{0,252}", "a server's name or address", "write it like nas.lan")
    ]
    share: Annotated[
        str,
        Text(
            r"[^\\/:*?\"<>|\x00-\x1f]{1,80}", "a share's name, without a folder in it", "write it like photos"
        ),
    ]
    username: Annotated[str, Checked(_text(104, 1))]
    password: Annotated[str, Checked(_text(256, 1))]
    folder: Annotated[str, Checked(_text(512))] = ""
    domain: Annotated[str, Checked(_text(255))] = ""
    port: Annotated[int, Field(ge=1, le=65535)] = 445


class OcrDetector(_Strict):
    """Stage 0."""

    backend: Literal["onnx", "text", "whole"] = "onnx"
    weights: LineOrNothing = ""
    classes: list[LineOrNothing] = []
    score: Annotated[float, Field(ge=0, le=1)] = 0.28
    fallback_text: bool = True


class OcrVision(_Strict):
    """Stage 1."""

    backend: Literal["rapidocr", "llama-server"] = "rapidocr"
    url: Url = "http://127.0.0.1:8090"
    model: LineOrNothing = "vision"
    timeout_s: Seconds = 90.0
    max_tokens: Tokens = 1024
    threads: Annotated[int, Field(ge=1, le=64)] = 2


class OcrReasoning(_Strict):
    """Stage 2."""

    backend: Literal["parser", "ollama", "openai"] = "parser"
    url: Url = "http://127.0.0.1:11434"
    model: LineOrNothing = "qwen2.5:14b"
    timeout_s: Seconds = 120.0
    max_tokens: Tokens = 512


class OcrPipeline(_Strict):
    """The pipeline's stages."""

    detector: OcrDetector = OcrDetector()
    vision: OcrVision = OcrVision()
    reasoning: OcrReasoning = OcrReasoning()
    templates: LineOrNothing = ""
    seconds_per_image: Seconds = 120.0
    gpu_lock: Annotated[str, Checked(_lock)] = ""
    max_bytes: Annotated[int, Field(gt=0)] = 25_000_000
    max_pixels: Annotated[int, Field(gt=0)] = 64_000_000


def _distinct(keys: list[OcrKey]) -> list[OcrKey]:
    for index, key in enumerate(keys):
        for other in keys[:index]:
            if key.name == other.name:
                raise refuse(f"two keys are called {key.name!r}", "give each a name of its own")
            if key.sha256.lower() == other.sha256.lower():
                fix = "make each holder a key with `ocr-key new NAME`"
                raise refuse(f"{other.name!r} and {key.name!r} have one key", fix)
    return keys


def _named(shares: dict[str, Any]) -> dict[str, Any]:
    for name in shares:
        if not re.fullmatch(SHARE_NAME, name):
            message = f"{name!r} is no name for a share: 1 to 64 letters, digits, '.', '_' and '-'"
            raise refuse(message, "rename it")
    return shares


LIMITS: Final[Mapping[str, Any]] = {
    "ocr_service_keys": Annotated[list[OcrKey], AfterValidator(_distinct)],
    "ocr_service_shares": Annotated[dict[str, OcrShare], AfterValidator(_named)],
    "ocr_service_database": DatabaseAddress,
    "ocr_service_records": DatabaseAddress,
    "ocr_service_queue": QueueAddress,
    "ocr_service_pipeline": OcrPipeline,
}
"""What these variables may hold beyond their type."""
