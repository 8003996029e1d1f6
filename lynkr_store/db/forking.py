"""Keeps an engine's connections out of the processes that are forked from this one.

An SQLite connection that is open at a fork is the ruin of its file. The child inherits SQLite's
notes of the locks that this process holds, and the operating system gives the child none of these
locks. A connection that the child then opens to the file writes without any lock; when the parent
ends, what the child committed can be thrown away. See https://sqlite.org/howtocorrupt.html,
section 2.6.

So before a fork every connection of every engine given to `keep_out_of_children` is closed, as soon
as the thread that uses it has given it back, and a thread that asks for one waits until the fork is
over. A connection that does not come back in time stays open, and the child then refuses its file.
A PostgreSQL connection is a socket, which the child only has to leave alone.
"""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Collection
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

_POLL_S: Final = 0.002  # a pool does not tell when it drops a connection
_FILE: Final = "lynkr_store_file"  # in a connection's info: the file that it has open

_guards: "weakref.WeakKeyDictionary[Dialect, _Guard]" = weakref.WeakKeyDictionary()
_inherited: list[object] = []  # the parent's connections: the collector must not close them
_refused: set[Identity] = set()  # files that this process must not open


def keep_out_of_children(engine: Engine) -> None:
    """Have the engine's connections closed before each fork, and others made in the child.

    A connection to an SQLite file is also replaced, when it is next asked for, after the file was
    removed or another one put in its place. Harmless when called again.

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
    """Has a child leave the connections of the parent's engine alone.

    An engine's first connection, of any database, also sets the engine up, under a lock that a
    child must not inherit: a fork waits for it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Callable[[], Engine | None] = weakref.ref(engine)
        self._set_up = False
        self._reset()
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "connect", self._on_connect)
        event.listen(engine, "checkin", self._on_checkin)

    def _reset(self) -> None:
        self._changed = threading.Condition()  # of an RLock: a signal handler may fork
        self._forking: list[int] = []  # the threads that fork
        self._waited: set[int] = set()  # threads that another fork has held up
        self._making: weakref.WeakKeyDictionary[ConnectionPoolEntry, int] = (
            weakref.WeakKeyDictionary()
        )
        """Connections that are being made, each with the thread that makes it."""

    def watch(self, engine: Engine) -> None:
        """Take this engine, if the one that shares its dialect and pool is gone."""
        if self._engine() is None:
            self._engine = weakref.ref(engine)

    # -- what the pool tells -------------------------------------------------------------------

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
            self._making.pop(record, None)
            raise

    def _later(self, dialect: Dialect) -> list[Callable[..., DBAPIConnection | None]]:
        """Listeners that were added later, which this one's answer would keep from being asked."""
        listeners = list(dialect.dispatch.do_connect)
        return listeners[listeners.index(self._connect) + 1 :]

    def _check(self) -> None:
        """Refuse a connection that this process must not make."""

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
            self._making.pop(record, None)  # of one that could not be made

    # -- the fork ------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Wait until the engine's first connection is made, if a thread is making it."""
        if not self._set_up:
            with self._changed:
                self._forking.append(threading.get_ident())
            _comes(lambda: not self._others(self._making), time.monotonic() + FORK_WAIT_S)

    def _others(self, connections: "weakref.WeakKeyDictionary[ConnectionPoolEntry, int]") -> bool:
        """Whether any of the connections belongs to a thread that does not fork."""
        with self._changed:
            return any(thread not in self._forking for thread in connections.values())

    def after_fork_in_parent(self) -> None:
        """Let the threads that wait go on."""
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
    """A closing of a connection that is under way; without a record if it was detached."""

    def __init__(self, record: ConnectionPoolEntry | None) -> None:
        self.record = record


