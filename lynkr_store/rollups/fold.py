"""Adds rows to the roll-ups, each row exactly once, in short transactions.

Only one process folds at a time: it locks the watermark, and moves it in the transaction that adds
the rows' sums. A fold that is killed has completed whole steps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, assert_never

from sqlalchemy import Connection, RowMapping, insert, select

from lynkr_store.backend import Backend
from lynkr_store.db.citus import ids_of_workers, is_distributed, lock
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import DIMENSIONS, PROGRESS, TELEMETRY, measure_columns
from lynkr_store.exceptions import RollupsRefused
from lynkr_store.ingest.batch import RowBatch
from lynkr_store.rollups import fold_sql, state
from lynkr_store.rollups.buckets import BUCKET_LENGTHS_MS, ceil_to, floor_to
from lynkr_store.rollups.state import (
    NOTHING_FOLDED,
    RAW_FROM,
    WATERMARK,
    read_state,
    removed_before,
)
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.storage import bulk, identities, progress, settled
from lynkr_store.storage.steps import end_of_step
from lynkr_store.storage.write_lock import PAUSE_S

OpenTransaction = Callable[[], AbstractContextManager[Connection]]
"""Opens a transaction and commits it at the end. One that writes holds the write lock on SQLite."""

STEP_ROWS: Final = 10_000
"""Rows that one step folds. With a busy writer thread a step holds SQLite's lock for about 12
ms."""

_MOST_BETWEEN: Final = 2 * STEP_ROWS  # late rows may be far apart, with other rows between
MEASURES: Final = tuple(measure_columns())
"""The columns of a roll-up that hold measures."""
_TRIM_DAYS: Final = 30
_POLL_S: Final = 0.01
_PATIENCE_S: Final = 2.0  # for transactions that may have written a row with a lower id


class FoldResult(NamedTuple):
    """The number of rows that a fold added, and whether it reached the newest row."""

    rows: int
    done: bool


def fold(
    write_transaction: OpenTransaction,
    *,
    read: OpenTransaction | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda _: None,
    alone: bool = False,
    pause_s: float = 0.0,
) -> FoldResult:
    """Fold the rows above the watermark, in steps.

    Args:
        write_transaction: Opens a transaction that writes.
        read: Opens a transaction that only reads. Most of the work happens there, on
            SQLite without the write lock. Default: ``write_transaction``.
        stop: Called before each step; True ends the fold.
        on_step: Called after each step with the number of rows folded so far.
        alone: Leave the rest to another process that folds now. Otherwise wait for its steps.
        pause_s: Seconds between two steps: `Database.pause_s`.

    Returns:
        ``done`` is False if the fold was stopped, if another process folds, or if transactions that
        may have inserted rows with lower ids stayed open; call again later.

    Raises:
        RollupsRefused: The roll-ups did not gain what was added; the step was rolled back.
    """
    read = read or write_transaction
    upto, rows = settled_id(write_transaction, read), 0
    if upto is None:
        return FoldResult(0, done=False)
    while not stop():
        step, last = _fold_step(write_transaction, read, upto, alone=alone)
        if last is None:
            break
        rows += step
        on_step(rows)
        if last >= upto:
            return FoldResult(rows, done=True)
        time.sleep(pause_s)
    return FoldResult(rows, done=False)


def _restart(write_transaction: OpenTransaction) -> None:
    """Fold all rows again, because the database assigns ids at or below the watermark again.

    That happens after TRUNCATE … RESTART IDENTITY or a DELETE from ``sqlite_sequence``: new rows
    would never be above the watermark. Until the fold is done, answers read all rows. The roll-ups
    before the oldest row stay as history. Those from its quarter on describe rows that are gone,
    and are deleted.
    """
    with write_transaction() as connection:
        watermark = held_watermark(connection)
        if not _ids_restarted(connection, watermark):
            return
        oldest: int | None = connection.scalar(fold_sql.oldest_instant())
        if oldest is not None:
            start = floor_to(QUARTER_MS, oldest)
            drop_from(connection, start)
            connection.execute(fold_sql.drop_changes(since=start))
            connection.execute(progress.remove(RAW_FROM))
            if read_state(connection).first_bucket is not None:
                progress.write(connection, RAW_FROM, start)
        progress.write(connection, WATERMARK, NOTHING_FOLDED)


def drop_from(connection: Connection, start: int) -> None:
    """Delete the roll-ups from a quarter on; its hour and day keep what was before the quarter."""
    connection.execute(fold_sql.drop_from(start))
    for span in BUCKET_LENGTHS_MS[1:]:
        connection.execute(fold_sql.sum_of_quarters(span, floor_to(span, start)))


def _ids_restarted(connection: Connection, watermark: int) -> bool:
    """Whether every id is at or below the watermark, and the next one will be too.

    If retention deleted the row with the greatest id, the next id is still above the watermark. If
    the table was empty, the watermark is gone, and roll-ups exist from the first row on.
    """
    current = read_state(connection)
    if watermark == NOTHING_FOLDED:
        oldest: int | None = connection.scalar(fold_sql.oldest_instant())
        last = current.last_bucket
        return oldest is not None and last is not None and last + QUARTER_MS > oldest
    passed = current.newest is None or current.newest < watermark
    return passed and identities.gives_upto(connection, watermark)


def settled_id(write_transaction: OpenTransaction, read: OpenTransaction) -> int | None:
    """An id up to which no further row can appear; None if waiting for it would take too long.

    SQLite's writers take turns, so this is the greatest id. On PostgreSQL it is settled when the
    transactions that may have written have ended: see `storage.settled`.

    Raises:
        RollupsRefused: A client stored rows by a worker of a Citus cluster.
    """
    with read() as connection:
        found: int | None = connection.scalar(state.newest_id())
        newest = NOTHING_FOLDED if found is None else found  # it may be 0
        backend = backend_of(connection)
        if words := ids_of_workers(connection):
            raise RollupsRefused(words)
    match backend:
        case Backend.SQLITE:
            return newest
        case Backend.POSTGRESQL:
            return newest if _wait_for_writers(write_transaction) else None
        case _:
            assert_never(backend)


def _wait_for_writers(write_transaction: OpenTransaction) -> bool:
    """Wait until the transactions that may write now have ended; new ones may begin meanwhile."""
    deadline = time.monotonic() + _PATIENCE_S
    with write_transaction() as connection:
        writers = settled.writers(connection)
    while writers:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
        with write_transaction() as connection:
            writers = settled.still_open(connection, writers)
    return True


def _fold_step(
    write_transaction: OpenTransaction, read: OpenTransaction, upto: int, *, alone: bool
) -> tuple[int, int | None]:
    """Fold one step; return the number of rows, and the watermark; None: see `hold_watermark`."""
    rows = fold_sql.step_statements()
    with read() as connection:
        watermark: int = connection.execute(state.watermark()).scalar_one()
        first: int | None = connection.scalar(fold_sql.first_above(watermark))
        if first is not None and first <= upto:
            parameters, quarters, new = _read_step(connection, watermark, first, upto)
        restarted = (first is None or watermark == NOTHING_FOLDED) and _ids_restarted(
            connection, watermark
        )
    if restarted:
        _restart(write_transaction)
        return 0, NOTHING_FOLDED
    if first is None or first > upto:
        return 0, max(watermark, upto)
    if new:
        with write_transaction() as connection:
            if hold_watermark(connection, alone=alone) is None:
                return 0, None
            enter_dimensions(connection, rows, parameters)
        with read() as connection:
            quarters = connection.execute(rows.quarters, parameters).mappings().all()
    sums = _summed(quarters)
    with write_transaction() as connection:
        now = hold_watermark(connection, alone=alone)
        if now != watermark:
            return 0, now  # another process folded in between
        update_raw_from(connection)
        number = _count_rows(connection, parameters, quarters)
        if number != _requests(quarters):  # rows were deleted, or changed dimensions
            enter_dimensions(connection, rows, parameters)
            quarters = connection.execute(rows.quarters, parameters).mappings().all()
            sums = _summed(quarters)
            if number == connection.scalar(rows.number, parameters) != _requests(quarters):
                raise RollupsRefused  # the dimensions were not stored
        _add(connection, sums)
        last = parameters["upto"]
        progress.write(connection, WATERMARK, last)
        if connection.execute(state.watermark()).scalar_one() != last:
            raise RollupsRefused
    return _requests(quarters), last


def _read_step(
    connection: Connection, watermark: int, first: int, upto: int
) -> tuple[dict[str, int], Sequence[RowMapping], bool]:
    """Read the next rows above the watermark.

    Returns:
        The range of ids, the measures, and whether some of the rows have dimensions that are not in
        the table. Such rows have no measures yet.
    """
    rows = fold_sql.step_statements()

    def measured(last: int) -> Sequence[RowMapping]:
        parameters = {"after": watermark, "upto": last}
        return connection.execute(rows.quarters, parameters).mappings().all()

    last = min(first + STEP_ROWS - 1, upto)
    quarters = measured(last)
    if last < upto and 2 * _requests(quarters) < STEP_ROWS:  # maybe many ids have no row
        further = end_of_step(connection, TELEMETRY, watermark, upto, STEP_ROWS)
        if further > last:
            last, quarters = further, measured(further)
    parameters = {"after": watermark, "upto": last}
    if last - first + 1 == _requests(quarters):
        return parameters, quarters, False
    # an id has no row, or its row has dimensions that are not in the table
    new = connection.execute(rows.new_dimensions, parameters).first() is not None
    return parameters, quarters, new


def _count_rows(
    connection: Connection, parameters: dict[str, int], quarters: Sequence[RowMapping]
) -> int:
    """How many rows of a step exist; ``quarters`` are its measures."""
    if quarters:
        between = {
            "first": min(int(quarter["first"]) for quarter in quarters),
            "last": max(int(quarter["last"]) for quarter in quarters),
            "most": _MOST_BETWEEN,
        }
        seen, found = connection.execute(fold_sql.number_between(), parameters | between).one()
        if seen < _MOST_BETWEEN:
            return int(found)
    number: int = connection.execute(fold_sql.step_statements().number, parameters).scalar_one()
    return number


def enter_dimensions(
    connection: Connection, rows: fold_sql.RowStatements, parameters: dict[str, int]
) -> None:
    """Insert the combinations of the rows' dimensions that are not in the table yet.

    They are read and sent back, because Citus inserts nothing, without an error, when an INSERT
    selects from distributed rows those that a table of its own lacks.
    """
    new = connection.execute(rows.new_dimensions, parameters).mappings().all()
    if new:
        connection.execute(insert(DIMENSIONS), [dict(each) for each in new])


def held_watermark(connection: Connection) -> int:
    """The watermark, locked until this transaction ends."""
    if is_distributed(connection):
        lock(connection, PROGRESS.name)
    return progress.held(connection, WATERMARK, NOTHING_FOLDED)


def hold_watermark(connection: Connection, *, alone: bool) -> int | None:
    """As `held_watermark`; with ``alone``, None if another transaction holds it.

    On SQLite a transaction that writes is always alone.
    """
    if alone and _is_held(connection):
        return None
    return held_watermark(connection)


def _is_held(connection: Connection) -> bool:
    if is_distributed(connection):
        return not lock(connection, PROGRESS.name, wait=False)
    if connection.scalar(fold_sql.unlocked_watermark()) is not None:
        return False
    return connection.scalar(select(progress.value_of(WATERMARK))) is not None


def update_raw_from(connection: Connection) -> int | None:
    """Save the instant from which rows exist, before late rows hide that older ones are gone."""
    current = read_state(connection)
    removed = removed_before(connection, current)
    if removed is not None and removed != current.raw_from:
        progress.raise_to(connection, RAW_FROM, removed)
    return removed


def save_removed(connection: Connection, upto_ms: int) -> None:
    """Save that the store removed folded rows up to an instant, in the transaction that does so.

    The rows that remain would tell the same, unless a late row that is older was folded meanwhile.
    """
    if upto_ms >= INSTANT_MIN_MS:  # the roll-ups hold no row from before
        progress.raise_to(connection, RAW_FROM, upto_ms + 1)


def trim(
    write_transaction: OpenTransaction,
    before_ms: int,
    *,
    read: OpenTransaction | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Delete roll-ups before an instant: whole days whose rows are gone, a month at a time.

    While a day still has rows, answers need its roll-ups, even if the rows arrived late.

    Args:
        write_transaction: Opens a transaction that writes.
        before_ms: The first instant that is kept.
        read: Opens a transaction that only reads; used to find out whether there is
            anything to delete, without the write lock. Default: ``write_transaction``.
        stop: Called before each step; True ends the work.
    """
    read = read or write_transaction
    while not stop():
        with read() as connection:
            if not can_trim(connection, before_ms):
                return
        with write_transaction() as connection:
            held_watermark(connection)
            days = _days_to_trim(connection, before_ms, update_raw_from(connection))
            if not days:
                return
            connection.execute(fold_sql.trim(days))


