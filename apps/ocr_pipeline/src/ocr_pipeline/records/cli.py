"""`ocr-records`: the register and the reports, from the shell."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import nullcontext
from pathlib import Path

from sqlalchemy.exc import OperationalError

from ocr_pipeline.api.settings import SETTINGS_FILE, Settings, load
from ocr_pipeline.database import DatabaseError, open_engine
from ocr_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, SettingsError
from ocr_pipeline.jobs.store import JobStore
from ocr_pipeline.records import report
from ocr_pipeline.records.store import RecordsError, RecordStore, read_register


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 it could not be done, 2 bad usage."""
    parser = argparse.ArgumentParser(
        "ocr-records",
        description="The records that photos are held against, and a feeder's report.",
        epilog="Exit codes: 0 done, 1 it could not be done, 2 bad usage.",
    )
    parser.add_argument("--settings", type=Path, default=SETTINGS_FILE, help="default: %(default)s")
    parser.add_argument(
        "--database",
        metavar="URL",
        help="the records' address, instead of the settings' one; the job tables are then not asked",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("migrate", help="make the tables, or bring them up to date")
    importer = verbs.add_parser(
        "import",
        help="read a register in CSV: pole_id, feeder, and any of the 11 fields; all of it or nothing",
    )
    importer.add_argument("file", metavar="FILE.csv", help="- for standard input")
    maker = verbs.add_parser("report", help="write a feeder's report")
    maker.add_argument("feeder", metavar="FEEDER")
    maker.add_argument("--job", help="of this job's photos only")
    maker.add_argument("--format", choices=["html", "csv", "json"], default="html")
    maker.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    options = parser.parse_args(argv)
    try:
        settings = None if options.database else load(options.settings)
        store = RecordStore(open_engine(settings.url("records") if settings else options.database))
        store.prepare()
        return _run(options, store, settings)
    except (SettingsError, DatabaseError) as error:
        print(f"ocr-records: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RecordsError as error:
        print(f"ocr-records: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OperationalError as error:
        print(
            f"ocr-records: the database does not answer: {str(error.orig).splitlines()[0]}", file=sys.stderr
        )
        return EXIT_FAILED
    except OSError as error:
        print(f"ocr-records: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED


def _run(options: argparse.Namespace, store: RecordStore, settings: Settings | None) -> int:
    if options.verb == "import":
        if options.file == "-":
            raw, name = io.BytesIO(sys.stdin.buffer.read()), "standard input"
        else:
            raw, name = io.BytesIO(Path(options.file).read_bytes()), Path(options.file).name
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            count = store.import_rows(list(read_register(file, name)))
        print(f"{count} poles")
    elif options.verb == "report":
        sent = _sent(options, settings) if settings else None
        made = report.build(store, options.feeder, options.job, sent)
        if made is None:
            print(f"ocr-records: feeder {options.feeder!r}: no photo and no record of it", file=sys.stderr)
            return EXIT_FAILED
        pieces, _ = made.stream(options.format)
        with options.output.open("wb") if options.output else nullcontext(sys.stdout.buffer) as file:
            file.writelines(pieces)
    return EXIT_DONE


def _sent(options: argparse.Namespace, settings: Settings) -> report.Sent | None:
    """What the job tables say; None of a job that they no longer have."""
    jobs = JobStore(open_engine(settings.url("database")), settings.limits())
    jobs.prepare()
    if not options.job:
        return report.Sent("", jobs.standings(feeder=options.feeder))
    view = jobs.view(options.job)
    return report.Sent(view.state.value, jobs.standings(job_id=view.id)) if view else None


if __name__ == "__main__":
    sys.exit(main())
