"""Citus: whether the store's tables are distributed over several PostgreSQL servers.

On a distributed table each statement sees a snapshot of its own on every server, so a number that
one statement would compute from two tables can mix two moments. Citus also plans no statement for
parameters that it does not know, no recursive query, and no lock on rows of several servers. Where
a statement depends on any of that, it has a second form, which is used if `is_distributed`.
"""

from typing import Final

from sqlalchemy import Connection, select, text

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import TELEMETRY, Base
from lynkr_store.db.postgresql import schema_of
from lynkr_store.exceptions import UnsupportedDatabase

FIRST_ID_OF_WORKERS: Final = 1 << 48
"""Ids from here on were assigned by a worker: its sequences begin at its number times 2**48."""

_NO_NODE: Final = 0  # the number of the coordinator, and of a server that belongs to no cluster

ONE_BY_ONE: Final = text("SET LOCAL citus.multi_shard_modify_mode TO sequential")
"""Have Citus connect to each server once in this transaction."""

_KNOWN: Final = "lynkr_store_distributed"  # in a connection's info: by schema, whether it is so

_CATALOGUE: Final = text(
    "SELECT CAST(pg_catalog.to_regclass('pg_catalog.pg_dist_partition') AS TEXT)"
)
_GROUP: Final = text("SELECT groupid FROM pg_catalog.pg_dist_local_group")
_PREPARED_BY: Final = "citus_"  # Citus gives such names to the transactions that it prepares
# those that are committed, or about to be, and not on every server yet
_PREPARED: Final = text(
    "SELECT success, result FROM pg_catalog.run_command_on_all_nodes("
    "'SELECT pg_catalog.string_agg(gid, '','') FROM pg_catalog.pg_prepared_xacts "
    "WHERE database = current_database() AND pg_catalog.starts_with(gid, ''citus_'')')"
)
# a lock of the coordinator; the key differs between schemas, and from Citus' own
_LOCK: Final = (
    "SELECT pg_catalog.{}(CAST(:key AS BIGINT) "
    "+ CAST(CAST(pg_catalog.to_regclass(CAST(:name AS TEXT)) AS OID) AS BIGINT))"
)
_WAITING: Final = text(_LOCK.format("pg_advisory_xact_lock"))
_AT_ONCE: Final = text(_LOCK.format("pg_try_advisory_xact_lock"))
_KEY: Final = int.from_bytes(b"lynk") << 32
# a table is on the coordinator alone if it has one shard, one copy, and belongs to no group
_MANAGED: Final = text(
    "SELECT given.name, partmethod = 'n' AND repmodel = 's' AND colocationid = 0 AS is_local "
    "FROM pg_catalog.unnest(CAST(:names AS TEXT[])) AS given (name) "
    "JOIN pg_catalog.pg_dist_partition ON CAST(logicalrelid AS OID) "
    "= CAST(pg_catalog.to_regclass(given.name) AS OID)"
)


def is_distributed(connection: Connection) -> bool:
    """Whether Citus manages any of the store's tables, whoever had it do so.

    The catalogue is asked once for each connection to PostgreSQL. On a connection from before the
    tables were distributed, statements fail until `forget` was called.
    """
    if backend_of(connection) is not Backend.POSTGRESQL:
        return False
    known: dict[str | None, bool] = connection.info.setdefault(_KNOWN, {})
    schema = schema_of(connection)
    if schema not in known:
        known[schema] = bool(_managed(connection))
    return known[schema]


def forget(connection: Connection) -> None:
    """Have `is_distributed` ask again, after a statement failed on the connection."""
    if not connection.closed and not connection.invalidated:
        connection.info.pop(_KNOWN, None)


def managed_tables(connection: Connection) -> frozenset[str]:
    """The names of those of the store's tables whose rows Citus keeps in shards, or copies."""
    return frozenset(name for name, is_local in _managed(connection).items() if not is_local)


def tables_with_shards(connection: Connection) -> frozenset[str]:
    """`managed_tables`, and those of which Citus keeps the only shard on the coordinator."""
    return frozenset(_managed(connection))


def _managed(connection: Connection) -> dict[str, bool]:
    """The tables that Citus manages, and whether each is on the coordinator alone."""
    if not has_citus(connection):
        return {}
    found = connection.execute(_MANAGED, {"names": list(Base.metadata.tables)})
    return {row.name: row.is_local for row in found}


def has_citus(connection: Connection) -> bool:
    """Whether the database has the extension ``citus``."""
    if backend_of(connection) is not Backend.POSTGRESQL:
        return False
    return connection.scalar(_CATALOGUE) is not None


def use_one_connection_each(connection: Connection) -> None:
    """Have Citus connect to each server once in the transaction that writes, which has just begun.

    Otherwise a COPY takes a connection for each shard, and each of them commits in two phases.
    """
    if is_distributed(connection):
        connection.execute(ONE_BY_ONE)


def lock(connection: Connection, name: str, *, wait: bool = True) -> bool:
    """Take a lock that belongs to one of the store's tables, until the transaction ends.

    A row of a reference table cannot be locked alone: Citus locks the whole table, and waits for it
    in spite of SKIP LOCKED.

    Args:
        connection: To the coordinator.
        name: The table.
        wait: Wait for a transaction that has the lock; otherwise return False.
    """
    values = {"key": _KEY, "name": name}
    if wait:
        connection.execute(_WAITING, values)
        return True
    return bool(connection.scalar(_AT_ONCE, values))


def refuse_worker(connection: Connection) -> None:
    """Refuse a connection to a worker of a cluster.

    Raises:
        UnsupportedDatabase: A worker assigns ids that are not in the order of time, which the
            roll-ups need.
    """
    if not has_citus(connection):
        return
    if connection.scalar(_GROUP) != _NO_NODE:
        raise UnsupportedDatabase(
            "url: this server is a worker of a Citus cluster: give the coordinator's address"
        )


def ids_of_workers(connection: Connection) -> str | None:
    """What is wrong if a client stored rows by a worker, with the remedy; None if none did."""
    if not is_distributed(connection):
        return None
    later = select(TELEMETRY.c.id).where(TELEMETRY.c.id >= FIRST_ID_OF_WORKERS).limit(1)
    if connection.scalar(later) is None:
        return None
    return (
        f"{TELEMETRY.name} has ids from {FIRST_ID_OF_WORKERS} on: a worker of the Citus cluster "
        "assigned them, or they were copied, and such ids are not in the order of time, so no row "
        "is folded or followed until they are gone. Have every client connect to the coordinator; "
        "then there insert these rows again without their ids, and delete them"
    )


def prepared_transactions(connection: Connection) -> set[str]:
    """The transactions that some server has yet to commit; a server that fails counts as one."""
    found: set[str] = set()
    for success, result in connection.execute(_PREPARED):
        found |= {*(result or "").split(",")} - {""} if success else {f"{_PREPARED_BY}unknown"}
    return found


def is_of_cluster(name: str) -> bool:
    """Whether a transaction's name is one of `prepared_transactions`."""
    return name.startswith(_PREPARED_BY)
