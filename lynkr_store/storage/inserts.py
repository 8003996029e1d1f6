"""Inserts rows: each batch exactly once, and a refused row does not affect the other rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of, driver_of
from lynkr_store.db.errors import Fault, fault_of, refusal
from lynkr_store.db.models import TELEMETRY
from lynkr_store.db.sqlite import ensure_begun
from lynkr_store.exceptions import RowRejected, StoreUnavailable, raise_alone
from lynkr_store.ingest.batch import Row
from lynkr_store.schemas.units import INSTANT_MIN_MS
from lynkr_store.storage import bulk, ledger
from lynkr_store.storage.diagnosis import hindrance, whose, without_ids

PART_ROWS: Final = 100
"""The most rows that are inserted one by one in one transaction, when the database refuses some of
them. 1,000 rows would hold SQLite's lock for half a second."""

SKIPPED: Final = "skipped"
"""The cause for rows that the database neither stored nor refused, because a trigger skips them."""

_GIVES_IDS: Final = "lynkr_store_gives_ids"  # in a connection's info: its table assigns ids

_SAMPLES: Final = 16  # rows of a batch that are tried alone before the database is at fault

_PLAIN_ROW: Final[Row] = {
    **{column.name: None for column in TELEMETRY.c if column.name != "id"},
    "request_id": "",
    "timestamp": INSTANT_MIN_MS,
    "provider": "",
}


def insert_once(
    connection: Connection,
    batch_id: str,
    rows: Sequence[Row],
    now_ms: int,
    *,
    known_good: Row | None = None,
) -> tuple[int, Counter[str]] | None:
    """Insert a batch, unless an earlier try under the same id was committed.

    The ledger's row is inserted first. Its key makes a second try wait for an earlier one that the
    server is still executing, although this client lost the connection to it.

    Args:
        connection: In a transaction of its own, which the caller commits.
        batch_id: The same for every try.
        rows: In order.
        now_ms: The present, for the ledger.
        known_good: See `insert_isolating`.

    Returns:
        The number of rows stored, by this try or an earlier one; and the number of rows that this
        try refused or skipped, by cause. None if the batch has more than `PART_ROWS` rows and one
        was refused, now or in an earlier try: roll back, and insert each part of the batch once.

    Raises:
        Exception: The failure was not caused by a row.
    """
    ensure_begun(connection)
    entry = ledger.enter_batch(backend_of(connection), batch_id, len(rows), now_ms)
    if not connection.execute(entry).rowcount:
        stored: int = connection.execute(ledger.batch_rows(batch_id)).scalar_one()
        return (stored, Counter()) if stored or len(rows) <= PART_ROWS else None
    if len(rows) > PART_ROWS:
        outcome = _insert_or_refuse(connection, rows, known_good)
        if isinstance(outcome, Exception):
            return None
        refused = _skipped(rows, outcome)
    else:
        refused = insert_isolating(connection, rows, known_good=known_good)
    stored = len(rows) - refused.total()
    if refused:
        connection.execute(ledger.correct_batch(batch_id, stored))
    return stored, refused


def insert_isolating(
    connection: Connection, rows: Sequence[Row], *, known_good: Row | None = None
) -> Counter[str]:
    """Insert rows in order; a row that the database refuses does not affect the others.

    All rows are inserted in one SAVEPOINT; if one is refused, each is inserted alone. If the cause
    is unclear, other rows are tried and rolled back: a plain row, one that was stored before, and
    some of the batch. If the table accepts none of them, the rows are not at fault.

    Args:
        connection: In a transaction that may be the caller's; never committed here.
        rows: In order.
        known_good: A row that the table accepted before.

    Returns:
        The number of refused rows by cause; rows that the table skipped silently are `SKIPPED`.

    Raises:
        Exception: The failure was not caused by a row.
    """
    outcome = _insert_or_refuse(connection, rows, known_good)
    if not isinstance(outcome, Exception):
        return _skipped(rows, outcome)
    if len(rows) == 1:
        return Counter({refusal(outcome): 1})
    refused: Counter[str] = Counter()
    for row in rows:
        refused += insert_isolating(connection, [row], known_good=known_good)
    return refused


