"""`ocr-api`: the service on its port. It reads no photo itself: that is the workers' work."""

from __future__ import annotations

import argparse
import sys
import threading
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError

from ocr_pipeline.api import app, redact
from ocr_pipeline.api.keys import KeyStore
from ocr_pipeline.api.settings import SETTINGS_FILE, Settings, load
from ocr_pipeline.database import DatabaseError, open_engine
from ocr_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, SettingsError
from ocr_pipeline.jobs.dispatch import HueyDispatch
from ocr_pipeline.jobs.store import JobStore
from ocr_pipeline.records.report import build
from ocr_pipeline.records.store import RecordStore

CONNECTIONS = 1000
STOP_S = 20
SWITCH_S = 0.001  # threads parse bodies and ask the database: /health need not wait 5 ms for each of them


def make(settings: Settings) -> FastAPI:
    """The application by its settings. Raises SettingsError, DatabaseError, ValueError."""
    store = JobStore(open_engine(settings.url("database"), pool_size=20), settings.limits())
    store.prepare()
    records = RecordStore(open_engine(settings.url("records")))
    records.prepare()
    service = app.Service(
        settings,
        store,
        HueyDispatch(settings.url("queue")),
        KeyStore(Path(settings.keys_file) if settings.keys_file else None),
        settings.shares(),
        partial(build, records),
    )
    return app.create(service)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM; what was accepted is answered first, for STOP_S seconds at most."""
    sys.setswitchinterval(SWITCH_S)
    application = make(settings)
    records = RecordStore(open_engine(settings.url("records"), pool_size=1), settings.records_kept())
    records.keep_retiring(threading.Event())
    uvicorn.run(
        application,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # it has the query in it, and so the key
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=STOP_S,
        h11_max_incomplete_event_size=65536,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 told to stop, 1 failed, 2 bad settings."""
    parser = argparse.ArgumentParser(
        "ocr-api",
        description="The OCR service's HTTP API.",
        epilog="Exit codes: 0 told to stop, 1 failed, 2 bad settings.",
    )
    parser.add_argument("--settings", type=Path, default=SETTINGS_FILE, help="default: %(default)s")
    parser.add_argument("--openapi", action="store_true", help="print the OpenAPI document, and end")
    parser.add_argument("--check", action="store_true", help="check the settings and their files, and end")
    options = parser.parse_args(argv)
    redact.set_up()
    try:
        settings = load(options.settings)
        if options.check:
            settings.shares()
            KeyStore(Path(settings.keys_file) if settings.keys_file else None)
            return EXIT_DONE
        if options.openapi:
            import json

            print(json.dumps(make(settings).openapi(), indent=1))
            return EXIT_DONE
        serve(settings)
    except (SettingsError, DatabaseError, ValueError) as error:
        print(f"ocr-api: {redact.redact(str(error))}", file=sys.stderr)
        return EXIT_USAGE
    except OperationalError as error:
        print(f"ocr-api: the database does not answer: {str(error.orig).splitlines()[0]}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
