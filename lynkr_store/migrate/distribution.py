"""Have Citus distribute the store's tables over the servers of a cluster."""

from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, Text, cast, func, select, text
from sqlalchemy.dialects.postgresql import REGCLASS
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db import triggers
from lynkr_store.db.citus import ONE_BY_ONE, has_citus, managed_tables
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import LEDGER, TELEMETRY, Base
from lynkr_store.exceptions import BadArgument, SchemaError
from lynkr_store.migrate.lock import WAIT_S, exclusively, is_in_the_way
from lynkr_store.migrate.revisions import lacks_tables, missing_tables, require_head
from lynkr_store.migrate.upgrade import lacks_right, permitted

_BY: Final = {TELEMETRY.name: TELEMETRY.c.id.name, LEDGER.name: LEDGER.c.batch_id.name}
"""The tables that are distributed, and by which column. All writers enter their batches in the
ledger: as a reference table Citus would lock it for each until the batch is stored."""

_citus: Final = func.pg_catalog
_AS_LONG_AS_IT_TAKES: Final = text("SET LOCAL statement_timeout = 0")  # rows are copied


class Distributed(NamedTuple):
    """What a call did: the tables that it distributed, and those that it copied to each server."""

    distributed: tuple[str, ...]
    copied: tuple[str, ...]


def distribute(engine: Engine, wait_s: float = WAIT_S) -> Distributed:
    """Distribute the rows by id and the ledger by batch; make the other tables reference tables.

    All is done in one transaction. Tables that Citus manages already stay as they are, so a call
    after an upgrade that created tables takes care of these. While rows are copied, writers wait.
    Citus runs no triggers on a distributed table, so the store's are dropped.

    Args:
        engine: The store's or the host's, to the coordinator; it is not disposed.
        wait_s: Seconds to wait for a migration, or for a session that holds a lock.

    Raises:
        BadArgument: The database is not PostgreSQL.
        SchemaError: The extension is missing, Citus refused, or this user lacks a right; nothing
            was changed.
        SchemaBehind: The schema is not at this release's revision, or lacks tables.
        UnsupportedDatabase: The server is a worker.
        UpgradeTimeout: It could not begin in time; nothing was changed.
        StoreUnavailable: The database cannot be reached.
    """
    if backend_of(engine) is not Backend.POSTGRESQL:
        raise BadArgument("url: only a PostgreSQL database with the extension citus has servers")
    done: list[Distributed] = []

    def body(connection: Connection) -> None:
        done[:] = [_distribute(connection)]

    with translated(of_rows=False), permitted(engine):
        exclusively(engine, body, wait_s)
    return done[0]


def _distribute(connection: Connection) -> Distributed:
    if not has_citus(connection):
        raise SchemaError(
            "nothing was changed: this database has no extension citus. Have a superuser run "
            "CREATE EXTENSION citus on every server, and citus_add_node() for each worker"
        )
    require_head(connection)
    if lost := missing_tables(connection):
        raise lacks_tables(lost)
    managed = managed_tables(connection)
    missing = [name for name in Base.metadata.tables if name not in managed]
    to_distribute = tuple(name for name in missing if name in _BY)
    to_copy = tuple(name for name in missing if name not in _BY)
    for setting in (_AS_LONG_AS_IT_TAKES, ONE_BY_ONE):
        connection.execute(setting)
    try:
        for name in to_copy:
            connection.execute(select(_citus.create_reference_table(_place(name))))
        if TELEMETRY.name in to_distribute:
            for statement in triggers.dropping(Backend.POSTGRESQL):
                connection.exec_driver_sql(statement)
        for name in to_distribute:
            place = _place(name)
            connection.execute(select(_citus.create_distributed_table(place, _BY[name])))
            connection.execute(select(_citus.truncate_local_data_after_distributing_table(place)))
    except DBAPIError as error:
        if is_in_the_way(error) or error.connection_invalidated or lacks_right(error):
            raise
        line = str(error.orig).partition("\n")[0]
        raise SchemaError(f"nothing was changed: Citus refused ({line})") from None
    return Distributed(to_distribute, to_copy)


def _place(name: str) -> ColumnElement[str]:
    return cast(func.pg_catalog.to_regclass(cast(name, Text)), REGCLASS)
