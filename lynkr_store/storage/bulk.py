"""Hands rows to the driver by the quickest way that it has.

On SQLite that is one INSERT of many rows: Python's driver lets go of the interpreter at each step
of a statement, and beside a thread that is at work waits up to 5 ms to get it back
(`sys.setswitchinterval`); ``executemany`` makes a step of every row. On PostgreSQL it is COPY.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Final

from sqlalchemy import Connection, Dialect, Float, Insert, Integer, insert
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of, driver_of
from lynkr_store.db.errors import sqlstate_of
from lynkr_store.db.models import TELEMETRY
from lynkr_store.db.sqlite import overwriting
from lynkr_store.ingest.batch import Row, RowBatch
from lynkr_store.ingest.gil import long_call

_MOST_ROWS: Final = 1_000  # of a statement, or half of it
_MOST_VALUES: Final = 32_766  # https://sqlite.org/limits.html, section 9

_COUNTING: Final = {"preserve_rowcount": True}  # psycopg forgets it with the cursor

_SQLITE: Final[Dialect] = sqlite.dialect()

_ENDS_SESSION: Final = ("FATAL", "PANIC")
"""Severities of PostgreSQL: https://www.postgresql.org/docs/current/runtime-config-logging.html,
table 19.2."""

_NOT_COPIED: Final = ("0A000", "42809")  # SQLSTATEs: row-level security, a view


def insert_rows() -> Insert:
    """The slower way, which each driver and every table has; rows are given as mappings.

    Inline: it asks for no id, which only a role that may read the table is told.
    """
    return insert(TELEMETRY).inline()


def send_slowly(connection: Connection, rows: Sequence[Row]) -> int:
    """Insert rows in order by `insert_rows`, and return how many are stored."""
    given = list(RowBatch.of(rows))
    result = connection.execute(insert_rows(), given, execution_options=_COUNTING)
    return _counted(result.rowcount, given)


def send(connection: Connection, rows: Sequence[Row]) -> int:
    """Insert rows in order, in the transaction that was begun.

    Args:
        connection: Synchronous, or under an asynchronous one.
        rows: One or more. A column that none of them has takes the table's default.

    Returns:
        How many the database says that it stored: fewer than were given where a trigger of the
        table skips rows. One that stores a row elsewhere in its place skips it, too.

    Raises:
        Exception: Whatever the driver raised, as SQLAlchemy presents it. Rows of statements before
            the one that failed are inserted: go back to a SAVEPOINT, or roll back.
    """
    rows = RowBatch.of(rows)
    if backend_of(connection) is Backend.SQLITE:
        with overwriting(connection):  # it leaves copies of rows that it moves for new ones
            return _insert(connection, rows)
    if connection.dialect.is_async:  # psycopg's COPY has to be awaited there
        return send_slowly(connection, rows)
    return _copy(connection, rows)


def is_not_copied(error: DBAPIError) -> bool:
    """Whether the table takes no COPY, but may take an INSERT."""
    return sqlstate_of(error) in _NOT_COPIED


def _insert(connection: Connection, rows: RowBatch) -> int:
    width = len(rows.columns)
    most = _MOST_ROWS if _MOST_ROWS * width <= _MOST_VALUES else _MOST_ROWS // 2
    stored = execute_in_parts(connection, partial(_insert_of, rows.columns), rows, most)
    # SQLite does not count what the triggers of a view store in its place
    return len(rows) if stored < len(rows) and _is_view(connection) else stored


def _is_view(connection: Connection) -> bool:
    kind = connection.exec_driver_sql(
        "SELECT type FROM sqlite_schema WHERE name = ?", (TELEMETRY.name,)
    ).scalar()
    return bool(kind == "view")


def execute_in_parts(
    connection: Connection,
    text_of: Callable[[int], str],
    rows: RowBatch,
    most: int,
) -> int:
    """Execute statements of several rows each, on SQLite; return how many rows they changed.

    Args:
        connection: In a transaction.
        text_of: The statement for so many rows, which takes the values of one after the other.
        rows: In order.
        most: Rows of one statement.

    Raises:
        DBAPIError: With the statement for one row: the others repeat it.
    """
    width, changed = len(rows.columns), 0
    for at, count in _parts(len(rows), most):
        values = tuple(rows.values[at * width : (at + count) * width])
        try:
            with long_call():
                changed += connection.exec_driver_sql(
                    text_of(count), values, execution_options=_COUNTING
                ).rowcount
        except DBAPIError as error:
            error.statement = text_of(1)
            raise
    return changed


def _parts(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Where each part begins, and its size: of few sizes, so that statements stay prepared."""
    at = 0
    while left := count - at:
        size = most if left >= most else 1 << left.bit_length() - 1
        yield at, size
        at += size


@lru_cache
def _insert_of(columns: tuple[str, ...], count: int) -> str:
    row = f"({', '.join('?' * len(columns))})"
    into = _into(_SQLITE, columns)
    return f"INSERT INTO {into} VALUES {', '.join([row] * count)}"  # noqa: S608 - our columns


@lru_cache
def _copy_of(columns: tuple[str, ...]) -> tuple[str, list[str]]:
    # the engine has imported the dialect by now; a store on SQLite never does
    from sqlalchemy.dialects import postgresql  # noqa: PLC0415

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    types = [_type_name(TELEMETRY.c[name].type.dialect_impl(dialect)) for name in columns]
    return f"COPY {_into(dialect, columns)} FROM STDIN", types


def _into(dialect: Dialect, columns: Iterable[str]) -> str:
    names = dialect.identifier_preparer
    return f"{names.format_table(TELEMETRY)} ({', '.join(map(names.quote, columns))})"


def _copy(connection: Connection, rows: RowBatch) -> int:
    statement, types = _copy_of(rows.columns)
    driver = driver_of(connection)
    try:
        # the server takes longer than Python, which waits for it again and again
        with driver.cursor() as cursor, long_call():
            with cursor.copy(statement) as copy:
                copy.set_types(types)
                for row in rows.tuples():
                    copy.write_row(row)
            return _counted(cursor.rowcount, rows)
    except connection.dialect.loaded_dbapi.Error as error:
        lost = driver.closed or _is_lost(connection, error)
        if lost:
            connection.invalidate()  # not for this error: the pool would log it, and the row's text
        raise DBAPIError.instance(
            statement,
            None,
            error,
            connection.dialect.loaded_dbapi.Error,
            hide_parameters=True,
            connection_invalidated=lost,
            dialect=connection.dialect,
        ) from error


def _is_lost(connection: Connection, error: Any) -> bool:
    """Whether an error ends the connection, though the driver has not read as far as its end.

    The session was ended by the server; or the error is the driver's own, of a socket that closed.
    """
    own = isinstance(error, connection.dialect.loaded_dbapi.OperationalError)
    return error.diag.severity_nonlocalized in _ENDS_SESSION or (own and error.sqlstate is None)


def _counted(stored: int, rows: Sequence[Row]) -> int:
    """How many rows the driver says are stored; all of them where it does not say."""
    return len(rows) if stored < 0 else stored


def _type_name(column_type: Any) -> str:
    """What psycopg calls the type; without it, a flag would go as t or f."""
    impl = getattr(column_type, "impl_instance", column_type)
    if isinstance(impl, Integer):
        return "int8"
    return "float8" if isinstance(impl, Float) else "text"