def can_trim(connection: Connection, before_ms: int) -> bool:
    """Whether `trim` would delete anything."""
    removed = removed_before(connection, read_state(connection))
    return bool(_days_to_trim(connection, before_ms, removed))


def _days_to_trim(connection: Connection, before_ms: int, removed: int | None) -> list[int]:
    if removed is None:
        return []
    return list(connection.scalars(fold_sql.days_gone(min(before_ms, removed), _TRIM_DAYS)))


def rebuild(
    write_transaction: OpenTransaction,
    *,
    since: int = INSTANT_MIN_MS,
    until: int = INSTANT_MAX_MS,
    on_step: Callable[[int], None] = lambda _: None,
) -> int:
    """Recompute the roll-ups of folded rows, a quarter of an hour at a time.

    Roll-ups of a time whose rows were removed stay, unless more rows exist than the roll-ups hold.
    Answers are correct at every moment. If interrupted, call again.

    Args:
        write_transaction: Opens a transaction that writes.
        since: Begin with the quarter of this instant.
        until: End before this instant; the quarter that contains it is included if it begins
            earlier.
        on_step: Called after each step with the number of rows counted so far.

    Returns:
        The number of rows counted.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted; the step was rolled back.
    """
    after, rows = floor_to(QUARTER_MS, max(since, INSTANT_MIN_MS)), 0
    while True:
        with write_transaction() as connection:
            held_watermark(connection)
            kept_from = ceil_to(QUARTER_MS, update_raw_from(connection) or INSTANT_MIN_MS)
            found = connection.execute(fold_sql.first_from(after, kept_from)).one()
            starts = [
                floor_to(QUARTER_MS, int(instant)) for instant in found if instant is not None
            ]
            if not starts or min(starts) >= until:
                return rows
            start = min(starts)
            if start >= kept_from or has_more(connection, start):
                rows += recount(connection, start) or 0
        on_step(rows)
        after = start + QUARTER_MS
        time.sleep(PAUSE_S)


