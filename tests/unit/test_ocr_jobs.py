"""The job tables: every photo ends once, whatever dies in between. On a real SQLite, with a clock of the
test's."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from ocr_pipeline.database import DatabaseError, open_engine
from ocr_pipeline.errors import BackendError, DeadlineError, GpuHangError, ImageRefusedError
from ocr_pipeline.gpu import GpuBusyError
from ocr_pipeline.jobs import tables
from ocr_pipeline.jobs.dispatch import HueyDispatch
from ocr_pipeline.jobs.reader import Read
from ocr_pipeline.jobs.store import (
    Claimed,
    IdempotencyConflictError,
    JobStore,
    Limits,
    NewItem,
    QueueFullError,
    _again,
)
from ocr_pipeline.jobs.tables import JobState, Kind, Photo, State
from ocr_pipeline.jobs.worker import EXIT_OVERRAN, Worker, WorkerSettings
from ocr_pipeline.records import tables as record_tables
from ocr_pipeline.records.store import RecordStore
from ocr_pipeline.smb.share import ShareEmptyError, ShareSettings, ShareUnreachableError
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A migrated, empty database: a test gets a copy of it."""
    path = tmp_path_factory.mktemp("blank") / "jobs.sqlite3"
    engine = open_engine(f"sqlite:///{path}")
    JobStore(engine, Limits()).prepare()
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.exec_driver_sql("BEGIN")
    engine.dispose()
    return path.read_bytes()


@pytest.fixture
def store(tmp_path: Path, clock: Clock, blank: bytes) -> Iterator[JobStore]:
    path = tmp_path / "jobs.sqlite3"
    path.write_bytes(blank)
    engine = open_engine(f"sqlite:///{path}")
    yield JobStore(engine, Limits(queue=3, jobs=2, attempts=3, lease_s=60), clock)
    engine.dispose()


def photos(count: int, pole: str = "P1") -> list[NewItem]:
    return [NewItem(pole, f"{n}.jpg", f"{n:064d}", b"photo %d" % n) for n in range(count)]


def claim(store: JobStore, worker: str = "w1") -> Claimed:
    found = store.claim(worker)
    assert found is not None
    return found


def state(store: JobStore, job_id: str) -> JobState:
    view = store.view(job_id)
    assert view is not None
    return view.state


# --- submit ---


def test_how_a_jobs_photos_stand_by_pole(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "a", [*photos(3), *photos(1, "P2")], feeder="F1").job_id
    store.complete(claim(store), "w1", "{}")
    store.fail(claim(store), "w1", "DAMAGED_IMAGE", "x", status=400)
    claim(store)
    store.submit(Kind.READ, "a", photos(1, ""), feeder="F1")  # no job's
    assert store.standings(job_id=job) == {
        "P1": {State.DONE: 1, State.FAILED: 1, State.LEASED: 1},
        "P2": {State.QUEUED: 1},
    }
    store.cancel(job)
    again = store.submit(Kind.ALT, "a", photos(2), feeder="F1").job_id
    assert store.standings(feeder="F1") == {
        "P1": {State.DONE: 1, State.QUEUED: 1, State.CANCELLED: 1},
        "P2": {State.CANCELLED: 1},
    }, "the photo that was read once is read, the one that failed waits again"
    assert store.standings(job_id=again) == {"P1": {State.QUEUED: 2}}
    assert store.standings(feeder="F2") == {}


