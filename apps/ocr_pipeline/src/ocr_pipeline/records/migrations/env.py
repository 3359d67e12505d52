"""Alembic's environment for the records."""

from ocr_pipeline.database import run_environment
from ocr_pipeline.records.tables import Base

run_environment(Base.metadata, "ocr_records_revision")