def has_more(connection: Connection, start: int) -> bool:
    """Whether a quarter has more rows than the roll-ups hold for it."""
    parameters = state.quarter_parameters(start, held_watermark(connection))
    counts = connection.execute(state.counts_of_quarter(), parameters).one()
    return bool(counts.there > counts.known)


def recount(connection: Connection, start: int) -> int | None:
    """Recompute the roll-ups of one quarter, and of the hour and the day that contain it.

    Returns:
        The number of its rows. None if rows of it were deleted and maintenance has not yet decided
        whether that was retention; then nothing was changed.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted.
    """
    rows = fold_sql.quarter_statements()
    parameters = state.quarter_parameters(start, held_watermark(connection))
    starts = {span: floor_to(span, start) for span in BUCKET_LENGTHS_MS}
    enter_dimensions(connection, rows, parameters)
    quarters = connection.execute(rows.quarters, parameters).mappings().all()
    # after reading the rows: a transaction that deleted some meanwhile has left a change entry
    if connection.scalar(fold_sql.deleted_upto(), {"start": start}) is not None:
        return None
    connection.execute(fold_sql.drop_buckets(starts))
    write_rollups(connection, [row for row in _summed(quarters) if row["span_ms"] == QUARTER_MS])
    if _requests_of(connection, QUARTER_MS, [start]) != _requests(quarters):
        raise RollupsRefused
    for span in BUCKET_LENGTHS_MS[1:]:
        connection.execute(fold_sql.sum_of_quarters(span, starts[span]))
    return _requests(quarters)


