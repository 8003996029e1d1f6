"""Deletes old rows and texts and shrinks the SQLite file, in short steps that let writers through.

SQLite has one write lock. A process that finds it taken retries after 1, 2, 5, 10, 15, 20, 25, 25,
25, 50 and then every 100 ms (``sqliteDefaultBusyCallback``). The pause after each step is longer
than 25 ms, so a waiting process gets the lock after one step. Each step is a transaction:
PostgreSQL's autovacuum can follow, and a killed process loses nothing.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Table

from lynkr_store.backend import Backend
from lynkr_store.db.citus import is_distributed
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import SAVINGS, TELEMETRY
from lynkr_store.db.sqlite import empty_wal, overwriting
from lynkr_store.maintenance import retention_sql
from lynkr_store.rollups.fold import held_watermark, save_removed, settled_id
from lynkr_store.schemas.values import INT64_MAX, INT64_MIN
from lynkr_store.storage import progress
from lynkr_store.storage.database import Database
from lynkr_store.storage.progress import OF_TEXTS, insert_if_absent, upsert
from lynkr_store.storage.steps import end_of_step
from lynkr_store.storage.write_lock import PAUSE_S

_STEP_S: Final = {  # the time that a step should take
    Backend.SQLITE: 0.012,  # other writers wait for this time
    Backend.POSTGRESQL: 0.1,
}
_ROWS_LEAST: Final = 20  # rows or pages of a step
_ROWS_FIRST: Final = 100
_ROWS_MOST: Final = 500

_COUNTED: Final = 100_000  # remaining rows counted; a larger number takes time and says no more
_INCREMENTAL: Final = 2  # PRAGMA auto_vacuum of a file that can shrink

_id: Final = TELEMETRY.c.id

_Stop = Callable[[], bool]

_Step = Callable[[Connection, int], tuple[int, bool]]
"""Takes a connection in a transaction and a number of rows. Returns how much it did, and whether
there is more to do."""


def _never() -> bool:
    return False


class Retained(NamedTuple):
    """What `retain` did and left; see `lynkr_store.schemas.MaintenanceReport`.

    Attributes:
        retention_waits: Why nothing was done although there is something to do.
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
    """Delete old rows, then old texts, then free unused pages, until told to stop.

    Args:
        database: At this release's revision.
        rows_before_ms: The first instant whose rows are kept; None keeps all.
        texts_before_ms: The first instant whose texts are kept; None keeps all.
        stop: Called before each step; True leaves the rest to the next call.
        upto_id: Rows with greater ids are kept; their texts may be removed.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    deleted = removed = rows_left = texts_left = 0
    if rows_before_ms is not None:
        deleted = delete_older(database, rows_before_ms, upto_id=upto_id, stop=stop)
        deleted += delete_older(database, rows_before_ms, table=SAVINGS, stop=stop)
    if texts_before_ms is not None:
        removed = remove_texts(database, texts_before_ms, stop=stop)
    freed = free_pages(database, stop=stop)
    if rows_before_ms is not None or texts_before_ms is not None:
        truncate_wal(database)
    with translated(), database.connected(database.engine) as connection:
        if rows_before_ms is not None:
            rows_left = _count_rows(connection, rows_before_ms)
        if texts_before_ms is not None:
            texts_left = _count_texts(connection, texts_before_ms)
    return Retained(deleted, rows_left, removed, texts_left, freed)


def any_older(database: Database, cutoff_ms: int) -> bool:
    """Whether there are rows before an instant.

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
    """Delete the rows before an instant, oldest first.

    On PostgreSQL rows locked by another transaction are kept, because another process may be
    deleting them. Where the rows are distributed, such processes take turns.

    Args:
        database: At this release's revision.
        cutoff_ms: The first instant that is kept, in epoch milliseconds.
        table: A table with ``id`` and ``timestamp``.
        upto_id: Rows with greater ids are kept.
        stop: Called before each step; True ends the work.

    Returns:
        How many rows were deleted.

    Raises:
        StoreUnavailable: The database cannot be reached; what was deleted before stays deleted.
    """
    last: retention_sql.Place | None = None

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        nonlocal last
        # PostgreSQL's index keeps deleted entries until it is vacuumed: continue after them
        older = retention_sql.older(table, cutoff_ms, after=last, upto_id=upto_id, limit=limit)
        if is_distributed(connection):
            held_watermark(connection)
        else:
            older = older.with_for_update(skip_locked=True)
        found = connection.execute(older).all()
        if not found:
            return 0, False
        last = found[-1].timestamp, found[-1].id
        done = connection.execute(retention_sql.delete_rows(table, [row.id for row in found]))
        if table is TELEMETRY:
            save_removed(connection, _whole(*last)[0])
        return done.rowcount, len(found) == limit

    return _in_steps(database, step, stop)


