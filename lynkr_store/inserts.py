"""Puts rows into the table: each batch once, and a row that is refused costs that row alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from lynkr_store import queries
from lynkr_store.domains import INSTANT_MIN_MS
from lynkr_store.engine import backend_of, ensure_begun
from lynkr_store.faults import Fault, fault_of
from lynkr_store.ingest import Row

LEDGER_DAYS: Final = 30
"""Days for which the ledger remembers a batch. One that a spool keeps, and whose answer was lost
longer ago, is not tried again: whether it is stored can no longer be told."""

_DAY_MS: Final = 86_400_000
_EXPIRED_ROWS: Final = 1_000  # at a time; half a millisecond's work

_PLAIN_ROW: Final = {"request_id": "", "timestamp": INSTANT_MIN_MS, "provider": ""}


def insert_once(
    connection: Connection, batch_id: str, rows: Sequence[Row], now_ms: int
) -> tuple[int, Counter[str]]:
    """Insert a batch, unless an earlier try under the same id was committed.

    The ledger's row comes first: its key makes a second try wait for a first that is still under
    way in a server that this client was cut off from.

    Args:
        connection: In a transaction of its own, which the caller commits.
        batch_id: The same for every try.
        rows: One mapping each, of every column but ``id``.
        now_ms: The present, for the ledger.

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
    refused = insert_isolating(connection, rows)
    stored = len(rows) - refused.total()
    if refused:
        connection.execute(queries.correct_batch(batch_id, stored))
    return stored, refused


def expire_ledger(connection: Connection, now_ms: int) -> None:
    """Forget up to 1,000 batches that are older than `LEDGER_DAYS`."""
    cutoff = now_ms - LEDGER_DAYS * _DAY_MS
    connection.execute(queries.expire_batches(cutoff, _EXPIRED_ROWS))


def insert_isolating(
    connection: Connection, rows: Sequence[Row], *, sound: bool = False
) -> Counter[str]:
    """Insert rows in order; a row that the database refuses costs that row alone.

    All go in one SAVEPOINT; where one is refused, each half is tried again, down to the row.
    Where it is not clear whose fault it was, a plain row is tried: if the table does not take that
    either, the fault is not the rows'.

    Args:
        connection: In a transaction that may be the caller's; never committed here.
        rows: One mapping each, of every column but ``id``.
        sound: The table was found to take a plain row.

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
        fault = fault_of(error)
        if fault is Fault.DATABASE:
            raise
        if fault is Fault.UNCLEAR and not sound:
            if not _takes_a_plain_row(connection):
                raise
            sound = True
        if len(rows) == 1:
            return Counter({"constraint" if isinstance(error, IntegrityError) else "data": 1})
        middle = len(rows) // 2
        return insert_isolating(connection, rows[:middle], sound=sound) + insert_isolating(
            connection, rows[middle:], sound=sound
        )
    return Counter()


def insert_all(connection: Connection, rows: Sequence[Row]) -> None:
    """Insert rows in order in a SAVEPOINT: all of them or none.

    Raises:
        Exception: Whatever the driver raised.
    """
    ensure_begun(connection)
    with connection.begin_nested():
        connection.execute(queries.insert_rows(), rows)


def _takes_a_plain_row(connection: Connection) -> bool:
    try:
        with connection.begin_nested() as savepoint:
            connection.execute(queries.insert_rows(), _PLAIN_ROW)
            savepoint.rollback()
    except Exception:  # noqa: BLE001 - the first error is the one to tell
        return False
    return True
