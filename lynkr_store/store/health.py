"""Probes a database for `health` in a thread of its own, so that callers never wait long."""

import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, assert_never

from sqlalchemy import Connection, Text, cast, func, select
from sqlalchemy.exc import DataError

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.citus import tables_with_shards
from lynkr_store.db.dialect import backend_of, driver_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import PROGRESS, TELEMETRY, Base
from lynkr_store.db.pools import is_full
from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.maintenance import retention_sql
from lynkr_store.migrate import revisions
from lynkr_store.process.files import identity_of
from lynkr_store.process.lifecycle import Forkable
from lynkr_store.process.log import words_of
from lynkr_store.process.threads import start_thread
from lynkr_store.process.waiting import Event
from lynkr_store.rollups import state
from lynkr_store.schemas import Reading
from lynkr_store.storage.database import Database

_FINISH_S: Final = 0.2
_LATE_S: Final = 2.0  # if a probe takes longer, the database counts as unreachable
_WAIT_S: Final = 0.04  # health() returns within 50 ms, even if the database does not answer


class Look(NamedTuple):
    """What one probe of the database found."""

    revision: str | None
    database_bytes: int
    reclaimable_bytes: int | None
    oldest: datetime | None
    rollup_lag: int | None
    server: str | None
    writable: bool | None


class Looked(NamedTuple):
    """The last probe: when it ended, on the monotonic clock, what it found, and why it failed.

    A failed probe keeps what an earlier one found.
    """

    at: float
    look: Look | None
    error: str | None


class Probe(Forkable):
    """Probes the database in a thread of its own, so that no caller waits for a frozen one."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler that closes the store may take it again
        self._under_way: tuple[threading.Thread, Event] | None = None
        self._began = self._asked = 0.0
        self.last: Looked | None = None

    @property
    def late_s(self) -> float | None:
        """Seconds for which a probe has waited for an answer, if that is too long; else None.

        Up to the last call that asked for a probe: what that call began is not late, though the
        machine may have stood still during the call.
        """
        with self._lock:
            waiting = self._under_way is not None and self._under_way[0].is_alive()
            waited = self._asked - self._began
        return waited if waiting and waited > _LATE_S else None

    @property
    def reachable(self) -> bool:
        """Whether the last probe succeeded, and no later one is waiting for too long."""
        return self.last is not None and self.last.error is None and self.late_s is None

    def refresh(self, *, patient: bool = False) -> None:
        """Probe now; return when it is done, or after 40 ms, if patient 2 s, without its result."""
        if under_way := self._look_now():
            thread, _ = under_way
            thread.join(_LATE_S if patient else _WAIT_S)

    async def refreshed(self) -> None:
        """As `refresh`, for a coroutine."""
        if under_way := self._look_now():
            _, ended = under_way
            await ended.wait(_WAIT_S)

    def _look_now(self) -> tuple[threading.Thread, Event] | None:
        """The probing thread and the event of its end; None if no thread could be started."""
        with self._lock:
            self._asked = time.monotonic()
            if self._under_way is None or not self._under_way[0].is_alive():
                ended = Event()
                thread = start_thread(partial(self._run_until, ended), "probe")
                if thread is None:
                    return None
                self._under_way, self._began = (thread, ended), self._asked
            return self._under_way

    def finish(self) -> None:
        """Wait up to 0.2 s for a running probe, whose connection would outlive its pool."""
        with self._lock:
            under_way = self._under_way
        if under_way is not None:
            under_way[0].join(_FINISH_S)

    def after_fork_in_child(self) -> None:
        """Forget the parent's probes."""
        self._reset()

    def _run_until(self, ended: Event) -> None:
        try:
            self._run()
        finally:
            ended.set()

    def _run(self) -> None:
        look, error = self.last.look if self.last else None, None
        try:
            with translated():
                look = _look(self.database)
        except BaseException as fault:  # noqa: BLE001 - whatever it is, `health` reports it
            error = words_of(fault)
        self.last = Looked(time.monotonic(), look, error)


def _look(database: Database) -> Look:
    database.follow_file()
    engine = database.engine
    if database.backend is Backend.SQLITE and engine.url.database and not database.in_memory:
        path = Path(engine.url.database)
        if identity_of(path) is None and "uri" not in engine.url.query:
            raise StoreUnavailable(f"{path} does not exist; the store creates it on first use")
    if is_full(engine):  # busy readers are no outage: take the writer's, between two batches
        engine = database.of_writer
    with database.connected(engine) as connection:
        server, writable = _server(connection)
        revision = revisions.current(connection)
        there = catalogue.tables(connection, (TELEMETRY.name, PROGRESS.name))
        oldest = lag = None
        if TELEMETRY.name in there:
            oldest = connection.scalar(retention_sql.oldest_timestamp())
        size, free = _sizes(connection)
        if {TELEMETRY.name, PROGRESS.name} <= there:
            lag = _lag(connection)
    return Look(revision, size, free, Reading().instant(oldest), lag, server, writable)


def _server(connection: Connection) -> tuple[str | None, bool | None]:
    """PostgreSQL: the server that the connection leads to, and whether it takes writes."""
    if backend_of(connection) is Backend.SQLITE:
        return None, None
    info = driver_of(connection).info
    host = f"[{info.host}]" if ":" in info.host else info.host
    own = func.pg_catalog
    is_standby, read_only = connection.execute(
        select(own.pg_is_in_recovery(), own.current_setting("default_transaction_read_only"))
    ).one()
    return f"{host}:{info.port}", not is_standby and read_only == "off"


def _lag(connection: Connection) -> int | None:
    """The number of rows that are not folded; None if odd ids make it exceed 64 bits."""
    try:
        lag: object = connection.scalar(state.lag())
    except DataError:  # PostgreSQL raises an error; SQLite returns a real instead
        return None
    return lag if isinstance(lag, int) else None


def _sizes(connection: Connection) -> tuple[int, int | None]:
    backend = backend_of(connection)
    match backend:
        case Backend.SQLITE:
            page, pages, free = (
                int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
                for name in ("page_size", "page_count", "freelist_count")
            )
            return page * pages, page * free
        case Backend.POSTGRESQL:
            own, managed = func.pg_catalog, tables_with_shards(connection)
            sizes = (
                (own.citus_total_relation_size if table in managed else own.pg_total_relation_size)(
                    own.to_regclass(cast(table, Text))
                )
                for table in Base.metadata.tables
            )
            there = (func.coalesce(size, 0) for size in sizes)
            return sum(connection.execute(select(*there)).one()), None
        case _:
            assert_never(backend)
