"""One run of maintenance: missing indexes, sequences, folding, repair, retention."""

import logging
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from sqlalchemy import select

from lynkr_store.backend import Backend
from lynkr_store.db.errors import translated
from lynkr_store.exceptions import ClockAhead
from lynkr_store.maintenance import clock_check, retention
from lynkr_store.maintenance.indexes import build_missing_indexes
from lynkr_store.maintenance.retention import Retained
from lynkr_store.process.log import say
from lynkr_store.rollups import fold as folding
from lynkr_store.rollups import repair, state
from lynkr_store.schemas import MaintenanceReport
from lynkr_store.schemas.units import DAY_MS
from lynkr_store.schemas.values import INT64_MIN
from lynkr_store.settings import StoreSettings
from lynkr_store.storage import identities, progress
from lynkr_store.storage.database import Database
from lynkr_store.storage.ledger import FORGOTTEN, expire_ledger, forgotten_before, has_expired
from lynkr_store.storage.write_lock import PAUSE_S

BUDGET_S: Final = 30.0
"""Seconds for retention, and for waiting for other sessions: a tenth of the default interval of the
store's own thread."""

OnStep = Callable[[int], None]
"""Called after each step of a fold with the number of rows folded so far."""

COUNTING: Final = 0.1
"""The share of the budget for comparing counts of rows: 1,000,000 rows a second."""

SCRUBBING: Final = 0.01
"""The share of the budget for recomputing old quarters from their rows: 50,000 rows a second."""

_LEDGER_STEPS: Final = 10  # of 1,000 batches each: as many as may be written between two runs


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
    """Do everything that keeps a database in order; see `lynkr_store.Store.maintain`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    forward = set_sequences_forward(database)
    with database.closed_if_disposed():
        built = build_missing_indexes(database.engine, budget_s)
    folded = fold(database, on_step=on_step)
    rows = folded.rows
    if rebuild:
        with translated():
            rows += folding.rebuild(
                database.write_transaction, on_step=lambda more: on_step(rows + more)
            )
    repaired = repair_rollups(database, budget_s) if folded.done else 0
    retained = retain(database, settings, clock, budget_s, trust_clock=trust_clock)
    if retained.retention_waits:
        say(logging.WARNING, "retention waits: %s", retained.retention_waits)
    with translated(), database.connected(database.engine) as connection:
        lag = connection.scalar(state.lag()) or 0
    return MaintenanceReport(
        indexes_built=built.names,
        indexes_left=built.left,
        waited_for=built.waited_for,
        sequences_set=forward,
        rows_folded=rows,
        quarters_recounted=folded.recounted,
        quarters_mended=repaired,
        rollup_lag=lag,
        **retained._asdict(),
    )


class IntervalTimer:
    """Decides when work is due that is asked about more often; it is due at the first call.

    Args:
        interval_s: Seconds between two times.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last: float | None = None

    def due(self) -> bool:
        """Whether the work is due; if so, it is due again when the interval has passed."""
        now = time.monotonic()
        if self._last is not None and now - self._last < self._interval_s:
            return False
        self._last = now
        return True


class FoldReport(NamedTuple):
    """What a fold did.

    Attributes:
        rows: Rows that were added to the roll-ups.
        recounted: Quarters whose roll-ups were recomputed because rows were changed or deleted.
        done: The fold reached the newest row.
    """

    rows: int
    recounted: int
    done: bool


def keep_up(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    checks: IntervalTimer,
    stop: Callable[[], bool],
) -> None:
    """What the store's own thread does at intervals: fold, repair, and retain if configured.

    Args:
        database: Opened on first use.
        settings: Say what is retained.
        clock: Returns the present in epoch milliseconds.
        checks: When to compare roll-ups with their rows; less often than rows are folded.
        stop: Called often; True leaves the rest to the next run.

    Raises:
        StoreUnavailable: The database cannot be reached.
        ClockAhead: The clock may be wrong, so retention waits.
    """
    database.open()
    set_sequences_forward(database)
    folded = fold(database, stop=stop, alone=True)
    if folded.done and not stop() and checks.due():
        repair_rollups(database, BUDGET_S, stop)
    if not stop():
        budget_s = BUDGET_S if _retains(settings) else 0
        if waits := retain(database, settings, clock, budget_s, stop).retention_waits:
            raise ClockAhead(waits)


