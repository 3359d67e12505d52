"""Alembic's environment for the tables of jobs."""

from ocr_pipeline.database import run_environment
from ocr_pipeline.jobs.tables import Base

run_environment(Base.metadata, "ocr_jobs_revision")
