"""PostgreSQL connection pools: never more connections than stated, and idle ones are closed.

SQLAlchemy's pool keeps idle connections for ever: its ``pool_recycle`` is an age, looked at when a
connection is next used. Servers have an ``idle_session_timeout``, but a pooler in between has none
for its clients, or ends sessions that others share.
"""

import threading
import time
import weakref
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from sqlalchemy import AsyncAdaptedQueuePool, Engine, QueuePool, event
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import queue as pool_queue

from lynkr_store.process.lifecycle import Forkable, on_fork
from lynkr_store.process.threads import start_thread

WAIT_S: Final = 30.0
"""Seconds to wait for one of a pool's connections; by default a statement may take as long."""

_RETURNED: Final = "lynkr_store_returned"  # in a connection's info: when it was last given back


class BoundedPool(QueuePool):
    """A pool that can close its idle connections."""

    __module__ = QueuePool.__module__  # names the logger: what a pool logs is SQLAlchemy's

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        record.info[_RETURNED] = time.monotonic()
        super()._do_return_conn(record)

    def close_idle(self, idle_s: float) -> float | None:
        """Close the connections that nobody has used for ``idle_s`` seconds.

        They keep their places in the pool, to be taken after the open ones and connected again.

        Returns:
            Seconds until the next one may be due; None if no connection is open.
        """
        entries: list[ConnectionPoolEntry] = []  # the last returned one first
        now, longest_s = time.monotonic(), 0.0
        try:
            with suppress(pool_queue.Empty):
                while True:
                    entries.append(self._pool.get(block=False))
            for entry in entries:
                if entry.dbapi_connection is None:
                    continue
                if (unused_s := now - entry.info[_RETURNED]) >= idle_s:
                    entry.close()
                else:
                    longest_s = max(longest_s, unused_s)
            is_open = any(entry.dbapi_connection is not None for entry in entries)
        finally:
            for entry in reversed(entries):
                self._pool.put(entry, block=False)
        return idle_s - longest_s if is_open or self.checkedout() else None


class AsyncBoundedPool(BoundedPool, AsyncAdaptedQueuePool):
    """The same for an asynchronous engine, in its event loop."""

    __module__ = QueuePool.__module__


def is_full(engine: Engine) -> bool:
    """Whether all connections of an engine's bounded pool are in use."""
    pool = engine.pool
    return isinstance(pool, BoundedPool) and pool.checkedout() >= pool.size()


class IdleCloser(Forkable):
    """Closes an engine's idle connections, in a thread that runs while any connection is open.

    The engine keeps it alive.

    Args:
        engine: Has a `BoundedPool`.
        idle_s: Seconds after which a connection is closed.
    """

    def __init__(self, engine: Engine, idle_s: float) -> None:
        self._engine = weakref.ref(engine)
        self._idle_s = min(idle_s, threading.TIMEOUT_MAX)
        self._reset()
        event.listen(engine, "connect", self._on_connect)
        event.listen(engine, "engine_disposed", self._on_disposed)
        on_fork(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may connect too
        self._thread: threading.Thread | None = None
        self._disposed: SimpleQueue[None] = SimpleQueue()

    def after_fork_in_child(self) -> None:
        """Start without a thread, and with the child's empty pool."""
        self._reset()

    def _on_connect(self, *_: object) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = start_thread(self._run, "idle")  # if None, the next connection tries

    def _on_disposed(self, *_: object) -> None:
        self._disposed.put(None)

    def _run(self) -> None:
        while (wait_s := self._close_idle()) is not None:
            with suppress(Empty):
                self._disposed.get(timeout=wait_s)

    def _close_idle(self) -> float | None:
        """Close what is due; None if this thread has to end."""
        with self._lock:
            engine, wait_s = self._engine(), None
            if engine is not None and isinstance(pool := engine.pool, BoundedPool):
                wait_s = pool.close_idle(self._idle_s)
            if wait_s is None:
                self._thread = None
            return wait_s
