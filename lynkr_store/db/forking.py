"""Closes an engine's connections before this process forks, so that no child inherits them.

An SQLite connection that is open at a fork can destroy its file. The child inherits SQLite's record
of the locks that this process holds, but the operating system gives the child none of these locks.
A connection that the child opens to the file then writes without any lock, and what the child
committed can be lost when the parent ends. See https://sqlite.org/howtocorrupt.html, section 2.6.

So before a fork, every connection of every engine given to `keep_out_of_children` is closed as soon
as the thread that uses it returns it, and a thread that asks for a connection waits until the fork
is over. If a connection is not returned in time, it stays open and the child refuses to use the
file. A PostgreSQL connection is a socket; the child only has to leave it alone.
"""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from lynkr_store.backend import Backend
from lynkr_store.db.urls import file_of, is_memory
from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.process.files import Identity, identity_of
from lynkr_store.process.lifecycle import FORK_WAIT_S, Forkable, on_fork

_POLL_S: Final = 0.002  # a pool has no event for dropping a connection
_FILE: Final = "lynkr_store_file"  # in a connection's info: the identity of its open file

_guards: "weakref.WeakKeyDictionary[Dialect, _Guard]" = weakref.WeakKeyDictionary()
_inherited: list[object] = []  # keeps the garbage collector from closing the parent's connections
_refused: set[Identity] = set()  # files that this process must not open


def keep_out_of_children(engine: Engine) -> None:
    """Close the engine's connections before each fork; parent and child then open new ones.

    If an SQLite file was removed or replaced, its connections are also replaced, when a thread next
    asks for one. May be called again.

    Args:
        engine: The store's or a host's; of an AsyncEngine its ``sync_engine``.
    """
    guard = _guards.get(engine.dialect)
    if guard is None:
        make = _SqliteGuard if engine.dialect.name == Backend.SQLITE else _Guard
        guard = _guards[engine.dialect] = make(engine)
        on_fork(guard)
    guard.watch(engine)