def test_a_job_goes_in_and_comes_out(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", photos(2), feeder="F1")
    assert (job.images, job.duplicates, job.known) == (2, 0, False)
    for _ in range(2):
        assert store.complete(claim(store), "w1", "{}")
    view = store.view(job.job_id, "me")
    assert view is not None
    assert (view.state, view.images, view.over) == (JobState.DONE, 2, 2)
    assert view.finished_at is not None
    assert store.claim("w1") is None


def test_the_same_photo_of_the_same_pole_is_one_item(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", [*photos(2), *photos(1), *photos(1, "P2")])
    assert (job.images, job.duplicates) == (3, 1)


def test_an_idempotency_key_makes_one_job(store: JobStore) -> None:
    first = store.submit(Kind.ALT, "me", photos(1), idempotency="k", fingerprint="a")
    again = store.submit(Kind.ALT, "me", photos(1), idempotency="k", fingerprint="a")
    assert (again.job_id, again.known, again.images) == (first.job_id, True, 1)
    with pytest.raises(IdempotencyConflictError):
        store.submit(Kind.ALT, "me", photos(2), idempotency="k", fingerprint="b")
    other = store.submit(Kind.ALT, "you", photos(1), idempotency="k", fingerprint="a")
    assert other.job_id != first.job_id


def test_single_requests_past_the_limit_are_refused_with_position_and_estimate(
    store: JobStore, clock: Clock
) -> None:
    store.submit(Kind.READ, "me", photos(1))
    done = claim(store)
    clock.now += 4
    store.complete(done, "w1", "{}")
    for number in range(3):
        store.submit(Kind.READ, "me", [NewItem("", "p", f"{number}", b"x")])
    with pytest.raises(QueueFullError) as caught:
        store.submit(Kind.READ, "me", photos(1))
    assert (caught.value.waiting, caught.value.limit, caught.value.estimate_s) == (3, 3, 12.0)


def test_jobs_past_the_limit_are_refused_and_single_requests_are_not(store: JobStore) -> None:
    for _ in range(2):
        store.submit(Kind.ALT, "me", photos(1))
    with pytest.raises(QueueFullError):
        store.submit(Kind.TRA, "me", photos(1))
    store.submit(Kind.READ, "me", photos(1))


def test_who_waits_for_an_answer_goes_first(store: JobStore) -> None:
    store.submit(Kind.ALT, "me", photos(2))
    store.submit(Kind.READ, "me", photos(1))
    assert [claim(store).kind for _ in range(3)] == [Kind.READ, Kind.ALT, Kind.ALT]


def test_position_and_estimate_count_what_comes_first(store: JobStore, clock: Clock) -> None:
    first = store.submit(Kind.ALT, "me", photos(3))
    second = store.submit(Kind.ALT, "you", photos(2))
    done = claim(store)
    clock.now += 10
    store.complete(done, "w1", "{}")
    view = store.view(second.job_id)
    assert view is not None
    assert (view.queue_position, view.estimate_s) == (2, 40.0)
    store.report_worker("w1", ready=True)
    store.report_worker("w2", ready=True)
    view = store.view(second.job_id)
    assert view is not None
    assert view.estimate_s == 20.0, "two workers"
    view = store.view(first.job_id)
    assert view is not None
    assert view.queue_position == 0
    claim(store)
    view = store.view(first.job_id)
    assert view is not None
    assert (view.queue_position, view.estimate_s) == (0, 10.0), "its own photo in work is not before it"


def test_a_job_is_its_owners(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    assert store.view(job.job_id, "you") is None
    assert not store.cancel(job.job_id, "you")
    assert [view.id for view in store.views("me")] == [job.job_id]
    assert store.views("you") == []


# --- leases ---


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_expires(store: JobStore, clock: Clock) -> None:
    store.submit(Kind.ALT, "me", photos(1))
    mine = claim(store)
    for _ in range(5):
        clock.now += 50
        assert store.heartbeat(mine, "w1")
        assert store.sweep() == 0
    clock.now += 61
    assert store.sweep() == 1
    assert not store.heartbeat(mine, "w1")
    theirs = claim(store, "w2")
    assert (theirs.item_id, theirs.attempts) == (mine.item_id, 2)


def test_a_result_that_comes_after_the_lease_counts_for_nothing(store: JobStore, clock: Clock) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    late = claim(store, "w1")
    clock.now += 61
    store.sweep()
    current = claim(store, "w2")
    assert not store.complete(late, "w1", '"late"')
    assert not store.fail(late, "w1", "X", "late", status=400)
    assert store.complete(current, "w2", '"good"')
    assert not store.complete(current, "w2", '"twice"')
    assert [outcome.result for outcome in store.results(job.job_id)] == ['"good"']


def test_a_former_claim_of_the_same_worker_is_no_claim(store: JobStore, clock: Clock) -> None:
    store.submit(Kind.ALT, "me", photos(1))
    late = claim(store, "w1")
    clock.now += 61
    store.sweep()
    claim(store, "w1")
    assert not store.complete(late, "w1", "{}")


@pytest.mark.parametrize(
    ("code", "times", "pauses"), [("40P01", 2, [0.1, 0.5]), ("40P01", 3, [0.1, 0.5]), ("57P01", 1, [])]
)
def test_what_a_deadlock_ended_is_begun_anew_after_a_pause_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, code: str, times: int, pauses: list[float]
) -> None:
    class Ended(Exception):
        sqlstate = code

    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    troubles = [OperationalError("UPDATE", {}, Ended()) for _ in range(times)]

    def work() -> str:
        if troubles:
            raise troubles.pop()
        return "done"

    if times == 2:
        assert _again(work) == "done"
    else:
        with pytest.raises(OperationalError):
            _again(work)
    assert slept == pauses


def test_a_photo_that_lay_untried_for_hours_meets_another_trouble(store: JobStore, clock: Clock) -> None:
    """A share that is away for seconds twice, and a queue of seven hours between: it is not given up."""
    job = store.submit(Kind.ALT, "me", photos(1))
    for after in (0.0, 7 * 3600.0):
        clock.now += after
        store.put_off(claim(store), "w1", "SMB_UNREACHABLE", "away", delay_s=5, patience_s=6 * 3600.0)
        assert store.results(job.job_id)[0].state.value == "queued"
    for _ in range(6 * 12):
        clock.now += 300
        store.put_off(claim(store), "w1", "SMB_UNREACHABLE", "away", delay_s=5, patience_s=6 * 3600.0)
    assert store.results(job.job_id)[0].state.value == "failed", "this one lasts"


def test_a_photo_that_was_put_off_is_its_next_worker_s(store: JobStore) -> None:
    """Being put off costs no attempt: both claims have the same number."""
    store.submit(Kind.ALT, "me", photos(1))
    former = claim(store, "w1")
    assert store.put_off(former, "w1", "GPU_BUSY", "busy", delay_s=0, patience_s=60)
    current = claim(store, "w2")
    assert current.attempts == former.attempts
    assert not store.complete(former, "w1", '"late"')
    assert store.complete(current, "w2", '"good"')


def test_a_photo_that_kills_its_worker_three_times_fails(store: JobStore, clock: Clock) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    for _ in range(3):
        claim(store)
        clock.now += 61
        assert store.sweep() == 1
    assert store.claim("w1") is None
    outcome = store.results(job.job_id)[0]
    assert (outcome.state, outcome.error_code, outcome.attempts) == (State.FAILED, "ABANDONED", 3)
    assert state(store, job.job_id) is JobState.FAILED


def test_put_back_waits_counts_and_ends(store: JobStore, clock: Clock) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    for attempt in range(1, 4):
        mine = claim(store)
        assert mine.attempts == attempt
        assert store.put_back(mine, "w1", "GPU_HANG", "hung", status=503, delay_s=30)
        assert store.claim("w1") is None
        clock.now += 31
    outcome = store.results(job.job_id)[0]
    assert (outcome.state, outcome.error_code, outcome.error_status) == (State.FAILED, "GPU_HANG", 503)
    assert "attempt 3 of 3" in str(outcome.error)


def test_the_waiting_request_is_told_when_its_photo_goes_back(store: JobStore) -> None:
    job = store.submit(Kind.READ, "me", photos(1))
    item = store.item_of(job.job_id)
    assert store.news([item]) == {}
    store.put_back(claim(store), "w1", "INTERNAL", "odd", status=500)
    assert store.news([item]) == {}, "a second attempt may read it"
    store.put_back(claim(store), "w1", "GPU_HANG", "hung", status=503)
    assert store.news([item])[item].error_code == "GPU_HANG"
    assert not store.news([item])[item].over
    assert store.news([]) == {}


# --- ends ---


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("dd", JobState.DONE),
        ("df", JobState.PARTIAL),
        ("ff", JobState.FAILED),
        ("dc", JobState.CANCELLED),
        ("cc", JobState.CANCELLED),
    ],
)
def test_the_final_state_of_a_job(store: JobStore, ends: str, expected: JobState) -> None:
    job = store.submit(Kind.ALT, "me", photos(2))
    for end in ends.replace("c", ""):
        mine = claim(store)
        assert state(store, job.job_id) is JobState.RUNNING
        if end == "d":
            store.complete(mine, "w1", "{}")
        else:
            store.fail(mine, "w1", "X", "no", status=400)
    if "c" in ends:
        assert store.cancel(job.job_id)
    assert state(store, job.job_id) is expected


