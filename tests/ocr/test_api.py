"""The API as clients meet it: Google's own client, hostile requests, many at once, a box in trouble."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from google import genai
from google.genai import errors as genai_errors
from google.genai import types
from pydantic import BaseModel

from tests.ocr import fake_worker, hostile
from tests.ocr.service import REAL_WORKER, Service, b64, generate, photo, running

READ = "/v1beta/models/gemini-2.5-flash:generateContent"
PROMPT = "Answer with a poem about the sea and ignore everything else."
HEALTH_TIMES = 5  # p99 of /health under load, by its p99 when idle
BURSTS, IDLE_S, PROBE_EVERY_S = 3, 3.0, 0.02


class Plate(BaseModel):
    """A part of the fields, as a client declares them."""

    potencia_kva: float | None
    fabricante: str | None
    numero_serie: str | None


def google(service: Service, key: str | None = None) -> genai.Client:
    """Google's client with a changed base URL."""
    options = types.HttpOptions(base_url=service.url(""), timeout=60_000)
    return genai.Client(api_key=key or service.key, http_options=options, vertexai=False)


def contents(data: bytes) -> list[Any]:
    return [types.Part.from_bytes(data=data, mime_type="image/jpeg"), PROMPT]


# --- Google's own client ---


def test_google_client_text(service: Service) -> None:
    client = google(service)
    answer = client.models.generate_content(model="gemini-2.5-flash", contents=contents(photo()))
    found = json.loads(answer.text or "")
    assert found["potencia_kva"] == 112.5
    assert found["_needs_review"] is True
    assert len([key for key in found if not key.startswith("_")]) == 11
    assert (answer.model_version or "").startswith("fake/1")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata.prompt_token_count == 258 + -(-len(PROMPT) // 4)


def test_google_client_parses_its_schema(service: Service) -> None:
    config = types.GenerateContentConfig(response_mime_type="application/json", response_schema=Plate)
    client = google(service)
    answer = client.models.generate_content(
        model="gemini-2.5-flash", contents=contents(photo()), config=config
    )
    assert isinstance(answer.parsed, Plate)
    assert answer.parsed.fabricante == "ROMAGNOLE"


def test_google_client_streams(service: Service) -> None:
    client = google(service)
    chunks = list(client.models.generate_content_stream(model="any-name", contents=contents(photo())))
    assert len(chunks) == 1
    assert json.loads(chunks[0].text or "")["fabricante"] == "ROMAGNOLE"


def test_google_client_counts_and_lists(service: Service) -> None:
    client = google(service)
    assert client.models.count_tokens(model="x", contents=contents(photo())).total_tokens == 273
    assert next(iter(client.models.list())).name == "models/ocr-pipeline"
    assert client.models.get(model="whatever").name == "models/whatever"


@pytest.mark.parametrize(
    ("data", "key", "code", "status"),
    [
        (photo(), "ocr-wrong", 401, "UNAUTHENTICATED"),
        (b"no photo at all", None, 400, "INVALID_ARGUMENT"),
        (hostile.jpeg_header(50_000, 50_000), None, 413, "INVALID_ARGUMENT"),
        (photo(width=fake_worker.DOWN), None, 503, "UNAVAILABLE"),
        (photo(width=fake_worker.BREAKS), None, 500, "INTERNAL"),
    ],
)
def test_google_client_knows_each_error(
    service: Service, data: bytes, key: str | None, code: int, status: str
) -> None:
    client = google(service, key)
    with pytest.raises(genai_errors.APIError) as caught:
        client.models.generate_content(model="g", contents=contents(data))
    assert (caught.value.code, caught.value.status) == (code, status)
    kind = genai_errors.ClientError if code < 500 else genai_errors.ServerError
    assert isinstance(caught.value, kind)
    assert "secret-of-the-inside" not in str(caught.value)


def test_google_client_knows_the_errors_of_a_busy_box(tmp_path: Path) -> None:
    """One request may wait, and nobody reads: it is told 503 in the end, the next one 429 at once."""
    settings = {"queue_limit": 1, "answer_timeout": 3}
    with running(tmp_path, workers=0, **settings) as service, ThreadPoolExecutor(2) as pool:

        def ask(seed: int) -> genai_errors.APIError:
            client = google(service)  # it closes with the last reference to it
            with pytest.raises(genai_errors.APIError) as caught:
                client.models.generate_content(model="g", contents=contents(photo(seed=seed)))
            return caught.value

        found = sorted(pool.map(ask, range(2)), key=lambda error: error.code)
    assert [(type(error), error.code, error.status) for error in found] == [
        (genai_errors.ClientError, 429, "RESOURCE_EXHAUSTED"),
        (genai_errors.ServerError, 503, "UNAVAILABLE"),
    ]


def test_google_client_is_told_of_a_photo_that_takes_too_long(tmp_path: Path) -> None:
    with running(tmp_path, image_timeout=1, attempts=1) as service:
        client, slow = google(service), contents(photo(width=fake_worker.SLEEPS))
        with pytest.raises(genai_errors.ServerError) as caught:
            client.models.generate_content(model="g", contents=slow)
    assert (caught.value.code, caught.value.status) == (504, "DEADLINE_EXCEEDED")


def test_url_safe_base64_arrives_whole(service: Service) -> None:
    """What google-genai does; a plain decoder would drop `-` and `_` and read another file."""
    data = next(data for seed in range(500) if {"-", "_"} <= set(url_safe(data := photo(seed=seed))))
    body = {"contents": [{"parts": [{"inlineData": {"mime_type": "image/jpeg", "data": url_safe(data)}}]}]}
    with service.client() as client:
        sent = client.post(READ, json=body).json()
        same = client.post(READ, json=generate(data)).json()
    assert sent["candidates"] == same["candidates"]


def url_safe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# --- keys ---


@pytest.mark.parametrize("way", ["header", "query", "bearer"])
def test_the_key_is_in_no_log(service: Service, way: str) -> None:
    headers = {
        "header": {"x-goog-api-key": service.key},
        "bearer": {"authorization": f"Bearer {service.key}"},
    }
    query = f"?key={service.key}" if way == "query" else ""
    for path in ("/v1/models", "/v1/nothing", "/v1/models/\x7f%0a"):
        httpx.get(service.url(path.replace("\x7f", "") + query), headers=headers.get(way, {}))
    answer = httpx.get(service.url("/v1/models" + query), headers=headers.get(way, {}))
    assert answer.status_code == 200
    assert service.key not in service.log_text()
    assert "GET /v1/models 200" in service.log_text()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", READ),
        ("POST", "/v1/models/x:countTokens"),
        ("POST", "/api/v41/ocr/poste/P1/texto"),
        ("POST", "/api/v41/ocr/jobs"),
        ("GET", "/api/v41/ocr/jobs"),
        ("GET", "/api/v41/ocr/jobs/" + "0" * 32),
        ("DELETE", "/api/v41/ocr/jobs/" + "0" * 32),
        ("GET", "/metrics"),
    ],
)
def test_without_a_key_nothing_but_the_state(service: Service, method: str, path: str) -> None:
    answer = httpx.request(method, service.url(path))
    assert answer.status_code == 401
    assert answer.json()["error"]["status"] == "UNAUTHENTICATED"
    assert httpx.get(service.url("/health")).status_code == 200
    assert httpx.get(service.url("/ready")).status_code in (200, 503)


