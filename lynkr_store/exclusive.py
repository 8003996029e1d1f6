"""One migration at a time on one database, after a bounded wait.

Replicas that start together all run the upgrade. On PostgreSQL they take turns at a session's
advisory lock; on SQLite at the write lock, which BEGIN IMMEDIATE takes before anything is read.
Whoever comes later finds the work done.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from lynkr_store.backend import Backend
from lynkr_store.engine import backend_of, ensure_begun, is_memory, writing
from lynkr_store.exceptions import UpgradeTimeout
from lynkr_store.faults import is_busy
from lynkr_store.search_path import make_schema, schema_of

WAIT_S: Final = 60.0
"""Seconds for which a migration waits for another, or for those who hold its tables."""

ADVISORY_LOCK: Final = int.from_bytes(b"lynkrsto")
"""The key of PostgreSQL's advisory lock, one for each database, as ``pg_locks`` shows it."""

_POLL_S: Final = 0.1
_LOCK_TIMEOUT_MS: Final = 1_000
"""PostgreSQL: how long ALTER TABLE may wait for those who use the table. Whoever comes after it
waits too, so it gives up soon and tries again later."""
_STATEMENT_TIMEOUT_MS: Final = 60_000
_IN_THE_WAY: Final = ("55P03", "40P01")  # a lock's timeout, a deadlock


def exclusively(engine: Engine, body: Callable[[Connection], None], wait_s: float = WAIT_S) -> None:
    """Run the body in a transaction that no other migration runs beside.

    When a lock is in its way, the transaction is rolled back and the body called again.

    Args:
        engine: The store's or the host's. Its connections here are closed afterwards: nobody
            inherits the session's settings, and an SQLite file's next one sees that it is ours.
        body: Takes a connection in a transaction, which is committed when it returns.
        wait_s: Seconds after which it is not tried again. One try may take a second more, on
            SQLite the driver's own ``busy_timeout``.

    Raises:
        UpgradeTimeout: Another migration ran all the time, or somebody kept a table locked.
    """
    deadline = time.monotonic() + wait_s
    postgresql = backend_of(engine) is Backend.POSTGRESQL
    with _turn(engine, deadline) if postgresql else nullcontext():
        tries = Retrying(
            retry=retry_if_exception(is_in_the_way),
            stop=stop_after_delay(max(0.0, deadline - time.monotonic())),
            wait=wait_random(_POLL_S, 5 * _POLL_S),
            reraise=True,
        )
        try:
            tries(_once, engine, body)
        except DBAPIError as error:
            if not is_in_the_way(error):
                raise
            holder = "uses the store's tables" if postgresql else "holds the file's write lock"
            raise UpgradeTimeout(
                f"nothing was changed: for {wait_s:g} s somebody else {holder}. Try again when the "
                "long transaction is over"
            ) from error


def _once(engine: Engine, body: Callable[[Connection], None]) -> None:
    with writing(engine).connect() as connection:
        if backend_of(engine) is Backend.POSTGRESQL:  # whatever a host's engine is set to
            connection.execution_options(isolation_level="READ COMMITTED")
        if not _is_whole_database(engine):
            connection.detach()
        with connection.begin():
            ensure_begun(connection)
            if backend_of(engine) is Backend.POSTGRESQL:
                connection.exec_driver_sql(f"SET lock_timeout = {_LOCK_TIMEOUT_MS}")
                connection.exec_driver_sql(f"SET statement_timeout = {_STATEMENT_TIMEOUT_MS}")
                # ends with the transaction, also where that outlives its process or its turn
                connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCK + 1)))
                make_schema(connection, schema_of(engine))
            body(connection)


def _is_whole_database(engine: Engine) -> bool:
    """Whether a connection that is closed may take an SQLite database in memory with it."""
    url = engine.url
    return backend_of(engine) is Backend.SQLITE and (
        is_memory(url) or str(url.database).startswith("file:")
    )


@contextmanager
def _turn(engine: Engine, deadline: float) -> Iterator[None]:
    """PostgreSQL's advisory lock, polled for on a session of its own, which does nothing else.

    Waiting for it in a statement would hold a snapshot, for which CREATE INDEX CONCURRENTLY
    waits; taken by the migrating session, a rollback there would let it go too early or too late.
    """
    with engine.connect() as session:
        session.execution_options(isolation_level="AUTOCOMMIT")
        session.detach()  # the lock ends with the session, however that ends
        session.exec_driver_sql("SET idle_session_timeout = 0")
        while not session.scalar(select(func.pg_try_advisory_lock(ADVISORY_LOCK))):
            if time.monotonic() > deadline:
                raise UpgradeTimeout(
                    f"nothing was changed: another migration of this database is running "
                    f"({_holder(session)}). Try again when it is done"
                )
            time.sleep(_POLL_S)
        yield


def _holder(session: Connection) -> str:
    statement = text(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
        "AND classid::bigint << 32 | objid::bigint = :key "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    pid = session.scalar(statement, {"key": ADVISORY_LOCK})
    return f"its backend's pid is {pid}"


def is_in_the_way(error: BaseException) -> bool:
    """Whether a lock of somebody else's was, so that another try may succeed."""
    if not isinstance(error, DBAPIError):
        return False
    return is_busy(error) or getattr(error.driver_exception, "sqlstate", None) in _IN_THE_WAY
