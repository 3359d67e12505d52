"""The settings of the pipeline: which backend each stage has. The defaults are the embedded ones: no GPU, no
server.

A file in YAML or JSON, given by --settings or OCR_PIPELINE_SETTINGS; the role ocr_service renders it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ocr_pipeline.errors import SettingsError
from ocr_pipeline.images import Limits

VARIABLE = "OCR_PIPELINE_SETTINGS"
Seconds = Annotated[float, Field(gt=0, le=3600)]
Share = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=16, le=8192)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s@]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectorSettings(_Strict):
    """Stage 0. `weights` empty: the detector that this project trains. A customer's YOLO export: its path
    and, where its
    file does not name its classes, `classes` in the order of its outputs; classes are found by name, never
    by number.
    """

    backend: Literal["onnx", "text", "whole"] = "onnx"
    weights: str = ""
    classes: tuple[str, ...] = ()
    score: Share = 0.28
    fallback_text: bool = True


class VisionSettings(_Strict):
    """Stage 1. `url` and `model` are the vision server's, for the backend `llama-server`."""

    backend: Literal["rapidocr", "llama-server"] = "rapidocr"
    url: Url = "http://127.0.0.1:8090"
    model: str = "vision"
    timeout_s: Seconds = 90.0
    max_tokens: Tokens = 1024
    threads: Annotated[int, Field(ge=1, le=64)] = 2


class ReasoningSettings(_Strict):
    """Stage 2. `url` and `model` are the server's, for the backends `ollama` and `openai`."""

    backend: Literal["parser", "ollama", "openai"] = "parser"
    url: Url = "http://127.0.0.1:11434"
    model: str = "qwen2.5:14b"
    timeout_s: Seconds = 120.0
    max_tokens: Tokens = 512


class Settings(_Strict):
    """The whole pipeline."""

    detector: DetectorSettings = DetectorSettings()
    vision: VisionSettings = VisionSettings()
    reasoning: ReasoningSettings = ReasoningSettings()
    templates: str = ""  # a folder of the customer's own templates, beside those of the package
    seconds_per_image: Seconds = 120.0
    gpu_lock: str = ""  # a file: who holds its lock has the GPU
    max_bytes: Annotated[int, Field(gt=0)] = Limits.max_bytes
    max_pixels: Annotated[int, Field(gt=0)] = Limits.max_pixels

    @model_validator(mode="after")
    def _gpu(self) -> Settings:
        if self.gpu_lock and not Path(self.gpu_lock).is_absolute():
            raise ValueError(f"gpu_lock = {self.gpu_lock!r} must be an absolute path")
        return self

    @property
    def limits(self) -> Limits:
        """What is read at most."""
        return Limits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)


def load(path: str | None = None) -> Settings:
    """The settings of `path`, else of $OCR_PIPELINE_SETTINGS, else the defaults. Raises SettingsError in one
    line.
    """
    name = path or os.environ.get(VARIABLE, "")
    if not name:
        return Settings()
    try:
        data: Any = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{name}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise SettingsError(f"{name}: neither YAML nor JSON") from None
    try:
        return Settings.model_validate({} if data is None else data)
    except ValidationError as error:
        raise SettingsError(f"{name}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, in one line: where, and what."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