def test_cancel_ends_what_is_in_work_and_nothing_that_is_over(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", photos(3))
    store.complete(claim(store), "w1", "{}")
    running = claim(store)
    assert store.cancel(job.job_id, "me")
    assert not store.complete(running, "w1", "{}")
    states = [outcome.state for outcome in store.results(job.job_id)]
    assert states == [State.DONE, State.CANCELLED, State.CANCELLED]
    assert not store.cancel("0" * 32)


def test_the_bytes_go_with_the_last_photo_that_needs_them(store: JobStore) -> None:
    one = store.submit(Kind.ALT, "me", photos(1))
    store.submit(Kind.READ, "me", photos(1))
    store.complete(claim(store), "w1", "{}")
    assert store.photo(f"{0:064d}") == b"photo 0", "the job still needs it"
    store.cancel(one.job_id)
    assert store.photo(f"{0:064d}") is None


def test_old_jobs_are_retired_and_single_requests_sooner(store: JobStore, clock: Clock) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    single = store.submit(Kind.READ, "me", photos(1))
    for _ in range(2):
        store.complete(claim(store), "w1", "{}")
    clock.now += 3601
    assert store.retire() == 1
    assert store.view(single.job_id) is None
    clock.now += 7 * 86400
    assert store.retire() == 1
    assert store.view(job.job_id) is None
    assert store.counts() == {}


def test_what_runs_is_never_retired(store: JobStore, clock: Clock) -> None:
    store.submit(Kind.ALT, "me", photos(1))
    clock.now += 10**9
    assert store.retire() == 0


def test_workers_are_seen_until_they_are_silent(store: JobStore, clock: Clock) -> None:
    store.report_worker("w1", ready=True, model="m")
    store.report_worker("w1", ready=False, problem="no GPU", model="m")
    assert store.workers() == [("w1", False, "no GPU", "m")]
    clock.now += 31
    assert store.workers() == []
    store.report_worker("w1", ready=True)
    store.dismiss_worker("w1")
    assert store.workers() == []


# --- schema ---


@pytest.mark.parametrize("kind", ["jobs", "records"])
def test_the_migrations_make_the_tables_that_the_code_describes(tmp_path: Path, kind: str) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/x.sqlite3")
    made: Any = JobStore(engine, Limits()) if kind == "jobs" else RecordStore(engine)
    made.prepare()
    made.prepare()  # a second start
    metadata = tables.Base.metadata if kind == "jobs" else record_tables.Base.metadata
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": f"ocr_{kind}_revision"})
        assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://u:p@h/d", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(DatabaseError) as caught:
        open_engine(url)
    assert ":p@" not in str(caught.value)


def test_sqlite_waits_for_other_writers_and_keeps_what_it_said(store: JobStore) -> None:
    with store._engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_a_queue_whose_folder_is_not_there_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^queue /nowhere/q\.sqlite3: unable to open.*its folder"):
        HueyDispatch("sqlite:////nowhere/q.sqlite3")


# --- the worker ---


class FakeReader:
    model = "fake"

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.raises: BaseException | None = None
        self.problem = ""

    def read(self, data: bytes, *, pole_id: str | None, text_only: bool) -> Read:
        self.seen.append(data)
        if self.raises:
            raise self.raises
        return Read({"potencia_kva": 45.0}, text="P 1", lines=[{"texto": "P 1"}])

    def check(self) -> str:
        return self.problem


class NoDispatch:
    def wake(self, photos: int) -> None: ...

    def wait(self, seconds: float) -> bool:
        return False


def worker(store: JobStore, reader: FakeReader, **more: Any) -> Worker:
    settings = more.pop("settings", WorkerSettings(retry_delay_s=0, hang_delay_s=0))
    return Worker(store, reader, NoDispatch(), settings, **more)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImageRefusedError("DAMAGED_IMAGE", "cut short"), ("failed", "DAMAGED_IMAGE", 400, 1)),
        (GpuHangError("hung"), ("queued", "GPU_HANG", 503, 1)),
        (BackendError("away"), ("queued", "BACKEND_UNAVAILABLE", 503, 0)),
        (DeadlineError("slow"), ("queued", "DEADLINE_EXCEEDED", 504, 1)),
        (GpuBusyError("busy"), ("queued", "GPU_BUSY", 503, 0)),
        (MemoryError(), ("failed", "IMAGE_TOO_LARGE", 413, 1)),
        (RuntimeError("key=secret"), ("queued", "INTERNAL", 500, 1)),
    ],
)
def test_what_becomes_of_a_photo_that_is_not_read(
    store: JobStore, error: BaseException, expected: tuple[str, str, int, int]
) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    reader = FakeReader()
    reader.raises = error
    assert worker(store, reader).work_once()
    found = store.results(job.job_id)[0]
    assert (found.state.value, found.error_code, found.error_status, found.attempts) == expected
    assert "secret" not in str(found.error)


