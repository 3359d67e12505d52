"""The records database: SQLite embedded, PostgreSQL in production."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ocr_pipeline.jobs.tables import NAMING, RowId


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


class Record(Base):
    """What the utility's register says of a pole. `potencia_kva` is the pole's whole power, banks
    included."""

    __tablename__ = "records"

    pole_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    feeder: Mapped[str] = mapped_column(String(128))
    potencia_kva: Mapped[float | None] = mapped_column(Float(53))
    fabricante: Mapped[str | None] = mapped_column(String(64))
    numero_serie: Mapped[str | None] = mapped_column(String(64))
    data_fabricacao: Mapped[str | None] = mapped_column(String(10))
    elo_fusivel: Mapped[str | None] = mapped_column(String(64))
    tensao_primaria: Mapped[float | None] = mapped_column(Float(53))
    tensao_secundaria: Mapped[str | None] = mapped_column(String(64))
    fases: Mapped[int | None] = mapped_column()
    autoprotegido: Mapped[bool | None] = mapped_column(Boolean)
    patrimonio: Mapped[str | None] = mapped_column(String(64))
    matricula: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (Index("ix_records_feeder", "feeder"),)


class Reading(Base):
    """One photo of a pole as a job read it. The same photo in the same job is there once."""

    __tablename__ = "readings"

    id: Mapped[int] = mapped_column(RowId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(32))
    feeder: Mapped[str] = mapped_column(String(128))
    pole_id: Mapped[str] = mapped_column(String(128))
    name: Mapped[str] = mapped_column(String(512))
    image_sha256: Mapped[str] = mapped_column(String(64))
    reading: Mapped[str] = mapped_column(Text)
    needs_review: Mapped[bool] = mapped_column(Boolean)
    crop: Mapped[bytes | None] = mapped_column(LargeBinary)
    read_at: Mapped[float] = mapped_column(Float(53))

    __table_args__ = (
        UniqueConstraint("job_id", "pole_id", "image_sha256"),
        Index("ix_readings_feeder", "feeder", "job_id"),
        Index("ix_readings_age", "job_id", "read_at"),  # without it every picture is passed to find the old
    )


class Tag(Base):
    """A class that the detector saw in a photo."""

    __tablename__ = "tags"

    reading_id: Mapped[int] = mapped_column(
        RowId, ForeignKey("readings.id", ondelete="CASCADE"), primary_key=True
    )
    tag: Mapped[str] = mapped_column(String(64), primary_key=True)
