"""Old rows go, old texts go, and an SQLite file gets smaller: in short steps, beside writers.

SQLite has one write lock, and who finds it taken looks again after 1, 2, 5, 10, 15, 20, 25, 25, 25,
then after 50 and every 100 ms (``sqliteDefaultBusyCallback``). The pause after each step is longer
than the 25 ms, so whoever waits gets the lock after one step. Each is a transaction of its own:
PostgreSQL's autovacuum can follow, and a process that is killed loses nothing.
"""

import math
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, Table

from lynkr_store import queries
from lynkr_store.backend import Backend
from lynkr_store.database import Database
from lynkr_store.engine import ensure_begun
from lynkr_store.faults import translated
from lynkr_store.models import TELEMETRY

_STEP_S: Final = 0.02  # what a step should take, with the lock held
_PAUSE_S: Final = 0.03
_ROWS_LEAST: Final = 20  # of a step, or pages
_ROWS_FIRST: Final = 100
_ROWS_MOST: Final = 1_000

_INCREMENTAL: Final = 2  # PRAGMA auto_vacuum, of a file that can be made smaller

_Step = Callable[[Connection, int], tuple[int, bool]]
"""Takes a connection in a transaction and a number of rows; returns what it did and whether there
is more to do."""


def delete_older(
    database: Database,
    cutoff_ms: int,
    *,
    table: Table = TELEMETRY,
    upto_id: int | None = None,
    deadline: float = math.inf,
) -> int:
    """Delete the rows before a moment, the oldest first.

    On PostgreSQL rows that another transaction has locked stay: another process may be deleting
    them.

    Args:
        database: At this release's revision.
        cutoff_ms: The first moment that stays, in epoch milliseconds.
        table: One with ``id`` and ``timestamp``.
        upto_id: Rows of greater ids stay.
        deadline: On the monotonic clock; what is not done by then stays.

    Returns:
        How many were deleted.

    Raises:
        StoreUnavailable: The database cannot be reached; what was deleted before stays deleted.
    """
    last: queries.Place | None = None

    def step(connection: Connection, limit: int) -> tuple[int, bool]:
        nonlocal last
        # PostgreSQL's index keeps what was deleted until it is vacuumed: go on behind it
        older = queries.older(table, cutoff_ms, after=last, upto_id=upto_id, limit=limit)
        found = connection.execute(older.with_for_update(skip_locked=True)).all()
        if not found:
            return 0, False
        last = found[-1].timestamp, found[-1].id
        done = connection.execute(queries.delete_rows(table, [row.id for row in found]))
        return done.rowcount, len(found) == limit

    return _in_steps(database, step, deadline)


def give_back(database: Database, *, deadline: float = math.inf) -> int:
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
        cursor = connection.connection.cursor()
        for _ in range(min(limit, before)):
            # Given a number it frees a page for each row that is read of it; rows without columns,
            # which Python's driver does not read.
            cursor.execute("PRAGMA incremental_vacuum(1)")
        cursor.close()
        after = _pragma(connection, "freelist_count")
        return (before - after) * _pragma(connection, "page_size"), 0 < after < before

    if database.backend is not Backend.SQLITE:
        return 0
    return _in_steps(database, step, deadline)


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())


def _in_steps(database: Database, step: _Step, deadline: float) -> int:
    """Take steps, each in a transaction, until one was the last; add up what they did."""
    total, rows, took_s = 0, _ROWS_FIRST, _STEP_S
    while time.monotonic() < deadline:
        with translated(), database.begun(took_s) as connection:
            began = time.monotonic()
            ensure_begun(connection)  # on a host's engine too
            done, more = step(connection, rows)
        total += done
        if not more:
            break
        took_s = time.monotonic() - began
        rows = _next_rows(rows, took_s)
        time.sleep(_PAUSE_S)
    return total


def _next_rows(rows: int, took_s: float) -> int:
    """How many rows a step may have that takes as long as it should; not many more than before."""
    wanted = min(rows * _STEP_S / max(took_s, _STEP_S / 2), _ROWS_MOST)
    return max(int(wanted), _ROWS_LEAST)