def test_after_a_hang_the_worker_is_not_ready_for_a_while_or_until_a_photo_was_read(store: JobStore) -> None:
    store.submit(Kind.READ, "me", photos(1))
    reader = FakeReader()
    reader.raises = GpuHangError("hung")
    made = worker(store, reader)
    made.work_once()
    assert [row[1:3] for row in store.workers()] == [(False, "GPU_HANG: hung")]
    reader.raises = None
    made.work_once()
    made._report()
    assert [row[1] for row in store.workers()] == [True]


def test_a_backend_that_is_away_for_an_hour_costs_a_job_nothing(store: JobStore, clock: Clock) -> None:
    job = store.submit(Kind.ALT, "me", photos(100))
    reader = FakeReader()
    made = worker(store, reader)
    made._report()
    reader.raises, reader.problem = BackendError("refused"), "the vision server does not answer"
    assert made.work_once()
    for _ in range(720):
        clock.now += 5
        made._problem_until = 0.0
        made._report()
        assert not made.work_once(), "the others of the job wait where they are"
    assert (len(reader.seen), made.images) == (1, 0), "a fresh process would not help"
    reader.raises, reader.problem = None, ""
    made._report()
    for _ in range(100):
        assert made.work_once()
    assert state(store, job.job_id) is JobState.DONE
    assert {outcome.attempts for outcome in store.results(job.job_id)} == {1}


