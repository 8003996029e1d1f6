"""Old rows go, old texts go, and an SQLite file gets smaller: in short steps, beside writers.

SQLite has one write lock, and who finds it taken looks again after 1, 2, 5, 10, 15, 20, 25, 25, 25,
then after 50 and every 100 ms (``sqliteDefaultBusyCallback``). The pause after each step is longer
than the 25 ms, so whoever waits gets the lock after one step. Each is a transaction of its own:
PostgreSQL's autovacuum can follow, and a process that is killed loses nothing.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Table

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import SAVINGS, TELEMETRY
from lynkr_store.db.sqlite import empty_wal, overwriting
from lynkr_store.maintenance import retention_sql
from lynkr_store.rollups.fold import settled_id
from lynkr_store.rollups.fold_sql import last_of_step
from lynkr_store.rollups.state import GREATEST_ID, NOTHING
from lynkr_store.storage import progress
from lynkr_store.storage.database import Database
from lynkr_store.storage.progress import insert_if_absent, upsert
from lynkr_store.storage.write_lock import PAUSE_S

_STEP_S: Final = {  # what a step should take
    Backend.SQLITE: 0.012,  # others wait meanwhile
    Backend.POSTGRESQL: 0.1,
}
_ROWS_LEAST: Final = 20  # of a step, or pages
_ROWS_FIRST: Final = 100
_ROWS_MOST: Final = 500

_COUNTED: Final = 100_000  # of what remains; more would take time for a number that says as much
_OF_TEXTS: Final = "texts_"  # names of the progress
_INCREMENTAL: Final = 2  # PRAGMA auto_vacuum, of a file that can be made smaller

_id: Final = TELEMETRY.c.id

_Stop = Callable[[], bool]

_Step = Callable[[Connection, int], tuple[int, bool]]
"""Takes a connection in a transaction and a number of rows; returns what it did and whether there
is more to do."""


def _never() -> bool:
    return False


class Retained(NamedTuple):
    """What `retain` did and left, as `lynkr_store.schemas.MaintenanceReport` says it.

    Attributes:
        retention_waits: Why nothing was done though there is something to do.
    """

    rows_deleted: int
    rows_remaining: int
    texts_removed: int
    texts_remaining: int
    bytes_freed: int
    retention_waits: str | None = None


def retain(
    database: Database,
    *,
    rows_before_ms: int | None,
    texts_before_ms: int | None,
    stop: _Stop,
    upto_id: int | None = None,
) -> Retained:
    """Delete old rows, then old texts, then give free pages back, until told to stop.

    Args:
        database: At this release's revision.
        rows_before_ms: The first moment whose rows stay; None keeps all.
        texts_before_ms: The first moment whose texts stay; None keeps all.
        stop: Asked before each step whether to leave the rest to the next time.
        upto_id: Rows of greater ids stay, their texts may go.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    deleted = removed = rows_left = texts_left = 0
    if rows_before_ms is not None:
        deleted = delete_older(database, rows_before_ms, upto_id=upto_id, stop=stop)
        deleted += delete_older(database, rows_before_ms, table=SAVINGS, stop=stop)
    if texts_before_ms is not None:
        removed = remove_texts(database, texts_before_ms, stop=stop)
    freed = give_back(database, stop=stop)
    if rows_before_ms is not None or texts_before_ms is not None:
        forget(database)
    with translated(), database.connected(database.engine) as connection:
        if rows_before_ms is not None:
            rows_left = _count_rows(connection, rows_before_ms)
        if texts_before_ms is not None:
            texts_left = _count_texts(connection, texts_before_ms)
    return Retained(deleted, rows_left, removed, texts_left, freed)


