"""AsyncStore: the store for coroutines, which never blocks an event loop."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, overload

from sqlalchemy.orm import Session

from lynkr_store.backend import Backend
from lynkr_store.cache import cached
from lynkr_store.db.dialect import parse_url, writing
from lynkr_store.db.engines import check_host_engine, create_store_async_engine, in_schema
from lynkr_store.db.errors import translated
from lynkr_store.db.event_loops import Engines, HostsEngine, OneLoopsEngine
from lynkr_store.db.failover import read_anywhere
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.exceptions import BadArgument, LynkrStoreError
from lynkr_store.ingest.validation import policy_of
from lynkr_store.ingest.writer import CLOSE_S, checked_timeout
from lynkr_store.maintenance.run import BUDGET_S
from lynkr_store.process.lifecycle import on_fork
from lynkr_store.process.waiting import Event, SharedCall, Workers, in_thread
from lynkr_store.queries.following import Follower, Page, Tail
from lynkr_store.queries.repository import RoutingRepository
from lynkr_store.schemas import (
    Cursor,
    Health,
    MaintenanceReport,
    ProviderStats,
    RoutingAccuracy,
    RoutingEvent,
    RoutingRow,
    RoutingRowBrief,
    RoutingStats,
)
from lynkr_store.schemas.filters import (
    RoutingFilter,
    Window,
    checked_limit,
)
from lynkr_store.settings import StoreSettings
from lynkr_store.storage.text_policy import set_policy
from lynkr_store.store.base import PAGE_ROWS, POLL_S, Core, new_follower, provider_key, window_key
from lynkr_store.store.following import AsyncFollowing

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_T = TypeVar("_T")

_THREADS: Final = 4
"""Threads that read an SQLite database for coroutines: with the writer thread's connection they use
the five connections that the engine keeps. Another four add records, and may wait for the lock."""

_UPKEEP: Final = 2
"""PostgreSQL connections for what no event loop does: maintenance, of which building an index takes
two, the probe, and the calls of further event loops."""


class AsyncStore(Core):
    """`Store` for asyncio: the same names, with ``await``; `record` stays a plain call.

    Any number of event loops may use it. On PostgreSQL it reads through psycopg's asynchronous
    connections, which belong to the first loop that reads, until that loop ends. For other loops
    meanwhile, and on SQLite, it reads in a few threads of its own. It writes as `Store` does, in
    the writer's thread on a connection of its own. Other calls that wait also run in threads of the
    store: the event loop's default executor is not used, because other code may fill it.

    Args:
        url: As in `Store`.
        engine: The host's own AsyncEngine instead, which the store uses and never disposes; the
            writer connects to its URL. Its connections belong to the event loop that opened them.
        settings: As in `Store`.
        clock: As in `Store`.
        read_only: As in `Store`.

    Raises:
        UnsupportedDatabase: The URL names no supported database or driver.
        MissingDriver: A driver is not installed.
        BadArgument: ``url`` and ``engine`` both, or an engine of SQLite in memory.
    """

    def __init__(
        self,
        url: str | Path | None = None,
        *,
        engine: "AsyncEngine | None" = None,
        settings: StoreSettings | None = None,
        clock: Callable[[], int] | None = None,
        read_only: bool = False,
    ) -> None:
        if engine is not None:
            if url is not None:
                raise BadArgument("url, engine: give one of the two")
            if read_only:
                raise BadArgument("read_only: give a url, not an engine")
            url = _shareable_url(engine)
        super().__init__(url, None, settings, clock, read_only=read_only, connections=_UPKEEP)
        self._engines: Engines | None = None
        if engine is not None and self._settings.enabled:
            self._engines = HostsEngine(self._prepared(engine))
        elif self._database.backend is Backend.POSTGRESQL:
            own = _new_engine(self._settings, read_only=read_only)
            self._engines = OneLoopsEngine(own, self._settings.idle_connection_s)
            on_fork(self._engines)
        self._opening = SharedCall("open")
        self._reading = Workers(_THREADS, "read")
        self._adding = Workers(_THREADS, "add")
        for part in (self._opening, self._reading, self._adding):
            on_fork(part)

    def _prepared(self, engine: "AsyncEngine") -> "AsyncEngine":
        """The host's engine, set up so that the store's transactions use the store's schema."""
        check_host_engine(engine.sync_engine)
        engine = type(engine)(in_schema(engine.sync_engine, self._settings.schema_name))
        keep_out_of_children(engine.sync_engine)
        set_policy(engine.sync_engine, self._policy)
        return engine

    async def __aenter__(self) -> Self:
        self._require_open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def check(self) -> None:
        """See `Store.check`."""
        self._handle_sigterm()
        await in_thread("check", self._do_check)

    async def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """See `Store.flush`."""
        timeout_s, flushed = checked_timeout(timeout_s), Event()
        self._writer.when_flushed(flushed.set)
        try:
            return await flushed.wait(timeout_s)
        finally:
            self._writer.forget_flush(flushed.set)

    async def close(self, timeout_s: float = CLOSE_S) -> None:
        """See `Store.close`. Any event loop may call it, also one that an exit handler runs.

        If the call is cancelled, closing continues in its thread.
        """
        await in_thread("close", self._do_close, timeout_s)
        self._reading.finish()
        self._adding.finish()
        if self._engines is not None:
            await self._engines.close()

    @overload
    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[True] = True,
    ) -> list[RoutingRow]: ...
    @overload
    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[False],
    ) -> list[RoutingRowBrief]: ...
    @overload
    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool,
    ) -> Sequence[RoutingRowBrief]: ...

    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool = True,
    ) -> Sequence[RoutingRowBrief]:
        """See `Store.query`."""
        return await self._read(
            lambda r: r.query(
                criteria, window, limit=limit, before=before, include_text=include_text
            )
        )

    async def iter_records(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        page_rows: int = PAGE_ROWS,
    ) -> AsyncIterator[RoutingRow]:
        """See `Store.iter_records`."""
        page_rows = checked_limit(page_rows, "page_rows", least=1)
        before = None
        while page := await self.query(criteria, window, limit=page_rows, before=before):
            for row in page:
                yield row
            before = page[-1].cursor

    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: Literal[True] = True,
    ) -> AsyncIterator[RoutingRow]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: Literal[False],
    ) -> AsyncIterator[RoutingRowBrief]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: bool,
    ) -> AsyncIterator[RoutingRowBrief]: ...

    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: bool = True,
    ) -> AsyncIterator[RoutingRowBrief]:
        """See `Store.follow`. Without ``after`` it begins when the first row is awaited.

        Cancelling the wait for a row loses none: the next call continues.
        """
        self._require_open()
        follower = new_follower(criteria, after, poll_s, include_text=include_text)
        return AsyncFollowing(
            partial(self._follow, follower), follower.poll_s, lambda: self._closed
        )

    @cached(window_key)
    async def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """See `Store.get_stats`."""
        return await self._read(lambda r: r.get_stats(window))

    @cached(provider_key)
    async def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """See `Store.get_provider_stats`."""
        return await self._read(lambda r: r.get_provider_stats(provider, window))

    @cached(window_key)
    async def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """See `Store.get_routing_accuracy`."""
        return await self._read(lambda r: r.get_routing_accuracy(window))

    async def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """See `Store.add_many`."""
        engine = None
        if self._database.backend is not Backend.SQLITE:  # aiosqlite would log the values
            engine = await self._engine()
        if engine is None:
            return await self._adding.run(self._do_add_many, records)
        add = partial(self._answer, lambda r: r.add_many(records))
        return await self._run(engine, add, to_write=True)

    async def cleanup(
        self, older_than: timedelta = timedelta(days=30), *, trust_clock: bool = False
    ) -> int:
        """See `Store.cleanup`. If the call is cancelled, the work continues in its thread."""
        return await in_thread("cleanup", self._do_cleanup, older_than, trust_clock=trust_clock)

    async def maintain(
        self,
        *,
        budget_s: float = BUDGET_S,
        rebuild: bool = False,
        trust_clock: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> MaintenanceReport:
        """See `Store.maintain`; another thread calls ``on_step``.

        If the call is cancelled, the work continues in that thread.
        """
        return await in_thread(
            "maintain",
            self._do_maintain,
            budget_s,
            on_step,
            rebuild=rebuild,
            trust_clock=trust_clock,
        )

    async def recount(self, window: Window | None = None) -> int:
        """See `Store.recount`."""
        return await in_thread("recount", self._do_recount, window)

    async def health(self) -> Health:
        """See `Store.health`."""
        if not self._closed:
            await self._probe.refreshed()
        return self._health()

    async def _read(self, body: Callable[[RoutingRepository], _T]) -> _T:
        engine = await self._engine()
        if engine is None:
            return await self._reading.run(self._do_read, body)
        return await self._run(engine, partial(self._answer, body))

    async def _follow(self, follower: Follower, tail: Tail | None) -> Page:
        engine = await self._engine()
        if engine is None:
            return await self._reading.run(self._do_follow, follower, tail)
        return await self._run(engine, partial(self._page, follower, tail))

    async def _engine(self) -> "AsyncEngine | None":
        """The engine that the running loop may use; None if it has to use a thread."""
        return None if self._engines is None else await self._engines.engine()

    async def _run(
        self,
        engine: "AsyncEngine",
        task: Callable[[Session], _T],
        *,
        to_write: bool = False,
    ) -> _T:
        """Run the task in one transaction, and commit it when the task returns."""
        from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 - needs the extra

        await self._be_open(to_write=to_write)
        pool = engine.pool
        try:
            with translated():
                async with (writing(engine) if to_write else engine).connect() as connection:
                    try:
                        async with AsyncSession(connection) as session, session.begin():
                            return await session.run_sync(task)
                    finally:
                        if self._closed or engine.pool is not pool:  # see `closed_if_disposed`
                            await connection.invalidate()
        except LynkrStoreError as error:
            if error.unclear:
                await in_thread("open", self._database.check_again)
            raise

    async def _be_open(self, *, to_write: bool) -> None:
        """Open the database if necessary; all tasks that find it closed wait for one thread."""
        self._require_open(to_write=to_write)
        if self._database.is_open:
            self._start_maintenance()
        else:
            await self._opening.run(self._open)


def _new_engine(settings: StoreSettings, *, read_only: bool) -> "AsyncEngine":
    engine: AsyncEngine = create_store_async_engine(
        settings.url,
        connect_timeout_s=settings.connect_timeout_s,
        statement_timeout_s=settings.statement_timeout_s,
        schema=settings.schema_name,
        connections=settings.read_connections - _UPKEEP,
        echo=settings.echo,
    )
    if read_only:
        engine = engine.execution_options(postgresql_readonly=True)
    read_anywhere(engine.sync_engine)
    set_policy(engine.sync_engine, policy_of(settings))
    return engine


def _shareable_url(engine: "AsyncEngine") -> str:
    url = parse_url(engine.url)
    if url.get_backend_name() == "sqlite" and not url.database:
        raise BadArgument("engine: SQLite in memory has one connection; give its url instead")
    return url.render_as_string(hide_password=False)
