"""A worker with the real pipeline around scripted model servers: hangs, turns, and what is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ocr_pipeline import gpu, servers, templates
from ocr_pipeline.api.settings import Settings as ServiceSettings
from ocr_pipeline.audit import PlateAuditor
from ocr_pipeline.database import open_engine
from ocr_pipeline.geometry import Box
from ocr_pipeline.images import Pixels
from ocr_pipeline.jobs import pipeline_reader
from ocr_pipeline.jobs.pipeline_reader import PipelineReader
from ocr_pipeline.jobs.reader import Read
from ocr_pipeline.jobs.store import JobStore, Limits, NewItem
from ocr_pipeline.jobs.tables import Kind
from ocr_pipeline.jobs.worker import EXIT_OVERRAN, Worker, WorkerSettings
from ocr_pipeline.parser import Parser
from ocr_pipeline.pipeline import Pipeline
from ocr_pipeline.servers import ServerReasoner, ServerVision
from ocr_pipeline.settings import ReasoningSettings, Settings, VisionSettings
from ocr_pipeline.stages import Deadline, Line, Plate, PlateClass, PoleIdContext
from sqlalchemy.exc import OperationalError

from tests.unit.test_ocr_images import encoded
from tests.unit.test_ocr_jobs import NoDispatch
from tests.unit.test_ocr_stages import Reads, Sees

PIXELS = np.zeros((40, 60, 3), np.uint8)
PLATE = Plate(PlateClass.IDENTIFICATION, Box(0, 0, 60, 40), 0.9)
UTILITYS = Plate(PlateClass.TRANSFORMER, Box(70, 0, 110, 40), 0.9)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    engine = open_engine(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    made = JobStore(engine, Limits())
    made.prepare()
    yield made
    engine.dispose()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def reading(url: str, image_timeout: float, lock: str = "") -> PipelineReader:
    """The real pipeline with the vision server's default time limit, as a worker has it."""
    chosen = Settings(vision=VisionSettings(backend="llama-server", url=url))
    pipeline = Pipeline(
        [Sees(PLATE)],
        ServerVision(chosen.vision, lock),
        Parser(templates.load()),
        PlateAuditor(),
        seconds_per_image=chosen.seconds_per_image,
    )
    return PipelineReader(pipeline, chosen, "1", WorkerSettings(image_timeout_s=image_timeout).reading_s)


def worked(store: JobStore, reader: PipelineReader, image_timeout: float) -> tuple[Any, list[int]]:
    """What became of one photo, and how the process ended meanwhile."""
    job = store.submit(Kind.READ, "me", [NewItem("", "photo", "h", encoded())])
    ended: list[int] = []
    settings = WorkerSettings(image_timeout_s=image_timeout, heartbeat_s=0.2, hang_delay_s=0)
    Worker(store, reader, NoDispatch(), settings, exit_process=ended.append).work_once()
    return store.results(job.job_id)[0], ended


def test_a_server_that_hangs_is_told_as_a_hang_before_the_worker_has_to_end(
    store: JobStore, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "PROBE_S", 0.2)
    monkeypatch.setattr(pipeline_reader, "CHECK_TIMEOUT_S", 0.1)
    found, ended = worked(store, reading(silent, 4.0), 4.0)
    assert (found.error_code, found.error_status, ended) == ("GPU_HANG", 503, [])


def test_a_gpu_that_others_have_is_told_as_busy_before_the_worker_has_to_end(
    store: JobStore, silent: str, tmp_path: Path
) -> None:
    lock = str(tmp_path / "gpu")
    with gpu.turn(lock, Deadline(1)):
        found, ended = worked(store, reading(silent, 4.0, lock), 4.0)
    assert (found.error_code, found.error_status, ended) == ("GPU_BUSY", 503, [])


def test_with_the_defaults_a_hang_is_told_before_the_client_is_sent_away() -> None:
    service = ServiceSettings()
    worker = service.worker()
    assert worker.reading_s + 2 * servers.PROBE_S < worker.image_timeout_s < service.answer_timeout


class Overlap(httpx.BaseTransport):
    """A model server that counts how many ask it at once."""

    def __init__(self) -> None:
        self.now = self.most = self.asked = 0
        self._own = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with self._own:
            self.now += 1
            self.asked += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        with self._own:
            self.now -= 1
        return httpx.Response(200, json={"choices": [{"message": {"content": "{}"}}]})


def test_stages_on_one_gpu_never_ask_at_once(tmp_path: Path) -> None:
    lock, server = str(tmp_path / "gpu"), Overlap()
    seeing = [ServerVision(VisionSettings(backend="llama-server"), lock, server) for _ in range(2)]
    thinking = [
        ServerReasoner(ReasoningSettings(backend="openai"), templates.load(), lock, server) for _ in range(2)
    ]
    lines = [Line("45 kVA")]
    work = [
        *(lambda stage=stage: stage.read(PIXELS, Deadline(30)) for stage in seeing),
        *(
            lambda stage=stage: stage.extract(lines, PoleIdContext.NAMEPLATE, Deadline(30))
            for stage in thinking
        ),
    ]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (server.asked, server.most) == (4, 1)


class ReadsByWidth(Reads):
    """A vision stage that finds a nameplate's text everywhere: no utility's plate can be confirmed by it."""

    def read(self, pixels: Pixels, deadline: Deadline) -> Any:
        assert deadline.left() <= 45, "one deadline for all of a photo"
        return super().read(pixels, deadline)


@pytest.mark.parametrize(
    ("pole", "tags"),
    [
        ("P1", ("placa_identificacao",)),
        (None, ("placa_identificacao", "placa_transformador")),
    ],
)
def test_of_a_poles_photo_only_confirmed_plates_are_kept(pole: str | None, tags: tuple[str, ...]) -> None:
    pipeline = Pipeline(
        [Sees(PLATE, UTILITYS)], ReadsByWidth("MEDIDOR", "Wh"), Parser(templates.load()), PlateAuditor()
    )
    reader = PipelineReader(pipeline, Settings(), "1", 45.0)
    assert reader.read(encoded(), pole_id=pole, text_only=False).tags == tags
    assert reader.read(encoded(), pole_id=pole, text_only=True).text is not None


class Sleeps:
    """A reader that takes longer than it may."""

    model = "sleeps"

    def __init__(self, ended: list[int]) -> None:
        self.ended = ended

    def read(self, data: bytes, *, pole_id: str | None, text_only: bool) -> Read:
        until = time.monotonic() + 10
        while not self.ended and time.monotonic() < until:
            time.sleep(0.01)
        return Read({})

    def check(self) -> str:
        return ""


@pytest.mark.parametrize("fault", ["locked", "silent", "silent to the heartbeat"])
def test_a_worker_that_overran_ends_whatever_its_database_does(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    ended: list[int] = []

    def away(*_: Any, **__: Any) -> bool:
        if fault == "locked":
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
        until = time.monotonic() + 5
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
        return False

    store.submit(Kind.ALT, "me", [NewItem("P1", "photo", "h", b"x")])
    monkeypatch.setattr(store, "heartbeat" if "heartbeat" in fault else "put_back", away)
    settings = WorkerSettings(image_timeout_s=0.1, heartbeat_s=0.02, noting_s=0.1)
    started = time.monotonic()
    Worker(store, Sleeps(ended), NoDispatch(), settings, exit_process=ended.append).work_once()
    assert ended == [EXIT_OVERRAN]
    assert time.monotonic() - started < 3