def _skipped(rows: Sequence[Row], stored: int) -> Counter[str]:
    return +Counter({SKIPPED: len(rows) - stored})


def insert_or_reject(connection: Connection, rows: Sequence[Row]) -> int:
    """Insert rows in order, all or none; return how many the database reports as stored.

    Args:
        connection: In a transaction that may be the caller's; never committed here.
        rows: In order.

    Raises:
        RowRejected: The database refuses a row because of its values.
        StoreUnavailable: The database is at fault; the message says what is wrong.
        DBAPIError: The database is at fault, and nothing more is known.
    """
    _require_ids(connection)
    try:
        return insert_all(connection, rows)
    except Exception as error:
        fault = _fault(connection, error)
        if fault is Fault.ROW:
            raise_alone(RowRejected("the database refused a row, so no row was added"))
        if fault is Fault.UNCLEAR and (words := hindrance(connection)):
            raise_alone(StoreUnavailable(words))
        if isinstance(error, SQLAlchemyError):
            raise
        # without its message: if the driver cannot encode a text, the message repeats it
        raise_alone(StoreUnavailable(f"the driver failed: {type(error).__name__}"))


def _insert_or_refuse(
    connection: Connection, rows: Sequence[Row], known_good: Row | None
) -> int | Exception:
    """Insert the rows, return how many are stored; return the error if a row caused it."""
    if not rows:
        return 0
    _require_ids(connection)
    try:
        return insert_all(connection, rows)
    except Exception as error:
        fault = _fault(connection, error)
        if fault is not Fault.UNCLEAR:
            if fault is not Fault.ROW:
                raise
            return error
        samples = rows[:: max(1, len(rows) // _SAMPLES)]
        good = {**_PLAIN_ROW, **(known_good or {})}  # with every column: any may be the cause
        if _whose(connection, [_PLAIN_ROW, good, *samples]) is not Fault.ROW:
            raise
    try:
        # The table works. If it was only missing for a moment, the rows are accepted now.
        return insert_all(connection, rows)
    except Exception as error:
        if _fault(connection, error) is Fault.DATABASE:
            raise
        return error


def insert_all(connection: Connection, rows: Sequence[Row]) -> int:
    """Insert rows in order in a SAVEPOINT, all of them or none; return how many are stored.

    Raises:
        Exception: Whatever the driver raised.
    """
    ensure_begun(connection)
    try:
        with _savepoint(connection):
            return bulk.send(connection, rows)
    except DBAPIError as error:
        if not bulk.is_not_copied(error):
            raise
    with _savepoint(connection):
        return bulk.send_slowly(connection, rows)


def _require_ids(connection: Connection) -> None:
    """PostgreSQL: refuse a table that assigns no ids; checked once for each connection."""
    if backend_of(connection) is Backend.SQLITE or connection.info.get(_GIVES_IDS):
        return
    if words := without_ids(connection):
        raise_alone(StoreUnavailable(words))
    connection.info[_GIVES_IDS] = True


@contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    savepoint = connection.begin_nested()
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error is raised instead
            savepoint.rollback()
        raise
    savepoint.commit()


def _fault(connection: Connection, error: Exception) -> Fault:
    """Decide what caused the error; the database did, if SQLite ended the transaction itself.

    SQLite does that on a full disk, for example. Then there is no savepoint to go back to, and
    later statements would be outside any transaction. See https://sqlite.org/lang_transaction.html,
    section 3.
    """
    if connection.invalidated:
        return fault_of(error)
    sqlite = backend_of(connection) is Backend.SQLITE
    ended = sqlite and not driver_of(connection).in_transaction
    fault = whose(connection, error)
    return Fault.DATABASE if ended else fault


def _whose(connection: Connection, rows: Sequence[Row]) -> Fault:
    """Decide an unclear error by trying these rows: a row is at fault if the table works at all."""
    for row in rows:
        savepoint = connection.begin_nested()
        try:
            connection.execute(bulk.insert_rows(), row)
        except Exception as error:  # noqa: BLE001 - the caller raises the first error
            with suppress(Exception):
                savepoint.rollback()
            fault = _fault(connection, error)
            if fault is not Fault.UNCLEAR:
                return fault
        else:
            savepoint.rollback()
            return Fault.ROW
    return Fault.DATABASE
