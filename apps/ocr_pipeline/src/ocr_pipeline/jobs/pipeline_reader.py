"""The pipeline as a worker uses it."""

from __future__ import annotations

from typing import Any

import httpx

from ocr_pipeline.jobs.reader import Read
from ocr_pipeline.pipeline import Pipeline
from ocr_pipeline.settings import Settings
from ocr_pipeline.stages import Deadline

CHECK_TIMEOUT_S = 2.0
_HEALTH = {"llama-server": "/health", "ollama": "/api/version", "openai": "/v1/models"}


class PipelineReader:
    """One Pipeline, for one process. `seconds`: what its stages may take together at most, for one photo."""

    def __init__(self, pipeline: Pipeline, settings: Settings, version: str, seconds: float) -> None:
        self._pipeline = pipeline
        self._seconds = min(settings.seconds_per_image, seconds)
        vision, reasoning = settings.vision, settings.reasoning
        self.model = f"ocr-pipeline/{version} {vision.backend}+{reasoning.backend}"
        self._servers = {
            backend.url: backend.url.rstrip("/") + _HEALTH[backend.backend]
            for backend in (vision, reasoning)
            if backend.backend in _HEALTH
        }

    def read(self, data: bytes, *, pole_id: str | None, text_only: bool) -> Read:
        deadline = Deadline(self._seconds)
        if text_only:
            found = self._pipeline.text(data, deadline=deadline)
            lines: list[dict[str, Any]] = [
                {"texto": line.text, "classe": str(line.kind), "confianca": round(line.confidence, 3)}
                for line in found.lines
            ]
            return Read(result={}, text=found.text, lines=lines)
        seen = self._pipeline.inspect(data, deadline=deadline)
        tags = seen.tags
        if pole_id:  # only a pole has a bank
            tags = self._pipeline.confirmed_tags(seen, deadline=deadline)
        return Read(result=seen.reading.flat(), tags=tags, crop=seen.crop_jpeg())

    def check(self) -> str:
        for url, health in self._servers.items():
            try:
                status = httpx.get(health, timeout=CHECK_TIMEOUT_S).status_code
            except httpx.HTTPError as error:
                return f"{url} does not answer ({type(error).__name__})"
            if status != httpx.codes.OK:
                return f"{url} answers {status} to {health.removeprefix(url.rstrip('/'))}"
        return ""
