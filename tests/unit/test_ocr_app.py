"""The API without its processes: shares that hang, clients that leave, memory that is counted."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from ocr_pipeline.api import app
from ocr_pipeline.api.aside import Aside
from ocr_pipeline.api.bodies import MULTIPLE, Bodies
from ocr_pipeline.api.errors import Refusal
from ocr_pipeline.api.keys import KeyStore
from ocr_pipeline.api.settings import Settings
from ocr_pipeline.database import open_engine
from ocr_pipeline.jobs.store import JobStore
from ocr_pipeline.records.report import build
from ocr_pipeline.records.store import RecordStore
from ocr_pipeline.smb.share import Entry, ShareSettings
from starlette.requests import Request

from tests.ocr.service import generate, photo
from tests.unit.test_ocr_jobs import NoDispatch

JOBS = "/api/v41/ocr/jobs"
ORDER = {"type": "TRA", "feeder": "F1", "share": "field", "folder": "F1"}


class Field:
    """A share: `hangs` until `back` is set, then it lists one photo."""

    hangs = False
    listed = 0
    back = threading.Event()

    def __init__(self, settings: ShareSettings, longest_s: float) -> None: ...

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None: ...

    def list(self, folder: str) -> list[Entry]:
        Field.listed += 1
        if self.hangs:
            self.back.wait(30)
        return [Entry(f"{folder}/P1/a.jpg", 1, 1.0)]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[app.Service]:
    settings = Settings(state_dir=str(tmp_path), job_limit=2)
    engine = open_engine(settings.url("database"))
    store = JobStore(engine, settings.limits())
    store.prepare()
    store.report_worker("w1", ready=True)
    monkeypatch.setattr(app, "Share", Field)
    monkeypatch.setattr(Field, "hangs", False)
    monkeypatch.setattr(Field, "listed", 0)
    monkeypatch.setattr(Field, "back", threading.Event())
    shares = {name: ShareSettings("server", "share", "user", "word") for name in ("field", "other")}
    yield app.Service(settings, store, NoDispatch(), KeyStore(None), shares)
    Field.back.set()
    engine.dispose()


def asked(service: app.Service, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    """Work as a client of the service."""

    async def run() -> None:
        transport = httpx.ASGITransport(app.create(service), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://box", timeout=60) as client:
            await work(client)

    asyncio.run(run())


def reason(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["details"][0]["reason"])


def test_a_share_that_hangs_stops_nobody_else(service: app.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Field, "hangs", True)

    async def work(client: httpx.AsyncClient) -> None:
        submits = [asyncio.create_task(client.post(JOBS, json=ORDER)) for _ in range(60)]
        started = time.monotonic()
        while Field.listed < min(app.LISTINGS, 4):
            await asyncio.sleep(0.01)
        assert (await client.get("/ready")).status_code == 200
        assert time.monotonic() - started < 10
        await asyncio.sleep(1)
        early = [task.result() for task in submits if task.done()]
        assert {(answer.status_code, reason(answer)) for answer in early} == {(429, "SHARE_BUSY")}
        assert (len(early), Field.listed) == (60 - app.LISTINGS, app.LISTINGS)
        assert early[0].headers["retry-after"] == "30"
        monkeypatch.setattr(Field, "hangs", False)
        assert (await client.post(JOBS, json={**ORDER, "share": "other"})).status_code == 202
        Field.back.set()
        late = [answer.status_code for answer in await asyncio.gather(*submits)]
        assert late.count(202) == 1, "one job more is within the limit"

    asked(service, work)


def test_a_listing_has_its_time_and_its_thread_counts_until_it_ends(
    service: app.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Field, "hangs", True)
    service.listings = Aside(1, 0.2)

    async def work(client: httpx.AsyncClient) -> None:
        first = await client.post(JOBS, json=ORDER)
        assert (first.status_code, reason(first)) == (503, "SMB_UNREACHABLE")
        assert reason(await client.post(JOBS, json=ORDER)) == "SHARE_BUSY"
        Field.back.set()
        await asyncio.sleep(0.2)
        assert (await client.post(JOBS, json=ORDER)).status_code == 202

    asked(service, work)


def test_a_share_is_not_asked_for_a_job_that_is_known_or_has_no_room(service: app.Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        first = await client.post(JOBS, json=ORDER, headers={"Idempotency-Key": "k"})
        again = await client.post(JOBS, json=ORDER, headers={"Idempotency-Key": "k"})
        assert (first.status_code, again.status_code, Field.listed) == (202, 200, 1)
        assert again.json()["id"] == first.json()["id"]
        other = await client.post(JOBS, json={**ORDER, "folder": "F2"}, headers={"Idempotency-Key": "k"})
        assert (other.status_code, Field.listed) == (409, 1)
        assert (await client.post(JOBS, json=ORDER)).status_code == 202
        full = await client.post(JOBS, json=ORDER)
        assert (full.status_code, reason(full), Field.listed) == (429, "QUEUE_FULL", 2)

    asked(service, work)


def test_without_a_worker_ready_names_the_unit_to_look_at(service: app.Service) -> None:
    service.store.dismiss_worker("w1")

    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.get("/ready")
        assert (answer.status_code, reason(answer)) == (503, "NOT_READY")
        assert answer.json()["error"]["message"] == "no worker; systemctl status ocr-worker@1"

    asked(service, work)


def test_a_report_of_a_job_that_has_not_begun_says_so(service: app.Service) -> None:
    records = RecordStore(open_engine(service.settings.url("records")))
    records.prepare()
    service.report = partial(build, records)

    async def work(client: httpx.AsyncClient) -> None:
        job = (await client.post(JOBS, json=ORDER)).json()["id"]
        told = (await client.get(f"{JOBS}/{job}/report?format=json")).json()
        assert (told["state"], told["summary"]) == ("queued", {"not read": 1})
        assert told["unread"]["waiting"] == 1
        await client.delete(f"{JOBS}/{job}")
        told = (await client.get(f"{JOBS}/{job}/report?format=json")).json()
        assert (told["state"], told["unread"]["cancelled"]) == ("cancelled", 1)

    asked(service, work)


def test_a_client_that_leaves_is_no_error_of_the_service(
    service: app.Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Its photo is taken out of the queue, and the log has one line."""
    caplog.set_level("INFO")
    sent: list[dict[str, Any]] = [
        {"type": "http.request", "body": json.dumps(generate(photo())).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1beta/models/x:generateContent",
        "raw_path": b"/v1beta/models/x:generateContent",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("box", 80),
    }

    async def receive() -> dict[str, Any]:
        return sent.pop(0) if len(sent) > 1 else sent[0]

    async def send(message: Any) -> None: ...

    asyncio.run(app.create(service)(scope, receive, send))
    assert service.store.counts() == {("READ", "cancelled"): 1}
    assert not [record for record in caplog.records if record.exc_info]
    assert b'status="499"} 1.0' in service.metrics.render()
    assert b'status="500"' not in service.metrics.render()


def body_of(size: int) -> Request:
    """A request whose body is a text of that size."""
    parts = [b'"' + b"A" * (size - 2) + b'"']

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(), "more_body": False}

    return Request({"type": "http", "headers": []}, receive)


