"""Keeps the roll-ups those of the rows, whoever changed or deleted them and by whatever means.

Three ways find a quarter of an hour whose roll-ups are not those of its rows. Triggers note each
UPDATE and DELETE (`db.triggers`). Counts of rows by quarter find rows whose ids had been
passed already. And a scrub, as file systems have, computes old quarters again: it finds what no
trigger saw, such as SQLite's REPLACE, a restore with triggers off, or a database that takes none.

What retention removed is no such difference: a quarter before the oldest row, or that lost only
rows older than those that are left, stays as it was counted.
"""

import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, select

from lynkr_store.rollups import fold_sql
from lynkr_store.rollups.answer import look as look_at
from lynkr_store.rollups.answer import removed_before
from lynkr_store.rollups.buckets import ceil_to, floor_to
from lynkr_store.rollups.fold import MEASURES, Begin, held_watermark, note_removed, recount
from lynkr_store.rollups.state import NOTHING
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.storage import progress
from lynkr_store.storage.progress import write
from lynkr_store.storage.write_lock import PAUSE_S

_Stop = Callable[[], bool]
_Compare = Callable[[Connection, int, int], set[int]]
"""The quarters of a range whose roll-ups seem not to be those of the rows."""

_STEP_S: Final = 0.012  # of a transaction that may write, after which it takes no further quarter
_COUNTED_ROWS: Final = 50_000  # of one look, about 40 ms
_SCRUBBED_ROWS: Final = 2_000  # of one look, about 40 ms
_COUNTED: Final = "counted"  # names of the progress: how far each has come
_SCRUBBED: Final = "scrubbed"


class Mended(NamedTuple):
    """What was counted again.

    Attributes:
        quarters: Quarters of an hour whose roll-ups were made again.
        done: Nothing is left to do.
    """

    quarters: int
    done: bool


def apply_changes(
    begin: Begin, *, look: Begin | None = None, stop: _Stop = lambda: False
) -> Mended:
    """Count the quarters again of which triggers noted changes, in short steps.

    A step takes the entries out first and reads the rows afterwards, in one transaction: who
    changes rows in between leaves an entry for the next step.

    Args:
        begin: Opens a transaction that may write.
        look: Opens one that reads: where nothing was changed, nobody is kept from writing.
        stop: Asked before each step whether to leave the rest to the next time.

    Raises:
        RollupsRefused: The roll-ups did not take what was counted; the step was rolled back.
    """
    look = look or begin
    with look() as connection:
        upto: int | None = connection.scalar(fold_sql.newest_change())
    quarters, more = 0, upto is not None
    while more and not stop():
        with begin() as connection:
            began = time.monotonic()
            held_watermark(connection)
            raw_from = note_removed(connection)
            if raw_from is not None:  # retention leaves many, in one statement
                connection.execute(fold_sql.drop_changes(before=raw_from))
            while time.monotonic() - began < _STEP_S:
                start: int | None = connection.scalar(fold_sql.first_changed(), {"upto": upto})
                if start is None:
                    more = False
                    break
                quarters += _apply(connection, start)
        if more:
            time.sleep(PAUSE_S)
    return Mended(quarters, not more)


def _apply(connection: Connection, start: int) -> bool:
    """Take out what is noted of a quarter, and count it again unless retention removed its rows."""
    noted = connection.scalars(fold_sql.take_changes(), {"start": start})
    deleted = max((instant for instant in noted if instant is not None), default=None)
    stands = look_at(connection)  # after that: rows that are gone by now were noted, or will be
    raw_from = stands.raw_from
    if stands.first_bucket is not None and stands.oldest_row is None:
        return False
    if deleted is not None and stands.oldest_row is not None and deleted < stands.oldest_row:
        raw_from = note_removed(connection)  # if the roll-ups knew them
    if start < (raw_from or NOTHING):
        return False
    return recount(connection, start) is not None


def compare_counts(begin: Begin, *, look: Begin, stop: _Stop) -> Mended:
    """Count a quarter again where it has more or fewer rows than the roll-ups know.

    It reads the index of instants alone, from where the last call was stopped.

    Raises:
        RollupsRefused: The roll-ups did not take what was counted.
    """
    return _pass(begin, look, stop, _COUNTED, _COUNTED_ROWS, _of_other_counts)


