"""The ledger: it makes sure that a batch is stored once, even if a commit's answer was lost."""

from typing import Any, Final

from sqlalchemy import (
    Connection,
    Delete,
    Insert,
    Select,
    Update,
    delete,
    select,
    update,
)

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.functions import inserting
from lynkr_store.db.models import LEDGER
from lynkr_store.db.sqlite import ensure_begun
from lynkr_store.schemas.units import DAY_MS

LEDGER_DAYS: Final = 30
"""Days for which the ledger remembers a batch. If the answer for a batch in a spool was lost longer
ago, the batch is not tried again: nothing can tell any more whether it is stored."""

FORGOTTEN: Final = "ledger_forgot_before_ms"
"""The progress value that holds the instant before which the ledger forgot batches."""

_EXPIRED_ROWS: Final = 1_000  # at a time; that takes half a millisecond


def enter_parts(connection: Connection, batch_id: str, now_ms: int) -> None:
    """Record that a batch is inserted in parts: its own entry has 0 rows, each part has another."""
    ensure_begun(connection)
    connection.execute(enter_batch(backend_of(connection), batch_id, 0, now_ms))


def has_expired(connection: Connection, now_ms: int) -> bool:
    """Whether the ledger has batches that are older than `LEDGER_DAYS`."""
    return connection.scalar(batches_before(forgotten_before(now_ms))) is not None


def forgotten_before(now_ms: int) -> int:
    """The earliest instant whose batches the ledger remembers, in epoch milliseconds."""
    return now_ms - LEDGER_DAYS * DAY_MS


def expire_ledger(connection: Connection, now_ms: int) -> bool:
    """Forget up to 1,000 batches older than `LEDGER_DAYS`; return whether there may be more.

    Args:
        connection: In a transaction that may write.
        now_ms: The present; it must be trusted, because a forgotten batch may be stored twice.
    """
    expire = expire_batches(forgotten_before(now_ms), _EXPIRED_ROWS)
    expired = connection.execute(expire)
    return expired.rowcount == _EXPIRED_ROWS


def enter_batch(backend: Backend, batch_id: str, row_count: int, now_ms: int) -> Insert:
    """Enter a batch in the ledger; ``rowcount`` is 0 if it already has an entry.

    If another transaction has not yet committed an entry for it, the statement waits for that one.
    """
    values = {"batch_id": batch_id, "row_count": row_count, "committed_at": now_ms}
    entry: Insert = inserting(backend, LEDGER).values(values).on_conflict_do_nothing()
    return entry.execution_options(preserve_rowcount=True)


def batch_rows(batch_id: str) -> Select[*tuple[Any, ...]]:
    """The number of rows of the batch that were stored."""
    return select(LEDGER.c.row_count).where(LEDGER.c.batch_id == batch_id)


def correct_batch(batch_id: str, row_count: int) -> Update:
    """Set the number of rows of the batch that were stored."""
    return update(LEDGER).where(LEDGER.c.batch_id == batch_id).values(row_count=row_count)


def batches_before(cutoff_ms: int) -> Select[*tuple[Any, ...]]:
    """The id of one entry before the cutoff, if there is any."""
    return select(LEDGER.c.batch_id).where(LEDGER.c.committed_at < cutoff_ms).limit(1)


def expire_batches(cutoff_ms: int, limit: int) -> Delete:
    """Delete up to ``limit`` entries before the cutoff, the oldest first."""
    oldest = (
        select(LEDGER.c.batch_id)
        .where(LEDGER.c.committed_at < cutoff_ms)
        .order_by(LEDGER.c.committed_at)
        .limit(limit)
    )
    return delete(LEDGER).where(LEDGER.c.batch_id.in_(oldest))
