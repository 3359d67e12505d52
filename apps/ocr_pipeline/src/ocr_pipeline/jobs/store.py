"""The jobs and their photos in the database: submit, claim, complete. Every change of state is one
transaction.

A worker owns a photo by a lease that it renews. Completion counts only while the lease is the worker's: a
photo whose
lease went to another, or that was cancelled meanwhile, keeps the one final state that it has.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, and_, case, delete, exists, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from ocr_pipeline.database import migrate, reading
from ocr_pipeline.jobs.tables import UNDER_WAY, Item, Job, JobState, Kind, Photo, State, Worker

PRIORITY = {Kind.READ: 0, Kind.TEXT: 0, Kind.ALT: 10, Kind.TRA: 10}
RECENT = 50  # photos that an estimate is taken from
WORKER_GONE_S = 30.0
LONGEST_DELAY_S = 300.0
DEADLOCK_PAUSES_S = (0.1, 0.5)  # before a transaction is begun a second, a third time
ANOTHER_TROUBLE_S = 3600.0  # untried for so long, a photo meets another trouble than it was put off for
ABANDONED = "ABANDONED"
CANCELLED = "CANCELLED"
UNAVAILABLE = 503
DEADLOCK = "40P01"  # PostgreSQL's name for it
T = TypeVar("T")


class QueueFullError(Exception):
    """Too much waits already."""

    def __init__(self, waiting: int, limit: int, estimate_s: float | None) -> None:
        super().__init__(f"{waiting} photos wait, {limit} may")
        self.waiting = waiting
        self.limit = limit
        self.estimate_s = estimate_s


class IdempotencyConflictError(Exception):
    """The same idempotency key came with another request."""


@dataclass(frozen=True)
class NewItem:
    """One photo of a job that is being submitted. `data`: None where it is read from a share later."""

    pole_id: str
    name: str
    image_hash: str
    data: bytes | None = None


@dataclass(frozen=True)
class Submitted:
    """What submit did. `known`: the idempotency key had made this job already."""

    job_id: str
    images: int
    duplicates: int
    known: bool = False


@dataclass(frozen=True)
class Claimed:
    """A photo that this worker has now."""

    item_id: int
    job_id: str
    kind: Kind
    pole_id: str
    name: str
    image_hash: str
    feeder: str
    share: str
    attempts: int


@dataclass(frozen=True)
class JobView:
    """A job as its owner sees it."""

    id: str
    kind: Kind
    state: JobState
    feeder: str
    share: str
    created_at: float
    finished_at: float | None
    counts: dict[str, int]
    duplicates: int
    queue_position: int
    estimate_s: float | None

    @property
    def images(self) -> int:
        """All of its photos."""
        return sum(self.counts.values())

    @property
    def over(self) -> int:
        """Photos in a final state."""
        return self.images - sum(self.counts.get(state, 0) for state in UNDER_WAY)


@dataclass(frozen=True)
class Outcome:
    """A photo's state, and what became of it."""

    item_id: int
    pole_id: str
    name: str
    image_hash: str
    state: State
    attempts: int
    result: str | None
    error_code: str | None
    error: str | None
    error_status: int | None

    @property
    def over(self) -> bool:
        """Whether the state is final."""
        return self.state not in UNDER_WAY


@dataclass(frozen=True)
class Limits:
    """Bounds of the store."""

    queue: int = 512  # photos of single requests that wait
    jobs: int = 64  # jobs under way
    attempts: int = 3
    lease_s: float = 60.0
    retention_s: float = 7 * 86400.0
    single_retention_s: float = 3600.0


