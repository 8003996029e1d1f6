"""Adds rows to the roll-ups, each once, in short transactions.

One folder at a time: who folds holds the watermark, and moves it in the transaction in which the
rows' sums are added. A fold that is killed has done whole steps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, assert_never

from sqlalchemy import ColumnElement, Connection, RowMapping, text

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import TELEMETRY
from lynkr_store.exceptions import RollupsRefused
from lynkr_store.ingest.batch import RowBatch
from lynkr_store.rollups import fold_sql, state
from lynkr_store.rollups.answer import look as look_at
from lynkr_store.rollups.answer import removed_before
from lynkr_store.rollups.buckets import SPANS_MS, ceil_to, floor_to
from lynkr_store.rollups.measures import columns_of
from lynkr_store.rollups.state import NOTHING
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.storage import bulk, identities, progress
from lynkr_store.storage.write_lock import PAUSE_S

Begin = Callable[[], AbstractContextManager[Connection]]
"""Opens a transaction that may write, on SQLite one that has the write lock, and commits it."""

STEP_ROWS: Final = 10_000
"""Rows that one step folds; beside a busy writer it holds SQLite's lock for about 12 ms."""

_MOST_BETWEEN: Final = 2 * STEP_ROWS  # late rows may lie far apart, and others between them
MEASURES: Final = tuple(columns_of())
"""The columns of a roll-up that hold measures."""
_TRIM_DAYS: Final = 30
_POLL_S: Final = 0.01
_PATIENCE_S: Final = 2.0  # for transactions that may have written a row with a lower id


class Folded(NamedTuple):
    """How far a fold came: rows that it folded, and whether it reached the newest."""

    rows: int
    done: bool


def fold(
    begin: Begin,
    *,
    look: Begin | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda _: None,
) -> Folded:
    """Fold what is above the watermark, in steps.

    Args:
        begin: Opens a transaction that may write.
        look: Opens one that reads, in which most of the work is done: on SQLite without its lock.
        stop: Asked before each step whether to leave it at that.
        on_step: Told after each step how many rows were folded so far.

    Returns:
        Not done where it was stopped, or where transactions that may have written rows with lower
        ids stayed open: try again later.

    Raises:
        RollupsRefused: The roll-ups did not gain what was added; the step was rolled back.
    """
    look = look or begin
    upto, rows = settled_id(begin, look), 0
    if upto is None:
        return Folded(0, done=False)
    while not stop():
        step, last = _fold_step(begin, look, upto)
        rows += step
        on_step(rows)
        if last >= upto:
            return Folded(rows, done=True)
        time.sleep(PAUSE_S)
    return Folded(rows, done=False)


def _begin_again(begin: Begin) -> None:
    """Fold all rows again, where the database gives ids at or below the watermark.

    So it does after TRUNCATE … RESTART IDENTITY, or a DELETE from ``sqlite_sequence``: rows that
    come would never be above the watermark. Answers read all rows meanwhile. What is known of the
    time before the oldest row stays as history; roll-ups from its quarter on are those of rows
    which are gone.
    """
    with begin() as connection:
        folded = held_watermark(connection)
        if not _began_again(connection, folded):
            return
        oldest: int | None = connection.scalar(fold_sql.oldest_instant())
        if oldest is not None:
            start = floor_to(QUARTER_MS, oldest)
            drop_from(connection, start)
            connection.execute(fold_sql.drop_changes(since=start))
            connection.execute(progress.remove("raw_from"))
            if look_at(connection).first_bucket is not None:
                progress.write(connection, "raw_from", start)
        progress.write(connection, "folded", NOTHING)


def drop_from(connection: Connection, start: int) -> None:
    """Delete the roll-ups from a quarter on; of its hour and day stays what was before it."""
    connection.execute(fold_sql.drop_from(start))
    for span in SPANS_MS[1:]:
        connection.execute(fold_sql.sum_of_quarters(span, floor_to(span, start)))


def _began_again(connection: Connection, folded: int) -> bool:
    """Whether every id is below the watermark, and the next one will be too.

    Retention alone may take the row of the greatest id: then the next one is above. Where the table
    was empty there is no watermark any more, and roll-ups are left from its first row on.
    """
    stands = look_at(connection)
    if folded == NOTHING:
        oldest: int | None = connection.scalar(fold_sql.oldest_instant())
        last = stands.last_bucket
        return oldest is not None and last is not None and last + QUARTER_MS > oldest
    passed = stands.newest is None or stands.newest < folded
    return passed and identities.gives_upto(connection, folded)


