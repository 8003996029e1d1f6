"""Sets up the store's SQLite connections: PRAGMAs, BEGIN, waiting for locks, the WAL."""

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

# keys of a connection's info
_SET_PAGES: Final = "lynkr_store_wal_pages"  # the number that `checkpoint_after` set
_PATIENT: Final = "lynkr_store_patient"  # it waits for locks
_OVERWRITES: Final = "lynkr_store_overwrites"  # it overwrites removed content with zeros
_IN_WAL: Final = "lynkr_store_in_wal"  # a commit needs no other lock than the one of BEGIN
_SECURE_DELETE: Final = "secure_delete"
_BUSY_MS: Final = 3_000  # the gateway writes the same file and waits as long
WAL_PAGES: Final = 1_000
"""Pages in the WAL after which a commit moves them to the file, by SQLite's default."""
CONNECTION_PRAGMAS: Final = (
    ("busy_timeout", _BUSY_MS),
    ("synchronous", "NORMAL"),  # with WAL a power cut may lose the last commits, never the file
    ("cache_size", -16_384),  # KiB, so 16 MB
    ("temp_store", "MEMORY"),  # sorting never writes prompt texts to another file
    # removed content is overwritten with zeros; measured: less than 1 % of the ingest's time
    (_SECURE_DELETE, "ON"),
)
_STEPS_OF_SCHEMA: Final = 1_000  # each may check all tables that were read before
_SCHEMA_S: Final = 60.0  # to read the schema of a file that the store opens to write
_FRESH_FILE_PRAGMAS: Final = (
    # Both are fixed when the file's first page is written, so they come before WAL.
    ("page_size", 8_192),  # rows of 2 KB: 31 % less on disk than pages of 4 KB
    ("auto_vacuum", "INCREMENTAL"),  # so that retention can return space to the file system
)
_decoded: Final = methodcaller("decode", errors="replace")  # of each text that is read


class Deadline:
    """Ends a statement that takes too long with SQLITE_INTERRUPT."""

    def __init__(self, connection: sqlite3.Connection, seconds: float, steps: int) -> None:
        self._seconds = seconds
        self.begin()
        connection.set_progress_handler(self._is_over, steps)

    def begin(self) -> None:
        """Start the time of a statement."""
        self._at = time.monotonic() + self._seconds

    def _is_over(self) -> bool:
        return time.monotonic() > self._at


def load_schema(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Make SQLite read a file's schema, in a bounded time.

    SQLite reads it before the first statement. The time grows with the square of the number of
    tables and views: measured on a busy machine, 6 s for 30,000 views and 42 s for 100,000.
    """
    Deadline(connection, timeout_s, _STEPS_OF_SCHEMA)
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
    finally:
        connection.set_progress_handler(None, 0)


def require_regular_file(path: Path) -> None:
    """Refuse a path that is not a regular file: SQLite could wait for ever, or fail obscurely.

    Raises:
        StoreUnavailable: The path is a directory, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # it does not exist, or SQLite will say what is wrong
        return
    if stat.S_ISDIR(mode):
        raise StoreUnavailable(f"{path} is a directory; give the path of a file, such as one in it")
    if not stat.S_ISREG(mode):
        raise StoreUnavailable(
            f"{path} is a pipe, a device or a socket; give the path of a regular file"
        )


def ensure_begun(connection: Connection) -> None:
    """Begin an SQLite transaction before a SAVEPOINT, on a host's engine too.

    Python's driver does not begin one: the SAVEPOINT would then be the transaction, and its RELEASE
    the commit.
    """
    if backend_of(connection) is Backend.SQLITE and not driver_of(connection).in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def checkpoint_after(connection: Connection, pages: int) -> None:
    """Make a commit move the WAL's content to the file once the WAL has so many pages."""
    if connection.info.get(_SET_PAGES) != pages:
        connection.exec_driver_sql(f"PRAGMA wal_autocheckpoint = {pages}")
        connection.info[_SET_PAGES] = pages


def checkpoint(connection: Connection) -> int:
    """Move the content of SQLite's WAL to the file, as far as possible without waiting for a lock.

    Call it outside a transaction. A failure is ignored, as SQLite ignores those of its own
    checkpoints; the next call tries again.

    Returns:
        The number of pages in the WAL. A writer starts the WAL from its beginning once all of them
            are in the file.
    """
    driver = driver_of(connection)
    try:
        _, pages, _ = driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except connection.dialect.loaded_dbapi.Error:
        return 0
    return int(pages)


def empty_wal(connection: Connection) -> None:
    """Move the content of SQLite's WAL to the file and truncate the WAL, if nothing uses them.

    Otherwise the WAL keeps the old pages, with texts that were removed, until new pages overwrite
    them. Call it outside a transaction. It waits for no lock and ignores a failure; the next call
    tries again.
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
    """Make SQLite overwrite removed or moved content with zeros, on a host's connection too.

    By default SQLite only marks the space as free. A host's setting is restored afterwards. On
    PostgreSQL this does nothing: VACUUM clears rows that no transaction can see any more.
    """
    if backend_of(connection) is not Backend.SQLITE:
        yield
        return
    if connection.info.get(_OVERWRITES):  # a connection of the store's own engine
        yield
        return
    before = connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE}").scalar_one()
    connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE} = ON").close()
    try:
        yield
    finally:
        with suppress(DBAPIError, InvalidRequestError):  # after an error it may be closed
            name = ("OFF", "ON", "FAST")[before]
            connection.exec_driver_sql(f"PRAGMA {_SECURE_DELETE} = {name}").close()


def before_connect(
    dialect: Dialect,  # noqa: ARG001
    record: ConnectionPoolEntry,  # noqa: ARG001
    arguments: list[Any],
    options: dict[str, Any],
) -> None:
    """Create the directory and the file, readable by its owner only, because it holds prompts.

    SQLite gives ``-wal`` and ``-shm`` the same mode. An existing file keeps its mode.
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
        # 0o755: a user who may write in the directory could replace the file
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(
            f"url: the directory {Path(path).parent} cannot be created ({error.strerror}); "
            "give a path where this user may write"
        ) from error
    with suppress(OSError, RuntimeError):  # then SQLite creates it, or says why it cannot
        make_private(Path(path).resolve())  # SQLite creates a link's target


def on_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    """Set up a new connection to a file that the store may write, and a new file.

    A file without the store's tables keeps its journal mode until it is adopted.
    """
    set_up(connection)
    if isinstance(connection, sqlite3.Connection):  # not an aiosqlite connection, made later
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
        # Another program's file is not changed at all, not even its header, until it is adopted.
        if fresh or _is_ours(cursor):
            # The errors: locked, because another connection sets the mode, which is the file's; or
            # read-only, and then the mode does not matter.
            with suppress(sqlite3.OperationalError):
                cursor.execute("PRAGMA journal_mode = WAL")
                record.info[_IN_WAL] = cursor.fetchall() == [("wal",)]
    finally:
        cursor.close()


def set_up(connection: Any) -> None:
    """Leave BEGIN to SQLAlchemy, and decode texts that are not UTF-8 with U+FFFD."""
    # The driver's own BEGIN is off: it comes too late for SELECT, and never for SAVEPOINT.
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
    if connection.info.get(_PATIENT, True) != patient:  # usually it is set already
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_MS if patient else 0}")
        connection.info[_PATIENT] = patient
