"""One migration at a time on one database, after a bounded wait.

Replicas that start together all run the upgrade. On PostgreSQL they take turns at an advisory lock
of the transaction; on SQLite at the write lock, which BEGIN IMMEDIATE takes before anything is
read. A replica that comes later finds the work done.
"""

import random
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of, writing
from lynkr_store.db.errors import is_busy
from lynkr_store.db.postgresql import make_schema, require_schema, schema_of
from lynkr_store.db.sqlite import ensure_begun
from lynkr_store.db.urls import is_memory
from lynkr_store.exceptions import UpgradeTimeout

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
        engine: The store's or the host's. Its connections here are closed afterwards: an SQLite
            file's next one sees that it is ours, and none has statements prepared of old tables.
        body: Takes a connection in a transaction, which is committed when it returns.
        wait_s: Seconds after which it is not tried again. One try may take a second more, on
            SQLite the driver's own ``busy_timeout``.

    Raises:
        UpgradeTimeout: Another migration ran all the time, or somebody kept a table locked.
    """
    postgresql = backend_of(engine) is Backend.POSTGRESQL
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if postgresql:
                _in_turn(engine, body, deadline)
            else:
                _once(engine, body)
        except DBAPIError as error:
            if not is_in_the_way(error):
                raise
            if time.monotonic() >= deadline:
                holder = "uses the store's tables" if postgresql else "holds the file's write lock"
                raise UpgradeTimeout(
                    f"nothing was changed: for {wait_s:g} s somebody else {holder}. Try again when "
                    "the long transaction is over"
                ) from error
        else:
            return
        pause()


def pause() -> None:
    """Wait before another try, for a random time: others that failed also try again."""
    time.sleep(random.uniform(_POLL_S, 5 * _POLL_S))  # noqa: S311 - no secret


def _once(engine: Engine, body: Callable[[Connection], None]) -> None:
    with writing(engine).connect() as connection:
        if not _is_whole_database(engine):
            connection.detach()
        with connection.begin():
            ensure_begun(connection)
            body(connection)


def _in_turn(engine: Engine, body: Callable[[Connection], None], deadline: float) -> None:
    """Run the body in the first transaction that gets PostgreSQL's advisory lock.

    The lock is the transaction's: it ends with it, also in a server that goes on with a COMMIT
    whose client was killed, and behind a pooler, where a session's would stay for ever. It is
    polled for, each time in a transaction that ends: waiting for it in a statement would hold a
    snapshot, for which CREATE INDEX CONCURRENTLY waits.
    """
    with engine.connect() as connection:  # not the writing one, which asks for the schema
        connection.execution_options(isolation_level="READ COMMITTED")  # whatever a host's has
        connection.detach()
        while not _had_turn(connection, engine, body, deadline):
            time.sleep(_POLL_S)


def _had_turn(
    connection: Connection, engine: Engine, body: Callable[[Connection], None], deadline: float
) -> bool:
    with connection.begin():
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}")
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_STATEMENT_TIMEOUT_MS}")
        if connection.scalar(select(func.pg_try_advisory_xact_lock(ADVISORY_LOCK))):
            make_schema(connection, schema_of(engine))
            require_schema(connection, schema_of(engine))
            body(connection)
            return True
        if time.monotonic() > deadline:
            raise UpgradeTimeout(
                "nothing was changed: another migration of this database is running "
                f"({_holder(connection)}). Try again when it is done"
            )
    return False


def _is_whole_database(engine: Engine) -> bool:
    """Whether a connection that is closed may take an SQLite database in memory with it."""
    url = engine.url
    return backend_of(engine) is Backend.SQLITE and (
        is_memory(url) or str(url.database).startswith("file:")
    )


def _holder(connection: Connection) -> str:
    """Who has the lock: any role may, also one that has no right to the store's tables."""
    statement = text(
        "SELECT usename, pid FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) "
        "WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
        "AND classid::bigint << 32 | objid::bigint = :key "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    holder = connection.execute(statement, {"key": ADVISORY_LOCK}).first()
    role, pid = holder or ("unknown", "unknown")
    return f"a backend of the role {role}, its pid is {pid}"


def is_in_the_way(error: BaseException) -> bool:
    """Whether a lock of somebody else's was, so that another try may succeed."""
    if not isinstance(error, DBAPIError):
        return False
    return is_busy(error) or getattr(error.driver_exception, "sqlstate", None) in _IN_THE_WAY