class JobStore:
    """See the module. `clock` is the time of day: boxes that share a database keep theirs by NTP."""

    def __init__(self, engine: Engine, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self.limits = limits
        self._clock = clock
        self._skip_locked = engine.dialect.name == "postgresql"

    def prepare(self) -> None:
        """Make the tables, or bring them up to date."""
        migrate(self._engine, "ocr_pipeline.jobs")

    # --- what clients do ---

    def submit(
        self,
        kind: Kind,
        owner: str,
        photos: Sequence[NewItem],
        *,
        feeder: str = "",
        share: str = "",
        idempotency: str | None = None,
        fingerprint: str = "",
    ) -> Submitted:
        """Take a job in, whole or not at all.

        Raises QueueFullError, and IdempotencyConflictError for a key that another request has used.
        """
        try:
            with self._engine.begin() as connection:
                known = self._known(connection, owner, idempotency, fingerprint)
                if known:
                    return known
                self._refuse_when_full(connection, kind)
                return self._insert(
                    connection,
                    Job(
                        id=uuid.uuid4().hex,
                        kind=kind.value,
                        state=JobState.QUEUED.value,
                        owner=owner,
                        feeder=feeder,
                        share=share,
                        idempotency=idempotency,
                        fingerprint=fingerprint,
                        created_at=self._clock(),
                    ),
                    photos,
                )
        except IntegrityError:
            # The same key twice at once: the other one won.
            with reading(self._engine) as connection:
                known = self._known(connection, owner, idempotency, fingerprint)
            if known is None:
                raise
            return known

    def look(self, kind: Kind, owner: str, idempotency: str | None, fingerprint: str) -> Submitted | None:
        """Whether a job of this key is there already, and there is room for one that is not.

        Raises QueueFullError and IdempotencyConflictError, as `submit` would.
        """
        with reading(self._engine) as connection:
            known = self._known(connection, owner, idempotency, fingerprint)
            if known is None:
                self._refuse_when_full(connection, kind)
            return known

    def _known(
        self, connection: Connection, owner: str, idempotency: str | None, fingerprint: str
    ) -> Submitted | None:
        if idempotency is None:
            return None
        found = connection.execute(
            select(Job.id, Job.fingerprint, Job.duplicates).where(
                Job.owner == owner, Job.idempotency == idempotency
            )
        ).first()
        if found is None:
            return None
        if found.fingerprint != fingerprint:
            raise IdempotencyConflictError
        images = connection.scalar(select(func.count()).where(Item.job_id == found.id)) or 0
        return Submitted(found.id, images, found.duplicates, known=True)

    def _refuse_when_full(self, connection: Connection, kind: Kind) -> None:
        if PRIORITY[kind] == 0:
            waiting = self._waiting(connection, Item.priority == 0)
            limit = self.limits.queue
        else:
            waiting = (
                connection.scalar(
                    select(func.count())
                    .select_from(Job)
                    .where(Job.finished_at.is_(None), Job.kind.in_([Kind.ALT.value, Kind.TRA.value]))
                )
                or 0
            )
            limit = self.limits.jobs
        if waiting >= limit:
            raise QueueFullError(waiting, limit, self._estimate(connection, waiting))

    def _insert(self, connection: Connection, job: Job, photos: Sequence[NewItem]) -> Submitted:
        distinct: dict[tuple[str, str], NewItem] = {}
        for photo in photos:
            distinct.setdefault((photo.pole_id, photo.image_hash), photo)
        duplicates = len(photos) - len(distinct)
        values = {column.key: getattr(job, column.key) for column in Job.__table__.columns}
        connection.execute(insert(Job).values({**values, "duplicates": duplicates}))
        stored = {photo.image_hash: photo.data for photo in distinct.values() if photo.data is not None}
        for sha256, data in sorted(stored.items()):  # in one order: no two then wait for each other
            self._keep_photo(connection, sha256, data)
        connection.execute(
            insert(Item),
            [
                {
                    "job_id": job.id,
                    "pole_id": photo.pole_id,
                    "name": photo.name,
                    "image_hash": photo.image_hash,
                    "priority": PRIORITY[Kind(job.kind)],
                    "state": State.QUEUED.value,
                }
                for photo in distinct.values()
            ],
        )
        return Submitted(job.id, len(distinct), duplicates)

    def _keep_photo(self, connection: Connection, sha256: str, data: bytes) -> None:
        """Store a photo's bytes, or hold the row that has them until this transaction's items are there.

        On PostgreSQL another transaction may be about to drop them: `_settle` locks the rows as this does, so
        whoever comes second sees what the first has done. On SQLite there is one writer at a time.
        """
        if not self._skip_locked:
            if not connection.scalar(select(exists().where(Photo.sha256 == sha256))):
                connection.execute(insert(Photo).values(sha256=sha256, data=data))
            return
        from sqlalchemy.dialects import postgresql

        made = postgresql.insert(Photo).values(sha256=sha256, data=data)
        connection.execute(
            made.on_conflict_do_update(index_elements=[Photo.sha256], set_={"sha256": made.excluded.sha256})
        )

    def view(self, job_id: str, owner: str | None = None) -> JobView | None:
        """A job; None when there is none, or when it is another's."""
        with reading(self._engine) as connection:
            job = connection.execute(
                select(Job.__table__).where(Job.id == job_id, *([Job.owner == owner] if owner else []))
            ).first()
            return self._view(connection, job) if job else None

    def views(self, owner: str, limit: int = 100) -> list[JobView]:
        """An owner's jobs, the newest first."""
        with reading(self._engine) as connection:
            jobs = connection.execute(
                select(Job.__table__)
                .where(Job.owner == owner, Job.kind.in_([Kind.ALT.value, Kind.TRA.value]))
                .order_by(Job.created_at.desc())
                .limit(limit)
            ).all()
            return [self._view(connection, job) for job in jobs]

    def _view(self, connection: Connection, job: Any) -> JobView:
        rows = connection.execute(
            select(Item.state, func.count()).where(Item.job_id == job.id).group_by(Item.state)
        ).all()
        counts = {state.value: 0 for state in State} | {row[0]: row[1] for row in rows}
        left = sum(counts[state] for state in UNDER_WAY)
        position = 0
        if counts[State.QUEUED]:
            first = connection.execute(
                select(Item.priority, Item.id)
                .where(Item.job_id == job.id, Item.state == State.QUEUED.value)
                .order_by(Item.priority, Item.id)
                .limit(1)
            ).one()
            position = self._ahead(connection, first.priority, first.id, Item.job_id != job.id)
        estimate = self._estimate(connection, position + left) if left else None
        return JobView(
            id=job.id,
            kind=Kind(job.kind),
            state=JobState(job.state),
            feeder=job.feeder,
            share=job.share,
            created_at=job.created_at,
            finished_at=job.finished_at,
            counts=counts,
            duplicates=job.duplicates,
            queue_position=position,
            estimate_s=estimate,
        )

    def results(self, job_id: str, offset: int = 0, limit: int | None = None) -> list[Outcome]:
        """The photos of a job, in order."""
        page = _OUTCOME.where(Item.job_id == job_id).order_by(Item.id).offset(offset).limit(limit)
        with reading(self._engine) as connection:
            rows = connection.execute(page).all()
        return [_outcome(row) for row in rows]

    def standings(self, *, job_id: str | None = None, feeder: str | None = None) -> dict[str, Counter[State]]:
        """How the photos of a job, or of all jobs of a feeder, stand, by pole. One that any of them has read
        is read."""
        which = Item.job_id == job_id if feeder is None else Job.feeder == feeder
        query = (
            select(Item.pole_id, Item.image_hash, Item.state)
            .join(Job, Job.id == Item.job_id)
            .where(which, Job.kind.in_([Kind.ALT.value, Kind.TRA.value]))
            .distinct()
        )
        best: dict[tuple[str, str], State] = {}
        with reading(self._engine) as connection:
            for pole, image, state in connection.execute(query):
                others = best.get((pole, image), State.CANCELLED)
                best[pole, image] = min(State(state), others, key=_BEST.index)
        found: dict[str, Counter[State]] = {}
        for (pole, _), state in best.items():
            found.setdefault(pole, Counter())[state] += 1
        return found

    def news(self, item_ids: Iterable[int]) -> dict[int, Outcome]:
        """Of these photos, those that are over, or that went back to the queue because of the box."""
        ids = list(item_ids)
        if not ids:
            return {}
        with reading(self._engine) as connection:
            rows = connection.execute(
                _OUTCOME.where(
                    Item.id.in_(ids),
                    or_(Item.state.not_in(UNDER_WAY), Item.error_status == UNAVAILABLE),
                )
            ).all()
        return {row.id: _outcome(row) for row in rows}

    def item_of(self, job_id: str) -> int:
        """The one photo of a single request."""
        with reading(self._engine) as connection:
            return connection.execute(select(Item.id).where(Item.job_id == job_id)).scalar_one()

    def cancel(self, job_id: str, owner: str | None = None) -> bool:
        """End what of a job is not over. False: no such job."""
        return _again(partial(self._cancel, job_id, owner))

    def _cancel(self, job_id: str, owner: str | None) -> bool:
        now = self._clock()
        with self._engine.begin() as connection:
            job = self._lock_job(connection, job_id)
            if job is None or (owner and job.owner != owner):
                return False
            connection.execute(
                update(Item)
                .where(Item.job_id == job_id, Item.state.in_(UNDER_WAY))
                .values(
                    state=State.CANCELLED.value,
                    lease_owner=None,
                    lease_until=None,
                    finished_at=now,
                    error_code=CANCELLED,
                    error="cancelled by its owner",
                    error_status=499,
                )
            )
            self._settle(connection, job_id)
        return True

    # --- what workers do ---

    def claim(self, worker: str, *, single: bool = False) -> Claimed | None:
        """Take the next photo that may be read now. `single`: only one that somebody waits for."""
        while True:
            with reading(self._engine) as connection:
                job_id = connection.scalar(self._ready(Item.job_id, single))
            if job_id is None:
                return None
            claimed = _again(partial(self._claim_of, job_id, worker, single))
            if claimed:
                return claimed
            # Others took what that job had, or it was cancelled: what else waits is looked for anew.

    def _ready(self, columns: Any, single: bool, *conditions: Any) -> Any:
        """The photo that is next."""
        return (
            select(columns)
            .where(
                Item.state == State.QUEUED.value,
                Item.not_before <= self._clock(),
                *([Item.priority == 0] if single else []),
                *conditions,
            )
            .order_by(Item.priority, Item.id)
            .limit(1)
        )

    def _claim_of(self, job_id: str, worker: str, single: bool) -> Claimed | None:
        """Take a job's next photo. The job is locked before the photo, as in whatever else locks both: two
        that lock in another order may wait for each other."""
        with self._engine.begin() as connection:
            job = self._lock_job(connection, job_id)
            found = connection.execute(self._ready(Item.__table__, single, Item.job_id == job_id)).first()
            if job is None or found is None:
                return None
            now = self._clock()
            connection.execute(
                update(Job)
                .where(Job.id == job_id, Job.state == JobState.QUEUED.value)
                .values(state=JobState.RUNNING.value)
            )
            connection.execute(
                update(Item)
                .where(Item.id == found.id)
                .values(
                    state=State.LEASED.value,
                    lease_owner=worker,
                    lease_until=now + self.limits.lease_s,
                    heartbeat_at=now,
                    started_at=now,
                    attempts=found.attempts + 1,
                    error_code=None,
                    error=None,
                    error_status=None,
                )
            )
        return Claimed(
            item_id=found.id,
            job_id=job_id,
            kind=Kind(job.kind),
            pole_id=found.pole_id,
            name=found.name,
            image_hash=found.image_hash,
            feeder=job.feeder,
            share=job.share,
            attempts=found.attempts + 1,
        )

    def photo(self, sha256: str) -> bytes | None:
        """The bytes that came with a request."""
        with reading(self._engine) as connection:
            return connection.scalar(select(Photo.data).where(Photo.sha256 == sha256))

    def heartbeat(self, claimed: Claimed, worker: str) -> bool:
        """Renew a lease. False: the photo is no longer this worker's."""
        now = self._clock()
        with self._engine.begin() as connection:
            done = connection.execute(
                update(Item)
                .where(_owned(claimed, worker))
                .values(heartbeat_at=now, lease_until=now + self.limits.lease_s)
            )
            return done.rowcount == 1

    def complete(self, claimed: Claimed, worker: str, result: str) -> bool:
        """A photo was read. False: it was no longer this worker's, and the result counts for nothing."""
        return self._finish(claimed, worker, {"state": State.DONE.value, "result": result})

    def fail(self, claimed: Claimed, worker: str, code: str, message: str, *, status: int) -> bool:
        """A photo cannot be read, and no later attempt would read it. `status`: what HTTP calls the error."""
        told = {"error_code": code, "error": message[:500], "error_status": status}
        return self._finish(claimed, worker, {"state": State.FAILED.value, **told})

    def put_back(
        self,
        claimed: Claimed,
        worker: str,
        code: str,
        message: str,
        *,
        status: int,
        delay_s: float = 0.0,
    ) -> bool:
        """A photo goes back to the queue; it fails once its attempts are used up."""
        if claimed.attempts >= self.limits.attempts:
            last = f"{message} (attempt {claimed.attempts} of {self.limits.attempts}, the last)"
            return self.fail(claimed, worker, code, last, status=status)
        with self._engine.begin() as connection:
            done = connection.execute(
                update(Item)
                .where(_owned(claimed, worker))
                .values(**_queued(code, message, status), not_before=self._clock() + delay_s)
            )
            return done.rowcount == 1

    def put_off(
        self, claimed: Claimed, worker: str, code: str, message: str, *, delay_s: float, patience_s: float
    ) -> bool:
        """A photo goes back because of the box: no attempt of its own, but for `patience_s` at most.

        It waits for `delay_s` at first, and longer the longer the trouble lasts.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            mine = select(Item.trouble_since, Item.not_before).where(_owned(claimed, worker))
            since, due = connection.execute(mine).one_or_none() or (None, now)
            lasts = 0.0 if since is None or now - due > ANOTHER_TROUBLE_S else now - since
            if lasts < patience_s:
                done = connection.execute(
                    update(Item)
                    .where(_owned(claimed, worker))
                    .values(
                        **_queued(code, message, UNAVAILABLE),
                        not_before=now + max(delay_s, min(LONGEST_DELAY_S, lasts / 4)),
                        trouble_since=now - lasts,
                        attempts=claimed.attempts - 1,
                    )
                )
                return done.rowcount == 1
        last = f"{message} (for {lasts / 60:.0f} min, then given up)"
        return self.fail(claimed, worker, code, last, status=UNAVAILABLE)

    def _finish(self, claimed: Claimed, worker: str, values: dict[str, Any]) -> bool:
        return _again(partial(self._end, claimed, worker, values))

    def _end(self, claimed: Claimed, worker: str, values: dict[str, Any]) -> bool:
        with self._engine.begin() as connection:
            self._lock_job(connection, claimed.job_id)
            done = connection.execute(
                update(Item)
                .where(_owned(claimed, worker))
                .values(lease_owner=None, lease_until=None, finished_at=self._clock(), **values)
            )
            if done.rowcount != 1:
                return False
            self._settle(connection, claimed.job_id)
        return True

    def _lock_job(self, connection: Connection, job_id: str) -> Any:
        """The job's row, for this transaction alone: of two photos that end at once, one is the last."""
        return connection.execute(select(Job.__table__).where(Job.id == job_id).with_for_update()).first()

    def _settle(self, connection: Connection, job_id: str) -> None:
        """Close a job whose photos are all over, and drop the bytes that nobody needs any more."""
        rows = connection.execute(
            select(Item.state, func.count()).where(Item.job_id == job_id).group_by(Item.state)
        ).all()
        counts: dict[str, int] = {row[0]: row[1] for row in rows}
        if any(counts.get(state) for state in UNDER_WAY):
            return
        connection.execute(
            update(Job)
            .where(Job.id == job_id, Job.finished_at.is_(None))
            .values(state=_final_state(counts).value, finished_at=self._clock())
        )
        mine = select(Item.image_hash).where(Item.job_id == job_id)
        needed = select(Item.image_hash).where(Item.state.in_(UNDER_WAY))
        if self._skip_locked:
            # First the rows' locks, then what is needed: a submit that holds one is over by then, and seen.
            connection.execute(
                select(Photo.sha256).where(Photo.sha256.in_(mine)).order_by(Photo.sha256).with_for_update()
            ).all()
        connection.execute(delete(Photo).where(Photo.sha256.in_(mine), Photo.sha256.not_in(needed)))

    def sweep(self) -> int:
        """Put photos whose worker died back into the queue, close what has died too often. How many."""
        now = self._clock()
        expired = and_(Item.state == State.LEASED.value, Item.lease_until < now)
        with reading(self._engine) as connection:
            jobs = connection.scalars(select(Item.job_id).where(expired).distinct()).all()
        count = 0
        for job_id in jobs:
            with self._engine.begin() as connection:
                self._lock_job(connection, job_id)
                spent = Item.attempts >= self.limits.attempts
                lost = f"its worker ended {self.limits.attempts} times while it read this photo"
                done = connection.execute(
                    update(Item)
                    .where(expired, Item.job_id == job_id)
                    .values(
                        state=case((spent, State.FAILED.value), else_=State.QUEUED.value),
                        finished_at=case((spent, now), else_=None),
                        error_code=case((spent, ABANDONED), else_=None),
                        error=case((spent, lost), else_=None),
                        error_status=case((spent, 500), else_=None),
                        lease_owner=None,
                        lease_until=None,
                    )
                )
                count += done.rowcount
                self._settle(connection, job_id)
        return count

    def retire(self) -> int:
        """Remove what is older than the retention. How many jobs."""
        now = self._clock()
        single = Job.kind.in_([Kind.READ.value, Kind.TEXT.value])
        old = or_(
            Job.finished_at < now - self.limits.retention_s,
            and_(single, Job.finished_at < now - self.limits.single_retention_s),
        )
        with self._engine.begin() as connection:
            ids = connection.scalars(select(Job.id).where(old).limit(500)).all()
            if ids:
                connection.execute(delete(Item).where(Item.job_id.in_(ids)))
                connection.execute(delete(Job).where(Job.id.in_(ids)))
            connection.execute(delete(Worker).where(Worker.seen_at < now - 86400))
        return len(ids)

    def report_worker(self, worker: str, *, ready: bool, problem: str = "", model: str = "") -> None:
        """A worker says that it is there."""
        values = {"seen_at": self._clock(), "ready": ready, "problem": problem[:500], "model": model[:200]}
        with self._engine.begin() as connection:
            done = connection.execute(update(Worker).where(Worker.id == worker).values(values))
            if not done.rowcount:
                connection.execute(insert(Worker).values(id=worker, **values))

    def dismiss_worker(self, worker: str) -> None:
        """A worker goes."""
        with self._engine.begin() as connection:
            connection.execute(delete(Worker).where(Worker.id == worker))

    # --- figures ---

    def workers(self) -> list[tuple[str, bool, str, str]]:
        """Those seen lately: id, ready, problem, model."""
        with reading(self._engine) as connection:
            rows = connection.execute(
                select(Worker.id, Worker.ready, Worker.problem, Worker.model)
                .where(Worker.seen_at >= self._clock() - WORKER_GONE_S)
                .order_by(Worker.seen_at.desc())
            ).all()
        return [(row.id, row.ready, row.problem, row.model) for row in rows]

    def counts(self) -> dict[tuple[str, str], int]:
        """Photos by kind of job and state."""
        with reading(self._engine) as connection:
            rows = connection.execute(
                select(Job.kind, Item.state, func.count())
                .join(Job, Job.id == Item.job_id)
                .group_by(Job.kind, Item.state)
            ).all()
        return {(row[0], row[1]): row[2] for row in rows}

    def standing(self, item_id: int) -> tuple[int, float | None]:
        """Photos before this one, and the seconds until it is done."""
        with reading(self._engine) as connection:
            found = connection.execute(select(Item.priority, Item.id).where(Item.id == item_id)).first()
            ahead = self._ahead(connection, found.priority, found.id) if found else 0
            return ahead, self._estimate(connection, ahead + 1)

    def ready_count(self) -> int:
        """Photos that could be read now."""
        with reading(self._engine) as connection:
            return self._waiting(connection, Item.not_before <= self._clock())

    def _waiting(self, connection: Connection, *conditions: Any) -> int:
        query = select(func.count()).select_from(Item).where(Item.state == State.QUEUED.value, *conditions)
        return connection.scalar(query) or 0

    def _ahead(self, connection: Connection, priority: int, item_id: int, *conditions: Any) -> int:
        before = or_(Item.priority < priority, and_(Item.priority == priority, Item.id < item_id))
        return (
            connection.scalar(
                select(func.count()).select_from(Item).where(Item.state.in_(UNDER_WAY), before, *conditions)
            )
            or 0
        )

    def _estimate(self, connection: Connection, photos: int) -> float | None:
        recent = (
            select((Item.finished_at - Item.started_at).label("seconds"))
            .where(Item.state == State.DONE.value)
            .order_by(Item.finished_at.desc())
            .limit(RECENT)
            .subquery()
        )
        mean = connection.scalar(select(func.avg(recent.c.seconds)))
        if mean is None:
            return None
        working = connection.scalar(
            select(func.count()).select_from(Worker).where(Worker.seen_at >= self._clock() - WORKER_GONE_S)
        )
        return float(mean) * photos / max(1, working or 0)


_BEST = (State.DONE, State.LEASED, State.QUEUED, State.FAILED, State.CANCELLED)
_OUTCOME = select(
    Item.id,
    Item.pole_id,
    Item.name,
    Item.image_hash,
    Item.state,
    Item.attempts,
    Item.result,
    Item.error_code,
    Item.error,
    Item.error_status,
)


def _outcome(row: Any) -> Outcome:
    item_id, pole_id, name, image_hash, state, *rest = row
    return Outcome(item_id, pole_id, name, image_hash, State(state), *rest)


def _again(work: Callable[[], T]) -> T:
    """A transaction, begun anew where PostgreSQL ended it so that another one could go on.

    After a pause: begun at once, it might take the lock for which the other one waits.
    """
    for pause in DEADLOCK_PAUSES_S:
        try:
            return work()
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != DEADLOCK:
                raise
        time.sleep(pause)
    return work()


def _owned(claimed: Claimed, worker: str) -> Any:
    """The photo is this worker's, by this very claim."""
    return and_(
        Item.id == claimed.item_id,
        Item.state == State.LEASED.value,
        Item.lease_owner == worker,
        Item.attempts == claimed.attempts,
    )


def _final_state(counts: dict[str, int]) -> JobState:
    if counts.get(State.CANCELLED):
        return JobState.CANCELLED
    if not counts.get(State.FAILED):
        return JobState.DONE
    return JobState.PARTIAL if counts.get(State.DONE) else JobState.FAILED


def _queued(code: str, message: str, status: int) -> dict[str, Any]:
    """What an item is that goes back to the queue, and why."""
    return {
        "state": State.QUEUED.value,
        "lease_owner": None,
        "lease_until": None,
        "error_code": code,
        "error": message[:500],
        "error_status": status,
    }
