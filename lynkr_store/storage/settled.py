"""Finds out on PostgreSQL which open transactions may still store a row with a lower id.

PostgreSQL assigns ids before their transactions commit. A transaction that was assigned an id below
one that is visible already holds a writer's lock on the table, or on the sequence that assigned the
id. So an id is settled when every transaction that holds such a lock after the id was seen has
ended. Nothing is locked here: a lock that waits for writers would make later writers queue behind
it, and a lock with a short timeout would never be granted during a long VACUUM.

Where Citus distributes the rows, the coordinator holds that lock until it has told every server to
commit. If it could not tell one, a prepared transaction stays on that server: it is waited for too,
after the transactions on the coordinator, because it may be prepared while these are waited for.
"""

from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, text

from lynkr_store.db.citus import is_distributed, is_of_cluster, prepared_transactions
from lynkr_store.db.models import TELEMETRY

Writers = Mapping[str, int | None]
"""Open transactions that may have written, and the process id of each one's server process.

A transaction that was prepared for a two-phase commit has none."""

# Every statement that stores rows takes this mode, and so does nextval(); both keep it until the
# transaction ends. Whoever holds a stronger lock and has stored rows holds this one too. Casts: see
# `identities`.
_WRITERS: Final = text(
    "SELECT virtualtransaction, pid FROM pg_catalog.pg_locks "
    "WHERE locktype = 'relation' AND granted AND mode = 'RowExclusiveLock' AND relation IN ("
    "CAST(pg_catalog.to_regclass(CAST(:name AS TEXT)) AS OID), "
    "CAST(CAST(pg_catalog.pg_get_serial_sequence(CAST(:name AS TEXT), 'id') AS REGCLASS) AS OID)) "
    "AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) "
    "AND pid IS DISTINCT FROM pg_backend_pid()"
)

_PREPARED_EARLIER: Final = "-1/"  # before the server's last start


def writers(connection: Connection) -> Writers:
    """The open transactions of others that may have been assigned an id.

    They are those of this moment, also if the connection's transaction sees the rows of an earlier
    one. So read the rows that they may have stored in a later transaction.
    """
    return _on_this_server(connection) or _on_any_server(connection)


def still_open(connection: Connection, before: Writers) -> Writers:
    """Those of ``before`` that have not ended.

    A transaction that was prepared meanwhile keeps its name, until the server is started again:
    then the name begins with -1.

    When the last one on this server has ended, those that a server has yet to commit.
    """
    if any(is_of_cluster(name) for name in before):
        return _both(before, _on_any_server(connection))
    return _both(before, _on_this_server(connection)) or _on_any_server(connection)


def _both(before: Writers, now: Writers) -> Writers:
    return {
        name: pid
        for name, pid in now.items()
        if name in before or name.startswith(_PREPARED_EARLIER)
    }


def _on_this_server(connection: Connection) -> Writers:
    found = connection.execute(_WRITERS, {"name": TELEMETRY.name})
    return {row.virtualtransaction: row.pid for row in found}


def _on_any_server(connection: Connection) -> Writers:
    if not is_distributed(connection):
        return {}
    return dict.fromkeys(prepared_transactions(connection))
