"""PostgreSQL on several servers, of which one takes writes, and not always the same one.

A server that became a standby, or read-only, answers on: neither SQLAlchemy nor the server ends its
connections. So the store gives them up itself, and libpq then chooses a server anew, from the hosts
of the URL and by its ``target_session_attrs``.
"""

import os
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

READ_ONLY: Final = "25006"
"""The SQLSTATE of a write on a server, or in a transaction, that is read-only."""

_TARGET: Final = "target_session_attrs"
_WRITABLE: Final = ("read-write", "primary")
# The server tells the client each change of these, with its next answer.
_TELLING: Final = ("in_hot_standby", "default_transaction_read_only")


def leave_read_only(engine: Engine) -> None:
    """Close the engine's connections when a server refuses a write because it is read-only."""
    event.listen(engine, "handle_error", _on_error)


def read_anywhere(engine: Engine) -> None:
    """Let reads go on while no server takes writes, if the engine's URL asks for one that does.

    A connection to another server is used once, so that each read looks for the right one first.
    """
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "checkout", _on_checkout)


def _on_error(context: ExceptionContext) -> None:
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True  # of all connections in the pool


def _wants_writable(options: dict[str, Any]) -> bool:
    return (options.get(_TARGET) or os.environ.get("PGTARGETSESSIONATTRS")) in _WRITABLE


def _connect(
    dialect: Dialect, record: ConnectionPoolEntry, arguments: list[Any], options: dict[str, Any]
) -> DBAPIConnection | None:
    if not _wants_writable(options):
        return None
    record.info[_TARGET] = True
    try:
        return dialect.connect(*arguments, **options)
    except dialect.loaded_dbapi.OperationalError:
        return dialect.connect(*arguments, **options | {_TARGET: "any"})


def _on_checkout(
    _: DBAPIConnection, record: ConnectionPoolEntry, __: PoolProxiedConnection
) -> None:
    driver: Any = record.driver_connection
    if _TARGET in record.info and any(
        driver.info.parameter_status(name) == "on" for name in _TELLING
    ):
        record.invalidate(soft=True)