def settled_id(begin: Begin, look: Begin) -> int | None:
    """An id up to which no row can appear any more; None where that would take too long.

    SQLite's writers come one after the other, so that is the greatest id. PostgreSQL gives out ids
    before their transactions commit. Whoever was given one below the greatest that is to be seen
    holds a writer's lock on the table since before; so it is settled when all who hold one now
    have come to an end. Nothing is locked for that: a lock that waits for writers would have
    others wait behind it, and one that gives up soon would never be had beside a long VACUUM.
    """
    with look() as connection:
        newest: int = connection.scalar(fold_sql.newest_id()) or NOTHING
        backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            return newest
        case Backend.POSTGRESQL:
            return newest if _wait_for_writers(begin) else None
        case _:
            assert_never(backend)


_WRITERS: Final = text(
    "SELECT virtualtransaction FROM pg_catalog.pg_locks WHERE locktype = 'relation' AND granted "
    "AND relation = CAST(pg_catalog.to_regclass(CAST(:name AS TEXT)) AS OID) "
    "AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) "
    "AND mode NOT IN ('AccessShareLock', 'RowShareLock', 'ShareUpdateExclusiveLock') "
    "AND pid IS DISTINCT FROM pg_backend_pid()"
)


def _wait_for_writers(begin: Begin) -> bool:
    """Wait until those who may write now do not any more; others may come meanwhile."""
    deadline = time.monotonic() + _PATIENCE_S
    writers: set[str] | None = None
    while writers is None or writers:
        if writers is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        with begin() as connection:
            now = set(connection.scalars(_WRITERS, {"name": TELEMETRY.name}))
        writers = now if writers is None else writers & now
    return True


def _fold_step(begin: Begin, look: Begin, upto: int) -> tuple[int, int]:
    """Fold some rows; return how many, and the watermark."""
    rows = fold_sql.rows_of_step()
    with look() as connection:
        folded: int = connection.execute(state.folded()).scalar_one()
        first: int | None = connection.scalar(fold_sql.first_above(folded))
        if first is not None and first <= upto:
            given, quarters, new = _read_step(connection, folded, first, upto)
        began_again = (first is None or folded == NOTHING) and _began_again(connection, folded)
    if began_again:
        _begin_again(begin)
        return 0, NOTHING
    if first is None or first > upto:
        return 0, max(folded, upto)
    if new:
        with begin() as connection:
            held_watermark(connection)
            connection.execute(rows.enter_dimensions, given)
        with look() as connection:
            quarters = connection.execute(rows.quarters, given).mappings().all()
    sums = _summed(quarters)
    with begin() as connection:
        now = held_watermark(connection)
        if now != folded:
            return 0, now  # another folder was quicker
        note_removed(connection)
        number = _number(connection, given, quarters)
        if number != _requests(quarters):  # some were deleted since, or have other dimensions
            connection.execute(rows.enter_dimensions, given)
            quarters = connection.execute(rows.quarters, given).mappings().all()
            sums = _summed(quarters)
            if number == connection.scalar(rows.number, given) != _requests(quarters):
                raise RollupsRefused  # the dimensions were not entered
        _add(connection, sums)
        last = given["upto"]
        progress.write(connection, "folded", last)
        if connection.execute(state.folded()).scalar_one() != last:
            raise RollupsRefused
    return _requests(quarters), last


def _read_step(
    connection: Connection, folded: int, first: int, upto: int
) -> tuple[dict[str, int], Sequence[RowMapping], bool]:
    """The next rows above the watermark: which ids, their measures, and whether that is not all.

    Rows of dimensions that are not known have no measures yet.
    """
    rows = fold_sql.rows_of_step()
    last = min(first + STEP_ROWS - 1, upto)
    given = {"after": folded, "upto": last}
    quarters = connection.execute(rows.quarters, given).mappings().all()
    if last < upto and 2 * _requests(quarters) < STEP_ROWS:  # there are ids without rows
        last = connection.scalar(fold_sql.last_of_step(folded, upto, STEP_ROWS)) or upto
        given = {"after": folded, "upto": last}
        quarters = connection.execute(rows.quarters, given).mappings().all()
    if last - first + 1 == _requests(quarters):
        return given, quarters, False
    # not each id is a row's of known dimensions
    return given, quarters, connection.execute(rows.new_dimensions, given).first() is not None


