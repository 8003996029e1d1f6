"""SQLite's write lock on a file that other processes share, and the file's write-ahead log (WAL).

SQLite has no queue for its one write lock: a writer that finds it taken sleeps and tries again
after at most 100 ms (``sqliteDefaultBusyCallback``). Writers that follow each other closely can
therefore lock out another one without limit, and the gateway gives up after 3 s. So all stores of a
machine leave the lock free in the same periodic gaps, which they derive from the machine's clock. A
gap is long enough for a waiting writer to try once.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from lynkr_store.db.errors import is_busy
from lynkr_store.db.sqlite import WAL_PAGES, checkpoint, checkpoint_after
from lynkr_store.ingest.gil import long_call

PERIOD_S: Final = 1.4
"""Seconds from one gap to the next: two gaps within the gateway's 3 s, because a waiting writer may
miss one."""
GAP_S: Final = 0.13
"""Seconds that a gap lasts: the 100 ms after which a waiting writer tries again, and a margin."""
PAUSE_S: Final = 0.026
"""Seconds between two of several short writes: in its first 128 ms a writer that found the lock
taken tries again after at most 25 ms, so it gets the lock after one of them."""
_RETRY_S: Final = (0.002, 0.02)
_BUSY_S: Final = 3.0  # to wait for another writer of the file; then the caller tries again later
_LONG_WAL_PAGES: Final = 10_000
"""Pages in the WAL, 80 MB in a fresh file. When there are more, their end is moved to the file
between two batches, so that the next writer starts the WAL from its beginning."""
MANY_WAL_PAGES: Final = 2 * _LONG_WAL_PAGES
"""Pages in the WAL from which the commit of a large batch moves them to the file, which takes a
fifth of the time of writing. Usually a fold, or a batch during its pause, has moved them before."""


def pause_s(now_s: float, expected_s: float) -> float:
    """Seconds to wait before a write may begin, so that it does not hold the lock in a gap.

    Args:
        now_s: Seconds since the epoch, by the machine's clock.
        expected_s: Seconds for which the lock will be held; at most half a period is considered.
    """
    into = now_s % PERIOD_S
    if into < GAP_S:
        return GAP_S - into
    if into + min(expected_s, PERIOD_S / 2) > PERIOD_S:
        return PERIOD_S - into + GAP_S
    return 0.0


def retry_s() -> float:
    """Seconds after which a lock that was taken may be tried again."""
    return random.uniform(*_RETRY_S)  # noqa: S311 - so that processes do not keep step


class WriteLock:
    """Takes the write lock of one file, and leaves gaps for writers of other processes.

    Args:
        sets_wal: Whether it may set the connections' WAL limit; not those of a host's engine.
    """

    def __init__(self, *, sets_wal: bool) -> None:
        self._sets_wal = sets_wal
        self._turn = threading.Lock()
        self._checkpointing = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let this store run one write transaction at a time."""
        if not self._turn.acquire(blocking=False):  # only then is it a long call
            with long_call():
                self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()

    def begin(self, connection: Connection, expected_s: float, wal_pages: int) -> None:
        """Begin a transaction that holds the write lock.

        Args:
            connection: Its BEGIN must fail if the lock is taken.
            expected_s: Seconds for which the lock will be held, roughly.
            wal_pages: Pages in the WAL from which the commit moves them to the file.

        Raises:
            OperationalError: Another writer held the lock for 3 s, or BEGIN failed otherwise.
        """
        deadline = time.monotonic() + _BUSY_S
        while True:
            wait_s = pause_s(time.time(), expected_s)
            if wait_s:
                with long_call():
                    self._pause(connection, wait_s, wal_pages)
            try:
                connection.begin()
            except OperationalError as error:
                if not is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(retry_s())
            else:
                break
        if self._sets_wal:
            checkpoint_after(connection, wal_pages)

    def _pause(self, connection: Connection, wait_s: float, wal_pages: int) -> None:
        """Wait; if the WAL may be long, move it to the file meanwhile, which needs no write lock.

        A short WAL is left alone, so that the writers for which the gap exists are not disturbed.
        """
        until = time.monotonic() + wait_s
        if wal_pages > WAL_PAGES and self._checkpointing.acquire(timeout=wait_s):
            try:
                checkpoint(connection)
            finally:
                self._checkpointing.release()
        time.sleep(max(0.0, until - time.monotonic()))

    def checkpoint(self, connected: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Move the WAL's content to the file, most of it while batches are written.

        Args:
            connected: Opens a connection.
        """
        with self._checkpointing, connected() as connection:
            pages = checkpoint(connection)
            if pages >= _LONG_WAL_PAGES:
                for _ in range(2):  # what was written meanwhile, which is less each time
                    checkpoint(connection)
        if pages >= _LONG_WAL_PAGES:
            # in a batch's order: the turn first, then a connection, as a host may have only one
            with self._turn, connected() as connection:
                checkpoint(connection)
