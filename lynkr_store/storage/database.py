"""One database: its engine, opened on first use, and its transactions."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DatabaseError, DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db.citus import use_one_connection_each
from lynkr_store.db.dialect import (
    backend_of,
    checked_migrate_url,
    disposing,
    parse_url,
    writing,
    writing_at_once,
)
from lynkr_store.db.engines import check_host_engine, create_store_engine, in_schema
from lynkr_store.db.errors import is_busy, is_no_database, translated
from lynkr_store.db.failover import read_anywhere
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.db.models import LEDGER, TELEMETRY
from lynkr_store.db.postgresql import require_utf8
from lynkr_store.db.sqlite import WAL_PAGES, ensure_begun
from lynkr_store.db.urls import file_of, is_memory
from lynkr_store.exceptions import (
    BadArgument,
    LynkrStoreError,
    OutcomeUnknown,
    SchemaBehind,
    StoreUnavailable,
)
from lynkr_store.ingest.gil import long_call
from lynkr_store.ingest.validation import policy_of
from lynkr_store.migrate import revisions
from lynkr_store.migrate.upgrade import bring_to
from lynkr_store.process.files import OpenedFile
from lynkr_store.process.lifecycle import Forkable
from lynkr_store.process.log import say
from lynkr_store.process.threads import start_thread
from lynkr_store.settings import StoreSettings
from lynkr_store.storage.read_only import open_read_only
from lynkr_store.storage.text_policy import set_policy
from lynkr_store.storage.write_lock import MANY_WAL_PAGES, PAUSE_S, WriteLock

_NEEDED: Final = frozenset((TELEMETRY.name, LEDGER.name))
"""Tables without which no record can be stored; without others a store goes on storing them."""
_OTHER_FILE: Final = "the file was removed, or another one was put in its place"
_UPGRADE_WAIT_S: Final = 5.0  # the caller that opens a store waits; the writer tries again


class Database(Forkable):
    """An engine and whether its schema was found to be this release's.

    Args:
        settings: The store's options.
        engine: The host's own Engine, which is used and left open. Before a fork, and when an
            SQLite file was removed, its idle connections are closed.
        read_only: Alter nothing; a gateway's file is read as it is.
        connections: PostgreSQL: the most connections of ``engine``, unless it is the host's.

    Attributes:
        engine: For reading.
        writing: The same for Sessions that write.
        of_writer: The engine of the writer's thread. On PostgreSQL it has one connection of its
            own, so that the writer never waits for readers, unless the engine is the host's.
        missing_columns: Read-only: columns of this release that the file lacks, read as NULL.
    """

    def __init__(
        self,
        settings: StoreSettings,
        engine: Engine | None = None,
        *,
        read_only: bool = False,
        connections: int | None = None,
    ) -> None:
        self._owned = engine is None
        self.read_only = read_only
        self.missing_columns: tuple[str, ...] = ()
        if engine is not None:
            self.engine = _host_engine(engine, settings, read_only=read_only)
        elif read_only and parse_url(settings.url).get_backend_name() == Backend.SQLITE:
            self.engine, self.missing_columns = open_read_only(settings)
        else:
            most = settings.read_connections if connections is None else connections
            self.engine = _own_engine(settings, most, read_only=read_only)
        self.backend = backend_of(self.engine)
        self._migrate_url = checked_migrate_url(settings.migrate_url, self.backend)
        self._schema_name = settings.schema_name
        self.of_writer = self.engine
        if self._owned and self.backend is Backend.POSTGRESQL and not read_only:
            self.of_writer = _own_engine(settings, 1, read_only=False)
        if self._owned:
            if self.backend is Backend.POSTGRESQL:
                read_anywhere(self.engine)
            for each in self._engines:
                set_policy(each, policy_of(settings))
        upgrade = settings.upgrade_on_open
        self._upgrade = self.backend is Backend.SQLITE if upgrade is None else upgrade
        self._writing = {each: self._to_write(each) for each in self._engines}
        self.writing = self._writing[self.engine]
        self._reset()

    @property
    def _engines(self) -> tuple[Engine, ...]:
        return tuple(dict.fromkeys((self.engine, self.of_writer)))

    def _to_write(self, engine: Engine) -> Engine:
        if self.backend is Backend.SQLITE:
            return writing(engine)
        # whatever a host's engine is set to: a batch is one transaction, and its second try must
        # see what the first committed meanwhile
        return writing(engine).execution_options(isolation_level="READ COMMITTED")

    def _reset(self) -> None:
        self._opened = False
        self._opened_once = False
        self._lock = threading.Lock()
        self._file = OpenedFile(file_of(self.engine.url))
        self._disposed = False
        self._write_lock = None
        if self.backend is Backend.SQLITE and not self.in_memory:
            self._write_lock = WriteLock(sets_wal=self._owned)

    @property
    def in_memory(self) -> bool:
        """Whether one connection is the whole database."""
        return is_memory(self.engine.url)

    @property
    def is_open(self) -> bool:
        """Whether the schema was found to be this release's, in the file that is still there."""
        return self._opened and not self._file.is_other()

    def open(self, *, patience_s: float = -1, engine: Engine | None = None) -> None:
        """Make sure once that the schema is this release's; create, adopt or upgrade it if so set.

        Args:
            patience_s: Seconds to wait for another thread that opens it, after which this one does.
            engine: `of_writer`, if the writer's thread opens it.

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
                before = self._file.forget()
                with translated(of_rows=False):
                    self._check_schema(engine or self.engine)
                if not self._file.remember(before):
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
        if self._file.is_other():
            if self.read_only:
                raise StoreUnavailable(f"{self._file.path}: {_OTHER_FILE}; open the store again")
            self._lose_file()

    def require_file(self) -> None:
        """Make sure that the file which was opened is still the one that its path names.

        Raises:
            StoreUnavailable: It was removed or replaced, and what was written into it is lost.
        """
        if self._file.is_other():
            raise StoreUnavailable(f"{self._file.path}: {_OTHER_FILE}")

    def forget_schema(self) -> None:
        """Have the next `open` check the schema again, which may have been changed."""
        self._opened = False

    def check_again(self) -> None:
        """Name the remedy, where a statement failed because the schema was changed meanwhile.

        Raises:
            SchemaBehind: It was downgraded, or lacks tables.
            SchemaAhead: A newer release changed it so that this one cannot work with it.
        """
        self.forget_schema()
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
            SchemaBehind: It was downgraded, or lacks tables.
            SchemaAhead: A newer release changed it so that this one cannot work with it.
        """
        try:
            yield
        except LynkrStoreError as error:
            if error.unclear:
                self.check_again()
            raise

    def _check_schema(self, engine: Engine) -> None:
        if self.read_only and self.backend is Backend.SQLITE:
            with self.connected(engine) as connection:
                revisions.standing(connection)  # its view has what is missing
            return
        try:
            with self.connected(engine) as connection:
                require_utf8(connection)
                if not self._opened_once and (foreign := revisions.foreign_owners(connection)):
                    say(logging.WARNING, "%s", " ".join(foreign))
                revisions.require_head(connection)
                if not self._opened_once:  # later the statement that fails says which is missing
                    lost = revisions.missing_tables(connection)
                    mends = self._upgrade and not self.read_only
                    if lost and (mends or not _NEEDED.isdisjoint(lost)):
                        raise revisions.lacks_tables(lost)
        except SchemaBehind:
            if self.read_only or not self._upgrade or self._opened_once:
                raise  # it was downgraded on purpose while this store was in use
            self._upgrade_by(engine)
        except DatabaseError as error:
            if is_no_database(error):
                raise StoreUnavailable(
                    f"url: {engine.url.database} is not an SQLite database; give another path"
                ) from error
            raise

    def _upgrade_by(self, engine: Engine) -> None:
        if self._migrate_url is None:
            with self.closed_if_disposed(engine):
                bring_to(engine, wait_s=_UPGRADE_WAIT_S)
            return
        try:
            with (
                translated(of_rows=False),
                disposing(
                    create_store_engine(self._migrate_url, schema=self._schema_name)
                ) as other,
            ):
                bring_to(other, wait_s=_UPGRADE_WAIT_S)
        except StoreUnavailable as error:
            raise StoreUnavailable(f"migrate_url: {error}") from error
        with self.connected(engine) as connection:
            if revisions.standing(connection).revision is None:
                raise SchemaBehind(
                    "migrate_url: the database that it leads to was upgraded, and the one that url "
                    "leads to was not: give URLs of one database"
                )

    @contextmanager
    def read(self, engine: Engine | None = None) -> Iterator[Connection]:
        """A transaction that reads."""
        with self.connected(engine or self.engine) as connection, connection.begin():
            yield connection

    @contextmanager
    def write_transaction(
        self,
        expected_s: float = 0.02,
        *,
        wal_pages: int = WAL_PAGES,
        engine: Engine | None = None,
    ) -> Iterator[Connection]:
        """A transaction that may write, which is committed at the end.

        On an SQLite file it has the write lock: it waits for this store's other transactions and
        leaves other processes their chance. Where the block rolls back, nothing is committed.

        Args:
            expected_s: Seconds for which the lock will be held, about: as long as the last time.
            wal_pages: Pages in SQLite's WAL from which on the commit moves them to the file.
            engine: `of_writer`, if the writer's thread asks.

        Raises:
            OutcomeUnknown: The connection was lost while the commit was under way.
        """
        lock = self._write_lock
        engine = writing_at_once(self.engine) if lock else self._writing[engine or self.engine]
        with lock.turn() if lock else nullcontext(), self.connected(engine) as connection:
            if lock:
                lock.begin(connection, expected_s, wal_pages)
            else:
                connection.begin()
            ensure_begun(connection)  # on a host's engine too
            use_one_connection_each(connection)
            yield connection
            _commit(connection)

    @contextmanager
    def write_step(self) -> Iterator[Connection]:
        """As `write_transaction`, one of many steps between which `checkpoint` is called."""
        with self.write_transaction(wal_pages=MANY_WAL_PAGES) as connection:
            yield connection

    def checkpoint(self) -> None:
        """Move what stands in SQLite's WAL to the file, most of it while batches are written."""
        if self._write_lock:
            self._write_lock.checkpoint(partial(self.connected, self.engine))

    @property
    def pause_s(self) -> float:
        """Seconds between two steps for others, who wait for the whole database on SQLite."""
        return PAUSE_S if self.backend is Backend.SQLITE else 0.0

    @contextmanager
    def connected(self, engine: Engine) -> Iterator[Connection]:
        """A connection that is not used again after a fault, nor after `dispose`.

        It keeps what it was made with, which may be the fault's reason: a file's mode, a session's
        settings.

        Raises:
            StoreUnavailable: The file that was opened is gone.
        """
        self.require_file()
        with self.closed_if_disposed(engine), engine.connect() as connection:
            try:
                yield connection
            except Exception as error:
                if not self.in_memory and not (isinstance(error, DBAPIError) and is_busy(error)):
                    connection.invalidate()
                raise

    @contextmanager
    def closed_if_disposed(self, engine: Engine | None = None) -> Iterator[None]:
        """Close connections taken inside at the end, if the engine was disposed meanwhile.

        Disposing an engine, by `dispose` or by the host whose engine it is, closes idle
        connections; one in use goes back to a pool that the engine no longer has.
        """
        engine = engine or self.engine
        pool, process = engine.pool, os.getpid()
        try:
            yield
        finally:
            # In a child of a fork, what the old pool has is the parent's, and stays open.
            if engine.pool is not pool and os.getpid() == process:
                pool.dispose()
            if self._disposed:
                engine.pool.dispose()  # of a connection that was made afterwards

    def _lose_file(self) -> None:
        """Start with the file that the path names by now: the opened one is gone from there."""
        self.engine.dispose()  # a host's too: it closes idle connections, and makes new ones
        self._opened = self._opened_once = False
        self._file.forget()

    def after_fork_in_child(self) -> None:
        """Start with new locks and a schema to be checked; the engine does so by itself."""
        self._reset()

    def dispose(self) -> None:
        """Close the engines' connections, unless they are the host's.

        A thread of its own does it. What a signal's handler raises comes up in the main thread, at
        a moment at which the pool's lock, a `threading.Condition`, can stay held; the next call,
        at the interpreter's end, would wait for it for ever.
        """
        self._disposed = self._owned
        if not self._owned:
            return
        thread = start_thread(self._dispose_engines, "dispose")
        if thread is None:
            self._dispose_engines()
        else:
            thread.join()

    def _dispose_engines(self) -> None:
        for engine in self._engines:
            engine.dispose()


def _own_engine(settings: StoreSettings, connections: int, *, read_only: bool) -> Engine:
    engine = create_store_engine(
        settings.url,
        connect_timeout_s=settings.connect_timeout_s,
        statement_timeout_s=settings.statement_timeout_s,
        schema=settings.schema_name,
        connections=connections,
        idle_connection_s=settings.idle_connection_s,
        echo=settings.echo,
    )
    return engine.execution_options(postgresql_readonly=True) if read_only else engine


def _host_engine(engine: Engine, settings: StoreSettings, *, read_only: bool) -> Engine:
    check_host_engine(engine)
    if read_only:
        raise BadArgument("read_only: give a url, not an engine")
    keep_out_of_children(engine)
    set_policy(engine, policy_of(settings))  # first: the engine in a schema takes it over
    return in_schema(engine, settings.schema_name)


def _commit(connection: Connection) -> None:
    try:
        with long_call():
            connection.commit()
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise OutcomeUnknown("the connection was lost while a commit was under way") from error
