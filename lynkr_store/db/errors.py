"""What a database's error means: a row's own fault, the database's, or not yet clear.

Judged by SQLSTATE, SQLite's result code and exception types, never by a message's text.
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

from lynkr_store.exceptions import StoreUnavailable, raise_alone


class Fault(Enum):
    """Whose fault an error is."""

    ROW = "row"
    """The row's: the database would take others."""
    DATABASE = "database"
    """The database's, the connection's, the disk's: the same row may be taken later."""
    UNCLEAR = "unclear"
    """Either: a table that is missing looks like a trigger that chokes on one row."""


# SQLSTATE classes: data exceptions, constraints, program limits (an index entry too long), and
# what a foreign trigger raises.
_ROW_STATES: Final = ("22", "23", "54", "P0")
_RULE_STATES: Final = ("23", "44", "P0", "42501")  # the last is a policy's, where it is a row's
# Connection, authorisation, catalogue name, transaction state, resources, locks, operators, system.
_DATABASE_STATES: Final = ("08", "25", "28", "3D", "40", "53", "55", "57", "58")
_EXHAUSTED: Final = "2200H"  # a sequence has no number left: a data exception by its class alone
# Of these the server's message cannot repeat what a statement was given: the connection, read-only
# and broken transactions, authorisation, serialisation, resources, a lock's timeout, interventions.
# Of the others one may: 58P01 names the file, and 3D000 the database, that a CHECK asks for.
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
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore a copy of it, or save what can be read "
    "into a new one (sqlite3 FILE .recover)",
    sqlite3.SQLITE_NOTADB: "give the path of an SQLite database, or of a file that is to be made",
    sqlite3.SQLITE_IOERR: "look at the disk, and whether this file system suits SQLite",
    sqlite3.SQLITE_INTERRUPT: "the statement took longer than statement_timeout_s allows: ask for "
    "less, or set LYNKR_STORE_STATEMENT_TIMEOUT_S",
}
"""What to do about faults of an SQLite file, by the primary code."""
_CHECK_URL: Final = "check the URL's host, port, user, password and database"

# Names of the schema follow in these, unless a full-text search in a trigger says so of a row.
_SCHEMA_WORDS: Final = ("no such table: ", "no such column: ")
_PRIMARY: Final = 0xFF  # the part of an extended result code that names its family


def fault_of(error: Exception) -> Fault:
    """Say whose fault it is that rows could not be inserted."""
    if not isinstance(error, DBAPIError):
        # a value that its column's type refuses, or something that no driver should raise
        return Fault.ROW if isinstance(error, StatementError) else Fault.UNCLEAR
    if error.connection_invalidated:
        return Fault.DATABASE
    driver: Any = error.driver_exception
    if hasattr(driver, "sqlstate"):  # psycopg
        return _of_state(driver.sqlstate) if driver.sqlstate else _of_kind(error)
    return _of_code(getattr(driver, "sqlite_errorcode", None))


def _of_kind(error: DBAPIError) -> Fault:
    """Psycopg's own faults: of a value that it cannot send, or of the connection."""
    own = isinstance(error, DataError | ProgrammingError | NotSupportedError)
    return Fault.ROW if own else Fault.DATABASE


def _of_state(state: str) -> Fault:
    if state == _EXHAUSTED:
        return Fault.DATABASE
    if state.startswith(_ROW_STATES):
        return Fault.ROW
    return Fault.DATABASE if state.startswith(_DATABASE_STATES) else Fault.UNCLEAR


def _of_code(code: int | None) -> Fault:
    if code is None or code & _PRIMARY in _ROW_CODES:  # None: the driver's own, in binding a value
        return Fault.ROW
    return Fault.UNCLEAR if code & _PRIMARY == sqlite3.SQLITE_ERROR else Fault.DATABASE


def refusal(error: Exception) -> str:
    """One word for why a row was refused, the same on every backend.

    ``constraint``: a rule of the table, a policy, a trigger or a view; ``data``: the value itself.
    """
    driver: Any = error.driver_exception if isinstance(error, DBAPIError) else None
    by_rule = isinstance(error, IntegrityError) or (
        getattr(driver, "sqlstate", None) or ""
    ).startswith(_RULE_STATES)
    return "constraint" if by_rule else "data"


def is_busy(error: DBAPIError) -> bool:
    """Whether another writer has SQLite's lock."""
    code = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return code & _PRIMARY == sqlite3.SQLITE_BUSY


