"""Builds the indexes that an upgrade left out, beside writers."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, assert_never

from sqlalchemy import Connection, Engine, Index, MetaData, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateIndex, DropIndex
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random,
)

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import backend_of, driver_of, writing
from lynkr_store.db.errors import translated
from lynkr_store.db.models import INDEXES, PROGRESS, TELEMETRY
from lynkr_store.db.postgresql import by_itself, is_direct
from lynkr_store.migrate.lock import is_in_the_way
from lynkr_store.migrate.upgrade import missing_indexes
from lynkr_store.storage.write_lock import GAP_S

WAIT_S: Final = 30.0
"""Seconds to wait for another session that builds them, or for a lock."""

_INDEX_BY_NAME: Final = {str(index.name): index for index in INDEXES}
_POLL_S: Final = 0.1
_TRIES: Final = 5
_LEAST_WAIT_S: Final = 1.0
_CANCELLED: Final = "57014"
_TRANSACTION_TIMEOUT_SINCE: Final = (17,)


class Built(NamedTuple):
    """What a call built and left.

    Attributes:
        names: The indexes that were missing and are there now.
        left: Those that are missing still.
        waited_for: What was in the way, in words; None where nothing is left.
    """

    names: tuple[str, ...]
    left: tuple[str, ...] = ()
    waited_for: str | None = None


def build_missing_indexes(engine: Engine, wait_s: float = WAIT_S) -> Built:
    """Build the indexes that an upgrade left out because their table had rows.

    On PostgreSQL concurrently: writers go on. One that an earlier attempt left invalid is built
    anew. On SQLite a build holds the file's write lock, which cannot be done in pieces: measured, 1
    to 2 µs a row, so a gateway beside it, which waits 3 s, loses nothing up to about 2,000,000
    rows. Safe to interrupt and call again.

    Args:
        engine: The store's or the host's.
        wait_s: PostgreSQL: seconds to wait for another session that builds indexes, and for
            others' transactions. Behind a pooler the build itself counts too.

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
            # read the table without the lock, so that the build, which holds it, reads from memory
            whole = text(f"{index.table} NOT INDEXED")
            connection.scalar(select(func.count()).select_from(whole))
        if number:
            time.sleep(GAP_S)  # let in who waits since the last one
        with writing(engine).begin() as connection:
            connection.execute(CreateIndex(index, if_not_exists=True))
    return tuple(missing)


def _build_postgresql(engine: Engine, deadline: float) -> Built:
    wanted = _Wanted.of(engine)
    if not wanted.missing:
        return Built(())
    built: list[str] = []
    waited_for: str | None = "another session builds indexes"
    with _turn(engine, deadline) as is_ours:
        if is_ours:
            waited_for = _tried(engine, deadline, built)
    left = tuple(name for name in wanted.missing if name not in built)
    return Built(tuple(built), left, waited_for if left else None)


def _tried(engine: Engine, deadline: float, built: list[str]) -> str | None:
    """Build what is missing, again after a lock was in the way; say what it was in the end."""
    # A build waits for transactions with a snapshot; a migration among them may wait for the build:
    # a deadlock, whose victim tries again.
    tries = Retrying(
        retry=retry_if_exception(is_in_the_way),
        stop=stop_after_attempt(_TRIES) | stop_after_delay(max(0.0, deadline - time.monotonic())),
        wait=wait_random(_POLL_S, 5 * _POLL_S),
        reraise=True,
    )
    try:
        tries(_build_concurrently, engine, deadline, built)
    except DBAPIError as error:
        if is_in_the_way(error):
            return "a transaction of another session stays open, for whose end an index waits"
        if getattr(error.driver_exception, "sqlstate", None) == _CANCELLED:
            return "its build was cancelled; behind a pooler it may take no longer than the budget"
        raise
    return None


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
    """Bound how long a build waits for the transactions of others, which any role can have open.

    Where the session is the connection's own it is told so, and the build itself takes as long as
    it takes. Behind a pooler what a session is told stays for others, so that the whole is bounded.
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
def _turn(engine: Engine, deadline: float) -> Iterator[bool]:
    """Whether it is this session's turn to build indexes, waited for until the deadline.

    To another session an index under construction looks like one that was left invalid. The lock is
    one of the table of progress that keeps nobody from reading and writing it. It takes the right
    to write there; an advisory lock any role can hold, also one without a right to these tables. A
    transaction that does nothing else holds it meanwhile, for a session's would stay in a pooler's
    connection. It has no snapshot, for which the build would wait: LOCK TABLE takes none, and each
    statement here goes by the simple protocol, which leaves no portal open.
    """
    wait_s = max(_LEAST_WAIT_S, deadline - time.monotonic())
    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")  # whatever a host's has
        connection.detach()
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
            with suppress(DBAPIError):  # it was ended meanwhile: what was built is built
                connection.rollback()


class _Wanted(NamedTuple):
    """What is to be done.

    Attributes:
        schema: Where the tables are.
        invalid: Indexes of ours that a concurrent build left unfinished.
        missing: Those, and the indexes that are not there.
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
    """A copy of an index, of its table in the schema, to be built or dropped beside its users."""
    table = _INDEX_BY_NAME[name].table
    assert table is not None  # noqa: S101 - every index of a model has one
    copies = table.to_metadata(MetaData(), schema=schema).indexes
    index = next(index for index in copies if index.name == name)
    index.dialect_options["postgresql"]["concurrently"] = True
    return index