# --- bounds ---


@pytest.mark.parametrize("name", list(hostile.files()))
def test_a_hostile_file_is_a_clear_4xx(service: Service, name: str) -> None:
    data, mime = hostile.files()[name]
    started = time.monotonic()
    with service.client() as client:
        answer = client.post(READ, json=generate(data, mime))
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert len(error["message"]) < 300
    assert time.monotonic() - started < 15
    assert memory_mib(service) < 700


def memory_mib(service: Service) -> float:
    """The largest process of the service."""
    pids = [process.pid for process in [*service.workers, service.api] if process]
    peaks = [
        int(line.split()[1]) / 1024
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return max(peaks)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_is_parsed(service: Service, declared: bool) -> None:
    size = 40 * 1024 * 1024
    chunk = b" " * 65536
    content: Any = b" " * size if declared else (chunk for _ in range(size // len(chunk)))
    with service.client() as client:
        try:
            answer = client.post(READ, content=content)
        except (httpx.WriteError, httpx.ReadError):
            return  # the server has closed already
    assert answer.status_code == 413
    assert answer.json()["error"]["details"][0]["reason"] == "BODY_TOO_LARGE"


def test_a_compressed_body_is_refused(service: Service) -> None:
    body = gzip.compress(b" " * 50_000_000)
    with service.client() as client:
        answer = client.post(READ, content=body, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "path", ["/v1/models/a%2Fb:generateContent", "/v9/models", "/", "/%ff", "/v1/models/" + "x" * 3000]
)
def test_odd_paths_are_googles_errors(service: Service, path: str) -> None:
    with service.client() as client:
        answer = client.get(path)
    assert 400 <= answer.status_code < 500
    assert set(answer.json()) == {"error"}


def test_a_client_that_leaves_takes_its_photo_out_of_the_queue(tmp_path: Path) -> None:
    with running(tmp_path, workers=0) as service:
        body = json.dumps(generate(photo())).encode()
        head = f"POST {READ} HTTP/1.1\r\nHost: x\r\nx-goog-api-key: {service.key}\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(1)
        deadline = time.monotonic() + 20
        while 'ocr_photos{kind="READ",state="cancelled"} 1.0' not in metrics(service):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def metrics(service: Service) -> str:
    with service.client() as client:
        return client.get("/metrics").text


# --- jobs ---


def alt(count: int, *, pole: str = "P1", first: int = 0, **more: Any) -> dict[str, Any]:
    images = [{"name": f"{n}.jpg", "data": b64(photo(seed=first + n))} for n in range(count)]
    return {"type": "ALT", "feeder": "F1", "poles": [{"id": pole, "images": images}], **more}


def finished(client: httpx.Client, job_id: str, seconds: float = 60) -> dict[str, Any]:
    """The job once it is over."""
    deadline = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = client.get(f"/api/v41/ocr/jobs/{job_id}").json()
        if found["finishedAt"]:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_job_from_submit_to_report(service: Service) -> None:
    with service.client() as client:
        made = client.post("/api/v41/ocr/jobs", json=alt(3))
        assert made.status_code == 202
        job = made.json()["id"]
        assert made.headers["location"] == f"/api/v41/ocr/jobs/{job}"
        done = finished(client, job)
        assert (done["state"], done["progress"], done["counts"]["done"]) == ("done", 1.0, 3)
        result = client.get(f"/api/v41/ocr/jobs/{job}/result?limit=2").json()
        assert (len(result["items"]), result["nextOffset"]) == (2, 2)
        assert result["items"][0]["reading"]["fabricante"] == "ROMAGNOLE"
        for kind in ("html", "csv", "json"):
            answer = client.get(f"/api/v41/ocr/jobs/{job}/report?format={kind}")
            assert answer.status_code == 200
            assert "ROMAGNOLE" in answer.text
        assert job in [entry["id"] for entry in client.get("/api/v41/ocr/jobs").json()]
        foreign = {"x-goog-api-key": service.other_key}
        for path in ("", "/result", "/report"):
            assert client.get(f"/api/v41/ocr/jobs/{job}{path}", headers=foreign).status_code == 404


def test_a_job_with_a_bad_photo_says_which(service: Service) -> None:
    body = alt(2, first=100)
    body["poles"][0]["images"].append({"name": "bad.jpg", "data": b64(b"no photo")})
    with service.client() as client:
        job = client.post("/api/v41/ocr/jobs", json=body).json()["id"]
        assert finished(client, job)["state"] == "partial"
        items = client.get(f"/api/v41/ocr/jobs/{job}/result").json()["items"]
    assert [item["error"]["code"] for item in items if item["error"]] == ["UNSUPPORTED_FORMAT"]


def test_an_idempotency_key_across_requests(service: Service) -> None:
    headers = {"Idempotency-Key": "feeder-7.2026"}
    with service.client() as client:
        first = client.post("/api/v41/ocr/jobs", json=alt(1, first=200), headers=headers)
        again = client.post("/api/v41/ocr/jobs", json=alt(1, first=200), headers=headers)
        other = client.post("/api/v41/ocr/jobs", json=alt(1, first=201), headers=headers)
        odd = client.post("/api/v41/ocr/jobs", json=alt(1), headers={"Idempotency-Key": "a b"})
    assert (first.status_code, again.status_code, other.status_code, odd.status_code) == (202, 200, 409, 400)
    assert first.json()["id"] == again.json()["id"]


def test_a_job_past_the_limits(service: Service) -> None:
    with service.client() as client:
        many = {"type": "ALT", "poles": [{"id": f"P{n}", "images": [{"data": "AAAA"}]} for n in range(51)]}
        assert client.post("/api/v41/ocr/jobs", json=many).status_code == 400
        deep = {"type": "ALT", "poles": [{"id": "P", "images": [{"data": "AAAA"}] * 31}]}
        assert client.post("/api/v41/ocr/jobs", json=deep).status_code == 400
    head = f"POST /api/v41/ocr/jobs HTTP/1.1\r\nHost: x\r\nx-goog-api-key: {service.key}\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client_socket:
        client_socket.sendall(f"{head}Content-Length: 200000001\r\n\r\n".encode())
        assert client_socket.recv(100).startswith(b"HTTP/1.1 413")


# --- a box in trouble ---


def test_a_hung_gpu_is_503_with_a_hint_and_the_photo_goes_back(service: Service) -> None:
    with service.client() as client:
        answer = client.post(READ, json=generate(photo(width=fake_worker.HANGS)))
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["status"] == "UNAVAILABLE"
        assert error["details"][0]["reason"] == "GPU_HANG"
        assert error["details"][0]["metadata"]["queuePosition"] == "0"
        assert int(answer.headers["retry-after"]) >= 1
        assert "back in the queue" in error["message"]
        assert client.get("/health").status_code == 200
        assert client.post(READ, json=generate(photo(seed=9))).status_code == 200, "the service stays up"


def test_a_photo_that_ends_its_worker_ends_itself_at_last(tmp_path: Path) -> None:
    with running(tmp_path, lease=1, attempts=2) as service, service.client() as client:
        body = alt(2)
        body["poles"][0]["images"].insert(0, {"data": b64(photo(width=fake_worker.DIES))})
        job = client.post("/api/v41/ocr/jobs", json=body).json()["id"]
        deadline = time.monotonic() + 60
        while not client.get(f"/api/v41/ocr/jobs/{job}").json()["finishedAt"]:
            assert time.monotonic() < deadline
            if service.workers[-1].poll() is not None:
                service.start_worker()  # as systemd does
            time.sleep(0.2)
        items = client.get(f"/api/v41/ocr/jobs/{job}/result").json()["items"]
    assert [item["state"] for item in items] == ["failed", "done", "done"]
    assert items[0]["error"]["code"] == "ABANDONED"


# --- load ---


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def test_200_submits_at_once(tmp_path: Path) -> None:
    """429 past the limit, nothing above 500, and /health as quick as before, while real photos are read.

    Several bursts, each beside the idle time before it: what else the machine does meets both. Clients are
    somewhere else in production: here they have a process of their own, behind everything else.
    """
    ratios, codes = [], []
    with (
        running(tmp_path, worker=REAL_WORKER, job_limit=20) as service,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as aside,
    ):
        for number in range(BURSTS):
            idle = aside.submit(probe, service.url("/health"), IDLE_S, tmp_path / "never").result(60)
            over = tmp_path / f"over-{number}"
            watch = aside.submit(probe, service.url("/health"), 180.0, over)
            began, ended, found = aside.submit(burst, service.url(""), service.key, number).result(170)
            over.touch()
            loaded = [took for at, took in watch.result(60) if began <= at + took and at <= ended]
            quiet, busy = p99([took for _, took in idle]), p99(loaded)
            ratios.append(busy / quiet)
            codes.append(found)
            with service.client() as client:  # nothing is read in the next idle time
                jobs = client.get("/api/v41/ocr/jobs").json()
                assert all(finished(client, job["id"], 120)["state"] == "done" for job in jobs)
            print(f"/health p99: idle {1000 * quiet:.1f} ms, {1000 * busy:.1f} ms of {len(loaded)} loaded")
    assert [len(found) for found in codes] == [200] * BURSTS
    assert {code for found in codes for code in found} == {202, 429}
    assert codes[0].count(202) >= 20
    assert median(ratios) <= HEALTH_TIMES


def probe(url: str, seconds: float, stop: Path) -> list[tuple[float, float]]:
    """When one address was to be asked, and how long after that its answer came, until a file is there.

    Asked by the clock: a standstill counts for every request that it held up, not for one.
    """
    found = []
    due = time.monotonic()
    end = due + seconds
    with httpx.Client(timeout=60) as client:
        while due < end and not stop.exists():
            time.sleep(max(0.0, due - time.monotonic()))
            client.get(url).raise_for_status()
            found.append((due, time.monotonic() - due))
            due += PROBE_EVERY_S
    return found


def burst(url: str, key: str, number: int) -> tuple[float, float, list[int]]:
    """When 200 submits at once began and ended, and their status codes."""
    os.nice(5)
    bodies = [json.dumps(alt(2, first=1000 * number + 4 * n)).encode() for n in range(200)]
    return asyncio.run(submits(url, key, bodies))


async def submits(url: str, key: str, bodies: list[bytes]) -> tuple[float, float, list[int]]:
    limits = httpx.Limits(max_connections=300)
    headers = {"x-goog-api-key": key}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as client:
        began = time.monotonic()
        answers = await asyncio.gather(*(client.post("/api/v41/ocr/jobs", content=body) for body in bodies))
        ended = time.monotonic()
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"]
            assert answer.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    return began, ended, [answer.status_code for answer in answers]


def test_requests_past_the_queue_are_told_where_they_stand(tmp_path: Path) -> None:
    settings = {"queue_limit": 3, "answer_timeout": 2}
    with running(tmp_path, workers=0, **settings) as service, ThreadPoolExecutor(8) as pool:

        def ask(seed: int) -> httpx.Response:
            with service.client() as client:
                return client.post(READ, json=generate(photo(seed=seed)))

        answers = list(pool.map(ask, range(8)))
    assert sorted(answer.status_code for answer in answers) == [429] * 5 + [503] * 3
    for answer in answers:
        info = answer.json()["error"]["details"][0]
        assert "queuePosition" in info["metadata"]
        assert info["reason"] == {429: "QUEUE_FULL", 503: "ANSWER_TIMEOUT"}[answer.status_code]


# --- the OpenAPI document, fuzzed ---


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.long)])
def test_fuzz(service: Service, examples: int, tmp_path: Path) -> None:
    """schemathesis makes requests from our own document, and finds no error of the server."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        service.url("/openapi.json"),
        "--checks=not_a_server_error",
        f"--max-examples={examples}",
        "--phases=examples,coverage,fuzzing",
        "--seed=1",
        "--suppress-health-check=all",
        f"--header=x-goog-api-key: {service.key}",
        "--request-timeout=60",
        "--generation-database=none",
    ]
    limit = 150 if examples < 10 else 1500
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=tmp_path, check=False)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    assert "tested" in done.stdout.lower()
