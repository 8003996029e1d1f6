"""Store and AsyncStore: open, wire, close. The only place that knows all the others.

What they answer is written once, in `lynkr_store.repository`; the two differ in how they wait.
"""

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, overload

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from lynkr_store import maintenance, migrate
from lynkr_store.cache import TTLCache, cached
from lynkr_store.database import Database, Probe
from lynkr_store.engine import create_store_async_engine, parse_url, writing
from lynkr_store.exceptions import BadArgument, StoreClosed
from lynkr_store.filters import (
    RoutingFilter,
    Window,
    checked_age,
    checked_limit,
    checked_provider,
    given,
)
from lynkr_store.ingest import TextPolicy
from lynkr_store.repository import RoutingRepository, epoch_ms_now, translated
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
from lynkr_store.settings import StoreSettings
from lynkr_store.writer import Writer

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_T = TypeVar("_T")

_PAGE_ROWS: Final = 1_000  # rows of iter_records in memory at a time
_CLOSE_S: Final = 5.0


def _span(window: Window | None = None) -> Hashable:
    """The question's window as it was asked: the default one stays one question as time goes."""
    asked = given(window, Window, "window")
    return asked.since_ms, asked.until_ms


def _provider_span(provider: str, window: Window | None = None) -> Hashable:
    return checked_provider(provider), _span(window)


class _Core:
    """What both stores share: settings, one database, one writer, one cache, one account."""

    def __init__(
        self,
        url: str | None,
        engine: Engine | None,
        settings: StoreSettings | None,
        clock: Callable[[], int] | None,
        *,
        read_only: bool = False,
    ) -> None:
        if url is not None and engine is not None:
            raise BadArgument("url, engine: give one of the two")
        settings = settings or StoreSettings()
        if url is not None:
            settings = settings.model_copy(update={"url": url})
        self._settings = settings
        self._clock = clock or epoch_ms_now
        self._policy = TextPolicy(settings.capture_text, settings.text_max_chars)
        self._database = Database(settings, engine, read_only=read_only)
        self._cache = TTLCache(settings.cache_ttl_s)
        self._probe = Probe(self._database)
        self._writer = Writer(
            self._database,
            policy=self._policy,
            clock=self._clock,
            max_rows=settings.queue_max_rows,
            max_bytes=settings.queue_max_bytes,
            batch_rows=settings.batch_max_rows,
            interval_s=settings.flush_interval_s,
        )
        self._closed = False
        if read_only:
            self._writer.close(0)
        # also when the store is forgotten, and when the interpreter exits
        self._finalizer = weakref.finalize(self, _close, self._writer, self._probe, _CLOSE_S)

    def __repr__(self) -> str:
        shown = self._database.engine.url.render_as_string(hide_password=True)
        return f"{type(self).__name__}({shown!r})"

    @property
    def settings(self) -> StoreSettings:
        """The options in force."""
        return self._settings

    @property
    def missing_columns(self) -> tuple[str, ...]:
        """Opened read-only: columns that the file lacks, read as None."""
        return self._database.view

    def record(
        self,
        event: RoutingEvent | Mapping[str, Any] | None = None,
        /,
        **fields: Any,
    ) -> bool:
        """Queue one record. Never raises, never waits for I/O; mistakes are counted in `health`.

        Args:
            event: The record, or a mapping of its fields, which is copied.
            fields: Fields by name; they win over the event's. `RoutingEvent` lists them; only
                ``provider`` is required.

        Returns:
            True when it was queued; False when it was dropped: the queue is full or the store
            closed.
        """
        if event is None:
            return self._writer.submit(fields)
        if isinstance(event, RoutingEvent) and not fields:
            return self._writer.submit(event)
        try:
            record = {**dict(event), **fields}
        except Exception:  # noqa: BLE001 - whatever was passed; it is rejected as unreadable
            record = {"event": None}
        return self._writer.submit(record)

    def _do_flush(self, timeout_s: float) -> bool:
        return self._writer.flush(timeout_s)

    def _do_close(self, timeout_s: float) -> None:
        self._closed = True
        self._finalizer.detach()
        _close(self._writer, self._probe, timeout_s)

    def _do_read(self, body: Callable[[RoutingRepository], _T]) -> _T:
        self._open()
        return self._do(self._database.engine, body)

    def _do(self, engine: Engine, body: Callable[[RoutingRepository], _T]) -> _T:
        """Run the body in one transaction, which is committed when it returns."""
        with translated(), Session(engine) as session, session.begin():
            return self._answer(session, body)

    def _answer(self, session: Session, body: Callable[[RoutingRepository], _T]) -> _T:
        repository = RoutingRepository(session, clock=self._clock, policy=self._policy)
        answer = body(repository)
        self._writer.note_unreadable(repository.unreadable)
        return answer

    def _do_add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        self._open(to_write=True)
        return self._do(self._database.writing, lambda r: r.add_many(records))

    def _do_cleanup(self, older_than: timedelta) -> int:
        checked_age(older_than)
        self._open(to_write=True)
        try:
            return maintenance.delete_older(self._database.engine, older_than, self._clock)
        finally:
            self._cache.clear()

    def _do_maintain(self) -> MaintenanceReport:
        self._open(to_write=True)
        days = self._settings.retention_days
        return MaintenanceReport(
            indexes_built=maintenance.build_missing_indexes(self._database.engine),
            rows_deleted=0 if days is None else self._do_cleanup(timedelta(days=days)),
        )

    def _do_health(self) -> Health:
        if not self._closed:
            self._probe.refresh()
        account, looked = self._writer.account(), self._probe.last
        now, look = time.monotonic(), looked and looked.look
        at, error = account.last_error_at, account.last_error
        if looked and looked.error and (at is None or looked.at > at):
            at, error = looked.at, looked.error
        return Health(
            submitted=account.submitted,
            recovered=0,
            written=account.written,
            rejected=account.rejected_by.total(),
            dropped=account.dropped_by.total(),
            spooled=0,
            pending=account.queued + account.in_batch,
            rejected_by=account.rejected_by,
            dropped_by=account.dropped_by,
            mended_by=account.mended_by,
            backend=self._database.backend,
            revision=look and look.revision,
            head=migrate.head(),
            reachable=looked is not None and looked.error is None,
            probe_age_s=looked and now - looked.at,
            last_error=error,
            last_error_age_s=None if at is None else now - at,
            database_bytes=look and look.database_bytes,
            reclaimable_bytes=look and look.reclaimable_bytes,
            oldest_timestamp=look and look.oldest,
        )

    def _open(self, *, to_write: bool = False) -> None:
        if self._closed:
            raise StoreClosed("the store was closed; open a new one")
        if to_write and self._database.read_only:
            raise BadArgument("the store was opened read-only; open it without read_only")
        self._database.open()


