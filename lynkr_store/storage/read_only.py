"""Engines on SQLite files that are read and never altered, whoever made them."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from lynkr_store.db.errors import said_of_file
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.db.sqlite import (
    CONNECTION_PRAGMAS,
    Deadline,
    load_schema,
    on_begin,
    require_regular_file,
    set_up,
)
from lynkr_store.exceptions import (
    StoreUnavailable,
)
from lynkr_store.process.files import identity_of

_OF_OTHERS_PRAGMAS: Final = (
    ("cell_size_check", "ON"),  # a damaged page is told when it is read, not while it is used
    # What somebody put into the file's schema may call no function that does more than compute.
    # Not where the store writes: with it, SQLite before 3.42 refuses a host's trigger that calls
    # json().
    ("trusted_schema", "OFF"),
)
_OF_OTHERS_LIMITS: Final = {
    # rows hold two texts of some ten thousand characters; SQLite's own limit is 1 GB a value
    sqlite3.SQLITE_LIMIT_LENGTH: 64 * 2**20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_DEADLINE: Final = "lynkr_store_deadline"  # until when a statement may take
_STEPS: Final = 100_000  # of SQLite's machine between two looks at the clock: some ms


def create_reading_engine(
    path: Path, *, views: Sequence[str] = (), statement_timeout_s: float = 30.0
) -> Engine:
    """An Engine that cannot alter the SQLite file, whoever made it.

    Whatever is in the file, a statement takes a bounded time, and a value of it bounded memory.

    Args:
        path: The file.
        views: What each connection runs for itself, ``CREATE TEMP VIEW …``.
        statement_timeout_s: Seconds after which a statement is given up.

    Raises:
        StoreUnavailable: There is no such file, or it is no database.
    """
    require_regular_file(path)
    if identity_of(path) is None:
        raise StoreUnavailable(f"{path}: there is no such file, or this user may not look for it")
    said = ""
    for uri in _reading_uris(path):
        engine = _reading_engine(path, uri, views, statement_timeout_s)
        try:
            with engine.connect():
                return engine
        except DBAPIError as error:
            said = said_of_file(cast("sqlite3.Error", error.orig))
    raise StoreUnavailable(f"{path}: cannot be opened for reading, or is no database: {said}")


def _reading_engine(path: Path, uri: str, views: Sequence[str], timeout_s: float) -> Engine:
    engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)
    keep_out_of_children(engine)

    def do_connect(*_: object) -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        try:
            for category, limit in _OF_OTHERS_LIMITS.items():
                connection.setlimit(category, limit)
            load_schema(connection, timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def on_connect(connection: Any, record: ConnectionPoolEntry) -> None:
        set_up(connection)
        record.info[_DEADLINE] = Deadline(connection, timeout_s, _STEPS)
        with closing(connection.cursor()) as cursor:
            for name, value in (*CONNECTION_PRAGMAS, *_OF_OTHERS_PRAGMAS):
                cursor.execute(f"PRAGMA {name} = {value}")
            for view in views:
                cursor.execute(view)
            cursor.execute("PRAGMA query_only = 1")

    def before_statement(connection: Connection, *_: object) -> None:
        connection.info[_DEADLINE].begin()

    event.listen(engine, "do_connect", do_connect)
    event.listen(engine, "connect", on_connect)
    event.listen(engine, "before_cursor_execute", before_statement)
    event.listen(engine, "begin", on_begin)
    return engine


def _reading_uris(path: Path) -> Iterator[str]:
    """Ways to open a file without altering it, the better first."""
    uri = f"file:{quote(str(path.resolve()))}"
    if any(path.with_name(path.name + end).exists() for end in ("-wal", "-journal")):
        # Somebody is writing, or was interrupted: a connection that may write would tidy up.
        yield f"{uri}?mode=ro"
        return
    # Read-only, a file in WAL mode would be left with an empty -wal beside it; this connection,
    # which PRAGMA query_only keeps from writing, takes its own away again.
    yield f"{uri}?mode=rw"
    yield f"{uri}?mode=ro"
    yield f"{uri}?mode=ro&immutable=1"  # in a folder where nothing may be made