def any_older(database: Database, cutoff_ms: int) -> bool:
    """Whether there are rows before a moment.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    with translated(), database.read() as connection:
        return bool(connection.scalar(retention_sql.count_older(TELEMETRY, cutoff_ms, most=1)))


def delete_older(
    database: Database,
    cutoff_ms: int,
    *,
    table: Table = TELEMETRY,
    upto_id: int | None = None,
    stop: _Stop = _never,
) -> int:
    """Delete the rows before a moment, the oldest first.

    On PostgreSQL rows that another transaction has locked stay: another process may be deleting
    them.

    Args:
        database: At this release's revision.
        cutoff_ms: The first moment that stays, in epoch milliseconds.
        table: One with ``id`` and ``timestamp``.
        upto_id: Rows of greater ids stay.
        stop: Asked before each step whether to leave it at that.

    Returns:
        How many were deleted.

    Raises:
        StoreUnavailable: The database cannot be reached; what was deleted before stays deleted.
    """
    last: retention_sql.Place | None = None

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        nonlocal last
        # PostgreSQL's index keeps what was deleted until it is vacuumed: go on behind it
        older = retention_sql.older(table, cutoff_ms, after=last, upto_id=upto_id, limit=limit)
        found = connection.execute(older.with_for_update(skip_locked=True)).all()
        if not found:
            return 0, False
        last = found[-1].timestamp, found[-1].id
        done = connection.execute(retention_sql.delete_rows(table, [row.id for row in found]))
        return done.rowcount, len(found) == limit

    return _in_steps(database, step, stop)


def remove_texts(database: Database, cutoff_ms: int, *, stop: _Stop = _never) -> int:
    """Remove the texts of the rows before a moment, and leave the rest.

    No row is looked at again and again: the store notes in its own table how far it came, and next
    time looks at what has become old since then, and at rows that have come since then.

    Args:
        database: At this release's revision.
        cutoff_ms: The first moment whose texts stay, in epoch milliseconds.
        stop: Asked before each step whether to leave the rest to the next time.

    Returns:
        From how many rows.

    Raises:
        StoreUnavailable: The database cannot be reached; what was removed before is gone.
    """
    with translated():
        settled = settled_id(database.write_transaction, database.read)
    noted: _Place | None = None  # by us, and exactly
    exactly: retention_sql.Place = NOTHING, NOTHING

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        nonlocal noted, exactly
        place = _place(connection, cutoff_ms, hold=True)
        goal = place.upto_id if settled is None else max(settled, place.upto_id)
        if goal == NOTHING:
            return 0, False
        if place.before_ms == NOTHING:
            place = place._replace(upto_id=goal)  # there is no text that could have come too late
        if place.upto_id < goal:
            last = connection.scalar(last_of_step(place.upto_id, goal, limit)) or goal
            rows, more = _id.between(place.upto_id + 1, last), True
            place = place._replace(upto_id=last)
        else:
            after = exactly if place == noted else place.after
            older = retention_sql.older(
                TELEMETRY, cutoff_ms, after=after, upto_id=place.upto_id, limit=limit
            )
            found = connection.execute(older).all()
            rows, more = _id.in_([row.id for row in found]), len(found) == limit
            exactly = (found[-1].timestamp, found[-1].id) if more else (cutoff_ms, NOTHING)
            noted = place = _Place(*_whole(*exactly), place.upto_id)
        removed = connection.execute(retention_sql.remove_texts(rows, cutoff_ms)).rowcount
        connection.execute(upsert(backend_of(connection)), place.noted())
        return removed, more

    return _in_steps(database, step, stop)


class _Place(NamedTuple):
    """How far the removal of texts has come.

    Rows up to ``upto_id`` that are before this instant, or of it and not above ``before_id``, have
    no texts.
    """

    before_ms: int = NOTHING
    before_id: int = NOTHING
    upto_id: int = NOTHING

    @property
    def after(self) -> retention_sql.Place | None:
        """The place of the last row that was looked at; None before the first."""
        return None if self.before_ms == NOTHING else (self.before_ms, self.before_id)

    def noted(self) -> list[dict[str, Any]]:
        """As the table of progress has it."""
        return [
            {"name": f"{_OF_TEXTS}{name}", "value": value} for name, value in self._asdict().items()
        ]


def _place(connection: Connection, cutoff_ms: int, *, hold: bool) -> _Place:
    """How far it has come; where it is held, nobody else goes on before the transaction ends."""
    nothing = _Place().noted()
    statement = progress.values_of([noted["name"] for noted in nothing])
    if hold:  # the first of several enters it, and the others wait
        connection.execute(insert_if_absent(backend_of(connection)), nothing)
        statement = statement.with_for_update()
    values = {row.name.removeprefix(_OF_TEXTS): row.value for row in connection.execute(statement)}
    place = _Place(**values)
    if place.before_ms > cutoff_ms:  # they are kept for longer now: the rows between must be seen
        place = place._replace(before_ms=cutoff_ms, before_id=NOTHING)
    return place


def _whole(timestamp: float, row_id: int) -> tuple[int, int]:
    """A place in whole milliseconds, or the next before it: some writers store fractions."""
    if isinstance(timestamp, int):
        return timestamp, row_id
    return math.floor(max(timestamp, NOTHING)), GREATEST_ID


def give_back(database: Database, *, stop: _Stop = _never) -> int:
    """Make an SQLite file smaller by the pages that are free, where the file allows that.

    One that was not made with ``auto_vacuum = INCREMENTAL``, a gateway's say, keeps them for new
    rows. PostgreSQL's autovacuum works by itself.

    Returns:
        Bytes; the file shrinks with SQLite's next checkpoint.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        if _pragma(connection, "auto_vacuum") != _INCREMENTAL:
            return 0, False
        before = _pragma(connection, "freelist_count")
        with closing(connection.connection.cursor()) as cursor:  # else a failed one holds the lock
            for _ in range(min(limit, before)):
                # Given a number it frees a page for each row that is read of it; rows without
                # columns, which Python's driver does not read.
                cursor.execute("PRAGMA incremental_vacuum(1)")
        after = _pragma(connection, "freelist_count")
        return (before - after) * _pragma(connection, "page_size"), 0 < after < before

    if database.backend is not Backend.SQLITE:
        return 0
    return _in_steps(database, step, stop)


