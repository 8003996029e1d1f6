"""Inserts rows in the fastest way that each driver offers.

On SQLite that is one INSERT with many rows. Python's driver releases the interpreter lock at each
step of a statement; while another thread computes, it then waits up to 5 ms to get the lock back
(`sys.setswitchinterval`), and ``executemany`` takes one step for each row. On PostgreSQL it is
COPY.
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
from lynkr_store.db.failover import READ_ONLY
from lynkr_store.db.models import TELEMETRY
from lynkr_store.db.postgresql import SETTINGS
from lynkr_store.db.sqlite import overwriting
from lynkr_store.ingest.batch import Row, RowBatch
from lynkr_store.ingest.gil import long_call

_MOST_ROWS: Final = 1_000  # in one statement; half as many if the rows are wide
_MOST_VALUES: Final = 32_766  # https://sqlite.org/limits.html, section 9

_COUNTING: Final = {"preserve_rowcount": True}  # psycopg's count is lost with the cursor

_SQLITE: Final[Dialect] = sqlite.dialect()

_ENDS_SESSION: Final = ("FATAL", "PANIC")
"""Severities of PostgreSQL: https://www.postgresql.org/docs/current/runtime-config-logging.html,
table 19.2."""

_NOT_COPIED: Final = ("0A000", "42809", "XX000")
"""SQLSTATEs of row-level security, of a view, and of every error of a COPY on Citus, where the
error of an INSERT tells the cause."""


def insert_rows() -> Insert:
    """The slower way, which works with every driver and every table; takes rows as mappings.

    Inline, so that it does not ask for the new id: only a role that may read the table can.
    """
    return insert(TELEMETRY).inline()


def send_slowly(connection: Connection, rows: Sequence[Row]) -> int:
    """Insert rows in order with `insert_rows`, and return how many are stored."""
    given = list(RowBatch.of(rows))
    result = connection.execute(insert_rows(), given, execution_options=_COUNTING)
    return _counted(result.rowcount, given)


def send(connection: Connection, rows: Sequence[Row]) -> int:
    """Insert rows in order, in a transaction that has begun.

    Args:
        connection: A synchronous one, or the one that an asynchronous connection wraps.
        rows: One or more. A column that none of them has gets the table's default.

    Returns:
        The number of rows that the database reports as stored. It is lower than the number given if
        a trigger of the table skips rows, or stores them in another table instead.

    Raises:
        Exception: What the driver raised, wrapped by SQLAlchemy. Rows of earlier statements are
            inserted, so go back to a SAVEPOINT, or roll back.
    """
    rows = RowBatch.of(rows)
    if backend_of(connection) is Backend.SQLITE:
        with overwriting(connection):  # SQLite leaves copies of the rows that it moves
            return _insert(connection, rows)
    if connection.dialect.is_async:  # psycopg's COPY would have to be awaited
        return send_slowly(connection, rows)
    return _copy(connection, rows)


def is_not_copied(error: DBAPIError) -> bool:
    """Whether the table does not accept COPY, but may accept an INSERT."""
    return sqlstate_of(error) in _NOT_COPIED


def _insert(connection: Connection, rows: RowBatch) -> int:
    width = len(rows.columns)
    most = _MOST_ROWS if _MOST_ROWS * width <= _MOST_VALUES else _MOST_ROWS // 2
    stored = execute_in_parts(connection, partial(_insert_of, rows.columns), rows, most)
    # SQLite does not count rows that the triggers of a view store in another table
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
    """SQLite: execute statements with several rows each; return how many rows they changed.

    Args:
        connection: In a transaction.
        text_of: Returns the statement for a number of rows, whose values it takes row after row.
        rows: In order.
        most: The most rows in one statement.

    Raises:
        DBAPIError: Its statement is the one for one row, which is short.
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
    """The start and size of each part; there are few sizes, so that statements stay prepared."""
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
    # the engine has imported the dialect by now; a store on SQLite never imports it
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
        # the server takes longer than Python, which waits for it repeatedly
        with driver.cursor() as cursor, long_call():
            with cursor.copy(statement) as copy:
                copy.set_types(types)
                for row in rows.tuples():
                    copy.write_row(row)
            return _counted(cursor.rowcount, rows)
    except connection.dialect.loaded_dbapi.Error as error:
        lost = driver.closed or _is_lost(connection, error)
        if lost:
            connection.invalidate()  # without the error: the pool would log it, with the row's text
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
    """Whether the error means that the connection is lost, although the driver may not know yet.

    The server ended the session, or the error is the driver's own, about a closed socket. On the
    store's engine also if the server is read-only; see `lynkr_store.db.failover`.
    """
    if error.sqlstate == READ_ONLY and SETTINGS in connection.get_execution_options():
        return True
    own = isinstance(error, connection.dialect.loaded_dbapi.OperationalError)
    return error.diag.severity_nonlocalized in _ENDS_SESSION or (own and error.sqlstate is None)


def _counted(stored: int, rows: Sequence[Row]) -> int:
    """How many rows the driver reports as stored; all of them if it reports no number."""
    return len(rows) if stored < 0 else stored


def _type_name(column_type: Any) -> str:
    """Psycopg's name of the type; without it, a flag would be sent as t or f."""
    impl = getattr(column_type, "impl_instance", column_type)
    if isinstance(impl, Integer):
        return "int8"
    return "float8" if isinstance(impl, Float) else "text"
