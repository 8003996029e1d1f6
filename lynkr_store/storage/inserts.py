"""Puts rows into the table: each batch once, and a row that is refused costs that row alone."""

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
"""Rows of a batch that are sorted out in one transaction when some are refused. Each then goes
alone, which takes half a second in 1,000, with SQLite's lock held."""

SKIPPED: Final = "skipped"
"""The cause of rows that the database did not store and did not refuse: a trigger skips them."""

_GIVES_IDS: Final = "lynkr_store_gives_ids"  # what is known of a connection's table

_SAMPLES: Final = 16  # rows of a batch that are tried alone, before the fault is the database's

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

    The ledger's row comes first: its key makes a second try wait for a first that is still under
    way in a server that this client was cut off from.

    Args:
        connection: In a transaction of its own, which the caller commits.
        batch_id: The same for every try.
        rows: In order.
        now_ms: The present, for the ledger.
        known_good: See `insert_isolating`.

    Returns:
        How many rows are stored, by this try or an earlier one; and, of this try, cause to number
        of rows refused or skipped. None where a row of more than `PART_ROWS` was refused, now or by
        an earlier try: roll back, and insert the batch in parts, each once.

    Raises:
        Exception: A fault that is no row's.
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
    """Insert rows in order; a row that the database refuses costs that row alone.

    All go in one SAVEPOINT; where one is refused, each goes alone. Where it is not clear whose
    fault it was, others are tried and taken back: a plain row, one that was stored before, some of
    the batch. If the table takes none, the fault is not the rows'.

    Args:
        connection: In a transaction that may be the caller's; never committed here.
        rows: In order.
        known_good: A row that the table took before.

    Returns:
        Cause to number of rows refused; those that the table skipped without a word are `SKIPPED`.

    Raises:
        Exception: A fault that is no row's.
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
    """Insert rows in order, all or none; return how many the database says that it stored.

    Args:
        connection: In a transaction that may be the caller's; never committed here.
        rows: In order.

    Raises:
        RowRejected: The database refuses a row for its own fault.
        StoreUnavailable: The fault is the database's, and what can be said of it.
        DBAPIError: The same, where there is nothing more to say.
    """
    _require_ids(connection)
    try:
        return insert_all(connection, rows)
    except Exception as error:
        fault = _fault(connection, error)
        if fault is Fault.ROW:
            raise_alone(RowRejected("the database refused a row, and none was added"))
        if fault is Fault.UNCLEAR and (words := hindrance(connection)):
            raise_alone(StoreUnavailable(words))
        if isinstance(error, SQLAlchemyError):
            raise
        # a driver that cannot write a text tells it
        raise_alone(StoreUnavailable(f"the driver failed: {type(error).__name__}"))


def _insert_or_refuse(
    connection: Connection, rows: Sequence[Row], known_good: Row | None
) -> int | Exception:
    """Insert the rows, return how many are stored; or the error if it is a row's, else raise it."""
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
        good = {**_PLAIN_ROW, **(known_good or {})}  # every column may be what is wrong
        if _whose(connection, [_PLAIN_ROW, good, *samples]) is not Fault.ROW:
            raise
    try:
        # the table works; where it was away before and somebody put it back, the rows work too
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
    """Refuse to insert into a table that gives no ids; PostgreSQL, once for each connection."""
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
        with suppress(Exception):  # the first error is the one to tell
            savepoint.rollback()
        raise
    savepoint.commit()


def _fault(connection: Connection, error: Exception) -> Fault:
    """Whose fault it is; the database's, where SQLite ended the transaction by itself.

    It does on a full disk, say: there is no savepoint to go back to then, and what followed would
    be outside any transaction. See https://sqlite.org/lang_transaction.html, section 3.
    """
    if connection.invalidated:
        return fault_of(error)
    sqlite = backend_of(connection) is Backend.SQLITE
    ended = sqlite and not driver_of(connection).in_transaction
    fault = whose(connection, error)
    return Fault.DATABASE if ended else fault


def _whose(connection: Connection, rows: Sequence[Row]) -> Fault:
    """A row's fault where the table works: it takes another row, or refuses one by its rules."""
    for row in rows:
        savepoint = connection.begin_nested()
        try:
            connection.execute(bulk.insert_rows(), row)
        except Exception as error:  # noqa: BLE001 - the caller has the one to tell
            with suppress(Exception):
                savepoint.rollback()
            fault = _fault(connection, error)
            if fault is not Fault.UNCLEAR:
                return fault
        else:
            savepoint.rollback()
            return Fault.ROW
    return Fault.DATABASE