def _number(connection: Connection, given: dict[str, int], quarters: Sequence[RowMapping]) -> int:
    """How many of a step's rows are there, of which these are the quarters."""
    if quarters:
        between = {
            "first": min(int(quarter["first"]) for quarter in quarters),
            "last": max(int(quarter["last"]) for quarter in quarters),
            "most": _MOST_BETWEEN,
        }
        seen, found = connection.execute(fold_sql.number_between(), given | between).one()
        if seen < _MOST_BETWEEN:
            return int(found)
    number: int = connection.execute(fold_sql.rows_of_step().number, given).scalar_one()
    return number


def held_watermark(connection: Connection) -> int:
    """The watermark, which nobody else moves before this transaction ends."""
    folded: int | None = connection.scalar(fold_sql.watermark())
    if folded is None:  # the first of several folders enters it, and the others wait
        first = {"name": "folded", "value": NOTHING}
        connection.execute(progress.insert_if_absent(backend_of(connection)), first)
        folded = connection.scalar(fold_sql.watermark())
    return NOTHING if folded is None else folded


def note_removed(connection: Connection) -> int | None:
    """Note from when on the rows are there, before late ones hide that older ones were removed."""
    stands = look_at(connection)
    removed = removed_before(connection, stands)
    if removed is not None and removed != stands.raw_from:
        progress.write(connection, "raw_from", removed)
    return removed


