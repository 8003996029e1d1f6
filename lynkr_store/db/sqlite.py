"""What an SQLite connection of the store is told: PRAGMAs, BEGIN, how long it waits, its WAL."""

import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import methodcaller
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.pool import ConnectionPoolEntry

from lynkr_store.backend import VERSION_TABLE, Backend
from lynkr_store.db.dialect import AT_ONCE, BEGIN, backend_of, driver_of
from lynkr_store.exceptions import (
    StoreUnavailable,
)
from lynkr_store.process.files import make_private

# what is known of a connection
_SET_PAGES: Final = "lynkr_store_wal_pages"  # what `checkpoint_after` told it
_PATIENT: Final = "lynkr_store_patient"  # it waits for locks
_OVERWRITES: Final = "lynkr_store_overwrites"  # what is removed, with zeros
_IN_WAL: Final = "lynkr_store_in_wal"  # a commit needs no lock beside that which BEGIN took
_SECURE_DELETE: Final = "secure_delete"
_BUSY_MS: Final = 3_000  # the gateway writes the same file and waits as long
WAL_PAGES: Final = 1_000
"""Pages in the WAL after which a commit moves them to the file, by SQLite's default."""
CONNECTION_PRAGMAS: Final = (
    ("busy_timeout", _BUSY_MS),
    ("synchronous", "NORMAL"),  # with WAL: no corruption on a power cut, the last commits may go
    ("cache_size", -16_384),  # KiB, so 16 MB
    ("temp_store", "MEMORY"),  # sorting never writes prompt texts to another file
    # what is removed is overwritten with zeros; measured: less than 1 % of the ingest's time
    (_SECURE_DELETE, "ON"),
)
_STEPS_OF_SCHEMA: Final = 1_000  # each may take a look at all tables that were read before
_SCHEMA_S: Final = 60.0  # to read the schema of a file that the store opens to write
_FRESH_FILE_PRAGMAS: Final = (
    # Both are fixed with the file's first page, so they come before WAL.
    ("page_size", 8_192),  # rows of 2 KB: 31 % less on disk than pages of 4 KB
    ("auto_vacuum", "INCREMENTAL"),  # retention can give space back
)
_decoded: Final = methodcaller("decode", errors="replace")  # of each text that is read


class Deadline:
    """Ends a statement of an SQLite connection that takes too long, with SQLITE_INTERRUPT."""

    def __init__(self, connection: sqlite3.Connection, seconds: float, steps: int) -> None:
        self._seconds = seconds
        self.begin()
        connection.set_progress_handler(self._is_over, steps)

    def begin(self) -> None:
        """A statement begins."""
        self._at = time.monotonic() + self._seconds

    def _is_over(self) -> bool:
        return time.monotonic() > self._at


def load_schema(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Have SQLite read what a file's tables are, in a bounded time.

    It does so before the first statement, and takes a time that grows with their number's square:
    measured with one query, 6 s for 30,000 views and 42 s for 100,000, on a busy machine.
    """
    Deadline(connection, timeout_s, _STEPS_OF_SCHEMA)
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
    finally:
        connection.set_progress_handler(None, 0)


def require_regular_file(path: Path) -> None:
    """Refuse what is no file, before SQLite makes of it what it likes, or waits for ever.

    Raises:
        StoreUnavailable: A directory stands there, or a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # it is not there, or SQLite says what is wrong
        return
    if stat.S_ISDIR(mode):
        raise StoreUnavailable(
            f"{path}: a directory stands there; give the path of a file, such as one in it"
        )
    if not stat.S_ISREG(mode):
        raise StoreUnavailable(
            f"{path}: a pipe, a device or a socket stands there; give the path of a file"
        )


def ensure_begun(connection: Connection) -> None:
    """Begin an SQLite transaction before a SAVEPOINT, on a host's engine too.

    Python's driver does not by itself: the SAVEPOINT would then be the transaction, and its
    RELEASE the commit.
    """
    if backend_of(connection) is Backend.SQLITE and not driver_of(connection).in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def checkpoint_after(connection: Connection, pages: int) -> None:
    """Have SQLite move what stands in its WAL to the file when it is so many pages at a commit."""
    if connection.info.get(_SET_PAGES) != pages:
        connection.exec_driver_sql(f"PRAGMA wal_autocheckpoint = {pages}")
        connection.info[_SET_PAGES] = pages


def checkpoint(connection: Connection) -> int:
    """Move what stands in SQLite's WAL to the file, as far as it goes without waiting for anybody.

    Outside of a transaction. A failure is left to the next one, as SQLite does with its own.

    Returns:
        Pages that stand in the WAL; a writer begins it anew when all of them are in the file.
    """
    driver = driver_of(connection)
    try:
        _, pages, _ = driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except connection.dialect.loaded_dbapi.Error:
        return 0
    return int(pages)


def empty_wal(connection: Connection) -> None:
    """Move what stands in SQLite's WAL to the file and make the WAL empty, if nobody uses either.

    Otherwise the WAL keeps the pages as they were before texts were removed from them, until new
    ones take their place. Outside of a transaction. It waits for nobody, and a failure is left to
    the next time.
    """
    driver = driver_of(connection)
    with suppress(connection.dialect.loaded_dbapi.Error):
        (patience_ms,) = driver.execute("PRAGMA busy_timeout").fetchone()
        driver.execute("PRAGMA busy_timeout = 0")
        try:
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            driver.execute(f"PRAGMA busy_timeout = {patience_ms}")


@contextmanager
def overwriting(connection: Connection) -> Iterator[None]:
    """Have SQLite overwrite what is removed or moved with zeros, on a host's connection too.

    By default SQLite only notes that the place is free. A host's connection is afterwards as it
    was. Other backends are left alone: PostgreSQL's VACUUM clears what nobody sees any more.
    """
    if backend_of(connection) is not Backend.SQLITE:
        yield
        return
    if connection.info.get(_OVERWRITES):  # our own
        yield
        return
    before = connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE}").scalar_one()
    connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE} = ON").close()
    try:
        yield
    finally:
        with suppress(DBAPIError, InvalidRequestError):  # after a fault it may be closed
            name = ("OFF", "ON", "FAST")[before]
            connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE} = {name}").close()


