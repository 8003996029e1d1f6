"""What keeps a database in shape: missing indexes, sequences, folding, retention."""

import logging
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import select

from lynkr_store import clock_check, folding, identities, retention, rollups
from lynkr_store.backend import Backend
from lynkr_store.courtesy import PAUSE_S
from lynkr_store.database import Database
from lynkr_store.exceptions import ClockAhead
from lynkr_store.faults import translated
from lynkr_store.indexes import build_missing_indexes
from lynkr_store.inserts import FORGOTTEN, expire_ledger, forgotten_before, has_expired
from lynkr_store.log import say
from lynkr_store.retention import Retained
from lynkr_store.schemas import MaintenanceReport
from lynkr_store.settings import StoreSettings
from lynkr_store.spans import DAY_MS

BUDGET_S: Final = 30.0
"""Seconds for retention, and to wait for others: a tenth of the time between two of a store's own,
by default."""

OnStep = Callable[[int], None]
"""Told after each step of a fold how many rows were folded so far."""

_LEDGER_STEPS: Final = 10  # of 1,000 batches: as many as may be written from one time to the next


def maintain(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    *,
    budget_s: float = BUDGET_S,
    rebuild: bool = False,
    trust_clock: bool = False,
    on_step: OnStep = lambda _: None,
) -> MaintenanceReport:
    """Do all that keeps a database in shape; see `lynkr_store.Store.maintain`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    forward = set_sequences_forward(database)
    built = build_missing_indexes(database.engine, budget_s)
    folded = fold(database, on_step=on_step)
    if rebuild:
        with translated():
            folded += folding.rebuild(
                database.begun, on_step=lambda rows: on_step(folded + rows)
            ).rows
    retained = retain(database, settings, clock, budget_s, trust_clock=trust_clock)
    if retained.retention_waits:
        say(logging.WARNING, "retention waits: %s", retained.retention_waits)
    with translated(), database.connected(database.engine) as connection:
        lag = connection.scalar(rollups.lag()) or 0
    return MaintenanceReport(
        indexes_built=built.names,
        indexes_left=built.left,
        waited_for=built.waited_for,
        sequences_set=forward,
        rows_folded=folded,
        rollup_lag=lag,
        **retained._asdict(),
    )


def keep_up(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    stop: Callable[[], bool],
) -> None:
    """What a store does by itself from time to time: fold, and retain where that is configured.

    Raises:
        StoreUnavailable: The database cannot be reached.
        ClockAhead: The clock may be wrong, so retention waits.
    """
    database.open()
    set_sequences_forward(database)
    fold(database, stop=stop)
    if not stop():
        budget_s = BUDGET_S if _retains(settings) else 0
        if waits := retain(database, settings, clock, budget_s, stop).retention_waits:
            raise ClockAhead(waits)


def set_sequences_forward(database: Database) -> tuple[str, ...]:
    """Set PostgreSQL's sequences that are behind their tables' ids forward; return their names.

    A restore or a copy leaves them behind, and then every new row meets an id that is there.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    if database.backend is Backend.SQLITE:  # it looks at the ids itself
        return ()
    with translated(), database.begun() as connection:
        return identities.set_forward(connection)


def fold(
    database: Database,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: OnStep = lambda _: None,
) -> int:
    """Fold new rows into the roll-ups, and return how many; see `lynkr_store.folding.fold`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was folded stays folded.
    """

    def after_step(rows: int) -> None:
        database.checkpoint()
        on_step(rows)

    with translated():
        return folding.fold(
            database.begun_step, look=database.looked, stop=stop, on_step=after_step
        ).rows


def retain(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    budget_s: float,
    stop: Callable[[], bool] = lambda: False,
    *,
    trust_clock: bool = False,
) -> Retained:
    """Apply the configured retention to rows, texts and roll-ups; see `lynkr_store.retention`.

    The ledger of batches forgets here too. All of it waits while the clock may be wrong; see
    `lynkr_store.clock_check`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    now, deadline = clock(), time.monotonic() + budget_s
    rows_before, texts_before = (
        None if days is None else now - int(days * DAY_MS)
        for days in (settings.retention_days, settings.text_retention_days)
    )
    rollups_before = now - int(settings.rollup_retention_days * DAY_MS)
    doubt = _doubt(database, now, trust_clock=trust_clock)
    retained = retention.retain(
        database,
        rows_before_ms=rows_before,
        texts_before_ms=texts_before,
        stop=lambda: doubt is not None or stop() or time.monotonic() >= deadline,
        upto_id=folded_upto(database),
    )
    with translated():
        if doubt is None:
            folding.trim(database.begun, rollups_before, look=database.looked, stop=stop)
            _forget_batches(database, now, stop)
            return retained
        with database.looked() as connection:
            due = folding.can_trim(connection, rollups_before)
    if due or retained.rows_remaining or retained.texts_remaining:
        return retained._replace(retention_waits=doubt)
    return retained


def _doubt(database: Database, now_ms: int, *, trust_clock: bool) -> str | None:
    """Why the clock may be wrong; None where it is trusted, which is then noted."""
    with translated():
        with database.looked() as connection:
            trusted = connection.scalar(select(rollups.noted(clock_check.TRUSTED)))
            newest = clock_check.newest(clock_check.seen_upto(now_ms, trusted))
            seen = clock_check.Seen(*connection.execute(newest).one())
        doubt = None if trust_clock else clock_check.doubt(now_ms, trusted, seen)
        if doubt is None and clock_check.is_news(now_ms, trusted):
            with database.begun() as connection:
                folding.note(connection, clock_check.TRUSTED, now_ms)
    return doubt


def _forget_batches(database: Database, now_ms: int, stop: Callable[[], bool]) -> None:
    """Take from the ledger what is older than it remembers, some of it now and the rest later."""
    with database.looked() as connection:
        more = has_expired(connection, now_ms)
    for _ in range(_LEDGER_STEPS):
        if not more or stop():
            return
        with database.begun() as connection:
            more = expire_ledger(connection, now_ms)
            earlier = connection.scalar(select(rollups.noted(FORGOTTEN)))
            latest = max(forgotten_before(now_ms), rollups.NOTHING if earlier is None else earlier)
            folding.note(connection, FORGOTTEN, latest)
        time.sleep(PAUSE_S)


def cleanup(database: Database, cutoff_ms: int, now_ms: int, *, trust_clock: bool = False) -> int:
    """Delete the rows before a moment, which the roll-ups remember; return how many.

    Raises:
        ClockAhead: The present may be wrong, and nothing was deleted.
        StoreUnavailable: The database cannot be reached; what was deleted before stays deleted.
    """
    set_sequences_forward(database)
    fold(database)
    doubt = _doubt(database, now_ms, trust_clock=trust_clock)
    if doubt is not None and retention.any_older(database, cutoff_ms):
        raise ClockAhead(doubt)
    deleted = retention.delete_older(database, cutoff_ms, upto_id=folded_upto(database))
    retention.give_back(database)
    retention.forget(database)
    return deleted


def folded_upto(database: Database) -> int:
    """The id up to which rows are in the roll-ups; others must not be deleted by retention."""
    with translated(), database.looked() as connection:
        folded: int = connection.execute(rollups.folded()).scalar_one()
    return folded


def _retains(settings: StoreSettings) -> bool:
    return settings.retention_days is not None or settings.text_retention_days is not None