Rollup = dict[str, int]
"""A row of the roll-ups: its keys and measures."""


def _summed(quarters: Sequence[RowMapping]) -> list[Rollup]:
    """Sum the measures of quarters into roll-ups of every length, to be added to existing ones."""
    sums: dict[tuple[int, int, int], Rollup] = {}
    for quarter in quarters:
        measured = {name: int(quarter[name] or 0) for name in MEASURES}
        for span in BUCKET_LENGTHS_MS:
            start, dimension = floor_to(span, int(quarter["start"])), int(quarter["dimension_id"])
            so_far = sums.get((span, start, dimension))
            if so_far is None:
                keys = {"span_ms": span, "start": start, "dimension_id": dimension}
                sums[span, start, dimension] = keys | measured
            else:
                for name, value in measured.items():
                    so_far[name] += value
    return [sums[key] for key in sorted(sums)]


def _requests(quarters: Sequence[RowMapping]) -> int:
    return sum(int(quarter["requests"]) for quarter in quarters)


def _add(connection: Connection, sums: Sequence[Rollup]) -> None:
    """Add to the roll-ups, and verify that they gained what was added.

    Raises:
        RollupsRefused: A rule or trigger of the table, or the database itself, stored less.
    """
    starts = {
        span: sorted({s["start"] for s in sums if s["span_ms"] == span})
        for span in BUCKET_LENGTHS_MS
    }
    before = {span: _requests_of(connection, span, starts[span]) for span in BUCKET_LENGTHS_MS}
    write_rollups(connection, sums)
    for span in BUCKET_LENGTHS_MS:
        added = sum(each["requests"] for each in sums if each["span_ms"] == span)
        if _requests_of(connection, span, starts[span]) != before[span] + added:
            raise RollupsRefused


def _requests_of(connection: Connection, span_ms: int, starts: Sequence[int]) -> int:
    if not starts:
        return 0
    asked = {"span_ms": span_ms, "starts": starts}
    return connection.scalar(fold_sql.requests_of_buckets(), asked) or 0


def write_rollups(connection: Connection, sums: Sequence[Rollup]) -> None:
    """Add measures to roll-ups, and create those that do not exist."""
    if not sums:
        return
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            values = [each[name] for each in sums for name in fold_sql.ROLLUP]
            rows = RowBatch(fold_sql.ROLLUP, values)
            bulk.execute_in_parts(connection, fold_sql.add_text, rows, fold_sql.MOST_ADDED)
        case Backend.POSTGRESQL:
            arrays = {
                name: fold_sql.as_array(each[name] for each in sums) for name in fold_sql.ROLLUP
            }
            connection.execute(fold_sql.add_to_rollups(), arrays)
        case _:
            assert_never(backend)
