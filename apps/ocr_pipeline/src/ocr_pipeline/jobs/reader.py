"""What a worker needs of the pipeline: one photo in, one flat result out; the ways to fail are those of
`ocr_pipeline.errors`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

PLATE = "placa_transformador"


@dataclass(frozen=True)
class Read:
    """A photo that was read. `result` is the object that `ocr-pipeline read` prints.

    `tags` are the classes that were seen and read, `lines` the text by line with its class, `crop` a small
    JPEG of the plate.
    """

    result: dict[str, Any]
    text: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    crop: bytes | None = None


class Reader(Protocol):
    """The pipeline, with its backends chosen by configuration."""

    model: str

    def read(self, data: bytes, *, pole_id: str | None, text_only: bool) -> Read:
        """Read one photo. Raises OcrError: ImageRefusedError, BackendError, GpuHangError, DeadlineError."""

    def check(self) -> str:
        """What is wrong with the backends, "" when they answer."""
