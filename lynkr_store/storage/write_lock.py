"""SQLite's write lock on a file that other processes share, and the file's write-ahead log (WAL).

SQLite has no queue for its one write lock: a writer that finds it taken sleeps and looks again,
after at most 100 ms (``sqliteDefaultBusyCallback``). Writers that follow one another closely can
therefore keep another one out for as long as they like, and the gateway gives up after 3 s. So all
stores of a machine, which share its clock, leave the lock alone at the same moments, again and
again, for long enough that a waiting writer looks once.
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
"""How often the lock is left alone: twice within the gateway's 3 s, for a waiting writer may miss
one."""
GAP_S: Final = 0.13
"""For how long: the 100 ms after which a waiting writer looks again, and a margin."""
PAUSE_S: Final = 0.026
"""From one of several short writes to the next: in its first 128 ms a writer that found the lock
taken looks again after 25 ms at most, so it gets in after one of them."""
_RETRY_S: Final = (0.002, 0.02)
_BUSY_S: Final = 3.0  # for another writer of the file, before the caller tries again later
_LONG_WAL_PAGES: Final = 10_000
"""80 MB of a fresh file's pages in the WAL: as many as it may hold before the end of it is moved to
the file between two batches, so that the next writer starts the WAL from its beginning."""
MANY_WAL_PAGES: Final = 2 * _LONG_WAL_PAGES
"""For a batch of many rows, pages from which on its commit moves them: a fifth of the time of
writing. A fold does it before, next to the batches, and a batch does during the pause."""


def pause_s(now_s: float, expected_s: float) -> float:
    """Seconds to wait before a write that takes as long as expected may begin.

    Args:
        now_s: Seconds since the epoch, by the machine's clock.
        expected_s: How long the lock will be held; more than half a period counts as that.
    """
    into = now_s % PERIOD_S
    if into < GAP_S:
        return GAP_S - into
    if into + min(expected_s, PERIOD_S / 2) > PERIOD_S:
        return PERIOD_S - into + GAP_S
    return 0.0


def retry_s() -> float:
    """Seconds after which a lock that was found taken may be asked for again."""
    return random.uniform(*_RETRY_S)  # noqa: S311 - so that processes do not keep step


class WriteLock:
    """Takes the write lock of one file so that no other writer waits in vain.

    Args:
        sets_wal: Whether the connections may be told when to move the WAL: a host's may not.
    """

    def __init__(self, *, sets_wal: bool) -> None:
        self._sets_wal = sets_wal
        self._turn = threading.Lock()
        self._checkpointing = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let this store's write transactions come one after the other."""
        if not self._turn.acquire(blocking=False):  # or other threads would wait for nothing
            with long_call():
                self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()

    def begin(self, connection: Connection, expected_s: float, wal_pages: int) -> None:
        """Begin a transaction that has the lock.

        Args:
            connection: Its BEGIN fails where the lock is taken.
            expected_s: Seconds for which the lock will be held, about.
            wal_pages: Pages in the WAL from which on the commit moves them to the file.

        Raises:
            OperationalError: Another writer has held the lock for 3 s; or another fault.
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
        """Wait; where the WAL may be long, move it to the file meanwhile, which needs no lock.

        Where it is short, the writers that the pause is for need not notice.
        """
        until = time.monotonic() + wait_s
        if wal_pages > WAL_PAGES and self._checkpointing.acquire(timeout=wait_s):
            try:
                checkpoint(connection)
            finally:
                self._checkpointing.release()
        time.sleep(max(0.0, until - time.monotonic()))

    def checkpoint(self, connected: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Move what stands in the WAL to the file, most of it while batches are written.

        Args:
            connected: Gives a connection.
        """
        with self._checkpointing, connected() as connection:
            pages = checkpoint(connection)
            if pages >= _LONG_WAL_PAGES:
                for _ in range(2):  # of what came meanwhile, less each time
                    checkpoint(connection)
        if pages >= _LONG_WAL_PAGES:
            # as a batch does: the turn first, then a connection, of which a host may have only one
            with self._turn, connected() as connection:
                checkpoint(connection)
