"""The databases of the service through SQLAlchemy: SQLite embedded, PostgreSQL when several boxes work."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

BUSY_TIMEOUT_S = 30
READ_ONLY = {"ocr_read_only": True}


class DatabaseError(Exception):
    """A database that cannot be used; the text is one line for the person, without its password."""


def address(url: str) -> URL:
    """The address of a database that can be used. Raises DatabaseError."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DatabaseError(
            "the database's address cannot be read; write it like sqlite:////var/lib/x.db"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    file = parsed.drivername == "sqlite" and parsed.database and parsed.database != ":memory:"
    if not file and parsed.drivername != "postgresql+psycopg":
        fix = "use sqlite:///FILE or postgresql://USER@HOST/NAME"
        raise DatabaseError(f"{parsed.render_as_string(hide_password=True)} is not supported; {fix}")
    return parsed


def open_engine(url: str, *, pool_size: int = 5) -> Engine:
    """An engine for `sqlite:///FILE` or `postgresql://…`. Raises DatabaseError for any other address."""
    parsed = address(url)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(
            parsed,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10},
        )
    assert parsed.database is not None
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, pool_size=pool_size, max_overflow=pool_size)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # Transactions are begun by _begin_sqlite: the driver's own habit begins them late, and two writers that
    # have read before they write then fail at once instead of waiting for each other.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA secure_delete=FAST")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    connection.exec_driver_sql("BEGIN" if options.get("ocr_read_only") else "BEGIN IMMEDIATE")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that only reads: on SQLite it waits for no writer, and none for it."""
    with engine.connect().execution_options(**READ_ONLY) as connection:
        yield connection


def migrate(engine: Engine, package: str) -> None:
    """Bring the schema of `package` (a package with `migrations/`) to its newest revision."""
    from alembic import command
    from alembic.config import Config

    with resources.as_file(resources.files(package) / "migrations") as folder:
        config = Config()
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":  # two processes that start together
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(736429)")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def run_environment(metadata: Any, version_table: str) -> None:
    """What an env.py of ours does: on the connection that `migrate` gave, or on the address of `-x url=`."""
    from alembic import context

    connection = context.config.attributes.get("connection")
    if connection is None:
        url = context.get_x_argument(as_dictionary=True).get("url", "")
        with open_engine(url).begin() as opened:
            _configure(context, opened, metadata, version_table)
            context.run_migrations()
        return
    _configure(context, connection, metadata, version_table)
    context.run_migrations()


def _configure(context: Any, connection: Connection, metadata: Any, version_table: str) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=version_table,
        render_as_batch=connection.dialect.name == "sqlite",
    )
