"""The parts of both stores: settings, database, writer, cache, maintenance thread, probe."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, Unpack

from sqlalchemy import URL, Engine
from sqlalchemy.orm import Session

from lynkr_store.cache import TTLCache, timer_of
from lynkr_store.db.citus import is_distributed, use_one_connection_each
from lynkr_store.db.errors import translated
from lynkr_store.db.postgresql import plan_for_any
from lynkr_store.db.urls import file_of, shown, url_text
from lynkr_store.exceptions import BadArgument, RollupsRefused, StoreClosed
from lynkr_store.ingest.spool import Spool, clashes
from lynkr_store.ingest.validation import policy_of, refuse_invalid
from lynkr_store.ingest.writer import CLOSE_S, Writer
from lynkr_store.maintenance import run
from lynkr_store.maintenance.background import BackgroundMaintenance
from lynkr_store.migrate import revisions
from lynkr_store.process.lifecycle import SigtermHandler, on_fork
from lynkr_store.queries.following import Follower, Page, Tail
from lynkr_store.queries.repository import RoutingRepository
from lynkr_store.schemas import (
    BatchAttempt,
    Health,
    MaintenanceReport,
    RoutingEvent,
    RoutingFields,
)
from lynkr_store.schemas.base import epoch_ms_now
from lynkr_store.schemas.filters import (
    RoutingFilter,
    Window,
    checked_after,
    checked_age,
    checked_clock,
    checked_criteria,
    checked_interval,
    checked_provider,
    checked_seconds,
    checked_window,
)
from lynkr_store.schemas.units import DAY_MS, INSTANT_MAX_MS, INSTANT_MIN_MS
from lynkr_store.settings import StoreSettings
from lynkr_store.storage.database import Database
from lynkr_store.storage.ledger import LEDGER_DAYS
from lynkr_store.storage.sink import DatabaseSink
from lynkr_store.store.health import Probe

_T = TypeVar("_T")

_NOTHING: Final = {  # the options of a store that is not enabled
    "url": "sqlite://",
    "migrate_url": None,
    "schema_name": None,
    "spool_path": None,
    "handle_sigterm": False,
    "upgrade_on_open": True,
}

PAGE_ROWS: Final = 1_000  # rows of iter_records in memory at a time
POLL_S: Final = 0.5  # between two reads of follow; the writer's flush_interval_s is as long


class Core:
    """Composes the parts; the stores differ in how they wait for the methods here."""

    def __init__(
        self,
        url: str | Path | None,
        engine: Engine | None,
        settings: StoreSettings | None,
        clock: Callable[[], int] | None,
        *,
        read_only: bool = False,
        connections: int | None = None,
    ) -> None:
        if url is not None and engine is not None:
            raise BadArgument("url, engine: give one of the two")
        settings = StoreSettings() if settings is None else settings
        if not isinstance(settings, StoreSettings):
            raise BadArgument("settings: give a StoreSettings")
        if url is not None:
            settings = settings.model_copy(update={"url": url_text(url), "migrate_url": None})
        if not settings.enabled:
            settings, engine = settings.model_copy(update=_NOTHING), None
            read_only = False
        self._settings = settings
        self._clock = epoch_ms_now if clock is None else checked_clock(clock)
        self._policy = policy_of(settings)
        self._plain = settings.enabled and not settings.strict
        self._database = Database(settings, engine, read_only=read_only, connections=connections)
        self._sink = DatabaseSink(self._database, self._clock)
        make_spool = None
        if settings.spool_path and not read_only:
            make_spool = _spool_maker(settings, self._database.engine.url)
        timer = time.monotonic if clock is None else timer_of(self._clock)
        self._cache = TTLCache(settings.cache_ttl_s, timer=timer)
        self._probe = Probe(self._database)
        self._writer = Writer(
            self._sink,
            policy=self._policy,
            clock=self._clock,
            max_rows=settings.queue_max_rows,
            max_bytes=settings.queue_max_bytes,
            batch_rows=settings.batch_max_rows,
            interval_s=settings.flush_interval_s,
            spool=make_spool,
            spool_after_s=settings.spool_after_s,
            forget_after_ms=(LEDGER_DAYS - 1) * DAY_MS,  # a day for clocks that are set
            has_forgotten=self._sink.has_forgotten,
        )
        interval_s = settings.maintenance_interval_s
        checks = run.IntervalTimer(interval_s)
        keep_up = partial(_keep_up, self._database, settings, self._clock, checks)
        self._background = BackgroundMaintenance(
            keep_up,
            interval_s,
            self._writer.note_restart,
            on_fault=partial(_note_refused, self._writer),
        )
        self._sink.on_written = self._background.rows_written
        self._closed = False
        if read_only:
            self._writer.close(0)
        # also when the store is forgotten, and when the interpreter exits
        parts = (self._writer, self._background, self._probe)
        self._at_exit = partial(_close, *parts, CLOSE_S)
        atexit.register(self._at_exit)
        self._finalizer = weakref.finalize(self, _forget, self._at_exit)
        # not by the interpreter's own list of finalizers: where another thread makes one while it
        # is read, as SQLAlchemy does for each connection in use, CPython runs none of them
        self._finalizer.atexit = False
        for part in (
            self._writer,
            self._database,
            self._sink,
            self._background,
            self._probe,
            self._cache,
        ):
            on_fork(part)
        self._sigterm: SigtermHandler | None = None
        if settings.handle_sigterm:  # last: the signal may come at once, and needs all of the above
            self._sigterm = SigtermHandler(_ending(self))
            self._writer.in_child = self._sigterm.install_in_child
        if settings.spool_path:
            self._writer.start()  # what an earlier process left is written without being asked

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self._database.engine.url)!r})"

    @property
    def settings(self) -> StoreSettings:
        """The options in force."""
        return self._settings

    @property
    def missing_columns(self) -> tuple[str, ...]:
        """Opened read-only: columns that the file lacks, read as None."""
        return self._database.missing_columns

    def record(
        self,
        event: RoutingEvent | Mapping[str, Any] | None = None,
        /,
        **fields: Unpack[RoutingFields],
    ) -> bool:
        """Queue one record. Never raises, never waits for I/O; mistakes are counted in `health`.

        After SIGTERM, with ``handle_sigterm``, it waits until the record is written, as long as all
        such calls together have not waited for 2.5 seconds.

        A record that is not valid is rejected later: ``health().rejections`` says why, and
        ``RoutingEvent(**fields)`` raises the exact error. With the setting ``strict`` this method
        raises it.

        Args:
            event: The record, or a mapping of its fields, which is copied.
            fields: Fields by name; they win over the event's. `RoutingEvent` lists them; only
                ``provider`` is required.

        Returns:
            True when it was queued; False when it was dropped: the queue is full or the store
            closed.

        Raises:
            BadArgument: Only with ``strict``: the record is not valid.
        """
        if event is None and self._plain:
            return self._writer.submit(fields)
        record: Any
        try:
            if event is None:
                record = fields
            elif type(event) is dict:  # pydantic's isinstance() takes a tenth of the call
                record = event | fields
            elif isinstance(event, RoutingEvent) and not fields:
                record = event
            else:
                record = dict(event)
                record.update(fields)
        except Exception:  # noqa: BLE001 - whatever was passed; it is rejected by its type
            record = event
        if self._settings.strict:
            refuse_invalid(record)
        return self._writer.submit(record) if self._settings.enabled else not self._closed

    def on_batch(self, listener: Callable[[BatchAttempt], object]) -> None:
        """Call a function after each attempt to write a batch, for metrics of durations.

        The thread that writes calls it, so it must be quick. What it raises is counted in
        ``health().faults_by`` and ends nothing. In a child of a fork it is called too.

        Args:
            listener: Takes a `BatchAttempt`.

        Raises:
            BadArgument: It cannot be called.
        """
        if not callable(listener):
            raise BadArgument("listener: give a function that takes a BatchAttempt")
        self._writer.listeners.append(listener)

    def _do_flush(self, timeout_s: float) -> bool:
        return self._writer.flush(timeout_s)

    def _do_close(self, timeout_s: float) -> None:
        timeout_s = checked_seconds(timeout_s, "timeout_s")
        self._closed = True
        _close(self._writer, self._background, self._probe, timeout_s)
        if self._sigterm:  # only now: the signal may come meanwhile
            self._sigterm.remove()
        self._finalizer.detach()  # last: an interrupted close is finished at the end
        atexit.unregister(self._at_exit)

    def _do_read(self, body: Callable[[RoutingRepository], _T]) -> _T:
        self._open()
        return self._do(self._database.engine, partial(self._answer, body))

    def _do_follow(self, follower: Follower, tail: Tail | None) -> Page:
        self._open()
        return self._do(self._database.engine, partial(self._page, follower, tail))

    def _do(self, engine: Engine, task: Callable[[Session], _T]) -> _T:
        """Run the task in one transaction, which is committed when it returns."""
        with (
            self._database.explained(),
            translated(),
            self._database.closed_if_disposed(),
            Session(engine) as session,
            session.begin(),
        ):
            return task(session)

    def _page(self, follower: Follower, tail: Tail | None, session: Session) -> Page:
        page = follower.read(session, tail)
        self._writer.note_unreadable(page.unreadable)
        return page

    def _answer(self, body: Callable[[RoutingRepository], _T], session: Session) -> _T:
        repository = RoutingRepository(
            session,
            clock=self._clock,
            policy=self._policy,
            before_statistic=_plan_for_any,
            before_rows=use_one_connection_each,
        )
        answer = body(repository)
        self._writer.note_unreadable(repository.unreadable)
        return answer

    def _do_add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        self._open(to_write=True)
        if not self._settings.enabled:
            return 0
        add = partial(self._answer, lambda r: r.add_many(records))
        added = self._do(self._database.writing, add)
        self._database.require_file()
        return added

    def _do_cleanup(self, older_than: timedelta, *, trust_clock: bool) -> int:
        now_ms = self._clock()
        cutoff_ms = now_ms - checked_age(older_than) // timedelta(milliseconds=1)
        with self._maintaining():
            return run.cleanup(self._database, cutoff_ms, now_ms, trust_clock=trust_clock)

    def _do_maintain(
        self,
        budget_s: float,
        on_step: run.OnStep | None,
        *,
        rebuild: bool,
        trust_clock: bool,
    ) -> MaintenanceReport:
        budget_s = checked_seconds(budget_s, "budget_s")
        with self._maintaining():
            return run.maintain(
                self._database,
                self._settings,
                self._clock,
                budget_s=budget_s,
                rebuild=rebuild,
                trust_clock=trust_clock,
                on_step=on_step or (lambda _: None),
            )

    def _do_recount(self, window: Window | None) -> int:
        asked = checked_window(window)
        since = max(INSTANT_MIN_MS, asked.since_ms or INSTANT_MIN_MS)
        until = INSTANT_MAX_MS if asked.until_ms is None else min(INSTANT_MAX_MS, asked.until_ms)
        if since >= until:
            return 0
        with self._maintaining():
            return run.recount(self._database, since, until)

    @contextmanager
    def _maintaining(self) -> Iterator[None]:
        """Open to write; afterwards no cached statistic is of the time before."""
        self._open(to_write=True)
        try:
            with self._database.explained(), translated():
                yield
        except RollupsRefused as error:
            _note_refused(self._writer, error)
            raise
        finally:
            self._cache.clear()

    def _do_health(self) -> Health:
        if not self._closed:
            self._probe.refresh()
        return self._health()

    def _health(self) -> Health:
        """What is known now, without another look at the database."""
        counters, looked = self._writer.counters(), self._probe.last
        now, look = time.monotonic(), looked and looked.look
        at, error = counters.last_error_at, counters.last_error
        if looked and looked.error and (at is None or looked.at > at):
            at, error = looked.at, looked.error
        if late_s := self._probe.late_s:
            at, error = now, f"StoreUnavailable: no answer for {late_s:.0f} s"
        return Health(
            enabled=self._settings.enabled,
            submitted=counters.submitted,
            recovered=counters.recovered,
            written=counters.written,
            rejected=counters.rejected_by.total(),
            dropped=counters.dropped_by.total(),
            spooled=counters.spooled,
            pending=counters.pending,
            queue_bytes=counters.queue_bytes,
            rejected_by=counters.rejected_by,
            rejections=counters.rejections,
            dropped_by=counters.dropped_by,
            mended_by=counters.mended_by,
            faults_by=counters.faults_by,
            backend=self._database.backend,
            revision=look and look.revision,
            head=revisions.head(),
            reachable=self._probe.reachable,
            server=look and look.server,
            writable=look and look.writable,
            probe_age_s=looked and now - looked.at,
            last_error=error,
            last_error_age_s=None if at is None else now - at,
            database_bytes=look and look.database_bytes,
            reclaimable_bytes=look and look.reclaimable_bytes,
            oldest_timestamp=look and look.oldest,
            rollup_lag=look and look.rollup_lag,
        )

    def _open(self, *, to_write: bool = False) -> None:
        self._require_open(to_write=to_write)
        self._database.open()
        self._start_maintenance()

    def _start_maintenance(self) -> None:
        if not self._database.read_only:
            self._background.start()

    def _do_check(self) -> None:
        self._require_open()
        with translated():
            self._database.check_again()
        self._probe.refresh(patient=True)  # or `health` could say first: unreachable
        self._start_maintenance()

    def _handle_sigterm(self) -> None:
        """In a child of a fork, install the handler again, if this is the main thread."""
        if self._sigterm:
            self._sigterm.install_in_child()

    def _require_open(self, *, to_write: bool = False) -> None:
        if self._closed:
            raise StoreClosed("the store was closed; open a new one")
        if to_write and self._database.read_only:
            raise BadArgument("the store was opened read-only; open it without read_only")


def _plan_for_any(session: Session) -> None:
    """The transaction is the store's own, so it may be set up for what is asked in it."""
    connection = session.connection()
    if not is_distributed(connection):  # Citus has no such plan
        plan_for_any(connection)


