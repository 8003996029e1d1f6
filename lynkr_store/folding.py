"""Adds rows to the roll-ups, each once, in short transactions.

One folder at a time: who folds holds the watermark, and moves it in the transaction in which the
rows' sums are added. A fold that is killed has done whole steps.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, assert_never

from sqlalchemy import ColumnElement, Connection, RowMapping, text

from lynkr_store import bulk, folds, rollups
from lynkr_store.answers import look, removed_before
from lynkr_store.backend import Backend
from lynkr_store.courtesy import PAUSE_S
from lynkr_store.domains import INSTANT_MIN_MS
from lynkr_store.engine import backend_of
from lynkr_store.measures import columns_of
from lynkr_store.models import TELEMETRY
from lynkr_store.rollups import NOTHING
from lynkr_store.rows import Rows
from lynkr_store.spans import DAY_MS, QUARTER_MS, SPANS_MS, ceil_to, floor_to

Begin = Callable[[], AbstractContextManager[Connection]]
"""Opens a transaction that may write, on SQLite one that has the write lock, and commits it."""

STEP_ROWS: Final = 10_000
"""Rows that one step folds; beside a busy writer it holds SQLite's lock for about 12 ms."""

_MOST_BETWEEN: Final = 2 * STEP_ROWS  # late rows may lie far apart, and others between them
_MEASURES: Final = tuple(columns_of())
_TRIM_MS: Final = 30 * DAY_MS
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


def settled_id(begin: Begin, look: Begin) -> int | None:
    """An id up to which no row can appear any more; None where that would take too long.

    SQLite's writers come one after the other, so that is the greatest id. PostgreSQL gives out ids
    before their transactions commit. Whoever was given one below the greatest that is to be seen
    holds a writer's lock on the table since before; so it is settled when all who hold one now
    have come to an end. Nothing is locked for that: a lock that waits for writers would have
    others wait behind it, and one that gives up soon would never be had beside a long VACUUM.
    """
    with look() as connection:
        newest: int = connection.scalar(folds.newest_id()) or NOTHING
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
    rows = folds.rows_of_step()
    with look() as connection:
        folded: int = connection.execute(rollups.folded()).scalar_one()
        first = connection.scalar(folds.first_above(folded))
        if first is None or first > upto:
            return 0, max(folded, upto)
        last = min(first + STEP_ROWS - 1, upto)
        given = {"after": folded, "upto": last}
        quarters = connection.execute(rows.quarters, given).mappings().all()
        if last < upto and 2 * _requests(quarters) < STEP_ROWS:  # there are ids without rows
            last = connection.scalar(folds.last_of_step(folded, upto, STEP_ROWS)) or upto
            given = {"after": folded, "upto": last}
            quarters = connection.execute(rows.quarters, given).mappings().all()
        new = None
        if last - first + 1 != _requests(quarters):  # not each id is a row's of known dimensions
            new = connection.execute(rows.new_dimensions, given).first()
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
        _note_removed(connection)
        if _number(connection, given, quarters) != _requests(quarters):  # some were deleted since
            quarters = connection.execute(rows.quarters, given).mappings().all()
            sums = _summed(quarters)
        _add(connection, sums)
        note(connection, "folded", last)
    return _requests(quarters), last


def _number(connection: Connection, given: dict[str, int], quarters: Sequence[RowMapping]) -> int:
    """How many of a step's rows are there, of which these are the quarters."""
    if quarters:
        between = {
            "first": min(int(quarter["first"]) for quarter in quarters),
            "last": max(int(quarter["last"]) for quarter in quarters),
            "most": _MOST_BETWEEN,
        }
        seen, found = connection.execute(folds.number_between(), given | between).one()
        if seen < _MOST_BETWEEN:
            return int(found)
    number: int = connection.execute(folds.rows_of_step().number, given).scalar_one()
    return number


def held_watermark(connection: Connection) -> int:
    """The watermark, which nobody else moves before this transaction ends."""
    folded: int | None = connection.scalar(folds.watermark())
    if folded is None:  # the first of several folders enters it, and the others wait
        first = {"name": "folded", "value": NOTHING}
        connection.execute(folds.note_first(backend_of(connection)), first)
        folded = connection.scalar(folds.watermark())
    return NOTHING if folded is None else folded


def note(connection: Connection, name: str, value: int) -> None:
    """Set a value of the progress."""
    connection.execute(folds.note(backend_of(connection)), {"name": name, "value": value})