def trim(
    begin: Begin,
    before_ms: int,
    *,
    look: Begin | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Delete roll-ups before an instant: whole days whose rows are gone, a month at a time.

    While rows are there, answers need the roll-ups of their day too, also where they came late.

    Args:
        begin: Opens a transaction that may write.
        before_ms: The first instant that stays.
        look: Opens one that reads: where there is nothing so old, nobody is kept from writing.
        stop: Asked before each step whether to leave it at that.
    """
    look = look or begin
    while not stop():
        with look() as connection:
            if connection.scalar(fold_sql.days_gone(before_ms)) is None:
                return
        with begin() as connection:
            held_watermark(connection)
            days = _days_to_trim(connection, before_ms, note_removed(connection))
            if not days:
                return
            connection.execute(fold_sql.trim(days))


def can_trim(connection: Connection, before_ms: int) -> bool:
    """Whether `trim` would find something to delete."""
    removed = removed_before(connection, look_at(connection))
    return bool(_days_to_trim(connection, before_ms, removed))


def _days_to_trim(connection: Connection, before_ms: int, removed: int | None) -> list[int]:
    if removed is None:
        return []
    return list(connection.scalars(fold_sql.days_gone(min(before_ms, removed), _TRIM_DAYS)))


def subtract(connection: Connection, condition: ColumnElement[bool]) -> None:
    """Take rows out of the roll-ups, which are to be erased in the same transaction.

    Args:
        connection: In a transaction of its own.
        condition: Which rows; those above the watermark are in no roll-up.
    """
    rows = fold_sql.folded_rows(held_watermark(connection), condition)
    _add(connection, _summed(connection.execute(rows.quarters).mappings().all(), sign=-1))
    connection.execute(fold_sql.drop_empty())


def rebuild(
    begin: Begin,
    *,
    since: int = INSTANT_MIN_MS,
    until: int = INSTANT_MAX_MS,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda _: None,
) -> Folded:
    """Make the roll-ups of folded rows anew, a quarter of an hour at a time.

    What is known of a time whose rows were removed stays, unless more rows are there than are
    known. Answers are right at every moment; one that was interrupted can be begun again.

    Args:
        begin: Opens a transaction that may write.
        since: From the quarter of this instant on.
        until: The first instant whose quarter stays as it is, unless it is that of an earlier one.
        stop: Asked before each step whether to leave it at that.
        on_step: Told after each step how many rows were counted so far.

    Raises:
        RollupsRefused: The roll-ups did not take what was counted; the step was rolled back.
    """
    after, rows = floor_to(QUARTER_MS, max(since, INSTANT_MIN_MS)), 0
    while not stop():
        with begin() as connection:
            held_watermark(connection)
            kept_from = ceil_to(QUARTER_MS, note_removed(connection) or INSTANT_MIN_MS)
            found = connection.execute(fold_sql.first_from(after, kept_from)).one()
            starts = [
                floor_to(QUARTER_MS, int(instant)) for instant in found if instant is not None
            ]
            if not starts or min(starts) >= until:
                return Folded(rows, done=True)
            start = min(starts)
            if start >= kept_from or has_more(connection, start):
                rows += recount(connection, start) or 0
        on_step(rows)
        after = start + QUARTER_MS
        time.sleep(PAUSE_S)
    return Folded(rows, done=False)


def has_more(connection: Connection, start: int) -> bool:
    """Whether a quarter has more rows than the roll-ups know of it."""
    given = state.quarter(start, held_watermark(connection))
    counts = connection.execute(state.counts_of_quarter(), given).one()
    return bool(counts.there > counts.known)


def recount(connection: Connection, start: int) -> int | None:
    """Make the roll-ups of one quarter anew, and those of the hour and the day it is in.

    Returns:
        How many rows it has. None where rows of it were deleted of which maintenance has not yet
        seen whether it was retention: then nothing was done.

    Raises:
        RollupsRefused: The roll-ups did not take what was counted.
    """
    rows = fold_sql.rows_of_quarter()
    given = state.quarter(start, held_watermark(connection))
    starts = {span: floor_to(span, start) for span in SPANS_MS}
    connection.execute(rows.enter_dimensions, given)
    quarters = connection.execute(rows.quarters, given).mappings().all()
    # asked after the rows were read: who deletes some meanwhile has noted it
    if connection.scalar(fold_sql.deleted_upto(), {"start": start}) is not None:
        return None
    connection.execute(fold_sql.drop_buckets(starts))
    _write(connection, [row for row in _summed(quarters) if row["span_ms"] == QUARTER_MS])
    if _requests_of(connection, QUARTER_MS, [start]) != _requests(quarters):
        raise RollupsRefused
    for span in SPANS_MS[1:]:
        connection.execute(fold_sql.sum_of_quarters(span, starts[span]))
    return _requests(quarters)


_Rollup = dict[str, int]
"""A row of the roll-ups."""


def _summed(quarters: Sequence[RowMapping], sign: int = 1) -> list[_Rollup]:
    """What was measured by quarter as roll-ups of every length, to be added to what is there."""
    sums: dict[tuple[int, int, int], _Rollup] = {}
    for quarter in quarters:
        measured = {name: sign * int(quarter[name] or 0) for name in MEASURES}
        for span in SPANS_MS:
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


def _add(connection: Connection, sums: Sequence[_Rollup]) -> None:
    """Add to the roll-ups, and make sure that they gained it.

    Raises:
        RollupsRefused: A rule or trigger of the table, or the database itself, took less.
    """
    starts = {span: sorted({s["start"] for s in sums if s["span_ms"] == span}) for span in SPANS_MS}
    before = {span: _requests_of(connection, span, starts[span]) for span in SPANS_MS}
    _write(connection, sums)
    for span in SPANS_MS:
        added = sum(each["requests"] for each in sums if each["span_ms"] == span)
        if _requests_of(connection, span, starts[span]) != before[span] + added:
            raise RollupsRefused


def _requests_of(connection: Connection, span_ms: int, starts: Sequence[int]) -> int:
    if not starts:
        return 0
    asked = {"span_ms": span_ms, "starts": starts}
    return connection.scalar(fold_sql.requests_of_buckets(), asked) or 0


def _write(connection: Connection, sums: Sequence[_Rollup]) -> None:
    if not sums:
        return
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            values = [each[name] for each in sums for name in fold_sql.ROLLUP]
            rows = RowBatch(fold_sql.ROLLUP, values)
            bulk.execute_in_parts(connection, fold_sql.add_text, rows, fold_sql.MOST_ADDED)
        case Backend.POSTGRESQL:
            lists = {name: [each[name] for each in sums] for name in fold_sql.ROLLUP}
            connection.execute(fold_sql.add_to_rollups(), lists)
        case _:
            assert_never(backend)