def set_sequences_forward(database: Database) -> tuple[str, ...]:
    """Advance PostgreSQL's sequences that are behind their tables' ids; return their names.

    A restore or a copy leaves them behind; every new row would then get an id that already exists.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    if database.backend is Backend.SQLITE:  # SQLite derives new ids from the existing ones
        return ()
    with translated(), database.write_transaction() as connection:
        return identities.set_forward(connection)


def fold(
    database: Database,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: OnStep = lambda _: None,
    alone: bool = False,
) -> FoldReport:
    """Bring the roll-ups up to date: first apply changes, then add new rows.

    Args:
        database: Open.
        stop: Called often; True leaves the rest to the next call.
        on_step: Called after each step with the number of rows folded so far.
        alone: PostgreSQL: leave the rest to another process that does it now. Many that wait for
            each other's steps would each read all rows, and the last would wait for seconds.

    Raises:
        RollupsRefused: The roll-ups did not keep what was added.
        StoreUnavailable: The database cannot be reached; what was folded stays folded.
    """

    def after_step(rows: int) -> None:
        database.checkpoint()
        on_step(rows)

    with translated():
        changed = repair.apply_changes(
            database.write_transaction, read=database.read, stop=stop, alone=alone
        )
        folded = folding.fold(
            database.write_step,
            read=database.read,
            stop=stop,
            on_step=after_step,
            alone=alone,
            pause_s=database.pause_s,
        )
    return FoldReport(folded.rows, changed.quarters, folded.done and changed.done)


def repair_rollups(
    database: Database, budget_s: float, stop: Callable[[], bool] = lambda: False
) -> int:
    """Recompute roll-ups that differ from their rows; return the number of quarters.

    Takes a share of the budget; the next call continues where this one stopped.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted.
        StoreUnavailable: The database cannot be reached; what was repaired stays repaired.
    """
    quarters = 0
    for check, share in ((repair.compare_counts, COUNTING), (repair.scrub, SCRUBBING)):
        deadline = time.monotonic() + share * budget_s

        def over(deadline: float = deadline) -> bool:
            return stop() or time.monotonic() >= deadline

        with translated():
            quarters += check(database.write_transaction, read=database.read, stop=over).quarters
    if quarters:
        say(
            logging.WARNING,
            "roll-ups of %d quarters of an hour differed from their rows and were recomputed",
            quarters,
        )
    return quarters


def recount(database: Database, since_ms: int, until_ms: int) -> int:
    """Recompute the roll-ups of a window's quarters; see `lynkr_store.Store.recount`.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted.
        StoreUnavailable: The database cannot be reached; what was counted stays counted.
    """
    fold(database)
    with translated():
        return folding.rebuild(database.write_transaction, since=since_ms, until=until_ms)


def retain(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    budget_s: float,
    stop: Callable[[], bool] = lambda: False,
    *,
    trust_clock: bool = False,
) -> Retained:
    """Apply the configured retention to rows, texts, roll-ups and the ledger of batches.

    See `retention`. All of it waits while the clock may be wrong; see `clock_check`.

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
            folding.trim(
                database.write_transaction,
                rollups_before,
                read=database.read,
                stop=stop,
            )
            _expire_batches(database, now, stop)
            return retained
        with database.read() as connection:
            due = folding.can_trim(connection, rollups_before)
    if due or retained.rows_remaining or retained.texts_remaining:
        return retained._replace(retention_waits=doubt)
    return retained


def _doubt(database: Database, now_ms: int, *, trust_clock: bool) -> str | None:
    """Why the clock may be wrong; None if it is trusted, which is then saved."""
    with translated():
        with database.read() as connection:
            trusted = connection.scalar(select(progress.value_of(clock_check.TRUSTED)))
            newest = clock_check.newest(clock_check.seen_upto(now_ms, trusted))
            seen = clock_check.Seen(*connection.execute(newest).one())
        doubt = None if trust_clock else clock_check.doubt(now_ms, trusted, seen)
        if doubt is None and clock_check.must_save(now_ms, trusted):
            with database.write_transaction() as connection:
                progress.write(connection, clock_check.TRUSTED, now_ms)
    return doubt


def _expire_batches(database: Database, now_ms: int, stop: Callable[[], bool]) -> None:
    """Delete expired batches from the ledger, a limited number in each run."""
    with database.read() as connection:
        more = has_expired(connection, now_ms)
    for _ in range(_LEDGER_STEPS):
        if not more or stop():
            return
        with database.write_transaction() as connection:
            more = expire_ledger(connection, now_ms)
            earlier = connection.scalar(select(progress.value_of(FORGOTTEN)))
            latest = max(forgotten_before(now_ms), INT64_MIN if earlier is None else earlier)
            progress.write(connection, FORGOTTEN, latest)
        time.sleep(PAUSE_S)


def cleanup(database: Database, cutoff_ms: int, now_ms: int, *, trust_clock: bool = False) -> int:
    """Delete the rows before an instant; the roll-ups keep them as history.

    Returns:
        How many rows were deleted.

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
    retention.free_pages(database)
    retention.truncate_wal(database)
    return deleted


def folded_upto(database: Database) -> int:
    """The watermark; retention must not delete rows with greater ids."""
    with translated(), database.read() as connection:
        folded: int = connection.execute(state.watermark()).scalar_one()
    return folded


def _retains(settings: StoreSettings) -> bool:
    return settings.retention_days is not None or settings.text_retention_days is not None
