"""Engine factories: which driver, which pool, which options, for each backend."""

from pathlib import Path
from typing import Any, Final, assert_never

from sqlalchemy import URL, Engine, QueuePool, StaticPool, create_engine, event
from sqlalchemy.pool import SingletonThreadPool

from lynkr_store.backend import Backend
from lynkr_store.db import psycopg_async
from lynkr_store.db.dialect import backend_named, parse_url
from lynkr_store.db.failover import leave_read_only
from lynkr_store.db.forking import keep_out_of_children
from lynkr_store.db.pools import WAIT_S, AsyncBoundedPool, BoundedPool, IdleCloser
from lynkr_store.db.postgresql import (
    APPLICATION,
    NETWORK,
    PREPARE,
    PREPARE_AFTER,
    SETTINGS,
    options_of,
    set_up_transaction,
    transaction_settings,
)
from lynkr_store.db.sqlite import before_connect, on_begin, on_connect
from lynkr_store.db.urls import (
    is_memory,
    parameters,
    prepare_threshold,
    without_secrets,
)
from lynkr_store.exceptions import (
    BadArgument,
    MissingDriver,
    UnsupportedDatabase,
)
from lynkr_store.settings import checked_schema

_ASYNC_DRIVER: Final = {
    Backend.SQLITE: "sqlite+aiosqlite",
    Backend.POSTGRESQL: "postgresql+psycopg",
}


def create_store_engine(
    url: str | Path | URL,
    *,
    connect_timeout_s: int = 5,
    statement_timeout_s: float = 30.0,
    schema: str | None = None,
    connections: int = 4,
    idle_connection_s: float = 60.0,
    echo: bool = False,
) -> Engine:
    """An Engine with the store's options; it opens nothing before its first connection.

    Args:
        url: A supported database; a `Path` is the file of an SQLite database.
        connect_timeout_s: PostgreSQL: seconds to wait for a new connection.
        statement_timeout_s: PostgreSQL: seconds after which the server cancels a statement.
        schema: PostgreSQL: the schema of the store's tables; None or ``""``: the server's default,
            normally ``public``.
        connections: PostgreSQL: the greatest number of connections. When all are in use, a thread
            waits up to 30 seconds for one.
        idle_connection_s: PostgreSQL: seconds after which a connection that nobody uses is closed.
        echo: Log statements, without their values.

    Raises:
        UnsupportedDatabase: Another database or driver.
        MissingDriver: The driver is not installed.
        BadArgument: PostgreSQL accepts no schema of that name.
    """
    target = parse_url(url)
    try:
        options = _engine_options(
            target, connect_timeout_s, statement_timeout_s, schema, connections
        )
        if is_memory(target):
            # the connection is the database: threads share it one at a time and never close it
            options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
            options["connect_args"] = {"check_same_thread": False}
        engine = create_engine(without_secrets(target), echo=echo, hide_parameters=True, **options)
    except ImportError as missing:
        raise _missing_driver(missing, "postgres") from missing
    _listen(engine)
    if isinstance(engine.pool, BoundedPool):
        IdleCloser(engine, idle_connection_s)
    return engine


def create_store_async_engine(
    url: str | Path | URL,
    *,
    connect_timeout_s: int = 5,
    statement_timeout_s: float = 30.0,
    schema: str | None = None,
    connections: int = 4,
    echo: bool = False,
) -> Any:
    """The asynchronous twin of `create_store_engine`, over aiosqlite or psycopg.

    It closes no idle connections by itself; see `lynkr_store.db.event_loops.OneLoopsEngine`.

    Returns:
        An ``sqlalchemy.ext.asyncio.AsyncEngine``.

    Raises:
        UnsupportedDatabase: Another database or driver, or SQLite in memory, which only one
            connection can see.
        MissingDriver: The driver is not installed.
    """
    target = parse_url(url)
    if is_memory(target):
        raise UnsupportedDatabase("url: an SQLite database in memory has one connection only")
    backend = backend_named(target.get_backend_name())
    try:
        from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - an extra

        options = _engine_options(
            target, connect_timeout_s, statement_timeout_s, schema, connections
        )
        if backend is Backend.POSTGRESQL:
            options["poolclass"] = AsyncBoundedPool
            options["connect_args"]["async_creator_fn"] = psycopg_async.connect
        engine = create_async_engine(
            without_secrets(target).set(drivername=_ASYNC_DRIVER[backend]),
            echo=echo,
            hide_parameters=True,
            **options,
        )
    except ImportError as missing:
        extra = "async" if backend is Backend.SQLITE else "postgres,async"
        raise _missing_driver(missing, extra) from missing
    _listen(engine.sync_engine)
    return engine


