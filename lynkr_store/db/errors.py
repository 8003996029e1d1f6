"""Decides what a database error means: the row is at fault, the database is, or it is unclear.

It decides by SQLSTATE, SQLite's result code and exception types. A message's text only chooses the
remedy that is named.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Final

from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
    TimeoutError,  # noqa: A004 - SQLAlchemy's, of a pool
)

from lynkr_store.backend import VERSION_TABLE
from lynkr_store.db.failover import READ_ONLY
from lynkr_store.db.models import Base
from lynkr_store.exceptions import SchemaError, StoreUnavailable, raise_alone


class Fault(Enum):
    """What caused an error."""

    ROW = "row"
    """The row: the database would accept others."""
    DATABASE = "database"
    """The database, the connection or the disk: the same row may be accepted later."""
    UNCLEAR = "unclear"
    """Either: a missing table and a trigger that fails for one row give the same error."""


# SQLSTATE classes: data exceptions, constraints, program limits (an index entry too long), and
# errors that a trigger of another program raises.
_ROW_STATES: Final = ("22", "23", "54", "P0")
_RULE_STATES: Final = ("23", "44", "P0", "42501")  # 42501: a row-level policy, if a row is at fault
# Connection, authorisation, catalogue name, transaction state, resources, locks, operators, system.
_DATABASE_STATES: Final = ("08", "25", "28", "3D", "40", "53", "55", "57", "58")
_EXHAUSTED: Final = "2200H"  # a sequence has no number left; only its class says "data exception"
# In these states the server's message cannot repeat a statement's values: connection, read-only and
# failed transactions, authorisation, serialisation, resources, a lock's timeout, interventions. In
# others it can: 58P01 names the file, and 3D000 the database, that a CHECK asks for.
_SAID_STATES: Final = ("08", "25", "28", "40", "53", "55P03", "57")

# https://sqlite.org/rescode.html
_ROW_CODES: Final = frozenset(
    {
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_RANGE,
    }
)
_REMEDIES: Final = {
    sqlite3.SQLITE_CANTOPEN: "give the path of a file that this user may read and write, in a "
    "directory where it may write, on a file system that is not read-only",
    sqlite3.SQLITE_READONLY: "this user may not write the file or its directory, or the file "
    "system is read-only: give it the right, or give another path",
    sqlite3.SQLITE_PERM: "this user may not use the file: give it the right, or give another path",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore a backup, or recover what can be read "
    "into a new file (sqlite3 FILE .recover)",
    sqlite3.SQLITE_NOTADB: "give the path of an SQLite database, or of a file that does not exist",
    sqlite3.SQLITE_IOERR: "check the disk, and that SQLite supports this file system",
    sqlite3.SQLITE_INTERRUPT: "the statement took longer than statement_timeout_s allows: ask for "
    "less, or set LYNKR_STORE_STATEMENT_TIMEOUT_S",
}
"""The remedy for each error of an SQLite file, by its primary code."""
_CHECK_URL: Final = "check the URL's host, port, user, password and database"
# libpq's words about a server that target_session_attrs=read-write or primary does not accept
_REFUSED_SERVER: Final = ("session is read-only", "server is in hot standby mode")

# A name of the schema follows, or text of a row, if a full-text search in a trigger fails.
_SCHEMA_WORDS: Final = ("no such table: ", "no such column: ")
_TABLES: Final = frozenset((*Base.metadata.tables, VERSION_TABLE))
_MISSING_STATES: Final = ("42P01", "42703", "3F000")  # a table, a column, a schema
_MISSING: Final = (
    "a table or column of the store is not there: run lynkr-store upgrade; if the tables are in a "
    "schema of their own, make the engine with it (create_store_engine(url, schema=…)) or set the "
    "role's search_path"
)
_NONE_FREE: Final = (
    "all connections were in use for too long: allow more (LYNKR_STORE_READ_CONNECTIONS, or the "
    "pool_size of your own engine), or read less at a time"
)
_TAKES_NO_WRITES: Final = (
    "the server takes no writes (read-only transaction): it is a standby, or "
    "default_transaction_read_only is on. Promote it or switch that off; with several servers, "
    "name all of them (?host=h1:5432&host=h2:5432&target_session_attrs=read-write)"
)
_REACHED_TAKES_NONE: Final = (
    "a server that was reached takes no writes: check that the URL names the one that does (host, "
    "port, user, password); if there is none, promote a standby, or switch "
    "default_transaction_read_only off"
)
_PRIMARY: Final = 0xFF  # the part of an extended result code that names its family


def sqlstate_of(error: DBAPIError) -> str:
    """PostgreSQL's SQLSTATE; ``""`` for SQLite's errors and for the driver's own."""
    return getattr(error.driver_exception, "sqlstate", None) or ""


