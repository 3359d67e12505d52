"""A whole service for tests: API and workers as processes of their own, on loopback, in one folder."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from ocr_pipeline.api.keys import new
from PIL import Image

from tests import support
from tests.ocr import servers

FAKE_WORKER = ("-m", "tests.ocr.fake_worker")
REAL_WORKER = ("-m", "ocr_pipeline.jobs.run", "--settings")


def photo(width: int = 64, height: int = 48, seed: int = 0, kind: str = "JPEG") -> bytes:
    """A small photo; another seed is another photo."""
    picture = Image.new("RGB", (width, height), (seed % 256, seed // 256 % 256, 128))
    picture.putpixel((seed % width, seed // width % height), (255, 255, 255))
    out = io.BytesIO()
    picture.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue() + seed.to_bytes(4, "big")


def b64(data: bytes) -> str:
    """Standard base64."""
    return base64.b64encode(data).decode()


def generate(data: bytes, mime: str = "image/jpeg") -> dict[str, Any]:
    """A generateContent request."""
    return {"contents": [{"parts": [{"inlineData": {"mimeType": mime, "data": b64(data)}}]}]}


class Service:
    """Processes of one service. `key` is a valid API key."""

    def __init__(
        self,
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        worker: Sequence[str] = FAKE_WORKER,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.worker = worker
        self.port = servers.free_port()
        self.key, entry = new("tester")
        self.other_key, other = new("other")
        self.environment = {**os.environ, **(environment or {})}
        self.log = folder / "service.log"
        (folder / "keys.json").write_text(json.dumps({"version": 1, "keys": [entry, other]}))
        self.settings_file = folder / "service.json"
        self.settings = {
            "port": self.port,
            "state_dir": str(folder / "state"),
            "keys_file": str(folder / "keys.json"),
            "lease": 3,
            "worker_nice": 5,
            "retry_delay": 0.2,
            "hang_delay": 0.2,
            **settings,
        }
        self.settings_file.write_text(json.dumps(self.settings))
        self.api: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def _start(self, *argv: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *argv, str(self.settings_file)],
                cwd=support.ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_api(self) -> None:
        """Start it, and wait until it answers."""
        self.api = self._start("-m", "ocr_pipeline.api.server", "--settings")
        servers.wait_for(lambda: servers.accepts(self.port), "the API's start", 60)

    def start_worker(self) -> subprocess.Popen[bytes]:
        """One more worker."""
        worker = self._start(*self.worker)
        self.workers.append(worker)
        return worker

    def wait_ready(self) -> None:
        """Until a worker has told that it is there."""
        servers.wait_for(lambda: httpx.get(self.url("/ready")).status_code == 200, "readiness", 60)

    def url(self, path: str) -> str:
        """An address of the API."""
        return f"http://127.0.0.1:{self.port}{path}"

    def client(self, **options: Any) -> httpx.Client:
        """A client with the key."""
        return httpx.Client(
            base_url=self.url(""), headers={"x-goog-api-key": self.key}, timeout=60, **options
        )

    def log_text(self) -> str:
        """What both have logged."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """End all of it."""
        for process in [*self.workers, *([self.api] if self.api else [])]:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                try:
                    process.wait(10)
                    break
                except subprocess.TimeoutExpired:
                    continue
        self.workers.clear()
        self.api = None


@contextlib.contextmanager
def running(folder: Path, workers: int = 1, **settings: Any) -> Iterator[Service]:
    """A service that is ready."""
    service = Service(folder, **settings)
    try:
        service.start_api()
        for _ in range(workers):
            service.start_worker()
        if workers:
            service.wait_ready()
        yield service
    finally:
        service.stop()