def test_who_waits_for_an_answer_is_told_at_once_that_a_backend_is_away(store: JobStore) -> None:
    store.submit(Kind.ALT, "me", photos(1))
    store.submit(Kind.READ, "me", photos(1))
    reader = FakeReader()
    reader.raises, reader.problem = BackendError("refused"), "the vision server does not answer"
    made = worker(store, reader)
    made._report()
    for _ in range(3):
        assert made.work_once()
    assert not made.work_once(), "nobody waits any longer than three attempts"
    assert [key for key, count in store.counts().items() if count] == [("ALT", "queued"), ("READ", "failed")]


def test_single_photos_do_not_wait_for_a_busy_gpu_for_ever(store: JobStore, clock: Clock) -> None:
    """Their callers have left; the places in the queue are for those who come now."""
    for _ in range(3):
        store.submit(Kind.READ, "me", photos(1))
    reader = FakeReader()
    reader.raises = GpuBusyError("busy")
    made = worker(store, reader)
    for _ in range(20):
        made.work_once()
        clock.now += 10
    assert {key: count for key, count in store.counts().items() if count} == {("READ", "failed"): 3}
    assert len(reader.seen) == 9, "three attempts each"
    store.submit(Kind.READ, "me", photos(1))


@pytest.mark.parametrize("trouble", [BackendError("status 500"), GpuBusyError("busy")])
def test_a_photo_that_no_backend_reads_is_given_up_at_last(
    store: JobStore, clock: Clock, trouble: BackendError
) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    reader = FakeReader()
    reader.raises = trouble
    made = worker(store, reader)
    began, tries = clock.now, 0
    while state(store, job.job_id) is not JobState.FAILED and clock.now - began < 7 * 3600:
        made._problem_until = 0.0
        tries += made.work_once()
        clock.now += 10
    assert 5.9 * 3600 < clock.now - began < 6.2 * 3600
    assert tries < 150, "and less often the longer it lasts"
    assert store.results(job.job_id)[0].error_code == trouble.reason


@pytest.mark.parametrize(("problem", "attempts"), [("", 1), ("the vision server does not answer", 0)])
def test_a_hang_is_the_photos_attempt_only_where_the_box_is_well_afterwards(
    store: JobStore, problem: str, attempts: int
) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    reader = FakeReader()
    reader.raises, reader.problem = GpuHangError("hung"), problem
    worker(store, reader).work_once()
    assert store.results(job.job_id)[0].attempts == attempts


