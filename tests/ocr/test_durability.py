"""kill -9 at random moments: every photo in exactly one final state, none twice, none lost. On real
backends."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from ocr_pipeline.database import open_engine, reading
from ocr_pipeline.jobs.dispatch import HueyDispatch
from ocr_pipeline.jobs.store import JobStore, Limits, NewItem
from ocr_pipeline.jobs.tables import Item, Job, JobState, Kind, State
from ocr_pipeline.records.tables import Reading
from ocr_pipeline.synthetic.scene import sample
from PIL import Image
from sqlalchemy import Engine, delete, event, func, select, text, update

from tests.ocr import servers
from tests.ocr.hostile import saved
from tests.ocr.service import FAKE_WORKER, REAL_WORKER, Service, b64, photo

SEED = 20261128
FINAL = {"done", "failed", "cancelled"}


def kill(process: Any) -> None:
    """At once, without a word."""
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def submit(service: Service, body: dict[str, Any], key: str) -> str:
    """Submit, again and again with the same idempotency key, as a client does that gets no answer."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with service.client() as client:
                answer = client.post("/api/v41/ocr/jobs", json=body, headers={"Idempotency-Key": key})
        except httpx.HTTPError:
            revive(service)
        else:
            if answer.status_code in (200, 202):
                return str(answer.json()["id"])
            assert answer.status_code in (429, 503), answer.text
        assert time.monotonic() < deadline
        time.sleep(0.2)


def revive(service: Service) -> None:
    """What systemd does."""
    if service.api is None or service.api.poll() is not None:
        service.start_api()
    if not service.workers or service.workers[-1].poll() is not None:
        service.start_worker()


def settle(service: Service, job: str) -> list[dict[str, Any]]:
    """The job's photos once it is over."""
    deadline = time.monotonic() + 1200
    while True:
        revive(service)
        try:
            with service.client() as client:
                if client.get(f"/api/v41/ocr/jobs/{job}").json()["finishedAt"]:
                    items: list[dict[str, Any]] = client.get(f"/api/v41/ocr/jobs/{job}/result").json()[
                        "items"
                    ]
                    return items
        except httpx.HTTPError:
            continue
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_for_progress(service: Service, job: str) -> None:
    """Until one more photo of the job is over, if any is left."""
    with service.client() as client:

        def over() -> float:
            return float(client.get(f"/api/v41/ocr/jobs/{job}").json()["progress"])

        before = over()
        servers.wait_for(lambda: over() > before or before >= 1, "the next photo", 120)


def small(seed: int) -> bytes:
    """A photo for the stand-in of the pipeline."""
    return photo(seed=seed)


@cache
def plate(number: int) -> bytes:
    """A nameplate that the real pipeline reads in a second."""
    picture = Image.fromarray(sample(number, "easy").pixels)
    picture.thumbnail((900, 900))
    return saved(picture, "JPEG")


def real(seed: int) -> bytes:
    """One of ten plates; no two photos have the same bytes."""
    return plate(6000 + seed % 10) + seed.to_bytes(4, "big")


