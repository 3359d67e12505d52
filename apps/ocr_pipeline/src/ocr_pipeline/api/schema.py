"""What the OpenAPI document says of requests and answers. The parsing itself is in `envelope` and
`orders`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ocr_pipeline.reading import Reading

Base64 = Annotated[str, Field(description="base64, standard or URL-safe alphabet, with or without padding")]
PoleId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._/-]{0,63}$", examples=["P-0417"])]


class _Camel(BaseModel):
    model_config = ConfigDict(extra="allow")


class InlineData(_Camel):
    """A photo. Keys in camelCase or snake_case, here and everywhere."""

    mimeType: str = Field(examples=["image/jpeg"])
    data: Base64


class Part(_Camel):
    """One part: a photo, or text, which is accepted and never followed."""

    inlineData: InlineData | None = None
    text: str | None = None


class Content(_Camel):
    """Parts of one turn."""

    role: str | None = None
    parts: list[Part]


class GenerateRequest(_Camel):
    """generateContent: exactly one photo. `generationConfig` and all other fields are accepted and
    ignored."""

    contents: list[Content]
    generationConfig: dict[str, Any] | None = None


class Answer(BaseModel):
    """generateContent's answer: `candidates[0].content.parts[0].text` is the reading, as JSON text."""

    candidates: list[dict[str, Any]]
    usageMetadata: dict[str, int]
    modelVersion: str
    responseId: str


class ErrorBody(BaseModel):
    """What is wrong: `code` is the HTTP status, `status` Google's name of it, `details` has the machine's
    reason."""

    code: int
    message: str
    status: str
    details: list[dict[str, Any]] = []


class ErrorAnswer(BaseModel):
    """Every error, of every path."""

    error: ErrorBody


class AltImage(_Camel):
    """A photo of a pole."""

    name: str | None = None
    data: Base64


class AltPole(_Camel):
    """A pole with its photos."""

    id: PoleId
    images: list[AltImage]


class AltJob(_Camel):
    """Photos that come with the request."""

    type: Literal["ALT"]
    feeder: str | None = None
    poles: list[AltPole]


class TraJob(_Camel):
    """A feeder's photos on a share that the box knows by name: `FOLDER/POLE/PHOTO.jpg` or
    `FOLDER/POLE_….jpg`."""

    type: Literal["TRA"]
    feeder: str
    share: str
    folder: str


class JobStatus(BaseModel):
    """A job. `counts` has the photos by state; `queuePosition` those of others that come first."""

    id: str
    type: Literal["ALT", "TRA"]
    state: Literal["queued", "running", "done", "partial", "failed", "cancelled"]
    feeder: str
    images: int
    duplicates: int
    counts: dict[str, int]
    progress: float
    queuePosition: int
    estimateSeconds: float | None
    createdAt: str
    finishedAt: str | None


class JobResult(BaseModel):
    """The photos of a job, by page; `nextOffset` is null on the last one."""

    id: str
    state: str
    items: list[dict[str, Any]]
    nextOffset: int | None


class PoleTextAnswer(BaseModel):
    """The text of a pole's photo that is not a nameplate's, a meter's or a telecom label's."""

    poste: str
    texto: str
    linhas: list[dict[str, Any]]


def reading_schema() -> dict[str, Any]:
    """JSON Schema of the flat object that `text` carries."""
    return Reading.model_json_schema(by_alias=True, mode="serialization")