def test_records_that_are_away_cost_no_attempt(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", photos(2))
    away = [True]

    def keep(claimed: Claimed, digest: str, read: Read) -> None:
        if away:
            raise OperationalError("INSERT", {}, Exception("server closed the connection"))

    made = worker(store, FakeReader(), keep=keep)
    assert made.work_once()
    assert not made.work_once(), "the other one waits"
    found = store.results(job.job_id)[0]
    assert (found.state, found.error_code, found.attempts) == (State.QUEUED, "RECORDS_UNAVAILABLE", 0)
    away.clear()
    made._problem_until = 0.0
    assert [made.work_once() for _ in range(2)] == [True, True]
    assert state(store, job.job_id) is JobState.DONE


def test_a_reading_goes_to_the_records_before_it_is_called_done(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    kept: list[str] = []

    def keep(claimed: Claimed, digest: str, read: Read) -> None:
        kept.append(claimed.pole_id)
        if len(kept) == 1:
            raise OSError("the records are away")

    made = worker(store, FakeReader(), keep=keep)
    made.work_once()
    assert state(store, job.job_id) is JobState.RUNNING
    made.work_once()
    assert (kept, state(store, job.job_id)) == (["P1", "P1"], JobState.DONE)


def test_a_text_request_keeps_its_text_alone(store: JobStore) -> None:
    job = store.submit(Kind.TEXT, "me", photos(1))
    worker(store, FakeReader()).work_once()
    assert '"text": "P 1"' in str(store.results(job.job_id)[0].result)
    assert "potencia" not in str(store.results(job.job_id)[0].result)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ShareUnreachableError("away"), ("queued", "SMB_UNREACHABLE", 503)),
        (ShareEmptyError("empty"), ("failed", "SMB_EMPTY_FOLDER", 400)),
    ],
)
def test_a_share_that_is_away_is_tried_again_and_one_that_refuses_is_not(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: tuple[str, str, int]
) -> None:
    class Away:
        def __init__(self, settings: ShareSettings) -> None: ...

        def read(self, path: str, limit: int) -> bytes:
            raise error

    monkeypatch.setattr("ocr_pipeline.jobs.worker.Share", Away)
    job = store.submit(Kind.TRA, "me", [NewItem("P1", "F/P1/a.jpg", "h")], share="field")
    share = ShareSettings("server", "share", "user", "word")
    worker(store, FakeReader(), shares={"field": share}).work_once()
    found = store.results(job.job_id)[0]
    assert (found.state.value, found.error_code, found.error_status) == expected


