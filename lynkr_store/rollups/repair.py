"""Keeps the roll-ups equal to their rows when rows are changed or deleted by any means.

Three checks find a quarter of an hour whose roll-ups differ from its rows. Triggers enter each
UPDATE and DELETE in a table of changes (`db.triggers`). Comparing the number of rows of each
quarter finds rows that were inserted below the watermark. A scrub, as in file systems, recomputes
old quarters; it finds what no trigger sees, such as SQLite's REPLACE, a restore with triggers
disabled, or a database without triggers.

Rows that retention removed are not such a difference: a quarter before the oldest row, or a quarter
that lost only rows older than the remaining ones, keeps its roll-ups.
"""

import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, select

from lynkr_store.db.citus import is_distributed
from lynkr_store.rollups import fold_sql
from lynkr_store.rollups.buckets import ceil_to, floor_to
from lynkr_store.rollups.fold import (
    MEASURES,
    OpenTransaction,
    enter_dimensions,
    held_watermark,
    hold_watermark,
    recount,
    update_raw_from,
)
from lynkr_store.rollups.state import read_state, removed_before
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.storage import progress
from lynkr_store.storage.progress import write
from lynkr_store.storage.write_lock import PAUSE_S

_Stop = Callable[[], bool]
_Compare = Callable[[Connection, int, int], set[int]]
"""Finds the quarters of a range whose roll-ups seem to differ from the rows."""

_STEP_S: Final = 0.012  # after this time a write transaction starts no further quarter
_COUNTED_ROWS: Final = 50_000  # in one read transaction, about 40 ms
_SCRUBBED_ROWS: Final = 2_000  # in one read transaction, about 40 ms
_COUNTED: Final = "counted"  # names in the table of progress: where each scan continues
_SCRUBBED: Final = "scrubbed"


class Repaired(NamedTuple):
    """The result of a repair.

    Attributes:
        quarters: The number of quarters whose roll-ups were recomputed.
        done: Nothing is left to do.
    """

    quarters: int
    done: bool


def apply_changes(
    write_transaction: OpenTransaction,
    *,
    read: OpenTransaction | None = None,
    stop: _Stop = lambda: False,
    alone: bool = False,
) -> Repaired:
    """Recompute the quarters for which triggers made change entries, in short steps.

    A step first deletes the entries and then reads the rows, in one transaction. A transaction that
    changes rows in between leaves an entry for the next step.

    Args:
        write_transaction: Opens a transaction that writes.
        read: Opens a transaction that only reads; used to find out whether there are
            entries, without the write lock. Default: ``write_transaction``.
        stop: Called before each step; True leaves the rest to the next call.
        alone: Leave the rest to another process that folds now.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted; the step was rolled back.
    """
    read = read or write_transaction
    with read() as connection:
        upto: int | None = connection.scalar(fold_sql.newest_change())
    quarters, more = 0, upto is not None
    while more and not stop():
        with write_transaction() as connection:
            began = time.monotonic()
            if hold_watermark(connection, alone=alone) is None:
                break
            raw_from = update_raw_from(connection)
            if raw_from is not None:  # retention makes many entries: delete them in one statement
                connection.execute(fold_sql.drop_changes(before=raw_from))
            while time.monotonic() - began < _STEP_S:
                start: int | None = connection.scalar(fold_sql.first_changed(), {"upto": upto})
                if start is None:
                    more = False
                    break
                quarters += _apply(connection, start)
        if more:
            time.sleep(PAUSE_S)
    return Repaired(quarters, not more)


def _apply(connection: Connection, start: int) -> bool:
    """Delete a quarter's change entries and recompute it, unless retention removed its rows."""
    entries = connection.scalars(fold_sql.take_changes(), {"start": start})
    deleted = max((instant for instant in entries if instant is not None), default=None)
    # read afterwards: rows that are gone by now have an entry above, or one for the next step
    current = read_state(connection)
    raw_from = current.raw_from
    if current.first_bucket is not None and current.oldest_row is None:
        return False
    if deleted is not None and current.oldest_row is not None and deleted < current.oldest_row:
        raw_from = update_raw_from(connection)  # only if the roll-ups held these rows
    if raw_from is not None and start < raw_from:
        return False
    return recount(connection, start) is not None


def compare_counts(
    write_transaction: OpenTransaction, *, read: OpenTransaction, stop: _Stop
) -> Repaired:
    """Recompute each quarter that has more or fewer rows than the roll-ups hold.

    It reads only the index of timestamps, and continues where the last call was stopped.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted.
    """
    return _scan(write_transaction, read, stop, _COUNTED, _COUNTED_ROWS, _with_other_counts)