def scrub(begin: Begin, *, look: Begin, stop: _Stop) -> Mended:
    """Compute the roll-ups of each quarter from its rows, and make those that differ again.

    From where the last call was stopped; after the newest quarter it begins with the oldest.

    Raises:
        RollupsRefused: The roll-ups did not take what was counted.
    """
    return _pass(begin, look, stop, _SCRUBBED, _SCRUBBED_ROWS, _of_other_measures)


def _pass(
    begin: Begin, look: Begin, stop: _Stop, name: str, rows: int, differing: _Compare
) -> Mended:
    with look() as connection:
        noted: int | None = connection.scalar(select(progress.value_of(name)))
    since, quarters = noted or INSTANT_MIN_MS, 0
    while since < INSTANT_MAX_MS and not stop():
        with look() as connection:
            last = connection.scalar(fold_sql.instant_after(), {"since": since, "rows": rows})
            until = INSTANT_MAX_MS if last is None else floor_to(QUARTER_MS, last) + QUARTER_MS
            found = differing(connection, since, until)
        for number, start in enumerate(sorted(found)):
            if number and stop():  # whatever the time, each call comes further
                until = start
                break
            with begin() as connection:
                quarters += _mend(connection, start)
            time.sleep(PAUSE_S)
        since = until
    done = since >= INSTANT_MAX_MS
    if done:
        since = INSTANT_MIN_MS
    if since != (noted or INSTANT_MIN_MS):
        with begin() as connection:
            write(connection, name, since)
    return Mended(quarters, done)


def _of_other_counts(connection: Connection, since: int, until: int) -> set[int]:
    given = _between(connection, since, until)
    there = dict(_pairs(connection, fold_sql.counts_there(), given))
    for start, requests in _pairs(connection, fold_sql.counts_above(), given):
        there[start] = there.get(start, 0) - requests
    return _differing(connection, there, given)


def _differing(connection: Connection, there: dict[int, int], given: dict[str, int]) -> set[int]:
    kept_from = given["kept_from"]
    late = any(start < kept_from for start in there)  # hardly any, and of history there is much
    asked = given if late else given | {"since": max(given["since"], kept_from)}
    known = dict(_pairs(connection, fold_sql.counts_known(), asked))
    return {
        start
        for start in there.keys() | known.keys()
        if there.get(start, 0) > known.get(start, 0)
        or (start >= kept_from and there.get(start, 0) < known.get(start, 0))
    }


def _of_other_measures(connection: Connection, since: int, until: int) -> set[int]:
    # by their number too: a row of dimensions that are not known has no measures
    found = _of_other_counts(connection, since, until)
    given = _between(connection, since, until)
    kept_from = given["kept_from"]
    if kept_from >= until:
        return found
    given |= {"since": max(since, kept_from), "between_since": max(since, kept_from)}
    there = _measures(connection, fold_sql.rows_between().quarters, given)
    known = _measures(connection, fold_sql.known_quarters(), given)
    return found | {start for (start, _), _ in there.items() ^ known.items()}


def _between(connection: Connection, since: int, until: int) -> dict[str, int]:
    stands = look_at(connection)
    raw_from = removed_before(connection, stands)
    return {
        "since": since,
        "until": until,
        "between_since": since,
        "between_until": until,
        "folded": stands.folded,
        "kept_from": ceil_to(QUARTER_MS, raw_from or INSTANT_MIN_MS),
    }


def _pairs(connection: Connection, statement: Any, given: dict[str, int]) -> list[tuple[int, int]]:
    return [(int(start), int(requests)) for start, requests in connection.execute(statement, given)]


def _measures(
    connection: Connection, statement: Any, given: dict[str, int]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """The measures of quarters, by start and dimension."""
    return {
        (int(row["start"]), int(row["dimension_id"])): tuple(
            int(row[name] or 0) for name in MEASURES
        )
        for row in connection.execute(statement, given).mappings()
    }


def _mend(connection: Connection, start: int) -> bool:
    """Count a quarter again if it still differs and no entry says that it will be."""
    held_watermark(connection)
    note_removed(connection)
    given = _between(connection, start, start + QUARTER_MS)
    connection.execute(fold_sql.rows_between().enter_dimensions, given)
    if start not in _of_other_measures(connection, start, start + QUARTER_MS):
        return False
    return recount(connection, start) is not None