def remove_texts(database: Database, cutoff_ms: int, *, stop: _Stop = _never) -> int:
    """Remove the texts of the rows before an instant, and keep the rest of these rows.

    The position is saved in the table of progress, so that no row is read again and again: the next
    call reads the rows that became old since then, and the rows that were inserted since then.

    Args:
        database: At this release's revision.
        cutoff_ms: The first instant whose texts are kept, in epoch milliseconds.
        stop: Called before each step; True leaves the rest to the next call.

    Returns:
        From how many rows texts were removed.

    Raises:
        StoreUnavailable: The database cannot be reached; what was removed before is gone.
    """
    with translated():
        settled = settled_id(database.write_transaction, database.read)
    saved: _Position | None = None  # by this call, which also knows the exact place:
    exactly: retention_sql.Place = INT64_MIN, INT64_MIN

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        nonlocal saved, exactly
        place = _position(connection, cutoff_ms, hold=True)
        goal = place.upto_id if settled is None else max(settled, place.upto_id)
        if goal == INT64_MIN:
            return 0, False
        if place.before_ms == INT64_MIN:
            place = place._replace(upto_id=goal)  # nothing was removed yet, so no text can be late
        if place.upto_id < goal:
            last = end_of_step(connection, TELEMETRY, place.upto_id, goal, limit)
            rows, more = _id.between(place.upto_id + 1, last), True
            place = place._replace(upto_id=last)
        else:
            after = exactly if place == saved else place.after
            older = retention_sql.older(
                TELEMETRY, cutoff_ms, after=after, upto_id=place.upto_id, limit=limit
            )
            found = connection.execute(older).all()
            rows, more = _id.in_([row.id for row in found]), len(found) == limit
            exactly = (found[-1].timestamp, found[-1].id) if more else (cutoff_ms, INT64_MIN)
            saved = place = _Position(*_whole(*exactly), place.upto_id)
        removed = connection.execute(retention_sql.remove_texts(rows, cutoff_ms)).rowcount
        connection.execute(upsert(backend_of(connection)), place.as_progress())
        return removed, more

    return _in_steps(database, step, stop)


class _Position(NamedTuple):
    """How far the removal of texts has come.

    Rows up to ``upto_id`` have no texts if they are before ``before_ms``, or at ``before_ms`` with
    an id up to ``before_id``.
    """

    before_ms: int = INT64_MIN
    before_id: int = INT64_MIN
    upto_id: int = INT64_MIN

    @property
    def after(self) -> retention_sql.Place | None:
        """The place of the last row that was read; None before the first."""
        return None if self.before_ms == INT64_MIN else (self.before_ms, self.before_id)

    def as_progress(self) -> list[dict[str, Any]]:
        """The rows of the table of progress."""
        return [
            {"name": f"{OF_TEXTS}{name}", "value": value} for name, value in self._asdict().items()
        ]


def _position(connection: Connection, cutoff_ms: int, *, hold: bool) -> _Position:
    """How far the removal has come; ``hold`` locks it until the transaction ends."""
    nothing = _Position().as_progress()
    statement = progress.values_of([row["name"] for row in nothing])
    if hold:  # one process inserts it, the others wait for its lock
        connection.execute(insert_if_absent(backend_of(connection)), nothing)
        statement = statement.with_for_update()
    values = {row.name.removeprefix(OF_TEXTS): row.value for row in connection.execute(statement)}
    place = _Position(**values)
    if place.before_ms > cutoff_ms:  # the retention was lengthened: read the rows between
        place = place._replace(before_ms=cutoff_ms, before_id=INT64_MIN)
    return place


def _whole(timestamp: float, row_id: int) -> tuple[int, int]:
    """A place in whole milliseconds, or the next one before it: some writers store fractions."""
    if isinstance(timestamp, int):
        return timestamp, row_id
    return math.floor(max(timestamp, INT64_MIN)), INT64_MAX


def free_pages(database: Database, *, stop: _Stop = _never) -> int:
    """Shrink an SQLite file by its free pages, if the file allows that.

    A file created without ``auto_vacuum = INCREMENTAL``, such as a gateway's, keeps free pages for
    new rows. On PostgreSQL autovacuum does this by itself.

    Returns:
        The number of bytes; the file shrinks with SQLite's next checkpoint.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        if _pragma(connection, "auto_vacuum") != _INCREMENTAL:
            return 0, False
        before = _pragma(connection, "freelist_count")
        with closing(connection.connection.cursor()) as cursor:  # a failed one would keep the lock
            for _ in range(min(limit, before)):
                # With a number, the PRAGMA frees one page for each result row that is fetched. The
                # rows have no columns, and Python's driver does not fetch such rows.
                cursor.execute("PRAGMA incremental_vacuum(1)")
        after = _pragma(connection, "freelist_count")
        return (before - after) * _pragma(connection, "page_size"), 0 < after < before

    if database.backend is not Backend.SQLITE:
        return 0
    return _in_steps(database, step, stop)


def truncate_wal(database: Database) -> None:
    """Empty SQLite's WAL, which holds pages from before rows or texts were removed.

    It does not wait: if another connection uses the WAL, the next call does it.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    if database.backend is not Backend.SQLITE:
        return
    with translated():
        database.checkpoint()  # most of it while batches continue
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
    place = _position(connection, cutoff_ms, hold=False)
    statements = (
        retention_sql.count_older(TELEMETRY, cutoff_ms, after=place.after, most=_COUNTED),
        retention_sql.count_late(place.upto_id, place.before_ms, most=_COUNTED),
    )
    return min(sum(connection.scalar(each) or 0 for each in statements), _COUNTED)


def _in_steps(database: Database, step: _Step, stop: _Stop) -> int:
    """Run steps, each in a transaction, until one was the last; return the sum of what they did."""
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
    """The number of rows for which a step should take its time; at most twice as many as before."""
    wanted = min(rows * should_s / max(took_s, should_s / 2), _ROWS_MOST)
    return max(int(wanted), _ROWS_LEAST)
