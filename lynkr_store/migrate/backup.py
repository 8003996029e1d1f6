"""Copy an SQLite file by SQLite's backup API: a consistent copy, also while others write."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Engine, NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.exceptions import BadArgument, StoreUnavailable


def opened_file(engine: Engine) -> Path:
    """Return the path of the file that the engine's connections open.

    Raises:
        BadArgument: PostgreSQL, or a database in memory.
    """
    path = ""
    if backend_of(engine) is Backend.SQLITE:
        with engine.connect() as connection:
            databases = connection.exec_driver_sql("PRAGMA database_list").all()
        path = next(file for _, name, file in databases if name == "main")
    if not path:
        raise BadArgument("backup: works only for an SQLite file; on PostgreSQL use pg_dump")
    return Path(path)


@contextmanager
def _read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file to read it, on a connection that is closed before another thread forks."""
    name, only = f"file:{quote(str(path))}", {"mode": "ro", "uri": "true"}
    engine = create_engine(URL.create("sqlite", database=name, query=only), poolclass=NullPool)
    keep_out_of_children(engine)
    try:
        with engine.connect() as connection:
            source: Any = connection.connection.driver_connection
            yield source
    except DBAPIError as error:
        raise error.driver_exception from None


def back_up(engine: Engine, name: str) -> Path:
    """Copy the engine's file to a new file in the same directory, which only its owner can read.

    In WAL mode, writers are not blocked. The copy includes what is in the file's ``-wal``.

    Args:
        engine: An engine on an SQLite file.
        name: A part of the copy's name; the time is another.

    Returns:
        The copy's path.

    Raises:
        BadArgument: PostgreSQL, or a database in memory.
        StoreUnavailable: The disk is full, or the file cannot be read; no partial copy is left.
    """
    path = opened_file(engine)
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    copy = path.with_name(f"{path.name}.{name}-{at}.bak")
    partial = copy.with_name(copy.name + ".partial")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with _read_only(path) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.rename(copy)
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(f"backup: {error}; nothing was changed") from error
    finally:
        for end in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                partial.with_name(partial.name + end).unlink(missing_ok=True)
    return copy
