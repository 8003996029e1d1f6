"""One database: its engine, opened on first use; where batches go."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, Engine, MetaData, Table, false, null, select
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateView

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import backend_of, disposing, parse_url, writing, writing_at_once
from lynkr_store.db.engines import check_host_engine, create_store_engine, in_schema
from lynkr_store.db.errors import Fault, fault_of, is_busy, is_no_database, translated
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.db.models import CHANGES, DIMENSIONS, LEDGER, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.db.postgresql import require_utf8
from lynkr_store.db.sqlite import WAL_PAGES, checkpoint, checkpoint_after, ensure_begun
from lynkr_store.db.urls import file_of, is_memory
from lynkr_store.exceptions import (
    BadArgument,
    OutcomeUnknown,
    SchemaBehind,
    SchemaError,
    StoreUnavailable,
    raise_alone,
)
from lynkr_store.ingest.batch import Row
from lynkr_store.ingest.handoff import Away
from lynkr_store.ingest.validation import policy_of
from lynkr_store.migrate import revisions
from lynkr_store.migrate.upgrade import bring_to, foreign_owners
from lynkr_store.process.files import Identity, identity_of
from lynkr_store.process.lifecycle import Forkable, without_sigterm
from lynkr_store.process.log import say
from lynkr_store.schemas import LONG_FIELDS
from lynkr_store.schemas.base import epoch_ms_now
from lynkr_store.schemas.units import DAY_MS
from lynkr_store.settings import StoreSettings
from lynkr_store.storage import bulk, progress
from lynkr_store.storage.company import has_company
from lynkr_store.storage.diagnosis import hindrance
from lynkr_store.storage.inserts import PART_ROWS, insert_once
from lynkr_store.storage.ledger import FORGOTTEN, enter_parts
from lynkr_store.storage.read_only import create_reading_engine
from lynkr_store.storage.text_policy import set_policy
from lynkr_store.storage.write_lock import again_s, pause_s

_NO_TEXTS: Final = dict.fromkeys(LONG_FIELDS)
_OF_ROLLUPS: Final = (
    DIMENSIONS,
    ROLLUPS,
    PROGRESS,
    CHANGES,
)  # without them all is read from the rows
_LONG_WAL_PAGES: Final = 10_000
"""80 MB of a fresh file's pages in the WAL: as many as it may hold before the end of it is moved
between two batches, so that it begins anew."""
_BATCHES_WAL_PAGES: Final = 2 * _LONG_WAL_PAGES
"""Pages from which on a commit of many rows moves them: a fifth of the time of writing. A fold does
it before, beside the batches, and a batch does in the pause in which the lock is left alone."""
_MANY_ROWS: Final = 100
"""Rows from which on a batch is taken for one of many. Small ones write the same pages again and
again: of these the WAL would hold many times what is in the file."""
_NEEDED: Final = frozenset((TELEMETRY.name, LEDGER.name))
"""Tables without which no record can be stored; without others a store goes on storing them."""
_OTHER_FILE: Final = "the file was removed, or another one was put in its place"
_MEMORY: Final = 0.8
_BUSY_S: Final = 3.0  # for another writer of an SQLite file, before the writer tries again later
_UPGRADE_WAIT_S: Final = 5.0  # who opens a store waits for an answer; the writer tries again
_OPEN_WAIT_S: Final = 1.0
"""How long a writer waits for a thread that is opening the database. That may be one that a signal
handler interrupted to close the store, which waits for the writer. Both may open it."""


class Database(Forkable):
    """An engine and whether its schema was found to be this release's.

    Args:
        settings: The store's options.
        engine: The host's own Engine, which is used and left open. Before a fork, and when an
            SQLite file was removed, its idle connections are closed.
        clock: The present in epoch milliseconds, for the ledger.
        read_only: Alter nothing; a gateway's file is read as it is.

    Attributes:
        engine: For reading.
        view: Read-only: columns of this release that the file lacks, read as NULL.
        on_written: Called with the number of rows of each batch that was stored.
    """

    def __init__(
        self,
        settings: StoreSettings,
        engine: Engine | None = None,
        *,
        clock: Callable[[], int] = epoch_ms_now,
        read_only: bool = False,
    ) -> None:
        self._owned = engine is None
        self._clock = clock
        self.read_only = read_only
        self._begin()
        self.on_written: Callable[[int], None] = lambda _: None
        self.view: tuple[str, ...] = ()
        if engine is not None:
            check_host_engine(engine)
            if read_only:
                raise BadArgument("read_only: give a url, not an engine")
            keep_out_of_children(engine)
            set_policy(engine, policy_of(settings))
            self.engine = in_schema(engine, settings.schema_name)
        elif read_only and parse_url(settings.url).get_backend_name() == Backend.SQLITE:
            self.engine, self.view = _reading(settings)
        else:
            self.engine = create_store_engine(
                settings.url,
                connect_timeout_s=settings.connect_timeout_s,
                statement_timeout_s=settings.statement_timeout_s,
                schema=settings.schema_name,
                echo=settings.echo,
            )
            if read_only:
                self.engine = self.engine.execution_options(postgresql_readonly=True)
        if self._owned:
            set_policy(self.engine, policy_of(settings))
        self.backend = backend_of(self.engine)
        upgrade = settings.upgrade_on_open
        self._upgrade = self.backend is Backend.SQLITE if upgrade is None else upgrade
        self.writing = writing(self.engine)
        self._shared_file = self.backend is Backend.SQLITE and not self.in_memory
        self._path = file_of(self.engine.url)
        if self.backend is Backend.POSTGRESQL:
            # whatever a host's engine is set to: a batch is one transaction, and its second try
            # must see what the first committed meanwhile
            self.writing = self.writing.execution_options(isolation_level="READ COMMITTED")

    def _begin(self) -> None:
        self._opened = False
        self._opened_once = False
        self._lock = threading.Lock()
        self._gate = threading.Lock()  # held while a batch is written
        self._file: Identity | None = None
        self._disposed = False
        self._using: set[Connection] = set()  # who has another of the engine's is somebody else
        self._hold_s = 0.0  # how long the last batch held the lock
        self._checkpointing = threading.Lock()
        self._away: Away = nullcontext  # of the batch that is written
        self._batch = ""  # the last one, and what was refused of it and its parts
        self._tried: dict[str, Counter[str]] = {}
        self._known_good: Row | None = None  # a row that was taken, without its texts

    @property
    def in_memory(self) -> bool:
        """Whether one connection is the whole database."""
        return is_memory(self.engine.url)

    @property
    def is_open(self) -> bool:
        """Whether the schema was found to be this release's, in the file that is still there."""
        return self._opened and not self._is_other_file()

    def open(self, *, patience_s: float = -1) -> None:
        """Make sure once that the schema is this release's; create, adopt or upgrade it if so set.

        Raises:
            StoreUnavailable: The database cannot be reached, or the file is none.
            SchemaBehind: It must be upgraded first.
            SchemaAhead: A newer release made it.
            AdoptionRefused: Its tables are not the gateway's; nothing was changed.
            UnsupportedDatabase: Its encoding is not UTF-8.
        """
        if self.is_open:
            return
        held = self._lock.acquire(timeout=patience_s)
        try:
            self.follow_file()
            if not self._opened:
                before, self._file = self._identity(), None
                with translated(of_rows=False):
                    self._check_schema()
                self._file = self._identity()
                if self._path and (self._file is None or before not in (None, self._file)):
                    self._lose_file()
                    raise StoreUnavailable("the file was removed or replaced while it was opened")
                self._opened = self._opened_once = True
        finally:
            if held:
                self._lock.release()

    def follow_file(self) -> None:
        """Forget the file that was opened, if its path names another or none by now.

        Raises:
            StoreUnavailable: The database was opened read-only, with views made for that one file.
        """
        if self._is_other_file():
            if self.read_only:
                raise StoreUnavailable(f"{self._path}: {_OTHER_FILE}; open the store again")
            self._lose_file()

    def require_file(self) -> None:
        """Make sure that the file which was opened is still the one that its path names.

        Raises:
            StoreUnavailable: It was removed or replaced, and what was written into it is lost.
        """
        if self._is_other_file():
            raise StoreUnavailable(f"{self._path}: {_OTHER_FILE}")

    def look_again(self) -> None:
        """Name the remedy, where a statement failed because the schema was changed meanwhile.

        Raises:
            SchemaBehind: It was taken back, or lacks tables.
            SchemaAhead: A newer release changed it so that this one cannot work with it.
        """
        self._opened = False
        self.open()
        if not self.read_only:
            with self.connected(self.engine) as connection:
                lost = revisions.missing_tables(connection)
            if lost:
                raise revisions.lacks_tables(lost)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Have an error name the remedy where it comes of a schema that was changed meanwhile.

        Raises:
            SchemaBehind: It was taken back, or lacks tables.
            SchemaAhead: A newer release changed it so that this one cannot work with it.
        """
        try:
            yield
        except StoreUnavailable as error:
            if error.unclear:
                self.look_again()
            raise

    def _check_schema(self) -> None:
        if self.read_only and self.backend is Backend.SQLITE:
            with self.connected(self.engine) as connection:
                revisions.standing(connection)  # its view has what is missing
            return
        try:
            with self.connected(self.engine) as connection:
                require_utf8(connection)
                if not self._opened_once and (foreign := foreign_owners(connection)):
                    say(logging.WARNING, "%s", " ".join(foreign))
                revisions.require_head(connection)
                if not self._opened_once:  # later the statement that fails says which is missing
                    lost = revisions.missing_tables(connection)
                    mends = self._upgrade and not self.read_only
                    if lost and (mends or not _NEEDED.isdisjoint(lost)):
                        raise revisions.lacks_tables(lost)
        except SchemaBehind:
            if self.read_only or not self._upgrade or self._opened_once:
                raise  # what was taken back while it was in use, somebody took back
            bring_to(self.engine, wait_s=_UPGRADE_WAIT_S)
        except DatabaseError as error:
            if is_no_database(error):
                raise StoreUnavailable(
                    f"url: {self.engine.url.database} is not an SQLite database; give another path"
                ) from error
            raise

    def write(self, batch_id: str, rows: Sequence[Row], away: Away) -> Mapping[str, int]:
        """Store a batch once; see `lynkr_store.ingest.writer.Sink`.

        In one transaction, or, where a row of many is refused, in one for each part.
        """
        if not self._gate.acquire(blocking=False):  # going away costs the other thread's turn
            with away():
                self._gate.acquire()
        try:
            self._away = away
            with translated():
                try:
                    self.open(patience_s=_OPEN_WAIT_S)
                    refused = self._whole_or_parts(batch_id, rows)
                except DBAPIError as error:
                    if fault_of(error) is Fault.UNCLEAR:
                        # the schema may have been changed: look again, to name the remedy
                        self._opened = False
                        with self.looked() as connection:
                            words = hindrance(connection)
                        if words:
                            raise_alone(StoreUnavailable(words))
                    raise
        finally:
            self._away = nullcontext
            self._gate.release()
        self.on_written(len(rows))
        return refused

    def has_forgotten(self, at_ms: int) -> bool:
        """Whether the ledger may have forgotten a batch that was stored at an instant.

        By what it did forget, not by the present, which may be wrong.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        with translated():
            self.open(patience_s=_OPEN_WAIT_S)
            with self.looked() as connection:
                before = connection.scalar(select(progress.value_of(FORGOTTEN)))
        return before is not None and at_ms - DAY_MS < before  # a day for clocks that are set

    @contextmanager
    def looked(self) -> Iterator[Connection]:
        """A transaction that reads."""
        with self.connected(self.engine) as connection, connection.begin():
            yield connection

    @contextmanager
    def begun(self, last_s: float = 0.02, *, wal_pages: int = WAL_PAGES) -> Iterator[Connection]:
        """A transaction that may write, on SQLite with the write lock, and is committed at the end.

        Whoever writes to a file that others share takes its turn here, and with this store's own
        batches without waiting in vain.

        Args:
            last_s: Seconds for which the lock was held the last time; it will be about as long.
            wal_pages: Pages in SQLite's WAL from which on the commit moves them to the file.
        """
        gate = self._gate if self._shared_file else nullcontext()
        with gate, self._begun(last_s, wal_pages=wal_pages) as connection:
            ensure_begun(connection)  # on a host's engine too
            yield connection

    @contextmanager
    def begun_step(self) -> Iterator[Connection]:
        """As `begun`, one of many steps between which `checkpoint` is called."""
        with self.begun(wal_pages=_BATCHES_WAL_PAGES) as connection:
            yield connection

    def checkpoint(self) -> None:
        """Move what stands in SQLite's WAL to the file, most of it beside the batches."""
        if not self._shared_file:
            return
        with self._checkpointing, self.connected(self.engine) as connection:
            pages = checkpoint(connection)
            if pages >= _LONG_WAL_PAGES:
                for _ in range(2):  # of what came meanwhile, less each time
                    checkpoint(connection)
        if pages >= _LONG_WAL_PAGES:
            # as a batch does: the lock first, then a connection, of which a host may have only one
            with self._gate, self.connected(self.engine) as connection:
                checkpoint(connection)

    def _whole_or_parts(self, batch_id: str, rows: Sequence[Row]) -> Counter[str]:
        if batch_id != self._batch:
            self._batch = batch_id
            self._tried.clear()
        refused = self._store(batch_id, rows)
        if refused is None:
            refused = Counter()
            for at in range(0, len(rows), PART_ROWS):
                part = rows[at : at + PART_ROWS]
                refused += self._store(f"{batch_id}.{at}", part, of=batch_id) or Counter()
        return refused

    def _store(
        self, batch_id: str, rows: Sequence[Row], *, of: str | None = None
    ) -> Counter[str] | None:
        """Store a batch, or a part of one, in one transaction; None where it must go in parts."""
        with self._begun_for_batch(len(rows)) as connection:
            connection.execution_options(**{bulk.AWAY: self._away})
            if of:
                enter_parts(connection, of, self._clock())
            refused = self._insert(connection, batch_id, rows)
            if refused is None:
                connection.rollback()
                return None
            if refused:  # by a rule that a newer release made? then the batch waits
                try:
                    revisions.require_head(connection)
                except SchemaError:
                    self._opened = False
                    raise
            try:
                with self._away():
                    connection.commit()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                raise OutcomeUnknown("the connection was lost while a commit was under way") from (
                    error
                )
        self.require_file()
        return refused

    @contextmanager
    def _begun_for_batch(self, rows: int) -> Iterator[Connection]:
        wal_pages = _BATCHES_WAL_PAGES if rows >= _MANY_ROWS else WAL_PAGES
        with self._begun(self._hold_s, self._away, wal_pages) as connection:
            began = time.monotonic()
            yield connection
            # a long one is remembered for some batches: what comes is like what came
            self._hold_s = max(time.monotonic() - began, _MEMORY * self._hold_s)

    @contextmanager
    def _begun(
        self, last_s: float, away: Away = nullcontext, wal_pages: int = WAL_PAGES
    ) -> Iterator[Connection]:
        if not self._shared_file:
            with self.connected(self.writing) as connection, connection.begin():
                yield connection
            return
        deadline = time.monotonic() + _BUSY_S
        with self.connected(writing_at_once(self.engine)) as connection:
            while True:
                wait_s = pause_s(time.time(), last_s)
                if wait_s and self._has_company():
                    with away():
                        self._pause(connection, wait_s, wal_pages)
                try:
                    connection.begin()
                except OperationalError as error:
                    if not is_busy(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(again_s())
                else:
                    break
            if self._owned:  # a host's connections are its own
                checkpoint_after(connection, wal_pages)
            yield connection
            connection.commit()

    def _has_company(self) -> bool:
        """Whether somebody may wait for the file's lock who takes no turn at the gate."""
        pool = self.engine.pool
        if not self._owned or not self._path or not isinstance(pool, QueuePool):
            return True
        return has_company(self._path, pool.checkedin() + len(self._using))

    def _pause(self, connection: Connection, wait_s: float, wal_pages: int) -> None:
        """Wait; where the WAL may be long, move it to the file meanwhile, which needs no lock.

        Where it is short, those for whom the lock is left alone need not feel it.
        """
        until = time.monotonic() + wait_s
        if wal_pages > WAL_PAGES and self._checkpointing.acquire(timeout=wait_s):
            try:
                checkpoint(connection)
            finally:
                self._checkpointing.release()
        time.sleep(max(0.0, until - time.monotonic()))

    @contextmanager
    def connected(self, engine: Engine) -> Iterator[Connection]:
        """A connection that is not used again after a fault, nor after `dispose`.

        It keeps what it was made with, which may be the fault's reason: a file's mode, a session's
        settings.

        Raises:
            StoreUnavailable: The file that was opened is gone.
        """
        self.require_file()
        with self.closed_if_disposed(), engine.connect() as connection:
            self._using.add(connection)
            try:
                yield connection
            except Exception as error:
                if not self.in_memory and not (isinstance(error, DBAPIError) and is_busy(error)):
                    connection.invalidate()
                raise
            finally:
                self._using.discard(connection)

    @contextmanager
    def closed_if_disposed(self) -> Iterator[None]:
        """Connections taken inside are closed at the end, where `dispose` came meanwhile.

        It closes those that are idle; one in use goes back to a pool that is the engine's no more.
        """
        pool = self.engine.pool
        try:
            yield
        finally:
            if self._disposed:
                pool.dispose()

    def _insert(
        self, connection: Connection, batch_id: str, rows: Sequence[Row]
    ) -> Counter[str] | None:
        now, good = self._clock(), self._known_good
        done = insert_once(connection, batch_id, rows, now, known_good=good)
        if done is None:
            return None
        stored, refused = done
        missing = len(rows) - stored - refused.total()
        if missing:  # an earlier try was committed without them
            causes = self._tried.get(batch_id, Counter())
            refused = causes if causes.total() == missing else Counter(refused_earlier=missing)
        self._tried[batch_id] = refused
        if not refused:
            self._known_good = {**rows[-1], **_NO_TEXTS}
        return refused

    def _identity(self) -> Identity | None:
        """Which file the path names: that of an SQLite database can be removed, or replaced."""
        return identity_of(self._path) if self._path else None

    def _is_other_file(self) -> bool:
        file = self._file  # read once: another thread that opens it forgets it meanwhile
        return file is not None and self._identity() != file

    def _lose_file(self) -> None:
        """The file is gone from its path, and with it what is written there: start anew."""
        self.engine.dispose()  # a host's too: it closes idle connections, and makes new ones
        self._opened = self._opened_once = False
        self._file = None

    def after_fork_in_child(self) -> None:
        """Start anew; the engine does so by itself."""
        self._begin()

    def dispose(self) -> None:
        """Close the engine's connections, unless it is the host's.

        A thread of its own does it. What a signal's handler raises comes up in the main thread, at
        a moment at which the pool's lock, a `threading.Condition`, can stay held; the next call,
        at the interpreter's end, would wait for it for ever.
        """
        self._disposed = self._owned
        if not self._owned:
            return
        thread = threading.Thread(
            target=self.engine.dispose, name="lynkr-store-dispose", daemon=True
        )
        try:
            with without_sigterm():  # its handler closes too, and may start no thread meanwhile
                thread.start()
        except RuntimeError:  # the interpreter ends, and starts no thread any more
            self.engine.dispose()
        else:
            thread.join()


def looking_engine(settings: StoreSettings) -> Engine:
    """An engine that alters nothing and shows what is there.

    Raises:
        UnsupportedDatabase: Another database or driver.
        StoreUnavailable: There is no such file, or it is no database.
    """
    url = parse_url(settings.url)
    if url.get_backend_name() == Backend.SQLITE:
        return create_reading_engine(
            _file_to_read(url), statement_timeout_s=settings.statement_timeout_s
        )
    engine = create_store_engine(url, schema=settings.schema_name)
    return engine.execution_options(postgresql_readonly=True)


def _file_to_read(url: URL) -> Path:
    if is_memory(url) or url.database is None:
        raise BadArgument("url: an empty database in memory cannot be read; give a file")
    return Path(url.database)


def _reading(settings: StoreSettings) -> tuple[Engine, tuple[str, ...]]:
    """An engine that alters nothing, and the columns that its view supplies as NULL."""
    path = _file_to_read(parse_url(settings.url))
    timeout_s = settings.statement_timeout_s
    names = (TELEMETRY.name, *(table.name for table in _OF_ROLLUPS))
    with (
        disposing(create_reading_engine(path, statement_timeout_s=timeout_s)) as engine,
        translated(of_rows=False),
        engine.connect() as connection,
    ):
        for name, kind in catalogue.not_plain(connection, names).items():
            raise SchemaError(
                f"{path}: {name} is a {kind} and no table, and a read of it could take any time "
                "and memory: give a file that the gateway or this library made"
            )
        lost = [table for table in _OF_ROLLUPS if not catalogue.tables(connection, [table.name])]
        there = catalogue.column_names(connection, TELEMETRY.name)
        if not there:
            raise SchemaBehind(
                f"{path} has no table {TELEMETRY.name}: give a gateway's file, or run "
                f"{revisions.UPGRADE_COMMAND} to make one"
            )
        for name in names:
            if computed := catalogue.generated_columns(connection, name):
                raise SchemaError(
                    f"{path}: {name}.{min(computed)} is a generated column, and a read of it could "
                    "take any time and memory: give a file that the gateway or this library made"
                )
        missing = tuple(column.name for column in TELEMETRY.c if column.name not in there)
        views = [*map(_empty, lost), *([_view(there)] if missing else [])]
        statements = [str(view.compile(engine)) for view in views]
    engine = create_reading_engine(path, views=statements, statement_timeout_s=timeout_s)
    return engine, missing


def _view(there: Collection[str]) -> CreateView:
    """A temporary view that hides the table of the same name and has all columns."""
    main = TELEMETRY.to_metadata(MetaData(), schema="main")
    columns = (
        main.c[column.name] if column.name in there else null().label(column.name)
        for column in TELEMETRY.c
    )
    return CreateView(select(*columns), TELEMETRY.name, temporary=True)


def _empty(table: Table) -> CreateView:
    """A temporary view in the place of a table that the file does not have, without rows."""
    columns = (null().label(column.name) for column in table.c)
    return CreateView(select(*columns).where(false()), table.name, temporary=True)