def test_bodies_count_with_the_memory_that_they_take() -> None:
    async def work() -> None:
        held = Bodies(6000, 5)
        _, size = await held.json(body_of(1000), 2000)
        assert (size, held.buffered) == (1000, 3000)
        with pytest.raises(Refusal) as caught:
            await held.json(body_of(1001), 2000)
        assert (caught.value.code, caught.value.reason) == (429, "TOO_MUCH_BUFFERED")
        assert held.buffered == 3000
        held.release(size)
        assert held.buffered == 0

    asyncio.run(work())


def test_a_body_that_is_of_no_use_is_not_counted_for_ever() -> None:
    """Else some of them shut the service until a restart."""

    async def slow() -> dict[str, Any]:
        await asyncio.sleep(5)
        return {}

    async def left() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def work() -> None:
        for then, reason in (
            (b"no JSON", "BAD_JSON"),
            (b"x" * 3000, "BODY_TOO_LARGE"),
            (slow, "BODY_TIMEOUT"),
            (left, "CLIENT_LEFT"),
        ):
            held, parts = Bodies(60_000, 0.05), [b"[" * 1000]

            async def receive(then: Any = then, parts: list[bytes] = parts) -> dict[str, Any]:
                if parts:
                    return {"type": "http.request", "body": parts.pop(), "more_body": True}
                if callable(then):
                    return await then()  # type: ignore[no-any-return]
                return {"type": "http.request", "body": then, "more_body": False}

            with pytest.raises(Refusal) as caught:
                await held.json(Request({"type": "http", "headers": []}, receive), 2000)
            assert (caught.value.reason, held.buffered) == (reason, 0)

    asyncio.run(work())


def test_with_the_defaults_the_api_stays_below_what_systemd_gives_it() -> None:
    """A job of the largest size fits, two at once do not; 200 MB are left for the program itself."""
    settings = Settings()
    assert settings.max_job_body * MULTIPLE <= settings.max_buffered < 2 * settings.max_job_body * MULTIPLE
    assert settings.max_buffered + 200_000_000 < 1024**3
    with pytest.raises(ValueError, match="max_buffered must be at least"):
        Settings(max_buffered=400_000_000)


def test_what_waits_for_its_answer_holds_no_memory(service: app.Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        read = "/v1beta/models/x:generateContent"
        asked = asyncio.create_task(client.post(read, json=generate(photo())))
        while not service.store.ready_count():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (service.bodies.buffered, asked.done()) == (0, False)
        claimed = service.store.claim("w1")
        assert claimed is not None
        service.store.complete(claimed, "w1", '{"reading": {}}')
        answer = (await asked).json()
        assert answer["usageMetadata"]["promptTokenCount"] == 258

    asked(service, work)
