# ruff: noqa: INP001, S608 - names are this project's own
"""Databases that exist only for one measurement; the bare driver inserts their rows."""

import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Final

import psycopg
from sqlalchemy import make_url

from benchmarks.sample import COLUMNS, Row
from lynkr_store.backend import Backend
from tests.support.postgres import PgServer, available_servers

Driver = sqlite3.Connection | psycopg.Connection[Any]

_BATCH: Final = 10_000
_SQLITE_INDEXES: Final = (
    "SELECT name, sql FROM sqlite_schema "
    "WHERE type = 'index' AND tbl_name = 'routing_telemetry' AND sql IS NOT NULL"
)
_POSTGRESQL_INDEXES: Final = (
    "SELECT indexname, indexdef FROM pg_indexes "
    "WHERE tablename = 'routing_telemetry' AND indexname NOT IN "
    "(SELECT conname FROM pg_constraint)"
)


@dataclass(frozen=True)
class Place:
    """A directory or server where databases are created.

    Attributes:
        name: ``sqlite``, or ``postgres`` and the major version.
        backend: The backend of its databases.
        make: Creates an empty database with a name and returns its URL.
        remove: Removes the database with a name.
    """

    name: str
    backend: Backend
    make: Callable[[str], str]
    remove: Callable[[str], None]

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database, which is removed at the end."""
        name = f"bench{next(_numbers)}"
        try:
            yield self.make(name)
        finally:
            self.remove(name)


_numbers = count()


@contextmanager
def sqlite_files() -> Iterator[Place]:
    """A temporary directory for SQLite files."""
    with tempfile.TemporaryDirectory() as folder:

        def make(name: str) -> str:
            return f"sqlite:///{folder}/{name}.db"

        def remove(name: str) -> None:
            for end in ("", "-wal", "-shm"):
                Path(folder, f"{name}.db{end}").unlink(missing_ok=True)

        yield Place("sqlite", Backend.SQLITE, make, remove)


@contextmanager
def postgresql_server() -> Iterator[Place]:
    """A server of the newest installed PostgreSQL, without fsync."""
    with PgServer(available_servers()[-1]) as server:
        yield Place(server.name, Backend.POSTGRESQL, server.create_database, server.drop_database)


@contextmanager
def every_place() -> Iterator[tuple[Place, ...]]:
    """The places of SQLite and of PostgreSQL."""
    with sqlite_files() as files, postgresql_server() as server:
        yield files, server


def connect(url: str) -> Driver:
    """Connect the bare driver: AUTOCOMMIT, and on SQLite the PRAGMAs of store and original."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return psycopg.connect(url, autocommit=True)
    connection = sqlite3.connect(str(parsed.database), isolation_level=None)
    for pragma in ("synchronous = NORMAL", "cache_size = -16000", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def insert(
    connection: Driver,
    rows: Iterable[Row],
    batch: int = _BATCH,
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Insert rows with ``executemany`` or COPY, in transactions of ``batch`` rows."""
    into = f"routing_telemetry ({', '.join(columns)})"
    iterator = iter(rows)
    while several := list(islice(iterator, batch)):
        if isinstance(connection, psycopg.Connection):
            with connection.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN") as copy:
                for row in several:
                    copy.write_row(row)
        else:
            marks = ", ".join("?" * len(columns))
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(f"INSERT INTO {into} VALUES ({marks})", several)
            connection.execute("COMMIT")


@contextmanager
def without_indexes(connection: Driver) -> Iterator[None]:
    """Drop the table's indexes, and build them again at the end: inserting is faster without."""
    driver: Any = connection
    sqlite = isinstance(connection, sqlite3.Connection)
    indexes = driver.execute(_SQLITE_INDEXES if sqlite else _POSTGRESQL_INDEXES).fetchall()
    for name, _ in indexes:
        driver.execute(f"DROP INDEX {name}")
    yield
    for _, definition in indexes:
        driver.execute(definition)


def settle(connection: Driver) -> None:
    """Bring a database to rest: move SQLite's WAL to the file, run PostgreSQL's VACUUM."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    else:
        connection.execute("VACUUM ANALYZE routing_telemetry")