def _note_removed(connection: Connection) -> int | None:
    """Note from when on the rows are there, before late ones hide that older ones were removed."""
    stands = look(connection)
    removed = removed_before(connection, stands)
    if removed is not None and removed != stands.raw_from:
        note(connection, "raw_from", removed)
    return removed


def trim(
    begin: Begin,
    before_ms: int,
    *,
    look: Begin | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Delete roll-ups before an instant: whole days whose rows are gone, a month at a time.

    While rows are there, answers need the roll-ups of their time too.

    Args:
        begin: Opens a transaction that may write.
        before_ms: The first instant that stays.
        look: Opens one that reads: where there is nothing so old, nobody is kept from writing.
        stop: Asked before each step whether to leave it at that.
    """
    look = look or begin
    while not stop():
        with look() as connection:
            first = connection.scalar(folds.first_start())
        if first is None or first + DAY_MS > before_ms:
            return
        with begin() as connection:
            held_watermark(connection)
            removed = _note_removed(connection)
            first = connection.scalar(folds.first_start())
            if removed is None or first is None:
                return
            until = min(before_ms, removed)
            if first + DAY_MS > until:
                return
            connection.execute(folds.trim(min(until, first + _TRIM_MS)))


def can_trim(connection: Connection, before_ms: int) -> bool:
    """Whether `trim` would find something to delete."""
    first, removed = (
        connection.scalar(folds.first_start()),
        removed_before(connection, look(connection)),
    )
    if first is None or removed is None:
        return False
    return int(first) + DAY_MS <= min(before_ms, removed)


def subtract(connection: Connection, condition: ColumnElement[bool]) -> None:
    """Take rows out of the roll-ups, which are to be erased in the same transaction.

    Args:
        connection: In a transaction of its own.
        condition: Which rows; those above the watermark are in no roll-up.
    """
    rows = folds.folded_rows(held_watermark(connection), condition)
    _add(connection, _summed(connection.execute(rows.quarters).mappings().all(), sign=-1))
    connection.execute(folds.drop_empty())


def rebuild(
    begin: Begin,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int], None] = lambda _: None,
) -> Folded:
    """Make the roll-ups of folded rows anew, a quarter of an hour at a time.

    What is known of a time whose rows were removed stays. Answers are right at every moment; one
    that was interrupted can be begun again.
    """
    with begin() as connection:
        held_watermark(connection)
        raw_from = _note_removed(connection)
    after, rows = INSTANT_MIN_MS if raw_from is None else ceil_to(QUARTER_MS, raw_from), 0
    while not stop():
        with begin() as connection:
            found = connection.execute(folds.first_from(after)).one()
            starts = [
                floor_to(QUARTER_MS, int(instant)) for instant in found if instant is not None
            ]
            if not starts:
                return Folded(rows, done=True)
            rows += _recount(connection, min(starts))
        on_step(rows)
        after = min(starts) + QUARTER_MS
        time.sleep(PAUSE_S)
    return Folded(rows, done=False)


def _recount(connection: Connection, start: int) -> int:
    """Make the roll-ups of one quarter anew, and those of the hour and the day it is in."""
    rows = folds.rows_of_quarter()
    given = rollups.quarter(start, held_watermark(connection))
    starts = {span: floor_to(span, start) for span in SPANS_MS}
    connection.execute(folds.drop_buckets(starts))
    connection.execute(rows.enter_dimensions, given)
    quarters = connection.execute(rows.quarters, given).mappings().all()
    _add(connection, [row for row in _summed(quarters) if row["span_ms"] == QUARTER_MS])
    for span in SPANS_MS[1:]:
        connection.execute(folds.sum_of_quarters(span, starts[span]))
    return _requests(quarters)


_Rollup = dict[str, int]
"""A row of the roll-ups."""


def _summed(quarters: Sequence[RowMapping], sign: int = 1) -> list[_Rollup]:
    """What was measured by quarter as roll-ups of every length, to be added to what is there."""
    sums: dict[tuple[int, int, int], _Rollup] = {}
    for quarter in quarters:
        measured = {name: sign * int(quarter[name] or 0) for name in _MEASURES}
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
    if not sums:
        return
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            values = [each[name] for each in sums for name in folds.ROLLUP]
            rows = Rows(folds.ROLLUP, values)
            bulk.execute_in_parts(connection, folds.add_text, rows, folds.MOST_ADDED)
        case Backend.POSTGRESQL:
            lists = {name: [each[name] for each in sums] for name in folds.ROLLUP}
            connection.execute(folds.add_to_rollups(), lists)
        case _:
            assert_never(backend)
