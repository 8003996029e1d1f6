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
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
)

from lynkr_store.exceptions import StoreUnavailable


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

# https://sqlite.org/rescode.html
_ROW_CODES: Final = frozenset(
    {
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_RANGE,
    }
)
_SAFE_WORDS: Final = ("no such table: ", "no such column: ")  # names of the schema follow
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


def is_full(error: DBAPIError) -> bool:
    """Whether SQLite had no room: on the disk, or for another id."""
    code = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return code & _PRIMARY == sqlite3.SQLITE_FULL


def is_null_refused(error: DBAPIError) -> bool:
    """Whether SQLite misses the value of a column that must have one."""
    code = getattr(error.driver_exception, "sqlite_errorcode", 0)
    return bool(code == sqlite3.SQLITE_CONSTRAINT_NOTNULL)


@contextmanager
def translated() -> Iterator[None]:
    """Give the database's own faults the library's words.

    Raises:
        StoreUnavailable: With the first line of the driver's words where they cannot repeat a
            row. A connection's fault is chained; another is not, for what the driver says of it
            at length may carry a row's values.
    """
    try:
        yield
    except DBAPIError as error:
        error.hide_parameters = True  # an engine of the host's may show them
        line, safe = _words(error)
        unavailable = StoreUnavailable(f"the database failed: {line}")
        unavailable.unclear = fault_of(error) is Fault.UNCLEAR
        raise unavailable from error if safe else None
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"the database failed: {type(error).__name__}") from error


def _words(error: DBAPIError) -> tuple[str, bool]:
    """What may be said of the error, and whether the error itself may be shown."""
    driver: Any = error.driver_exception
    line = str(error.orig).partition("\n")[0]
    code = getattr(driver, "sqlite_errorcode", None)
    if code is not None:  # in SQLITE_ERROR a function that a trigger calls may speak
        safe = _of_code(code) is Fault.DATABASE or line.startswith(_SAFE_WORDS)
        return (
            (line, True)
            if safe
            else (f"{type(driver).__name__} ({driver.sqlite_errorname})", False)
        )
    diagnosis = getattr(driver, "diag", None)
    if diagnosis is None or not driver.sqlstate:
        return line, True
    database = driver.sqlstate.startswith(_DATABASE_STATES)
    # a COPY's own context repeats the row's line, and the message of a fault of the database's
    # does not; any other context is a trigger's, which may say what it likes
    copying = (diagnosis.context or "").startswith("COPY ")
    if diagnosis.message_detail or (diagnosis.context and not (copying and database)):
        return f"{type(driver).__name__} ({driver.sqlstate})", False
    return line, database and not diagnosis.context