def _note_refused(writer: Writer, error: Exception) -> None:
    """Have `health` say that roll-ups were refused; of other faults the probe tells.

    A function of the module: by a method, the maintenance thread would hold the store.
    """
    if isinstance(error, RollupsRefused):
        writer.note_fault(error)


def _keep_up(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    checks: run.IntervalTimer,
    stop: Callable[[], bool],
) -> None:
    with database.explained(), translated():
        run.keep_up(database, settings, clock, checks, stop)


def _close(
    writer: Writer, background: BackgroundMaintenance, probe: Probe, timeout_s: float
) -> None:
    if writer.is_this_thread or background.is_this_thread:
        # the collector found a forgotten store in here; this thread must not wait for itself
        threading.Thread(target=_close, args=(writer, background, probe, timeout_s)).start()
        return
    writer.close(timeout_s)
    background.finish()
    probe.finish()
    probe.database.dispose()


def _forget(close: Callable[[], None]) -> None:
    """Close the parts of a store that the collector found."""
    close()
    atexit.unregister(close)


def _ending(core: Core) -> Callable[[bool], None]:
    """A function for SIGTERM, which does not keep the store alive.

    Where the process goes on for a while, the store stays open, so that requests in progress can
    record; each such call waits for its record, because servers end by the signal itself. The
    handler may have interrupted an event loop, so it waits 2.5 seconds at most, and not
    beyond a try that fails: what is pending is tried again, or enters the spool, while the process
    goes on.
    """
    reference = weakref.ref(core)

    def end(goes_on: bool) -> None:  # noqa: FBT001 - its only argument
        if (alive := reference()) is None:
            return
        if not goes_on:
            alive._do_close(CLOSE_S)  # noqa: SLF001 - this module's own
        else:
            alive._writer.write_at_once(CLOSE_S / 2)  # noqa: SLF001
            alive._writer.flush_while_reached(CLOSE_S / 2)  # noqa: SLF001

    return end


def _spool_maker(settings: StoreSettings, url: URL) -> Callable[[], Spool]:
    assert settings.spool_path  # noqa: S101 - asked before
    path = Path(settings.spool_path).absolute()  # from where the store was opened
    database = file_of(url)
    if database and clashes(path, database):
        raise BadArgument(
            f"spool_path: {path} is the database's file, or one that SQLite keeps next to it; give "
            "a path of its own"
        )
    return lambda: Spool(path, settings.spool_max_bytes)


def new_follower(
    criteria: RoutingFilter | None, after: int | None, poll_s: float, *, include_text: bool
) -> Follower:
    """What `follow` was asked for, checked."""
    return Follower(
        checked_criteria(criteria),
        checked_after(after),
        min(checked_interval(poll_s, "poll_s"), threading.TIMEOUT_MAX),
        include_text,
    )


def window_key(window: Window | None = None) -> Hashable:
    """The question's window as it was asked: the default one stays one question as time goes."""
    if window is None:
        return None, None
    asked = checked_window(window)
    return asked.since, asked.until


def provider_key(provider: str, window: Window | None = None) -> Hashable:
    """`window_key` of a question about one provider."""
    return checked_provider(provider), window_key(window)
