"""Run one migration at a time on a database; others wait for a bounded time.

Replicas that start together all run the upgrade. On PostgreSQL each takes an advisory lock in its
transaction; on SQLite each takes the write lock by BEGIN IMMEDIATE before it reads anything. A
replica that starts later finds nothing to do.
"""

import random
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of, writing
from lynkr_store.db.errors import is_busy, sqlstate_of
from lynkr_store.db.postgresql import closed_after, make_schema, require_schema, schema_of
from lynkr_store.db.sqlite import ensure_begun
from lynkr_store.db.urls import is_memory
from lynkr_store.exceptions import UpgradeTimeout

WAIT_S: Final = 60.0
"""Seconds that a migration waits for another migration, or for sessions that use its tables."""

ADVISORY_LOCK: Final = int.from_bytes(b"lynkrsto")
"""The key of PostgreSQL's advisory lock; each database has its own lock of this key."""

_POLL_S: Final = 0.1
_LOCK_TIMEOUT_MS: Final = 1_000
"""PostgreSQL: how long ALTER TABLE waits for sessions that use the table. Statements that come
after it wait behind it, so the migration gives up soon and tries again later."""
_STATEMENT_TIMEOUT_MS: Final = 60_000
_IN_THE_WAY: Final = ("55P03", "40P01")  # a lock's timeout, a deadlock


def exclusively(engine: Engine, body: Callable[[Connection], None], wait_s: float = WAIT_S) -> None:
    """Run a function in a transaction while no other migration runs on the database.

    If another session holds a lock that it needs, the transaction is rolled back and the function
    is called again.

    Args:
        engine: The store's or the host's. The connections used here are closed afterwards, so that
            no pooled connection has statements prepared for the old tables, and the next connection
            to an SQLite file sees that it is the store's.
        body: Takes a connection in a transaction, which is committed when the function returns.
        wait_s: Seconds after which no new try begins. One try can take a second longer; on SQLite,
            as long as the driver's ``busy_timeout``.

    Raises:
        UpgradeTimeout: Another migration was running, or another session held a lock, throughout.
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
                who = (
                    "another session uses the store's tables"
                    if postgresql
                    else "another connection holds the file's write lock"
                )
                raise UpgradeTimeout(
                    f"nothing was changed: for {wait_s:g} s {who}. Try again after its transaction "
                    "has ended"
                ) from error
        else:
            return
        pause()


def pause() -> None:
    """Wait for a random time before the next try, so that replicas do not retry in step."""
    time.sleep(random.uniform(_POLL_S, 5 * _POLL_S))  # noqa: S311 - no secret


def _once(engine: Engine, body: Callable[[Connection], None]) -> None:
    with writing(engine).connect() as connection:
        if not _is_whole_database(engine):
            connection.detach()
        with connection.begin():
            ensure_begun(connection)
            body(connection)


def _in_turn(engine: Engine, body: Callable[[Connection], None], deadline: float) -> None:
    """Run the function in the first transaction that gets PostgreSQL's advisory lock.

    The lock is released when the transaction ends. So it is also released where the server still
    commits for a client that was killed, and behind a pooler, where a session lock would stay.
    The lock is polled for, each time in a new transaction: a statement that waits for it would
    hold a snapshot, and CREATE INDEX CONCURRENTLY waits for snapshots.
    """
    with closed_after(engine) as connection:  # a writing connection would require the schema
        connection.execution_options(
            isolation_level="READ COMMITTED"
        )  # a host may have set another
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
                f"({_holder(connection)}). Try again after it has ended"
            )
    return False


def _is_whole_database(engine: Engine) -> bool:
    """Tell whether closing a connection may discard an SQLite database in memory."""
    url = engine.url
    return backend_of(engine) is Backend.SQLITE and (
        is_memory(url) or str(url.database).startswith("file:")
    )


def _holder(connection: Connection) -> str:
    """Describe the session that holds the lock; any role can hold it."""
    statement = text(
        "SELECT usename, pid FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) "
        "WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
        "AND classid::bigint << 32 | objid::bigint = :key "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    holder = connection.execute(statement, {"key": ADVISORY_LOCK}).first()
    role, pid = holder or ("unknown", "unknown")
    return f"by the role {role}; its backend's pid is {pid}"


def is_in_the_way(error: BaseException) -> bool:
    """Tell whether another session's lock caused the error, so that another try may succeed."""
    if not isinstance(error, DBAPIError):
        return False
    return is_busy(error) or sqlstate_of(error) in _IN_THE_WAY