def _close(writer: Writer, probe: Probe, timeout_s: float) -> None:
    writer.close(timeout_s)
    probe.finish()
    probe.database.dispose()


class Store(_Core):
    """A gateway's routing telemetry: records in, rows and statistics out. Safe to share by threads.

    Args:
        url: The database; default ``LYNKR_STORE_URL``, else ``sqlite:///.lynkr/telemetry.db``.
        engine: The host's own Engine instead, which is used and never disposed. Its PRAGMAs and
            BEGIN mode are the host's business.
        settings: Every other option; default from the environment (``LYNKR_STORE_*``).
        clock: The present in epoch milliseconds, for default windows, stamps and ages.
        read_only: Alter nothing. An SQLite file may be a gateway's own, of any version; columns
            that it lacks are read as None.

    Raises:
        UnsupportedDatabase: The URL names no supported database or driver.
        MissingDriver: The driver is not installed.
        BadArgument: ``url`` and ``engine`` both, or an engine that cannot be shared.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        engine: Engine | None = None,
        settings: StoreSettings | None = None,
        clock: Callable[[], int] | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(url, engine, settings, clock, read_only=read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine in use, for a Session of your own with `RoutingRepository`.

        For writing take ``lynkr_store.writing(store.engine)``.
        """
        return self._database.engine

    def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """Wait until everything recorded before this call is written, rejected or dropped.

        Returns:
            False when ``timeout_s`` seconds were not enough.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        return self._do_flush(timeout_s)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Flush within ``timeout_s`` seconds and stop; what is left is dropped and counted.

        May be called again. `record` then returns False, reads raise `StoreClosed`.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        self._do_close(timeout_s)

    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[True] = True,
    ) -> list[RoutingRow]: ...
    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[False],
    ) -> list[RoutingRowBrief]: ...

    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool = True,
    ) -> Sequence[RoutingRowBrief]:
        """Rows, newest first; see `RoutingRepository.query`."""
        return self._do_read(
            lambda r: r.query(
                criteria, window, limit=limit, before=before, include_text=include_text
            )
        )

    def iter_records(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        page_rows: int = _PAGE_ROWS,
    ) -> Iterator[RoutingRow]:
        """All matching rows, newest first, read page by page; no transaction stays open between.

        Rows that arrive meanwhile and are newer than the first are not given.

        Raises:
            BadArgument: ``page_rows`` is not a positive whole number.
            StoreUnavailable: The database cannot be reached.
        """
        checked_limit(page_rows, "page_rows", least=1)
        before = None
        while page := self.query(criteria, window, limit=page_rows, before=before):
            yield from page
            before = page[-1].cursor

    @cached(_span)
    def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """What a person reads first; see `RoutingRepository.get_stats`. Cached by window."""
        return self._do_read(lambda r: r.get_stats(window))

    @cached(_provider_span)
    def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """One provider's figures; see `RoutingRepository.get_provider_stats`. Cached."""
        return self._do_read(lambda r: r.get_provider_stats(provider, window))

    @cached(_span)
    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """How often the tier was wrong; see `RoutingRepository.get_routing_accuracy`. Cached."""
        return self._do_read(lambda r: r.get_routing_accuracy(window))

    def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """Write records now, in one transaction, all or none; see `RoutingRepository.add_many`."""
        return self._do_add_many(records)

    def cleanup(self, older_than: timedelta = timedelta(days=30)) -> int:
        """Delete rows older than an age, in short transactions.

        Returns:
            How many were deleted.

        Raises:
            BadArgument: A negative age.
            StoreUnavailable: The database cannot be reached.
        """
        return self._do_cleanup(older_than)

    def maintain(self) -> MaintenanceReport:
        """Build indexes that an adoption left out, and apply the configured retention.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        return self._do_maintain()

    def health(self) -> Health:
        """The account of every record and the state of the database, within 50 ms. Never raises."""
        return self._do_health()


class AsyncStore(_Core):
    """`Store` for asyncio: the same names, with ``await``; `record` stays a plain call.

    Reads go over aiosqlite or psycopg. Writing is the same thread as in `Store`, on a connection
    of its own. SQLite in memory has one connection, which the reads use from a thread.

    Args:
        url: As in `Store`.
        engine: The host's own AsyncEngine instead, which is used and never disposed; the writer
            connects by its URL.
        settings: As in `Store`.
        clock: As in `Store`.

    Raises:
        UnsupportedDatabase: The URL names no supported database or driver.
        MissingDriver: A driver is not installed.
        BadArgument: ``url`` and ``engine`` both, or an engine of SQLite in memory.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        engine: "AsyncEngine | None" = None,
        settings: StoreSettings | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if engine is not None:
            if url is not None:
                raise BadArgument("url, engine: give one of the two")
            url = _shareable_url(engine)
        super().__init__(url, None, settings, clock)
        self._owns_engine = engine is None
        self._engine = engine
        if engine is None and not self._database.in_memory:
            self._engine = create_store_async_engine(
                self._settings.url,
                connect_timeout_s=self._settings.connect_timeout_s,
                statement_timeout_s=self._settings.statement_timeout_s,
                echo=self._settings.echo,
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """See `Store.flush`."""
        return await asyncio.to_thread(self._do_flush, timeout_s)

    async def close(self, timeout_s: float = _CLOSE_S) -> None:
        """See `Store.close`."""
        await asyncio.to_thread(self._do_close, timeout_s)
        if self._engine is not None and self._owns_engine:
            await self._engine.dispose()

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
        page_rows: int = _PAGE_ROWS,
    ) -> AsyncIterator[RoutingRow]:
        """See `Store.iter_records`."""
        checked_limit(page_rows, "page_rows", least=1)
        before = None
        while page := await self.query(criteria, window, limit=page_rows, before=before):
            for row in page:
                yield row
            before = page[-1].cursor

    @cached(_span)
    async def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """See `Store.get_stats`."""
        return await self._read(lambda r: r.get_stats(window))

    @cached(_provider_span)
    async def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """See `Store.get_provider_stats`."""
        return await self._read(lambda r: r.get_provider_stats(provider, window))

    @cached(_span)
    async def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """See `Store.get_routing_accuracy`."""
        return await self._read(lambda r: r.get_routing_accuracy(window))

    async def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """See `Store.add_many`."""
        if self._engine is None:
            return await asyncio.to_thread(self._do_add_many, records)
        return await self._run(writing(self._engine), lambda r: r.add_many(records))

    async def cleanup(self, older_than: timedelta = timedelta(days=30)) -> int:
        """See `Store.cleanup`."""
        return await asyncio.to_thread(self._do_cleanup, older_than)

    async def maintain(self) -> MaintenanceReport:
        """See `Store.maintain`."""
        return await asyncio.to_thread(self._do_maintain)

    async def health(self) -> Health:
        """See `Store.health`."""
        return await asyncio.to_thread(self._do_health)

    async def _read(self, body: Callable[[RoutingRepository], _T]) -> _T:
        if self._engine is None:
            return await asyncio.to_thread(self._do_read, body)
        return await self._run(self._engine, body)

    async def _run(self, engine: "AsyncEngine", body: Callable[[RoutingRepository], _T]) -> _T:
        """Run the body in one transaction, which is committed when it returns."""
        await asyncio.to_thread(self._open)
        from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 - needs the extra

        with translated():
            async with AsyncSession(engine) as session, session.begin():
                return await session.run_sync(self._answer, body)


def _shareable_url(engine: "AsyncEngine") -> str:
    url = parse_url(engine.url)
    if url.get_backend_name() == "sqlite" and not url.database:
        raise BadArgument("engine: SQLite in memory has one connection; give its url instead")
    return url.render_as_string(hide_password=False)