def _code_of(error: DBAPIError) -> int:
    """SQLite's extended result code; 0 for other errors."""
    code: int = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return code


def fault_of(error: Exception) -> Fault:
    """Decide what caused the failure of an insert."""
    if not isinstance(error, DBAPIError):
        # a value that its column's type refuses, or an exception that no driver should raise
        return Fault.ROW if isinstance(error, StatementError) else Fault.UNCLEAR
    if error.connection_invalidated:
        return Fault.DATABASE
    driver: Any = error.driver_exception
    if hasattr(driver, "sqlstate"):  # psycopg
        return _of_state(driver.sqlstate) if driver.sqlstate else _of_kind(error)
    return _of_code(getattr(driver, "sqlite_errorcode", None))


def _of_kind(error: DBAPIError) -> Fault:
    """Decide about psycopg's own errors: a value that it cannot send, or the connection."""
    own = isinstance(error, DataError | ProgrammingError | NotSupportedError)
    return Fault.ROW if own else Fault.DATABASE


def _of_state(state: str) -> Fault:
    if state == _EXHAUSTED:
        return Fault.DATABASE
    if state.startswith(_ROW_STATES):
        return Fault.ROW
    return Fault.DATABASE if state.startswith(_DATABASE_STATES) else Fault.UNCLEAR


def _of_code(code: int | None) -> Fault:
    if code is None or code & _PRIMARY in _ROW_CODES:  # None: the driver could not bind a value
        return Fault.ROW
    return Fault.UNCLEAR if code & _PRIMARY == sqlite3.SQLITE_ERROR else Fault.DATABASE


def refusal(error: Exception) -> str:
    """One word for the reason why a row was refused, the same on every backend.

    ``constraint``: a constraint, policy, trigger or view; ``data``: the value itself.
    """
    state = sqlstate_of(error) if isinstance(error, DBAPIError) else ""
    by_rule = isinstance(error, IntegrityError) or state.startswith(_RULE_STATES)
    return "constraint" if by_rule else "data"


def is_busy(error: DBAPIError) -> bool:
    """Whether another writer holds SQLite's lock."""
    return _code_of(error) & _PRIMARY == sqlite3.SQLITE_BUSY


def is_no_database(error: DBAPIError) -> bool:
    """Whether the file is not an SQLite database."""
    return _code_of(error) & _PRIMARY == sqlite3.SQLITE_NOTADB


def is_full(error: DBAPIError) -> bool:
    """Whether SQLite had no space left on the disk, or no id left."""
    return _code_of(error) & _PRIMARY == sqlite3.SQLITE_FULL


def is_null_refused(error: DBAPIError) -> bool:
    """Whether SQLite refused NULL in a NOT NULL column."""
    return _code_of(error) == sqlite3.SQLITE_CONSTRAINT_NOTNULL


