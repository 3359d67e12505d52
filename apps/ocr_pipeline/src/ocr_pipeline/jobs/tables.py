"""The tables of jobs. An item is one photo; its state is the truth, a message in huey's queue only a wake-up.

queued ──claim──▶ leased ──▶ done | failed | cancelled      (terminal: never left again)
   ▲                 │
   └── lease expired, GPU hung, share away: attempts are counted, and bounded
       backend or records away, GPU busy: a job's photo is bounded by the time since, a single one by attempts
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
LONGEST_NAME = 512  # of a photo; PostgreSQL refuses a longer one, SQLite would take it
RowId = BigInteger().with_variant(Integer, "sqlite")


class Kind(StrEnum):
    """What a job is. Whoever waits for an answer goes before the jobs."""

    READ = "READ"  # one generateContent request
    TEXT = "TEXT"  # one request for a pole's text
    ALT = "ALT"  # photos that came with the request
    TRA = "TRA"  # a whole feeder, photos on a share


class State(StrEnum):
    """Of an item: the first two are under way, the others final."""

    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobState(StrEnum):
    """Of a job. `partial`: some of its photos failed."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNDER_WAY = (State.QUEUED.value, State.LEASED.value)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8))
    state: Mapped[str] = mapped_column(String(16))
    owner: Mapped[str] = mapped_column(String(64))
    feeder: Mapped[str] = mapped_column(String(128), default="")
    share: Mapped[str] = mapped_column(String(64), default="")
    idempotency: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64), default="")
    duplicates: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float] = mapped_column(Float(53))
    finished_at: Mapped[float | None] = mapped_column(Float(53))

    __table_args__ = (
        UniqueConstraint("owner", "idempotency"),
        Index("ix_jobs_finished", "finished_at"),
    )


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(32), ForeignKey("jobs.id", ondelete="CASCADE"))
    pole_id: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(LONGEST_NAME))
    image_hash: Mapped[str] = mapped_column(String(64))
    priority: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(server_default="0")
    not_before: Mapped[float] = mapped_column(Float(53), server_default="0")
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[float | None] = mapped_column(Float(53))
    heartbeat_at: Mapped[float | None] = mapped_column(Float(53))
    started_at: Mapped[float | None] = mapped_column(Float(53))
    finished_at: Mapped[float | None] = mapped_column(Float(53))
    trouble_since: Mapped[float | None] = mapped_column(Float(53))
    result: Mapped[str | None] = mapped_column(Text)
    error_code: Mapped[str | None] = mapped_column(String(32))
    error: Mapped[str | None] = mapped_column(String(500))
    error_status: Mapped[int | None] = mapped_column()

    __table_args__ = (
        UniqueConstraint("job_id", "pole_id", "image_hash"),  # the idempotency key
        Index("ix_items_order", "state", "priority", "id"),
        Index("ix_items_job", "job_id", "state"),
        Index("ix_items_finished", "finished_at"),
    )


class Photo(Base):
    """The bytes that came with a request, until the last item that needs them is over."""

    __tablename__ = "photos"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Worker(Base):
    """Who works, for readiness and estimates."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    seen_at: Mapped[float] = mapped_column(Float(53))
    ready: Mapped[bool] = mapped_column(default=False)
    problem: Mapped[str] = mapped_column(String(500), default="")
    model: Mapped[str] = mapped_column(String(200), default="")
