"""Builds the indexes that an upgrade left out, without blocking writers on PostgreSQL."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, assert_never

from sqlalchemy import Connection, Engine, Index, MetaData, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateIndex, DropIndex

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import backend_of, driver_of, writing
from lynkr_store.db.errors import sqlstate_of, translated
from lynkr_store.db.models import INDEXES, PROGRESS, TELEMETRY
from lynkr_store.db.postgresql import by_itself, closed_after, is_direct
from lynkr_store.migrate.comparison import missing_indexes
from lynkr_store.migrate.lock import is_in_the_way, pause
from lynkr_store.storage.write_lock import GAP_S

WAIT_S: Final = 30.0
"""Seconds to wait for another session that builds indexes, or for a lock."""

_INDEX_BY_NAME: Final = {str(index.name): index for index in INDEXES}
_TRIES: Final = 5
_LEAST_WAIT_S: Final = 1.0
_CANCELLED: Final = "57014"
_TRANSACTION_TIMEOUT_SINCE: Final = (17,)


class Built(NamedTuple):
    """The result of a call.

    Attributes:
        names: The indexes that were missing and were built.
        left: The indexes that are still missing.
        waited_for: What blocked them, in words; None if none is missing.
    """

    names: tuple[str, ...]
    left: tuple[str, ...] = ()
    waited_for: str | None = None


def build_missing_indexes(engine: Engine, wait_s: float = WAIT_S) -> Built:
    """Build the indexes that an upgrade left out because their table had rows.

    PostgreSQL builds them concurrently, so writers continue; an index that an earlier attempt left
    invalid is rebuilt. SQLite holds the file's write lock for the whole build of an index. That
    takes 1 to 2 µs a row (measured), so a gateway on the same file, which waits 3 s, loses nothing
    up to about 2,000,000 rows. The call can be interrupted and repeated.

    Args:
        engine: The store's or the host's.
        wait_s: PostgreSQL: seconds to wait for another session that builds indexes, and for
            transactions of other sessions. Through a pooler this limits the build itself too.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    with translated(of_rows=False):
        backend = backend_of(engine)
        match backend:
            case Backend.SQLITE:
                return Built(_build_sqlite(engine))
            case Backend.POSTGRESQL:
                return _build_postgresql(engine, time.monotonic() + wait_s)
            case _:
                assert_never(backend)


def _build_sqlite(engine: Engine) -> tuple[str, ...]:
    with engine.connect() as connection:
        missing = missing_indexes(connection)
    for number, name in enumerate(missing):
        index = _INDEX_BY_NAME[name]
        with engine.connect() as connection:
            # read the table without the lock first, so that the build, which holds it, reads memory
            whole = text(f"{index.table} NOT INDEXED")
            connection.scalar(select(func.count()).select_from(whole))
        if number:
            time.sleep(GAP_S)  # let writers that waited for the last build proceed
        with writing(engine).begin() as connection:
            connection.execute(CreateIndex(index, if_not_exists=True))
    return tuple(missing)


def _build_postgresql(engine: Engine, deadline: float) -> Built:
    wanted = _Wanted.of(engine)
    if not wanted.missing:
        return Built(())
    built: list[str] = []
    waited_for: str | None = "another session builds indexes"
    with _build_lock(engine, deadline) as is_held:
        if is_held:
            waited_for = _try_to_build(engine, deadline, built)
    left = tuple(name for name in wanted.missing if name not in built)
    return Built(tuple(built), left, waited_for if left else None)


def _try_to_build(engine: Engine, deadline: float, built: list[str]) -> str | None:
    """Build what is missing, and retry after a lock timeout; return what blocked the last try."""
    # A build waits for transactions with a snapshot, and a migration among them may wait for the
    # build. That is a deadlock, and its victim retries.
    for number in range(1, _TRIES + 1):
        try:
            _build_concurrently(engine, deadline, built)
        except DBAPIError as error:
            if sqlstate_of(error) == _CANCELLED:
                return "the build was cancelled; through a pooler it may not exceed the budget"
            if not is_in_the_way(error):
                raise
        else:
            return None
        if number == _TRIES or time.monotonic() >= deadline:
            break
        pause()
    return "an index waits for a transaction of another session to end"