def forget(database: Database) -> None:
    """Empty SQLite's WAL, where pages stand as they were before rows or texts were removed.

    As far as that goes without waiting: while somebody reads or writes it is left to the next time.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    if database.backend is not Backend.SQLITE:
        return
    with translated():
        database.checkpoint()  # most of it beside the batches
        with database.connected(database.engine) as connection:
            empty_wal(connection)


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())


def _count_rows(connection: Connection, cutoff_ms: int) -> int:
    statements = (
        retention_sql.count_older(table, cutoff_ms, most=_COUNTED) for table in (TELEMETRY, SAVINGS)
    )
    return min(sum(connection.scalar(each) or 0 for each in statements), _COUNTED)


def _count_texts(connection: Connection, cutoff_ms: int) -> int:
    place = _place(connection, cutoff_ms, hold=False)
    statements = (
        retention_sql.count_older(TELEMETRY, cutoff_ms, after=place.after, most=_COUNTED),
        retention_sql.count_late(place.upto_id, place.before_ms, most=_COUNTED),
    )
    return min(sum(connection.scalar(each) or 0 for each in statements), _COUNTED)


def _in_steps(database: Database, step: _Step, stop: _Stop) -> int:
    """Take steps, each in a transaction, until one was the last; add up what they did."""
    total, rows, took_s = 0, _ROWS_FIRST, _STEP_S[database.backend]
    while not stop():
        with (
            translated(),
            database.write_transaction(took_s) as connection,
            overwriting(connection),
        ):
            began = time.monotonic()
            done, more = step(connection, rows)
        total += done
        if not more:
            break
        took_s = time.monotonic() - began
        rows = _next_rows(rows, took_s, _STEP_S[database.backend])
        time.sleep(PAUSE_S)
    return total


def _next_rows(rows: int, took_s: float, should_s: float) -> int:
    """How many rows a step may have that takes as long as it should; not many more than before."""
    wanted = min(rows * should_s / max(took_s, should_s / 2), _ROWS_MOST)
    return max(int(wanted), _ROWS_LEAST)
