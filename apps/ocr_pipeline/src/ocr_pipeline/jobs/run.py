"""`ocr-worker`: one worker process. systemd starts the next when it ends, for whatever reason."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from sqlalchemy.exc import OperationalError

from ocr_pipeline.api import redact
from ocr_pipeline.api.settings import SETTINGS_FILE, Settings, load
from ocr_pipeline.database import DatabaseError, open_engine
from ocr_pipeline.errors import EXIT_FAILED, EXIT_USAGE, OcrError, SettingsError
from ocr_pipeline.jobs.dispatch import HueyDispatch
from ocr_pipeline.jobs.reader import Reader
from ocr_pipeline.jobs.store import JobStore
from ocr_pipeline.jobs.worker import Worker
from ocr_pipeline.records.store import RecordStore

log = logging.getLogger(__name__)


def make(settings: Settings, reader: Reader) -> Worker:
    """A worker by its settings. Raises SettingsError, DatabaseError."""
    store = JobStore(open_engine(settings.url("database")), settings.limits())
    store.prepare()
    records = RecordStore(open_engine(settings.url("records")))
    records.prepare()
    return Worker(
        store,
        reader,
        HueyDispatch(settings.url("queue")),
        settings.worker(),
        shares=settings.shares(),
        keep=records.keep,
    )


def run(worker: Worker, nice: int) -> int:
    """Work behind everything else, until SIGTERM or SIGINT; the photo in work is finished first."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    with contextlib.suppress(OSError):
        os.nice(max(0, nice - os.nice(0)))
    return worker.run()


def pipeline_reader(settings: Settings) -> Reader:
    """The real pipeline, by its own settings."""
    from ocr_pipeline import build
    from ocr_pipeline import settings as pipeline_settings
    from ocr_pipeline.api.app import VERSION
    from ocr_pipeline.jobs.pipeline_reader import PipelineReader

    chosen = pipeline_settings.load(settings.pipeline_file or None)
    return PipelineReader(build.pipeline(chosen), chosen, VERSION, settings.worker().reading_s)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 told to stop or time for a fresh one, 1 failed, 2 bad settings, 75 a
    photo overran."""
    parser = argparse.ArgumentParser(
        "ocr-worker",
        description="Read the photos that wait in the job tables, one by one.",
        epilog="Exit codes: 0 told to stop, or time for a fresh process; 1 failed; 2 bad settings; "
        "75 a photo took too long.",
    )
    parser.add_argument("--settings", type=Path, default=SETTINGS_FILE, help="default: %(default)s")
    options = parser.parse_args(argv)
    redact.set_up()
    try:
        settings = load(options.settings)
        return run(make(settings, pipeline_reader(settings)), settings.worker_nice)
    except (SettingsError, DatabaseError, ValueError) as error:
        print(f"ocr-worker: {redact.redact(str(error))}", file=sys.stderr)
        return EXIT_USAGE
    except OperationalError as error:
        print(f"ocr-worker: the database does not answer: {str(error.orig).splitlines()[0]}", file=sys.stderr)
        return EXIT_FAILED
    except OcrError as error:
        print(f"ocr-worker: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