@contextmanager
def translated(*, of_rows: bool = True) -> Iterator[None]:
    """Raise the library's own exception for errors of the database.

    Args:
        of_rows: The statements touch rows, so any message of the driver may repeat their values: a
            CHECK, a trigger, an index or a view may call any function on a row's text. False for
            statements about the schema alone, as in an upgrade.

    Raises:
        SchemaError: A table or column of the statement does not exist.
        StoreUnavailable: With the first line of the driver's message if that cannot repeat a row,
            else with the error's name and code. The driver's error is its cause only if it cannot
            contain a row's values.
    """
    try:
        yield
    except DBAPIError as error:
        error.hide_parameters = True  # a host's engine may show them
        if _is_missing(error):
            absent = SchemaError(_MISSING)
            absent.unclear = True
            raise_alone(absent)
        line, safe = _words(error, of_rows=of_rows)
        unavailable = StoreUnavailable(f"the database failed: {line}")
        unavailable.unclear = fault_of(error) is Fault.UNCLEAR
        if safe:
            raise unavailable from error
        raise_alone(unavailable)
    except TimeoutError as error:
        raise StoreUnavailable(_NONE_FREE) from error
    except SQLAlchemyError as error:
        raise_alone(StoreUnavailable(f"the database failed: {type(error).__name__}"))
    except sqlite3.Error as error:  # raised by the driver's connection itself, without SQLAlchemy
        line, _ = _words_of_code(error, of_rows=of_rows)
        raise_alone(StoreUnavailable(f"the database failed: {line}"))


def _is_missing(error: DBAPIError) -> bool:
    """Whether the statement itself, not a trigger's, names a table or column that is not there."""
    driver: Any = error.driver_exception
    if state := sqlstate_of(error):
        return state in _MISSING_STATES and not driver.diag.context
    named = str(driver).removeprefix("no such table: ").partition(".")
    return _code_of(error) == sqlite3.SQLITE_ERROR and (named[2] or named[0]) in _TABLES


def _words(error: DBAPIError, *, of_rows: bool) -> tuple[str, bool]:
    """The message for the error, and whether the error itself may be shown."""
    driver: Any = error.driver_exception
    line = str(error.orig).partition("\n")[0]
    if hasattr(driver, "sqlstate"):  # psycopg
        return _words_of_state(error, line, of_rows=of_rows)
    return _words_of_code(driver, of_rows=of_rows)


def said_of_file(error: sqlite3.Error) -> str:
    """SQLite's message about a file that it cannot use, and the remedy."""
    return _words_of_code(error, of_rows=False)[0]


def _words_of_code(driver: Any, *, of_rows: bool) -> tuple[str, bool]:
    line = str(driver).partition("\n")[0]
    code = getattr(driver, "sqlite_errorcode", None)
    if code is None:  # the driver's own: it cannot bind a value, or decode a text
        return type(driver).__name__, False
    named = _of_code(code) is Fault.UNCLEAR and line.startswith(_SCHEMA_WORDS)
    if _of_code(code) is Fault.DATABASE or (named and not of_rows):
        remedy = _REMEDIES.get(code & _PRIMARY)
        return f"{line}; {remedy}" if remedy else line, True
    return f"{type(driver).__name__} ({driver.sqlite_errorname})", False


def _words_of_state(error: DBAPIError, line: str, *, of_rows: bool) -> tuple[str, bool]:
    driver: Any = error.driver_exception
    state, diagnosis = driver.sqlstate, driver.diag
    if state == READ_ONLY:
        return _TAKES_NO_WRITES, not diagnosis.context
    if not state:  # psycopg's own: the connection failed, or it cannot send or read a value
        own = isinstance(error, OperationalError | InterfaceError)
        if own and driver.pgconn is not None:  # an attempt to connect failed
            refused = any(words in str(error.orig) for words in _REFUSED_SERVER)
            remedy = _REACHED_TAKES_NONE if refused else _CHECK_URL
            line = f"{_of_each_host(error) or line}; {remedy}"
        return (line, True) if own else (type(driver).__name__, False)
    database = state.startswith(_DATABASE_STATES)
    # COPY repeats the row's line in the context, but not in the message of a database's error; any
    # other context comes from a trigger, which may repeat anything
    copying = database and (diagnosis.context or "").startswith("COPY ")
    bare = not diagnosis.message_detail and (copying or not diagnosis.context)
    if not bare or (of_rows and not state.startswith(_SAID_STATES)):
        return f"{type(driver).__name__} ({state})", False
    return line, database and not diagnosis.context


def _of_each_host(error: DBAPIError) -> str:
    """Why each of several hosts was not connected to, as psycopg lists it below the last reason."""
    lines = str(error.orig).splitlines()
    return "; ".join(line.removeprefix("- ") for line in lines if line.startswith("- "))
