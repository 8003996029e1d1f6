"""Store: the store for threads."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, overload

from sqlalchemy import Engine

from lynkr_store.cache import cached
from lynkr_store.ingest.writer import CLOSE_S
from lynkr_store.maintenance.run import BUDGET_S
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
from lynkr_store.store.base import PAGE_ROWS, POLL_S, Core, new_follower, provider_key, window_key
from lynkr_store.store.following import Following


class Store(Core):
    """A gateway's routing telemetry: it stores records and reads rows and statistics.

    Threads may share it.

    Args:
        url: The database; default ``LYNKR_STORE_URL``, else ``sqlite:///.lynkr/telemetry.db``. A
            `Path` is the file of an SQLite database.
        engine: The host's own Engine instead, which the store uses and never disposes. The host
            sets its PRAGMAs and BEGIN mode.
        settings: Every other option; default from the environment (``LYNKR_STORE_*``).
        clock: Returns the present in epoch milliseconds, for default windows, for records without
            an instant, for ages, and for the age of cached statistics. Without it, these age by a
            monotonic clock.
        read_only: Change nothing. An SQLite file may be a gateway's own, of any version; columns
            that it lacks are read as None.

    Raises:
        UnsupportedDatabase: The URL names no supported database or driver.
        MissingDriver: The driver is not installed.
        BadArgument: Both ``url`` and ``engine``, an engine that cannot be shared, or a clock that
            does not tell epoch milliseconds.
    """

    def __init__(
        self,
        url: str | Path | None = None,
        *,
        engine: Engine | None = None,
        settings: StoreSettings | None = None,
        clock: Callable[[], int] | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(url, engine, settings, clock, read_only=read_only)

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine in use, for your own Session with `RoutingRepository`.

        To write, use ``lynkr_store.writing(store.engine)``.
        """
        return self._database.engine

    def check(self) -> None:
        """Open the database now, for a service that should not start without it.

        It is created, adopted or upgraded as at its first use, if the settings say so; `health` has
        probed it then, except if that took more than 2 seconds. In a process that a server forked,
        this also installs the handler of ``handle_sigterm``, as the first record does: a SIGTERM
        that comes before would be the server's alone.

        Raises:
            StoreUnavailable: The database cannot be reached.
            SchemaError: The schema is missing, behind, ahead, or lacks tables; the message names
                the command.
            StoreClosed: The store was closed.
        """
        self._handle_sigterm()
        self._do_check()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until all records from before this call are written, rejected, dropped or spooled.

        Returns:
            False if ``timeout_s`` seconds were not enough.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        return self._do_flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Flush within ``timeout_s`` seconds and stop; records that are left go to the spool.

        Without a spool they are dropped and counted. The second half of the time is for the spool,
        and another half a second if that is not enough. May be called again. Afterwards `record`
        returns False, and reads raise `StoreClosed`.

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
    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool,
    ) -> Sequence[RoutingRowBrief]: ...

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
        page_rows: int = PAGE_ROWS,
    ) -> Iterator[RoutingRow]:
        """All matching rows, newest first, read page by page, each page in its own transaction.

        Rows that arrive meanwhile and are newer than the first row are not included.

        Raises:
            BadArgument: ``page_rows`` is not a positive whole number.
            StoreUnavailable: The database cannot be reached.
        """
        page_rows = checked_limit(page_rows, "page_rows", least=1)
        before = None
        while page := self.query(criteria, window, limit=page_rows, before=before):
            yield from page
            before = page[-1].cursor

    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: Literal[True] = True,
    ) -> Iterator[RoutingRow]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: Literal[False],
    ) -> Iterator[RoutingRowBrief]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: bool,
    ) -> Iterator[RoutingRowBrief]: ...

    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = POLL_S,
        include_text: bool = True,
    ) -> Iterator[RoutingRowBrief]:
        """Rows as they are stored, by ascending id, without end; like ``tail -f``.

        No row is left out because its transaction was committed late. On PostgreSQL, where ids are
        assigned before the commit, a row waits while a transaction that may still store one with a
        lower id is open. Continue after the last row, also in another process, with
        ``after=row.id``.

        Between two reads the iterator holds no connection and no transaction, so it need not be
        closed. After an error the same iterator continues where it was. When the store is closed,
        the iteration ends.

        Args:
            criteria: Which rows; all by default.
            after: The id after which to begin, 0 for all rows. None begins after the greatest id at
                the time of the call.
            poll_s: Seconds between two reads while no rows are stored.
            include_text: False returns rows of a type without the two texts, and reads less.

        Raises:
            BadArgument: An argument is not valid, another thread waits for the same iterator, or
                ids that were read are assigned again, because the table was reset or replaced.
            UnsupportedDatabase: PostgreSQL: the server is a standby, or the sequence of the ids
                descends or has a cache.
            StoreUnavailable: The database cannot be reached; the call for the next row tries again
                after ``poll_s`` seconds.
            StoreClosed: The store was closed before the call.
        """
        follower = new_follower(criteria, after, poll_s, include_text=include_text)
        return Following(partial(self._do_follow, follower), follower.poll_s, lambda: self._closed)

    @cached(window_key)
    def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """The main figures; see `RoutingRepository.get_stats`. Cached by window."""
        return self._do_read(lambda r: r.get_stats(window))

    @cached(provider_key)
    def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """One provider's figures; see `RoutingRepository.get_provider_stats`. Cached."""
        return self._do_read(lambda r: r.get_provider_stats(provider, window))

    @cached(window_key)
    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """How often the tier was wrong; see `RoutingRepository.get_routing_accuracy`. Cached."""
        return self._do_read(lambda r: r.get_routing_accuracy(window))

    def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """Write records now, in one transaction, all or none; see `RoutingRepository.add_many`."""
        return self._do_add_many(records)

    def cleanup(
        self, older_than: timedelta = timedelta(days=30), *, trust_clock: bool = False
    ) -> int:
        """Delete rows older than an age, in short transactions.

        Args:
            older_than: The age.
            trust_clock: Delete them even if the clock is far ahead of the newest row and of the
                last retention.

        Returns:
            The number of deleted rows.

        Raises:
            BadArgument: The age is negative.
            ClockAhead: The clock may be wrong, and nothing was deleted.
            StoreUnavailable: The database cannot be reached.
        """
        return self._do_cleanup(older_than, trust_clock=trust_clock)

    def maintain(
        self,
        *,
        budget_s: float = BUDGET_S,
        rebuild: bool = False,
        trust_clock: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> MaintenanceReport:
        """Build missing indexes, fold new rows, apply the configured retention, free pages.

        It works in short transactions so that writers are not blocked; if it is interrupted, the
        next call continues.

        Args:
            budget_s: Seconds for retention and pages, and seconds to wait for sessions that block
                the build of an index; the next call does what is left, which the report names.
            rebuild: Recompute the roll-ups from the rows; roll-ups of a time whose rows retention
                removed are kept.
            trust_clock: Apply the retention even if the clock is far ahead of the newest row and of
                the last retention; otherwise it waits, and the report says so.
            on_step: Called after each step of folding with the number of rows folded so far.

        Raises:
            BadArgument: ``budget_s`` is negative or NaN.
            StoreUnavailable: The database cannot be reached.
        """
        return self._do_maintain(budget_s, on_step, rebuild=rebuild, trust_clock=trust_clock)

    def recount(self, window: Window | None = None) -> int:
        """Recompute the roll-ups of a window from its rows, now.

        If rows were changed or deleted by SQL, maintenance does this by itself. Call it after a
        change that triggers did not record: they were disabled, or the statement was SQLite's
        REPLACE. Roll-ups of a time whose rows retention removed are kept.

        Args:
            window: Every quarter of an hour that it touches is recomputed; None means all.

        Returns:
            The number of rows that were counted.

        Raises:
            RollupsRefused: The roll-ups did not keep what was added.
            StoreUnavailable: The database cannot be reached.
        """
        return self._do_recount(window)

    def health(self) -> Health:
        """Where every record is, and the database's state, within 50 ms. Raises no exception."""
        return self._do_health()
