"""Puts rows into the table: each batch once, and a row that is refused costs that row alone."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Connection

from lynkr_store import queries
from lynkr_store.backend import Backend
from lynkr_store.domains import INSTANT_MIN_MS
from lynkr_store.engine import backend_of, ensure_begun
from lynkr_store.faults import Fault, fault_of, refusal
from lynkr_store.ingest import Row
from lynkr_store.models import TELEMETRY

LEDGER_DAYS: Final = 30
"""Days for which the ledger remembers a batch. One that a spool keeps, and whose answer was lost
longer ago, is not tried again: whether it is stored can no longer be told."""

_DAY_MS: Final = 86_400_000
_EXPIRED_ROWS: Final = 1_000  # at a time; half a millisecond's work

_SINGLY: Final = 128  # rows that are tried one by one: halving on costs more where many are refused
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
) -> tuple[int, Counter[str]]:
    """Insert a batch, unless an earlier try under the same id was committed.

    The ledger's row comes first: its key makes a second try wait for a first that is still under
    way in a server that this client was cut off from.

    Args:
        connection: In a transaction of its own, which the caller commits.
        batch_id: The same for every try.
        rows: One mapping each, of every column but ``id``.
        now_ms: The present, for the ledger.
        known_good: See `insert_isolating`.

    Returns:
        How many rows are stored, by this try or an earlier one; and, of this try, cause to number
        of rows refused.

    Raises:
        Exception: A fault that is no row's.
    """
    ensure_begun(connection)
    entry = queries.enter_batch(backend_of(connection), batch_id, len(rows), now_ms)
    if connection.execute(entry).first() is None:
        return connection.execute(queries.batch_rows(batch_id)).scalar_one(), Counter()
    refused = insert_isolating(connection, rows, known_good=known_good)
    stored = len(rows) - refused.total()
    if refused:
        connection.execute(queries.correct_batch(batch_id, stored))
    return stored, refused


def expire_ledger(connection: Connection, now_ms: int) -> None:
    """Forget up to 1,000 batches that are older than `LEDGER_DAYS`."""
    cutoff = now_ms - LEDGER_DAYS * _DAY_MS
    connection.execute(queries.expire_batches(cutoff, _EXPIRED_ROWS))


def insert_isolating(
    connection: Connection, rows: Sequence[Row], *, known_good: Row | None = None
) -> Counter[str]:
    """Insert rows in order; a row that the database refuses costs that row alone.

    All go in one SAVEPOINT; where one is refused, each half is tried again, down to the row.
    Where it is not clear whose fault it was, others are tried and taken back: a plain row, one that
    was stored before, some of the batch. If the table takes none, the fault is not the rows'.

    Args:
        connection: In a transaction that may be the caller's; never committed here.
        rows: One mapping each, of every column but ``id``.
        known_good: A row that the table took before.

    Returns:
        Cause to number of rows refused.

    Raises:
        Exception: A fault that is no row's.
    """
    if not rows:
        return Counter()
    try:
        insert_all(connection, rows)
    except Exception as error:
        fault = _fault(connection, error)
        if fault is Fault.UNCLEAR:
            samples = rows[:: max(1, len(rows) // _SAMPLES)]
            fault = _whose(
                connection, [_PLAIN_ROW, *([known_good] if known_good else []), *samples]
            )
        if fault is not Fault.ROW:
            raise
        return _halved(connection, rows, error)
    return Counter()


def _halved(connection: Connection, rows: Sequence[Row], error: Exception) -> Counter[str]:
    """Insert what the table takes of rows that it refused together."""
    if len(rows) == 1:
        return Counter({refusal(error): 1})
    size = len(rows) // 2 if len(rows) > _SINGLY else 1
    refused: Counter[str] = Counter()
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        try:
            insert_all(connection, part)
        except Exception as fault:
            if _fault(connection, fault) is Fault.DATABASE:
                raise
            refused += _halved(connection, part, fault)
    return refused


def insert_all(connection: Connection, rows: Sequence[Row]) -> None:
    """Insert rows in order in a SAVEPOINT: all of them or none.

    Raises:
        Exception: Whatever the driver raised.
    """
    ensure_begun(connection)
    savepoint = connection.begin_nested()
    try:
        connection.execute(queries.insert_rows(), rows)
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
    if backend_of(connection) is Backend.SQLITE and not connection.invalidated:
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            return Fault.DATABASE
    return fault_of(error)


def _whose(connection: Connection, rows: Sequence[Row]) -> Fault:
    """A row's fault where the table works: it takes another row, or refuses one by its rules."""
    for row in rows:
        savepoint = connection.begin_nested()
        try:
            connection.execute(queries.insert_rows(), row)
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