def order(
    kind: str, count: int, samba: servers.Samba | None, make: Callable[[int], bytes] = small
) -> dict[str, Any]:
    """A job of `count` photos on 10 poles."""
    if kind == "ALT":
        poles = [
            {"id": f"P{p}", "images": [{"data": b64(make(p * 1000 + n))} for n in range(count // 10)]}
            for p in range(10)
        ]
        return {"type": "ALT", "feeder": "F", "poles": poles}
    assert samba is not None
    for p in range(10):
        folder = samba.photos / f"F/P{p}"
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(count // 10):
            (folder / f"{n}.jpg").write_bytes(make(p * 1000 + n))
    return {"type": "TRA", "feeder": "F", "share": "field", "folder": "F"}


def shares_file(folder: Path, samba: servers.Samba) -> str:
    """What the role renders."""
    entry = {
        "server": "127.0.0.1",
        "share": "photos",
        "username": samba.user,
        "password": samba.password,
        "port": samba.port,
        "timeout_s": 3,
    }
    path = folder / "shares.json"
    locked = {**entry, "password": "not-the-password"}
    path.write_text(json.dumps({"version": 1, "shares": {"field": entry, "locked": locked}}))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "count", "kills", "pipeline"),
    [
        ("ALT", 30, 4, "fake"),
        ("TRA", 30, 4, "fake"),
        pytest.param("ALT", 100, 30, "fake", marks=pytest.mark.long),
        pytest.param("TRA", 100, 30, "fake", marks=pytest.mark.long),
        pytest.param("ALT", 100, 30, "real", marks=pytest.mark.long),
        pytest.param("TRA", 100, 30, "real", marks=pytest.mark.long),
    ],
)
def test_kill_9(
    kind: str, count: int, kills: int, pipeline: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With a stand-in for the pipeline kills hit what is around it, with the real one mostly itself."""
    samba = request.getfixturevalue("samba") if kind == "TRA" else None
    more = {"shares_file": shares_file(tmp_path, samba)} if samba else {}
    folder = tmp_path / "service"
    folder.mkdir()
    make, worker, longest_s, lease = (
        (small, FAKE_WORKER, 1.2, 1) if pipeline == "fake" else (real, REAL_WORKER, 3.0, 5)
    )
    service = Service(
        folder,
        environment={"FAKE_SECONDS": "0.05"},
        worker=worker,
        lease=lease,
        attempts=20,
        job_limit=4,
        **more,
    )
    chance = random.Random(f"{SEED} {kind} {count}")  # noqa: S311 - moments of a test
    body = order(kind, count, samba, make)
    try:
        revive(service)
        kill(service.api if chance.random() < 0.5 else None)  # before the submit is answered
        job = submit(service, body, "once")
        for _ in range(kills):
            if pipeline == "real":  # which needs seconds to start: it is to be killed while it reads
                wait_for_progress(service, job)
            time.sleep(chance.uniform(0.0, longest_s))
            which = chance.randrange(1, 4)
            victims: list[Any] = [service.api] if which & 1 else []
            victims += service.workers[-1:] if which & 2 else []
            for victim in victims:
                kill(victim)
            revive(service)
        assert submit(service, body, "once") == job, "the same key is the same job"
        items = settle(service, job)
    finally:
        service.stop()
    assert {item["state"] for item in items} == {"done"}
    assert len(items) == count, "nothing lost"
    assert len({(item["pole"], item["imageSha256"]) for item in items}) == count, "nothing twice"
    records = open_engine(f"sqlite:///{folder}/state/records.sqlite3")
    with reading(records) as connection:
        assert connection.scalar(select(func.count()).select_from(Reading)) == count
    records.dispose()
    store = JobStore(open_engine(f"sqlite:///{folder}/state/jobs.sqlite3"), Limits())
    assert {state for _, state in store.counts()} <= FINAL


def test_a_message_that_is_lost_loses_nothing(tmp_path: Path) -> None:
    """The queue is emptied behind everybody's back: the job tables know what waits."""
    service = Service(tmp_path)
    try:
        service.start_api()
        job = submit(service, order("ALT", 10, None), "k")
        for file in (tmp_path / "state").glob("queue.sqlite3*"):
            file.unlink()
        assert {item["state"] for item in settle(service, job)} == {"done"}
    finally:
        service.stop()


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_huey_carries_the_wakes(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("redis_url") if kind == "redis" else f"sqlite:///{tmp_path}/q.sqlite3"
    sender, receiver = HueyDispatch(url), HueyDispatch(url)
    assert not receiver.wait(0.1)
    sender.wake(3)
    assert receiver.pending() == 3
    assert [receiver.wait(5) for _ in range(3)] == [True] * 3
    assert not receiver.wait(0.1)


def test_no_message_can_make_a_worker_run_anything(redis_url: str) -> None:
    """Huey's own messages are pickles; ours are JSON."""
    import pickle

    import redis

    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was loaded",))

    dispatch = HueyDispatch(redis_url)
    redis.Redis.from_url(redis_url).lpush("huey.redis.ocr", pickle.dumps(Bomb()))
    assert not dispatch.wait(0.2)
    dispatch.wake(1)
    assert dispatch.wait(5)


def test_a_queue_that_is_away_stops_nobody(tmp_path: Path) -> None:
    """Redis is gone: jobs are taken in, and workers find them by themselves."""
    service = Service(tmp_path, queue=f"redis://127.0.0.1:{servers.free_port()}/0")
    try:
        revive(service)
        job = submit(service, order("ALT", 10, None), "k")
        assert {item["state"] for item in settle(service, job)} == {"done"}
    finally:
        service.stop()


def test_several_boxes_share_redis_and_postgresql(
    tmp_path: Path, redis_url: str, postgresql_url: str
) -> None:
    """Two workers, one of them killed on the way; jobs and records in one PostgreSQL."""
    service = Service(
        tmp_path,
        environment={"FAKE_SECONDS": "0.05"},
        queue=redis_url,
        database=postgresql_url,
        records=postgresql_url,
        lease=1,
    )
    try:
        service.start_api()
        service.start_worker()
        service.start_worker()
        service.wait_ready()
        job = submit(service, order("ALT", 60, None), "k")
        time.sleep(0.5)
        kill(service.workers[0])
        items = settle(service, job)
        with service.client() as client:
            assert client.get(f"/api/v41/ocr/jobs/{job}/report?format=csv").status_code == 200
    finally:
        service.stop()
    assert len(items) == len({(item["pole"], item["imageSha256"]) for item in items}) == 60
    assert {item["state"] for item in items} == {"done"}
    engine = open_engine(postgresql_url)
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(Reading)) == 60
    engine.dispose()


@pytest.mark.parametrize("first", ["submit", "settle"])
def test_a_photo_that_is_sent_again_as_its_job_ends_is_not_lost(postgresql_url: str, first: str) -> None:
    """Two transactions that overlap: one job needs the bytes, the other one drops them."""
    engine = open_engine(postgresql_url)
    store = JobStore(engine, Limits())
    store.prepare()
    sha256 = ("1" if first == "submit" else "2") * 64
    sent = [NewItem("", "photo", sha256, b"bytes")]
    done = store.submit(Kind.READ, "me", sent)
    claimed = store.claim("w1")
    assert claimed is not None
    again = Job(id="3" * 31 + sha256[0], kind="READ", state=JobState.QUEUED.value, owner="me", created_at=1.0)
    again.feeder = again.share = again.fingerprint = ""
    try:
        if first == "submit":
            other = threading.Thread(target=store.complete, args=(claimed, "w1", "{}"))
            with engine.begin() as connection:
                store._insert(connection, again, sent)
                other.start()
                other.join(1)
        else:
            other = threading.Thread(target=store.submit, args=(Kind.READ, "me", sent))
            with engine.begin() as connection:
                values = {"state": State.DONE.value}
                connection.execute(update(Item).where(Item.id == claimed.item_id).values(values))
                store._settle(connection, done.job_id)
                other.start()
                other.join(1)
        other.join(30)
        assert store.photo(sha256) == b"bytes"
        left = store.claim("w2")
        assert left is not None
        assert store.complete(left, "w2", "{}")
        assert store.photo(sha256) is None
    finally:
        engine.dispose()


@pytest.fixture
def boxes(postgresql_url: str) -> Iterator[list[Engine]]:
    """Three boxes' ways to one empty PostgreSQL."""
    engines = [open_engine(postgresql_url) for _ in range(3)]
    JobStore(engines[0], Limits()).prepare()
    with engines[0].begin() as connection:
        connection.execute(delete(Item))
        connection.execute(delete(Job))
    yield engines
    for engine in engines:
        engine.dispose()


def one_waits(engine: Engine) -> bool:
    """Whether somebody waits for a lock of somebody else."""
    with reading(engine) as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


def test_a_job_is_cancelled_as_it_is_claimed(boxes: list[Engine]) -> None:
    """Both want the job and its photo; neither waits for what the other has while it has what that wants."""
    claims, cancels, looks = boxes
    worker, client = JobStore(claims, Limits()), JobStore(cancels, Limits())
    job = client.submit(Kind.READ, "me", [NewItem("", "photo", "4" * 64, b"x")]).job_id
    half_way = threading.Event()
    wrong: list[str] = []
    for engine in (claims, cancels):
        event.listen(engine, "handle_error", lambda context: wrong.append(str(context.original_exception)))

    def hold(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE jobs") and not half_way.is_set():
            half_way.set()
            servers.wait_for(lambda: one_waits(looks), "the other one's wait")

    event.listen(claims, "before_cursor_execute", hold)
    with ThreadPoolExecutor(2) as pool:
        claimed = pool.submit(worker.claim, "w1")
        assert half_way.wait(30)
        cancelled = pool.submit(client.cancel, job)
        assert cancelled.result(30)
        assert claimed.result(30) is not None
    assert wrong == [], "nothing was tried a second time either"
    assert [outcome.state for outcome in client.results(job)] == [State.CANCELLED]


@pytest.mark.parametrize("what", ["claim", "cancel", "complete"])
def test_a_transaction_that_is_ended_for_another_one_is_begun_again(boxes: list[Engine], what: str) -> None:
    """Somebody locks in the other order, as a person at the database may."""
    store = JobStore(boxes[0], Limits())
    job = store.submit(Kind.READ, "me", [NewItem("", "photo", "5" * 64, b"x")]).job_id
    item = store.item_of(job)
    work: Callable[[], Any] = lambda: store.claim("w1")  # noqa: E731
    if what == "cancel":
        work = lambda: store.cancel(job)  # noqa: E731
    elif what == "complete":
        mine = store.claim("w1")
        assert mine is not None
        work = lambda: store.complete(mine, "w1", "{}")  # noqa: E731
    wrong: list[str] = []
    event.listen(boxes[0], "handle_error", lambda context: wrong.append(str(context.original_exception)))
    with ThreadPoolExecutor(1) as pool, boxes[1].begin() as other:
        other.execute(text("SET LOCAL deadlock_timeout = '60s'"))  # so that it is the store that is ended
        other.execute(select(Item.id).where(Item.id == item).with_for_update())
        done = pool.submit(work)
        servers.wait_for(lambda: one_waits(boxes[2]), "the store's wait")
        other.execute(select(Job.id).where(Job.id == job).with_for_update())
        other.rollback()
        assert done.result(30)
    assert {error.splitlines()[0] for error in wrong} == {"deadlock detected"}