class _Guard(Forkable):
    """Makes a child leave the connections of the parent's engine alone.

    On any database, an engine's first connection also sets the engine up, under a lock that a child
    must not inherit, so a fork waits for it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Callable[[], Engine | None] = weakref.ref(engine)
        self._set_up = False
        self._reset()
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "connect", self._on_connect)
        event.listen(engine, "checkin", self._on_checkin)

    def _reset(self) -> None:
        self._changed = threading.Condition()  # has an RLock: a signal handler may fork
        self._forking: list[int] = []  # the threads that fork
        self._waited: set[int] = set()  # threads that waited for another thread's fork
        self._making: weakref.WeakKeyDictionary[ConnectionPoolEntry, int] = (
            weakref.WeakKeyDictionary()
        )
        """Connections that are being opened, each with the thread that opens it."""

    def watch(self, engine: Engine) -> None:
        """Take this engine, if the watched one, which shared its dialect and pool, is gone."""
        if self._engine() is None:
            self._engine = weakref.ref(engine)

    # -- events of the pool --------------------------------------------------------------------

    def _connect(
        self,
        dialect: Dialect,
        record: ConnectionPoolEntry,
        arguments: list[Any],
        options: dict[str, Any],
    ) -> DBAPIConnection:
        with self._changed:
            self._wait_for_forks()
            self._making[record] = threading.get_ident()
        try:
            self._check()
            for later in self._later(dialect):
                if (connection := later(dialect, record, arguments, options)) is not None:
                    return connection
            return dialect.connect(*arguments, **options)
        except BaseException:
            with self._changed:
                self._making.pop(record, None)
                self._waited.discard(threading.get_ident())
            raise

    def _later(self, dialect: Dialect) -> list[Callable[..., DBAPIConnection | None]]:
        """Listeners that were added later: SQLAlchemy skips them when this one returns a result."""
        listeners = list(dialect.dispatch.do_connect)
        return listeners[listeners.index(self._connect) + 1 :]

    def _check(self) -> None:
        """Refuse a connection that this process must not open."""

    def _wait_for_forks(self) -> None:
        me = threading.get_ident()
        if self._forking and me not in self._forking:
            self._waited.add(me)
            self._changed.wait_for(lambda: not self._forking)

    def _on_connect(self, _: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        with self._changed:
            self._making.pop(record, None)
            self._set_up = True

    def _on_checkin(self, _: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        with self._changed:
            self._making.pop(record, None)  # if it could not be opened

    # -- the fork ------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Wait until the engine's first connection is open, if a thread is opening it."""
        if not self._set_up:
            with self._changed:
                self._forking.append(threading.get_ident())
            _wait_until(lambda: not self._others(self._making), time.monotonic() + FORK_WAIT_S)

    def _others(self, connections: "weakref.WeakKeyDictionary[ConnectionPoolEntry, int]") -> bool:
        """Whether any of the connections belongs to a thread that does not fork."""
        with self._changed:
            return any(thread not in self._forking for thread in connections.values())

    def after_fork_in_parent(self) -> None:
        """Let the waiting threads continue."""
        with self._changed:
            if threading.get_ident() in self._forking:
                self._forking.remove(threading.get_ident())
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Start with an empty pool."""
        self._reset()
        if engine := self._engine():
            _inherited.append(engine.pool)
            engine.dispose(close=False)


class _Closing:
    """A connection that is being closed; ``record`` is None if it was detached."""

    def __init__(self, record: ConnectionPoolEntry | None) -> None:
        self.record = record


class _SqliteGuard(_Guard):
    """Closes an engine's SQLite connections before a fork.

    A database in memory is its one connection; it stays open, but no thread may be using it.
    """

    def __init__(self, engine: Engine) -> None:
        self._path = file_of(engine.url)
        self._in_memory = is_memory(engine.url)
        self._is_async = engine.dialect.is_async
        super().__init__(engine)
        event.listen(engine, "checkout", self._on_checkout)
        on_close = self._on_close_async if self._is_async else self._on_close
        event.listen(engine, "close", on_close)
        event.listen(engine, "detach", self._on_detach)
        event.listen(engine, "close_detached", self._on_close_detached)

    def _reset(self) -> None:
        super()._reset()
        self._at_rest = False
        self._known: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
        self._detached: dict[int, DBAPIConnection] = {}
        self._using: weakref.WeakKeyDictionary[ConnectionPoolEntry, int] = (
            weakref.WeakKeyDictionary()
        )
        """Connections in use, each with the thread that asked for it."""
        self._closing: dict[_Closing, int] = {}
        """Connections being closed, each with the thread that closes it."""
        self._ending: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        """Threads of asynchronous connections that an event loop is closing."""

    def _identity(self) -> Identity | None:
        return identity_of(self._path) if self._path else None

    # -- events of the pool --------------------------------------------------------------------

    def _check(self) -> None:
        if self._identity() in _refused:
            raise StoreUnavailable(
                f"{self._path}: this process was forked while another thread was using the file; "
                "SQLite's locks do not survive that, so the file is not used here. Fork before the "
                "store is used, or start processes by multiprocessing's 'spawn'"
            )

    def _on_connect(self, _: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        with self._changed:
            self._known.add(record)  # it stays in `_making` until it is checked out
        record.info[_FILE] = self._identity()

    def _on_checkout(self, _: DBAPIConnection, record: ConnectionPoolEntry, __: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._making.pop(record, None)
            if self._in_memory:
                self._wait_for_forks()
            elif self._forking and me not in (*self._forking, *self._waited):
                raise DisconnectionError("the process is about to fork")  # the pool makes another
            self._waited.discard(me)
            self._using[record] = me
        if self._path and record.info.get(_FILE) != self._identity():
            raise DisconnectionError("the file was removed or replaced")

    def _on_checkin(self, connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        super()._on_checkin(connection, record)
        with self._changed:
            self._using.pop(record, None)

    def _on_close(
        self, connection: DBAPIConnection, record: ConnectionPoolEntry | None = None
    ) -> None:
        """Close the connection here, so that a fork knows when it is closed; the pool has no event.

        Closing can take long. The pool's own call afterwards, or that of a concurrent fork, finds
        the connection closed.
        """
        closing = _Closing(record)
        with self._changed:
            self._closing[closing] = threading.get_ident()
        try:
            connection.close()
        except Exception:  # noqa: BLE001, S110 - the pool's own call raises it again and logs it
            pass
        finally:
            with self._changed:
                del self._closing[closing]

    def _on_close_async(self, connection: Any, _: ConnectionPoolEntry) -> None:
        """Close a connection on one side only: the other would wait for a thread that has ended."""
        with self._changed:
            self._wait_for_forks()  # short: a fork begins only when nothing is in use
            self._ending.add(connection.driver_connection._thread)  # noqa: SLF001 - as below

    def _on_detach(self, connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        self._detached[id(connection)] = connection
        self._on_checkin(None, record)

    def _on_close_detached(self, connection: DBAPIConnection) -> None:
        if not self._is_async:
            self._on_close(connection)
        self._detached.pop(id(connection), None)

    # -- the fork ------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Wait up to 5 s for the connections in use, and close all."""
        self._at_rest = False
        if engine := self._engine():
            deadline = time.monotonic() + FORK_WAIT_S
            if self._is_async:
                self._at_rest = self._close_async(engine, deadline)
            elif self._in_memory:
                self._block_threads()
                self._at_rest = _wait_until(
                    lambda: not (self._others(self._using) or self._others(self._making)), deadline
                )
            else:
                self._block_threads()
                self._at_rest = self._close(engine, deadline)

    def _block_threads(self) -> None:
        with self._changed:
            self._forking.append(threading.get_ident())

    def _close(self, engine: Engine, deadline: float) -> bool:
        # Kept alive: a connection returned to the disposed pool is garbage, and the collector, in
        # another thread, would remove it from `_known` before it closes it.
        known = set(self._known_now())
        engine.dispose()  # a host's too: its pool opens new connections on demand

        def is_closed_or_stuck() -> bool:
            known.update(self._known_now())
            for record in known:
                if self._user(record) is None:
                    # SQLAlchemy asserts that no other thread closes it meanwhile; where one did,
                    # the next round finds it closed
                    with suppress(AssertionError):
                        record.close()
            with self._changed:  # connections returned meanwhile are closed in the next round
                return all(self._user(one) in self._forking for one in self._open())

        return _wait_until(is_closed_or_stuck, deadline) and not self._open()

    def _user(self, connection: Any) -> int | None:
        """The thread that uses, opens or closes a connection; None if none does, or if unknown."""
        if isinstance(connection, int):  # detached
            return None
        if isinstance(connection, _Closing):
            return self._closing.get(connection)
        with self._changed:  # a checkout moves it from one of these to another
            for closing, thread in self._closing.items():
                if closing.record is connection:
                    return thread
            return self._using.get(connection) or self._making.get(connection)

    def _close_async(self, engine: Engine, deadline: float) -> bool:
        """As `_close`, for connections of an event loop, which must not be blocked meanwhile.

        A loop that runs in this thread can finish nothing before the fork, so this does not wait.
        """

        def is_idle() -> bool:
            with self._changed:
                closing = any(thread.is_alive() for thread in self._ending)
                if self._making or self._using or closing:
                    return False
                self._block_threads()
                return True

        if not _wait_until(is_idle, deadline if _no_loop_runs_here() else 0.0):
            return False
        drivers: list[Any] = [
            record.driver_connection for record in self._known_now() if record.dbapi_connection
        ]
        for driver in drivers:
            driver.stop()  # the connection's own thread closes it; that needs no event loop
        for driver in drivers:
            # aiosqlite has no public way to wait for its thread
            driver._thread.join(max(0.0, deadline - time.monotonic()))  # noqa: SLF001
        engine.dispose(close=False)
        return not any(driver._thread.is_alive() for driver in drivers)  # noqa: SLF001

    def _open(self) -> Collection[Any]:
        """Connections that are open, or being opened or closed."""
        with self._changed:
            made = [one for one in self._known_now() if one.dbapi_connection is not None]
            return [*made, *self._making, *self._detached, *self._closing]

    def _known_now(self) -> list[ConnectionPoolEntry]:
        with self._changed:
            return list(self._known)

    def after_fork_in_parent(self) -> None:
        """Let the waiting threads continue."""
        self._at_rest = False
        super().after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Start with an empty pool; refuse the file if a connection to it was open at the fork."""
        left = [] if self._at_rest else list(self._open())
        if left:
            files = {record.info.get(_FILE) for record in self._known_now()} | {self._identity()}
            _refused.update(file for file in files if file)
            _inherited.append(left)
        _inherited.append(self._detached)
        super().after_fork_in_child()


def _wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    """Wait until the condition holds; False if it did not before the deadline."""
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _no_loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False