def is_no_database(error: DBAPIError) -> bool:
    """Whether a file is not SQLite's."""
    code = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return code & _PRIMARY == sqlite3.SQLITE_NOTADB


def is_full(error: DBAPIError) -> bool:
    """Whether SQLite had no room: on the disk, or for another id."""
    code = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return code & _PRIMARY == sqlite3.SQLITE_FULL


def is_null_refused(error: DBAPIError) -> bool:
    """Whether SQLite misses the value of a column that must have one."""
    code = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return bool(code == sqlite3.SQLITE_CONSTRAINT_NOTNULL)


@contextmanager
def translated(*, of_rows: bool = True) -> Iterator[None]:
    """Give the database's own faults the library's words.

    Args:
        of_rows: The statements touch rows, so that the driver's words may repeat what is in them,
            whatever the error: a CHECK, a trigger, an index or a view may call any function on a
            row's text. False for those of the schema alone, such as an upgrade's.

    Raises:
        StoreUnavailable: With the first line of the driver's words where they cannot repeat a
            row, else with the error's name and code. Only where the error cannot carry a row's
            values is it the cause.
    """
    try:
        yield
    except DBAPIError as error:
        error.hide_parameters = True  # an engine of the host's may show them
        line, safe = _words(error, of_rows=of_rows)
        unavailable = StoreUnavailable(f"the database failed: {line}")
        unavailable.unclear = fault_of(error) is Fault.UNCLEAR
        if safe:
            raise unavailable from error
        raise_alone(unavailable)
    except TimeoutError as error:  # no connection was free in the pool
        raise StoreUnavailable(f"the database failed: {type(error).__name__}") from error
    except SQLAlchemyError as error:
        raise_alone(StoreUnavailable(f"the database failed: {type(error).__name__}"))
    except sqlite3.Error as error:  # of the driver's own connection, which SQLAlchemy did not see
        line, _ = _words_of_code(error, of_rows=of_rows)
        raise_alone(StoreUnavailable(f"the database failed: {line}"))


def _words(error: DBAPIError, *, of_rows: bool) -> tuple[str, bool]:
    """What may be said of the error, and whether the error itself may be shown."""
    driver: Any = error.driver_exception
    line = str(error.orig).partition("\n")[0]
    if hasattr(driver, "sqlstate"):  # psycopg
        return _words_of_state(error, line, of_rows=of_rows)
    return _words_of_code(driver, of_rows=of_rows)


def said_of_file(error: sqlite3.Error) -> str:
    """What SQLite says of a file that it cannot use, and the remedy."""
    return _words_of_code(error, of_rows=False)[0]


def _words_of_code(driver: Any, *, of_rows: bool) -> tuple[str, bool]:
    line = str(driver).partition("\n")[0]
    code = getattr(driver, "sqlite_errorcode", None)
    if code is None:  # the driver's own: of a value that it cannot bind, of a text that is none
        return type(driver).__name__, False
    named = _of_code(code) is Fault.UNCLEAR and line.startswith(_SCHEMA_WORDS)
    if _of_code(code) is Fault.DATABASE or (named and not of_rows):
        remedy = _REMEDIES.get(code & _PRIMARY)
        return f"{line}; {remedy}" if remedy else line, True
    return f"{type(driver).__name__} ({driver.sqlite_errorname})", False


def _words_of_state(error: DBAPIError, line: str, *, of_rows: bool) -> tuple[str, bool]:
    driver: Any = error.driver_exception
    state, diagnosis = driver.sqlstate, driver.diag
    if not state:  # psycopg's own: of the connection, or of a value that it cannot send or read
        own = isinstance(error, OperationalError | InterfaceError)
        if own and driver.pgconn is not None:  # it was raised from an attempt to connect
            line = f"{line}; {_CHECK_URL}"
        return (line, True) if own else (type(driver).__name__, False)
    database = state.startswith(_DATABASE_STATES)
    # a COPY's own context repeats the row's line, and the message of a fault of the database's
    # does not; any other context is a trigger's, which may say what it likes
    copying = database and (diagnosis.context or "").startswith("COPY ")
    bare = not diagnosis.message_detail and (copying or not diagnosis.context)
    if not bare or (of_rows and not state.startswith(_SAID_STATES)):
        return f"{type(driver).__name__} ({state})", False
    return line, database and not diagnosis.context