class _SqliteGuard(_Guard):
    """Closes an engine's SQLite connections before a fork.

    A database in memory is its one connection, which only has to be at rest.
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
        """Closings under way, each with its thread."""
        self._ending: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        """Threads of asynchronous connections that an event loop is closing."""

    def _identity(self) -> Identity | None:
        return identity_of(self._path) if self._path else None

    # -- what the pool tells -------------------------------------------------------------------

    def _check(self) -> None:
        if self._identity() in _refused:
            raise StoreUnavailable(
                f"{self._path}: this process was forked while another thread was using the file, "
                "whose locks do not survive that; it is not used here. Fork before the store is "
                "used, or start processes by multiprocessing's 'spawn'"
            )

    def _on_connect(self, _: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        with self._changed:
            self._known.add(record)  # and still being made, until it is checked out
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
        """Close a connection where a fork sees it, for the pool does not tell when it is closed.

        That can take long, and the pool's own call, or that of a fork meanwhile, finds nothing to
        do at once.
        """
        closing = _Closing(record)
        with self._changed:
            self._closing[closing] = threading.get_ident()
        try:
            connection.close()
        except Exception:  # noqa: BLE001, S110 - the pool's own call meets it again, and says so
            pass
        finally:
            with self._changed:
                del self._closing[closing]

    def _on_close_async(self, connection: Any, _: ConnectionPoolEntry) -> None:
        """Let one side close a connection: the other would wait for a thread that has ended."""
        with self._changed:
            self._wait_for_forks()  # they are short: nothing was in use when this one began
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
        """Wait for the connections in use, 5 s at most, and close all."""
        self._at_rest = False
        if engine := self._engine():
            deadline = time.monotonic() + FORK_WAIT_S
            if self._is_async:
                self._at_rest = self._close_async(engine, deadline)
            elif self._in_memory:
                self._hold_up()
                self._at_rest = _comes(
                    lambda: not (self._others(self._using) or self._others(self._making)), deadline
                )
            else:
                self._hold_up()
                self._at_rest = self._close(engine, deadline)

    def _hold_up(self) -> None:
        with self._changed:
            self._forking.append(threading.get_ident())

    def _close(self, engine: Engine, deadline: float) -> bool:
        # Kept alive: one that comes back to the pool that is disposed is garbage, and the
        # collector, in another thread, makes it unknown here before it closes it.
        known = set(self._known_now())
        engine.dispose()  # a host's too: it makes connections again when it is asked for one

        def is_closed_or_stuck() -> bool:
            known.update(self._known_now())
            for record in known:
                if self._user(record) is None:
                    record.close()
            with self._changed:  # what was given back meanwhile is closed the next time
                return all(self._user(one) in self._forking for one in self._open())

        return _comes(is_closed_or_stuck, deadline) and not self._open()

    def _user(self, connection: Any) -> int | None:
        """The thread that uses, makes or closes a connection; None where none does or is known."""
        if isinstance(connection, int):  # detached
            return None
        if isinstance(connection, _Closing):
            return self._closing.get(connection)
        with self._changed:
            for closing, thread in self._closing.items():
                if closing.record is connection:
                    return thread
        return self._using.get(connection) or self._making.get(connection)

    def _close_async(self, engine: Engine, deadline: float) -> bool:
        """Likewise, where an event loop has the connections, which must not be held up meanwhile.

        One that runs in this thread brings nothing to an end before the fork.
        """

        def is_idle() -> bool:
            with self._changed:
                closing = any(thread.is_alive() for thread in self._ending)
                if self._making or self._using or closing:
                    return False
                self._hold_up()
                return True

        if not _comes(is_idle, deadline if _no_loop_runs_here() else 0.0):
            return False
        drivers: list[Any] = [
            record.driver_connection for record in self._known_now() if record.dbapi_connection
        ]
        for driver in drivers:
            driver.stop()  # by the connection's own thread, without a loop
        for driver in drivers:
            # aiosqlite has no public way to wait
            driver._thread.join(max(0.0, deadline - time.monotonic()))  # noqa: SLF001
        engine.dispose(close=False)
        return not any(driver._thread.is_alive() for driver in drivers)  # noqa: SLF001

    def _open(self) -> Collection[Any]:
        """Connections that are open, or being made or closed."""
        with self._changed:
            made = [one for one in self._known_now() if one.dbapi_connection is not None]
            return [*made, *self._making, *self._detached, *self._closing]

    def _known_now(self) -> list[ConnectionPoolEntry]:
        with self._changed:
            return list(self._known)

    def after_fork_in_parent(self) -> None:
        """Let the threads that wait go on."""
        self._at_rest = False
        super().after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Start with an empty pool; without the file, if a connection to it was open."""
        left = [] if self._at_rest else list(self._open())
        if left:
            files = {record.info.get(_FILE) for record in self._known_now()} | {self._identity()}
            _refused.update(file for file in files if file)
            _inherited.append(left)
        _inherited.append(self._detached)
        super().after_fork_in_child()


def _comes(condition: Callable[[], bool], deadline: float) -> bool:
    """Whether the condition holds now, or at a moment before the deadline."""
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