def _build_concurrently(engine: Engine, deadline: float, built: list[str]) -> None:
    wanted = _Wanted.of(engine)
    with by_itself(engine) as connection, _bounded(connection, deadline):
        for name in wanted.invalid:
            connection.execute(DropIndex(_concurrent(name, wanted.schema), if_exists=True))
        for name in wanted.missing:
            connection.execute(CreateIndex(_concurrent(name, wanted.schema), if_not_exists=True))
            built.append(name)


@contextmanager
def _bounded(connection: Connection, deadline: float) -> Iterator[None]:
    """Limit how long a build waits for other sessions' transactions, which any role can hold open.

    On a direct connection the session's timeouts are set, and the build itself takes as long as it
    needs. Through a pooler, session settings would remain for other clients, so a timer cancels the
    whole build instead.
    """
    wait_s = max(_LEAST_WAIT_S, deadline - time.monotonic())
    if is_direct(connection):  # the session ends with the connection
        connection.exec_driver_sql(f"SET lock_timeout = {int(wait_s * 1000)}")
        connection.exec_driver_sql("SET statement_timeout = 0")
        yield
        return
    timer = threading.Timer(wait_s, driver_of(connection).cancel_safe)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _build_lock(engine: Engine, deadline: float) -> Iterator[bool]:
    """Hold the lock for building indexes; yields False if it was not granted by the deadline.

    An index under construction looks to another session like one that was left invalid, so only one
    session builds. The lock is a table lock on the table of progress, in a mode that does not block
    reading and writing it. It requires the right to write to that table; an advisory lock could be
    taken by any role. A separate transaction holds it, because a session lock would stay in a
    pooler's connection. The transaction has no snapshot, which the build would wait for: LOCK TABLE
    takes none, and each statement here uses the simple protocol, which leaves no portal open.
    """
    wait_s = max(_LEAST_WAIT_S, deadline - time.monotonic())
    with closed_after(engine) as connection:
        connection.execution_options(
            isolation_level="READ COMMITTED"
        )  # whatever a host's engine sets
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(wait_s * 1000)}")
        if (connection.dialect.server_version_info or ()) >= _TRANSACTION_TIMEOUT_SINCE:
            connection.exec_driver_sql("SET LOCAL transaction_timeout = 0")
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        try:
            connection.exec_driver_sql(f"LOCK TABLE {PROGRESS.name} IN SHARE UPDATE EXCLUSIVE MODE")
        except DBAPIError as error:
            if not is_in_the_way(error):
                raise
            yield False
            return
        try:
            yield True
        finally:
            with suppress(DBAPIError):  # the server ended it: finished indexes stay
                connection.rollback()


class _Wanted(NamedTuple):
    """What has to be done.

    Attributes:
        schema: The tables' schema.
        invalid: The store's indexes that a concurrent build left unfinished.
        missing: The invalid indexes and those that do not exist.
    """

    schema: str
    invalid: list[str]
    missing: list[str]

    @classmethod
    def of(cls, engine: Engine) -> "_Wanted":
        with engine.connect() as connection:
            schema = catalogue.schema_of(connection, TELEMETRY.name) or ""
            invalid = sorted(catalogue.invalid_indexes(connection, _INDEX_BY_NAME))
            missing = {*invalid, *missing_indexes(connection)}
        return cls(schema, invalid, [name for name in _INDEX_BY_NAME if name in missing])


def _concurrent(name: str, schema: str) -> Index:
    """A copy of an index, in the given schema, to be built or dropped concurrently."""
    table = _INDEX_BY_NAME[name].table
    assert table is not None  # noqa: S101 - every index of a model has one
    copies = table.to_metadata(MetaData(), schema=schema).indexes
    index = next(index for index in copies if index.name == name)
    index.dialect_options["postgresql"]["concurrently"] = True
    return index