def _missing_driver(missing: ImportError, extra: str) -> MissingDriver:
    # greenlet's absence, and that of psycopg's C library, are told in words alone
    what = f"{missing.name} is not installed" if missing.name else str(missing).partition("\n")[0]
    return MissingDriver(f"{what}: pip install 'lynkr-store[{extra}]'")


def _engine_options(
    target: URL,
    connect_timeout_s: int,
    statement_timeout_s: float,
    schema: str | None,
    connections: int,
) -> dict[str, Any]:
    schema = checked_schema(schema)
    backend = backend_named(target.get_backend_name())
    match backend:
        case Backend.SQLITE:
            return {}
        case Backend.POSTGRESQL:
            own = {k: v for k, v in (NETWORK | APPLICATION).items() if k not in target.query}
            arguments: dict[str, Any] = {"connect_timeout": connect_timeout_s, **own}
            arguments |= parameters(target)
            settings = transaction_settings(arguments["options"], statement_timeout_s, schema)
            return {
                "poolclass": BoundedPool,
                "pool_size": connections,
                "max_overflow": 0,
                "pool_timeout": WAIT_S,
                "pool_use_lifo": True,  # so that those that are not needed become idle
                # if the server restarted or a proxy hung up, the pool reconnects without an error
                "pool_pre_ping": True,
                "execution_options": {
                    **options_of(schema),
                    SETTINGS: tuple(settings.items()),
                    PREPARE: prepare_threshold(target, PREPARE_AFTER),
                },
                # psycopg looks its type up with an operator that another role could have created
                "use_native_hstore": False,
                # `set_up_transaction` turns prepared statements on if the session allows them
                "connect_args": {**arguments, "prepare_threshold": None},
            }
        case _:
            assert_never(backend)


def check_host_engine(engine: Engine) -> None:
    """Refuse a host's engine that the store cannot share.

    Raises:
        BadArgument: It is not an Engine; or its pool gives one connection to several threads, or
            gives each thread a database of its own; or its options commit each statement alone.
        UnsupportedDatabase: Another database or driver.
    """
    if not isinstance(engine, Engine):
        raise BadArgument("engine: give an sqlalchemy Engine")
    parse_url(engine.url)
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        raise BadArgument(
            "engine: its pool cannot be shared with the writer's thread; for SQLite in memory use "
            "Store('sqlite://') and its engine"
        )
    if engine.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        # it would override the store's own option, and a batch must be one transaction
        raise BadArgument(
            "engine: its execution options set AUTOCOMMIT, and a batch must be one transaction; "
            "give an engine without that option"
        )


def in_schema(engine: Engine, schema: str | None) -> Engine:
    """A host's engine; transactions that the store begins on the result work in the schema.

    Each of them sets its own search path, so the host's own transactions do not change.
    """
    if schema is None or engine.dialect.name != Backend.POSTGRESQL:
        return engine
    # the search path is set for a transaction, so AUTOCOMMIT of the host's engine must not apply
    own = engine.execution_options(isolation_level="READ COMMITTED", **options_of(schema))
    if SETTINGS not in own.get_execution_options():  # an engine of the store has the listener
        event.listen(own, "begin", set_up_transaction)
    return own


def _listen(engine: Engine) -> None:
    if engine.dialect.name == Backend.SQLITE:
        event.listen(engine, "do_connect", before_connect)
        event.listen(engine, "connect", on_connect)
        event.listen(engine, "begin", on_begin)
    else:
        event.listen(engine, "begin", set_up_transaction)
        leave_read_only(engine)
    keep_out_of_children(engine)