def scrub(write_transaction: OpenTransaction, *, read: OpenTransaction, stop: _Stop) -> Repaired:
    """Compute each quarter's roll-ups from its rows, and replace the roll-ups that differ.

    It continues where the last call was stopped, and after the newest quarter starts again with the
    oldest.

    Raises:
        RollupsRefused: The roll-ups did not keep what was counted.
    """
    return _scan(write_transaction, read, stop, _SCRUBBED, _SCRUBBED_ROWS, _with_other_measures)


def _scan(
    write_transaction: OpenTransaction,
    read: OpenTransaction,
    stop: _Stop,
    name: str,
    rows: int,
    differing: _Compare,
) -> Repaired:
    with read() as connection:
        saved: int | None = connection.scalar(select(progress.value_of(name)))
    since, quarters = saved or INSTANT_MIN_MS, 0
    while since < INSTANT_MAX_MS and not stop():
        with read() as connection:
            last = connection.scalar(fold_sql.instant_after(), {"since": since, "rows": rows})
            until = INSTANT_MAX_MS if last is None else floor_to(QUARTER_MS, last) + QUARTER_MS
            found = differing(connection, since, until)
        for number, start in enumerate(sorted(found)):
            if number and stop():  # each call makes some progress, even without time
                until = start
                break
            with write_transaction() as connection:
                quarters += _recompute_if_different(connection, start)
            time.sleep(PAUSE_S)
        since = until
    done = since >= INSTANT_MAX_MS
    if done:
        since = INSTANT_MIN_MS
    if since != (saved or INSTANT_MIN_MS):
        with write_transaction() as connection:
            write(connection, name, since)
    return Repaired(quarters, done)


def _with_other_counts(connection: Connection, since: int, until: int) -> set[int]:
    values = _range_parameters(connection, since, until)
    of_rows = fold_sql.counts_folded if is_distributed(connection) else fold_sql.counts_there
    there: dict[int, int] = {}
    for start, requests in _pairs(connection, of_rows(), values):
        there[start] = there.get(start, 0) + requests
    return _differing(connection, there, values)


def _differing(connection: Connection, there: dict[int, int], values: dict[str, int]) -> set[int]:
    kept_from = values["kept_from"]
    late = any(start < kept_from for start in there)  # rare; otherwise skip the long history
    asked = values if late else values | {"since": max(values["since"], kept_from)}
    known = dict(_pairs(connection, fold_sql.counts_known(), asked))
    return {
        start
        for start in there.keys() | known.keys()
        if there.get(start, 0) > known.get(start, 0)
        or (start >= kept_from and there.get(start, 0) < known.get(start, 0))
    }


def _with_other_measures(connection: Connection, since: int, until: int) -> set[int]:
    # compare counts too: a row whose dimensions are not in the table has no measures
    found = _with_other_counts(connection, since, until)
    values = _range_parameters(connection, since, until)
    kept_from = values["kept_from"]
    if kept_from >= until:
        return found
    values |= {"since": max(since, kept_from), "between_since": max(since, kept_from)}
    there = _measures(connection, fold_sql.range_statements().quarters, values)
    known = _measures(connection, fold_sql.known_quarters(), values)
    return found | {start for (start, _), _ in there.items() ^ known.items()}


def _range_parameters(connection: Connection, since: int, until: int) -> dict[str, int]:
    current = read_state(connection)
    raw_from = removed_before(connection, current)
    return {
        "since": since,
        "until": until,
        "between_since": since,
        "between_until": until,
        "watermark": current.watermark,
        "kept_from": ceil_to(QUARTER_MS, raw_from or INSTANT_MIN_MS),
    }


def _pairs(connection: Connection, statement: Any, values: dict[str, int]) -> list[tuple[int, int]]:
    return [
        (int(start), int(requests)) for start, requests in connection.execute(statement, values)
    ]


def _measures(
    connection: Connection, statement: Any, values: dict[str, int]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """The measures of quarters, by start and dimension."""
    return {
        (int(row["start"]), int(row["dimension_id"])): tuple(
            int(row[name] or 0) for name in MEASURES
        )
        for row in connection.execute(statement, values).mappings()
    }


def _recompute_if_different(connection: Connection, start: int) -> bool:
    """Recompute a quarter if it still differs and no change entry already schedules that."""
    held_watermark(connection)
    update_raw_from(connection)
    values = _range_parameters(connection, start, start + QUARTER_MS)
    enter_dimensions(connection, fold_sql.range_statements(), values)
    if start not in _with_other_measures(connection, start, start + QUARTER_MS):
        return False
    return recount(connection, start) is not None