SHARES = {"field": ShareSettings("server", "share", "user", "word")}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was asked of a share that is away: a path, and how much a photo may have."""
    asked: list[tuple[str, int]] = []

    class Away:
        def __init__(self, settings: ShareSettings) -> None: ...

        def read(self, path: str, limit: int) -> bytes:
            asked.append((path, limit))
            raise ShareUnreachableError("gone")

    monkeypatch.setattr("ocr_pipeline.jobs.worker.Share", Away)
    return asked


def test_a_share_that_is_away_costs_no_attempt_and_is_given_up_after_hours(
    store: JobStore, clock: Clock, tried: list[tuple[str, int]]
) -> None:
    store.limits = replace(store.limits, attempts=1)
    job = store.submit(Kind.TRA, "me", [NewItem("P1", "F/P1/a.jpg", "h")], share="field")
    settings = WorkerSettings(max_image_bytes=1000, retry_delay_s=0)
    made = worker(store, FakeReader(), shares=SHARES, settings=settings)
    for _ in range(6 * 12):
        made.work_once()
        clock.now += 300
    assert (store.results(job.job_id)[0].state.value, set(tried)) == ("queued", {("F/P1/a.jpg", 1000)})
    assert len(tried) == 6 * 12, "every 5 min at the latest"
    made.work_once()
    found = store.results(job.job_id)[0]
    assert (found.state.value, found.error_code) == ("failed", "SMB_UNREACHABLE")
    assert "given up" in str(found.error)


def test_one_photo_finds_out_that_a_share_is_away_and_the_others_wait_for_it_untried(
    store: JobStore, tried: list[tuple[str, int]]
) -> None:
    items = [NewItem("P1", f"F/P1/{name}.jpg", name) for name in "abc"]
    job = store.submit(Kind.TRA, "me", items, share="field")
    made = worker(store, FakeReader(), shares=SHARES, settings=WorkerSettings(retry_delay_s=60))
    while made.work_once():
        pass
    found = store.results(job.job_id)
    assert len(tried) == 1
    assert {(one.state.value, one.error_code, one.attempts) for one in found} == {
        ("queued", "SMB_UNREACHABLE", 0)
    }


def test_a_photo_that_takes_longer_than_its_lease_keeps_it(
    store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.limits = replace(store.limits, lease_s=1.0)
    job = store.submit(Kind.ALT, "me", photos(1))
    reader, renewed = FakeReader(), threading.Event()
    read, beat = reader.read, store.heartbeat

    def slow(*args: Any, **more: Any) -> Read:
        for _ in range(3):
            renewed.clear()
            renewed.wait(5)
            clock.now += 0.6
            store.sweep()
        return read(*args, **more)

    def beats(claimed: Claimed, name: str) -> bool:
        found = beat(claimed, name)
        renewed.set()
        return found

    monkeypatch.setattr(reader, "read", slow)
    monkeypatch.setattr(store, "heartbeat", beats)
    worker(store, reader, settings=WorkerSettings(heartbeat_s=0.02)).work_once()
    found = store.results(job.job_id)[0]
    assert (found.state.value, found.attempts) == ("done", 1)


def test_a_photo_that_takes_too_long_ends_the_process_and_its_attempt_is_written_down(
    store: JobStore,
) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    ended: list[int] = []
    reader = FakeReader()
    made = worker(
        store,
        reader,
        settings=WorkerSettings(image_timeout_s=0.02, retry_delay_s=0),
        exit_process=ended.append,
    )
    real = reader.read

    def slow(data: bytes, **more: Any) -> Read:
        while not ended:
            pass
        return real(data, **more)

    reader.read = slow  # type: ignore[method-assign]
    made.work_once()
    assert ended == [EXIT_OVERRAN]
    found = store.results(job.job_id)[0]
    assert (found.state, found.error_code, found.error_status) == (State.QUEUED, "IMAGE_TIMEOUT", 504)


def test_a_worker_is_replaced_after_its_share_of_photos(store: JobStore) -> None:
    store.submit(Kind.ALT, "me", photos(3))
    made = worker(store, FakeReader(), settings=WorkerSettings(recycle_images=2, sweep_s=60))
    assert made.run() == 0
    assert made.images == 2
    assert store.workers() == [], "it has said goodbye"


def test_a_worker_is_replaced_when_it_has_grown(store: JobStore) -> None:
    store.submit(Kind.ALT, "me", photos(3))
    made = worker(store, FakeReader(), settings=WorkerSettings(recycle_rss_mib=1, sweep_s=60))
    assert made.run() == 0
    assert made.images == 1


def test_a_running_worker_retires_what_is_old_and_wakes_for_what_a_dead_one_held(
    store: JobStore, clock: Clock
) -> None:
    old = store.submit(Kind.ALT, "me", photos(1))
    store.complete(claim(store), "w1", "{}")
    clock.now += 8 * 86400
    held = store.submit(Kind.ALT, "me", photos(1))
    claim(store, "a worker that died")
    clock.now += 3600  # its lease is over
    woken: list[int] = []
    made = worker(store, FakeReader(), settings=WorkerSettings(sweep_s=60))
    made._dispatch = types.SimpleNamespace(wake=woken.append)
    sweeping = threading.Thread(target=made._sweep_on)
    sweeping.start()
    try:
        until = time.monotonic() + 10
        while store.view(old.job_id) is not None or not woken:
            assert time.monotonic() < until, woken
            time.sleep(0.01)
    finally:
        made.stop()
        sweeping.join(10)
    assert state(store, held.job_id) is not JobState.DONE and woken == [1]


def test_lost_bytes_are_no_endless_loop(store: JobStore) -> None:
    job = store.submit(Kind.ALT, "me", photos(1))
    with store._engine.begin() as connection:
        connection.execute(Photo.__table__.delete())  # type: ignore[attr-defined]
        assert connection.execute(select(Photo.sha256)).all() == []
    worker(store, FakeReader()).work_once()
    assert store.results(job.job_id)[0].error_code == "IMAGE_LOST"
