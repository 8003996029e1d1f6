"""Opens SQLite files for reading and never changes them; also a gateway's file of any version."""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    MetaData,
    Table,
    create_engine,
    event,
    false,
    null,
    select,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.schema import CreateView

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import disposing, parse_url
from lynkr_store.db.engines import create_store_engine
from lynkr_store.db.errors import said_of_file, translated
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.db.models import CHANGES, DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.db.sqlite import (
    CONNECTION_PRAGMAS,
    Deadline,
    load_schema,
    on_begin,
    require_regular_file,
    set_up,
)
from lynkr_store.db.urls import is_memory
from lynkr_store.exceptions import (
    BadArgument,
    SchemaBehind,
    SchemaError,
    StoreUnavailable,
)
from lynkr_store.migrate import revisions
from lynkr_store.process.files import identity_of
from lynkr_store.settings import StoreSettings

_OF_OTHERS_PRAGMAS: Final = (
    ("cell_size_check", "ON"),  # a damaged page raises an error when it is read, not later
    # The schema, which another program wrote, may call no function with side effects. Not set where
    # the store writes: SQLite before 3.42 would refuse a host's trigger that calls json().
    ("trusted_schema", "OFF"),
)
_OF_OTHERS_LIMITS: Final = {
    # a row holds two texts of about ten thousand characters; SQLite's own limit is 1 GB per value
    sqlite3.SQLITE_LIMIT_LENGTH: 64 * 2**20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_ROLLUP_TABLES: Final = (DIMENSIONS, ROLLUPS, PROGRESS, CHANGES)
"""If these are missing, every answer is read from the rows."""
_DEADLINE: Final = "lynkr_store_deadline"  # in a connection's info: ends long statements
_STEPS: Final = 100_000  # SQLite's instructions between two checks of the clock: a few ms


def create_reading_engine(
    path: Path, *, views: Sequence[str] = (), statement_timeout_s: float = 30.0
) -> Engine:
    """An Engine that cannot change the SQLite file, whichever program created it.

    Whatever the file contains, the time of a statement and the memory of a value are limited.

    Args:
        path: The file.
        views: Statements that each connection runs first, ``CREATE TEMP VIEW …``.
        statement_timeout_s: Seconds after which a statement is interrupted.

    Raises:
        StoreUnavailable: The file does not exist, or is not a database.
    """
    require_regular_file(path)
    if identity_of(path) is None:
        raise StoreUnavailable(
            f"{path} does not exist, or this user may not read its directory; give a file's path"
        )
    said = ""
    for uri in _reading_uris(path):
        engine = _reading_engine(path, uri, views, statement_timeout_s)
        try:
            with engine.connect():
                return engine
        except DBAPIError as error:
            said = said_of_file(cast("sqlite3.Error", error.orig))
    raise StoreUnavailable(f"{path} cannot be opened for reading, or is not a database: {said}")


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
    """Ways to open a file without changing it, the best first."""
    uri = f"file:{quote(str(path.resolve()))}"
    if any(path.with_name(path.name + end).exists() for end in ("-wal", "-journal")):
        # Another process is writing, or was interrupted: a writable connection would clean up.
        yield f"{uri}?mode=ro"
        return
    # In read-only mode SQLite leaves an empty -wal next to a file in WAL mode. This connection
    # removes it again, and PRAGMA query_only prevents it from writing.
    yield f"{uri}?mode=rw"
    yield f"{uri}?mode=ro"
    yield f"{uri}?mode=ro&immutable=1"  # in a directory where this user may not create files


def inspecting_engine(settings: StoreSettings) -> Engine:
    """An engine that changes nothing, for looking at a database's schema.

    Raises:
        UnsupportedDatabase: Another database or driver.
        StoreUnavailable: The file does not exist, or is not a database.
    """
    url = parse_url(settings.url)
    if url.get_backend_name() == Backend.SQLITE:
        return create_reading_engine(
            _file_to_read(url), statement_timeout_s=settings.statement_timeout_s
        )
    engine = create_store_engine(url, schema=settings.schema_name)
    return engine.execution_options(postgresql_readonly=True)


def _file_to_read(url: URL) -> Path:
    if is_memory(url) or url.database is None:
        raise BadArgument("url: a database in memory is empty; give the URL of a file")
    return Path(url.database)


def open_read_only(settings: StoreSettings) -> tuple[Engine, tuple[str, ...]]:
    """An engine that changes nothing, and the missing columns, which its view supplies as NULL."""
    path = _file_to_read(parse_url(settings.url))
    timeout_s = settings.statement_timeout_s
    names = (TELEMETRY.name, *(table.name for table in _ROLLUP_TABLES))
    with (
        disposing(create_reading_engine(path, statement_timeout_s=timeout_s)) as engine,
        translated(of_rows=False),
        engine.connect() as connection,
    ):
        for name, kind in catalogue.not_plain(connection, names).items():
            raise SchemaError(
                f"{path}: {name} is a {kind}, not a table, and reading it could take unlimited "
                "time and memory: give a file that the gateway or this library created"
            )
        lost = [table for table in _ROLLUP_TABLES if not catalogue.tables(connection, [table.name])]
        there = catalogue.column_names(connection, TELEMETRY.name)
        if not there:
            raise SchemaBehind(
                f"{path} has no table {TELEMETRY.name}: give a gateway's file, or run "
                f"{revisions.UPGRADE_COMMAND} to create one"
            )
        for name in names:
            if computed := catalogue.generated_columns(connection, name):
                raise SchemaError(
                    f"{path}: {name}.{min(computed)} is a generated column, and reading it could "
                    "take unlimited time and memory: give a file that the gateway or this library "
                    "created"
                )
        missing = tuple(column.name for column in TELEMETRY.c if column.name not in there)
        views = [*map(_empty, lost), *([_view(there)] if missing else [])]
        statements = [str(view.compile(engine)) for view in views]
    engine = create_reading_engine(path, views=statements, statement_timeout_s=timeout_s)
    return engine, missing


def _view(there: Collection[str]) -> CreateView:
    """A temporary view that hides the table of the same name and has all columns."""
    main = TELEMETRY.to_metadata(MetaData(), schema="main")
    columns = (
        main.c[column.name] if column.name in there else null().label(column.name)
        for column in TELEMETRY.c
    )
    return CreateView(select(*columns), TELEMETRY.name, temporary=True)


def _empty(table: Table) -> CreateView:
    """A temporary view without rows, for a table that the file does not have."""
    columns = (null().label(column.name) for column in table.c)
    return CreateView(select(*columns).where(false()), table.name, temporary=True)
