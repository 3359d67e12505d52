"""A worker with a cheap stand-in for the pipeline: it decodes the photo as the real one does, and invents
the rest.

`python -m tests.ocr.fake_worker SETTINGS` runs one, as `ocr-worker` would. FAKE_SECONDS: how long a photo
takes.
What a photo shows is its size: see `behaviour`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

from ocr_pipeline import images
from ocr_pipeline.api import redact
from ocr_pipeline.api.settings import load
from ocr_pipeline.errors import BackendError, GpuHangError
from ocr_pipeline.jobs.reader import PLATE, Read
from ocr_pipeline.jobs.run import make, run
from ocr_pipeline.reading import Reading

HANGS, DOWN, BREAKS, SLEEPS, DIES = 101, 102, 103, 104, 105  # a photo of that width


class FakeReader:
    """Not the pipeline: a stand-in for tests of what is around it."""

    model = "fake/1 nothing+nothing"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.count = 0

    def read(self, data: bytes, *, pole_id: str | None, text_only: bool) -> Read:
        """A reading that tells which photo it is of."""
        self.count += 1
        photo = images.load(data)
        behaviour(photo.width)
        time.sleep(self.seconds)
        digest = hashlib.sha256(data).hexdigest()
        if text_only:
            line = {"texto": digest[:12], "classe": "pole", "confianca": 1.0}
            return Read(result={}, text=digest[:12], lines=[line])
        found = Reading.of(
            {"potencia_kva": 112.5, "fabricante": "ROMAGNOLE", "numero_serie": digest[:12]},
            ["low_confidence:numero_serie"],
            {"potencia_kva": 0.99},
        )
        return Read(result=found.flat(), tags=(PLATE,), crop=b"\xff\xd8crop\xff\xd9")

    def check(self) -> str:
        """It needs nothing."""
        return ""


def behaviour(width: int) -> None:
    """What goes wrong with a photo of this width."""
    if width == HANGS:
        raise GpuHangError("the GPU does not answer")
    if width == DOWN:
        raise BackendError("the vision server does not answer")
    if width == BREAKS:
        raise RuntimeError("secret-of-the-inside")
    if width == SLEEPS:
        time.sleep(3600)
    if width == DIES:
        os._exit(9)


if __name__ == "__main__":
    redact.set_up()
    settings = load(Path(sys.argv[1]))
    sys.exit(
        run(make(settings, FakeReader(float(os.environ.get("FAKE_SECONDS", "0")))), settings.worker_nice)
    )