def before_connect(
    dialect: Dialect,  # noqa: ARG001
    record: ConnectionPoolEntry,  # noqa: ARG001
    arguments: list[Any],
    options: dict[str, Any],
) -> None:
    """Make the file's directory, and the file, which its owner alone may read: it holds prompts.

    SQLite gives the mode to its ``-wal`` and ``-shm`` too. A file that is there keeps its mode.
    """
    path = arguments[0]
    if path == ":memory:":
        return
    if options.get("uri"):
        if "mode=memory" not in path:
            require_regular_file(Path(unquote(urlsplit(path).path)))
        return
    require_regular_file(Path(path))
    try:
        # whoever else may write there could put another file in its place
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(
            f"url: the directory {Path(path).parent} cannot be made ({error.strerror}); "
            "give a path where this user may write"
        ) from error
    with suppress(OSError, RuntimeError):  # then SQLite makes it, or says why it cannot be
        make_private(Path(path).resolve())  # where a link leads, for there SQLite makes it


def on_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    """Set a new connection of a file that the store may write, and a new file, as the store wants.

    A file without the store's tables keeps its journal mode until it is adopted.
    """
    set_up(connection)
    if isinstance(connection, sqlite3.Connection):  # not aiosqlite's, which come later
        load_schema(connection, _SCHEMA_S)
    cursor = connection.cursor()
    try:
        for name, value in CONNECTION_PRAGMAS:
            cursor.execute(f"PRAGMA {name} = {value}")
        record.info[_OVERWRITES] = True
        cursor.execute("PRAGMA page_count")
        fresh = cursor.fetchall() == [(0,)]
        if fresh:
            for name, value in _FRESH_FILE_PRAGMAS:
                cursor.execute(f"PRAGMA {name} = {value}")
        # A file of somebody else's stays as it is, down to its header, until it is adopted.
        if fresh or _is_ours(cursor):
            # Locked: another connection is switching, and the mode is the file's, not ours.
            # Read-only: then there is nothing to switch for.
            with suppress(sqlite3.OperationalError):
                cursor.execute("PRAGMA journal_mode = WAL")
                record.info[_IN_WAL] = cursor.fetchall() == [("wal",)]
    finally:
        cursor.close()


def set_up(connection: Any) -> None:
    """Leave BEGIN to SQLAlchemy, and read texts that are no UTF-8 with replacement characters."""
    # The driver's own BEGIN is off: it comes too late for SELECTs and not at all for SAVEPOINT.
    connection.isolation_level = None
    driver = getattr(connection, "driver_connection", connection)
    driver.text_factory = _decoded


def _is_ours(cursor: Any) -> bool:
    cursor.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (VERSION_TABLE,))
    return cursor.fetchone() is not None


def on_begin(connection: Connection) -> None:
    """Begin a transaction as the engine's execution options say."""
    options = connection.get_execution_options()
    at_once = options.get(AT_ONCE, False)
    _set_patience(connection, patient=not at_once)
    connection.exec_driver_sql(f"BEGIN {options.get(BEGIN, 'DEFERRED')}")
    if at_once and not connection.info.get(_IN_WAL):
        _set_patience(connection, patient=True)


def _set_patience(connection: Connection, *, patient: bool) -> None:
    if connection.info.get(_PATIENT, True) != patient:  # as a rule the last one wanted the same
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_MS if patient else 0}")
        connection.info[_PATIENT] = patient
