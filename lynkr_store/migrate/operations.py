"""The steps that revisions are made of. No step changes an object that already exists.

Revisions import only this module of the library, so its names and what they do are frozen: a step
that must do something else gets a new name. In a gateway's file a revision finds columns, tables
and indexes that the gateway made. In a script (``--sql``) no step can look at the database, so each
writes all its statements.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from alembic import context, op
from sqlalchemy import BigInteger, Column, Connection, TextClause, func, literal, select
from sqlalchemy import column as sql_column
from sqlalchemy import table as sql_table

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue, triggers
from lynkr_store.db.citus import managed_tables
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.sqlite import overwriting
from lynkr_store.exceptions import AdoptionRefused, DowngradeRefused
from lynkr_store.migrate.adoption import (
    adopted_revision,
    examine,
    note_adoption,
    refuse_below_adopted,
    refuse_while_the_gateway_writes,
)
from lynkr_store.schemas.values import INT64_MAX

_TABLES: Final = {"0001": "routing_telemetry", "0004": "savings_events"}
"""Tables that are not dropped while they have rows, by the revision that makes them."""

_ROLLUPS_REVISION: Final = "0009"
_ROLLUPS: Final = sql_table(
    "routing_rollups", sql_column("span_ms", BigInteger), sql_column("start", BigInteger)
)
_TELEMETRY: Final = sql_table("routing_telemetry", sql_column("timestamp", BigInteger))


def adopt() -> None:
    """Record which objects the gateway had made, if the gateway made the database.

    Raises:
        AdoptionRefused: Tables of these names exist, and the gateway did not make them.
    """
    if not context.is_offline_mode() and (found := examine(op.get_bind())):
        note_adoption(op.get_bind(), found, now_ms=time.time_ns() // 1_000_000)


def refuse_foreign(table: str) -> None:
    """Refuse a database that already has a table which the revision makes, and the gateway never.

    Raises:
        AdoptionRefused: The table exists.
    """
    if has_table(table):
        raise AdoptionRefused(f"the table {table} exists already, and the store did not make it")


def add_columns(table: str, columns: Sequence[Column[object]]) -> None:
    """Add the columns that are missing."""
    there: frozenset[str] = frozenset()
    if not context.is_offline_mode():
        there = catalogue.column_names(op.get_bind(), table)
    for column in columns:
        if column.name not in there:
            op.add_column(table, column)


def create_indexes(table: str, indexes: Mapping[str, Sequence[str | TextClause]]) -> None:
    """Create the missing indexes, on columns and expressions, if the table has no rows.

    Building an index on a table with rows can take long, and an upgrade holds the write lock, so
    ``maintain()`` builds it afterwards.
    """
    there: frozenset[str] = frozenset()
    if not context.is_offline_mode():
        if _has_rows(op.get_bind(), table):
            return
        there = catalogue.index_names(op.get_bind(), table)
    for name, columns in indexes.items():
        if name not in there:
            op.create_index(name, table, columns)


def drop_columns(table: str, columns: Sequence[str]) -> None:
    """Drop the columns and their values, but keep them in an adopted SQLite file.

    SQLite rewrites the whole table for each column: with 1,000,000 rows it holds the lock for 15 s,
    and a gateway waits for 3 s. The columns are nullable, so they disturb neither the gateway nor
    an older release, and a later upgrade uses them again. ``-x drop-data=yes`` drops them.
    """
    if not context.is_offline_mode():
        bind = op.get_bind()
        adopted = backend_of(bind) is Backend.SQLITE and adopted_revision(bind) is not None
        if adopted and not _may_drop_data():
            return
    with _overwriting():
        for column in columns:
            op.drop_column(table, column)


def has_table(table: str) -> bool:
    """Tell whether the table exists; in a script, always False."""
    return not context.is_offline_mode() and bool(catalogue.tables(op.get_bind(), [table]))


def drop_table(table: str) -> None:
    """Drop a table if it is empty; with ``-x drop-data=yes``, also one that has rows.

    Raises:
        DowngradeRefused: It has rows.
    """
    if not (_may_drop_data() or context.is_offline_mode()):
        _keep_rows(op.get_bind(), table)
    with _overwriting():
        op.drop_table(table)


def create_triggers() -> None:
    """Create the triggers that record changes of rows; on Citus, none."""
    for statement in triggers.creating(Backend(op.get_context().dialect.name)):
        op.execute(statement)


def drop_triggers() -> None:
    """Drop the triggers and, on PostgreSQL, their function."""
    distributed = not context.is_offline_mode() and _TELEMETRY.name in managed_tables(op.get_bind())
    backend = Backend(op.get_context().dialect.name)
    for statement in triggers.dropping(backend, distributed=distributed):
        op.execute(statement)


def _overwriting() -> AbstractContextManager[None]:
    """Make SQLite overwrite what is dropped, which may be texts, on a host's connection too."""
    return nullcontext() if context.is_offline_mode() else overwriting(op.get_bind())


def _keep_rows(connection: Connection, table: str) -> None:
    if _has_rows(connection, table):
        raise DowngradeRefused(
            f"{table} has rows, and this downgrade would drop it. Nothing was changed: to delete "
            "the rows, run lynkr-store downgrade --drop-data, or alembic -x drop-data=yes "
            "downgrade …"
        )


def refuse_early(connection: Connection, undone: Collection[str]) -> None:
    """Refuse a downgrade before its first step, because a step can hold SQLite's lock for long.

    Args:
        connection: To the database.
        undone: The revisions that would be undone.

    Raises:
        DowngradeRefused: One of the revisions cannot be undone.
    """
    for revision in sorted(undone, reverse=True):
        _keep_adopted(connection, revision)
    if _may_drop_data():
        return
    for revision, table in _TABLES.items():
        if revision in undone:
            _keep_rows(connection, table)
    if _ROLLUPS_REVISION in undone:
        _keep_history(connection)


def keep_adopted(revision: str) -> None:
    """Refuse to undo a revision whose objects the gateway made before the adoption, or writes now.

    Raises:
        DowngradeRefused: The gateway had made the objects; or the gateway writes them, and
            ``-x drop-data=yes`` was not given.
    """
    if not context.is_offline_mode():
        _keep_adopted(op.get_bind(), revision)


def _keep_adopted(connection: Connection, revision: str) -> None:
    refuse_below_adopted(connection, revision)
    if not _may_drop_data():
        refuse_while_the_gateway_writes(connection, revision)


def _keep_history(connection: Connection) -> None:
    """Refuse to drop roll-ups of rows that retention removed: nothing else has their figures."""
    names = (_ROLLUPS.name, _TELEMETRY.name)
    if len(catalogue.tables(connection, names)) < len(names):
        return
    oldest = func.coalesce(select(func.min(_TELEMETRY.c.timestamp)).scalar_subquery(), INT64_MAX)
    end = _ROLLUPS.c.start + _ROLLUPS.c.span_ms
    older = select(literal(1)).select_from(_ROLLUPS).where(end <= oldest).limit(1)
    if connection.scalar(older) is not None:
        raise DowngradeRefused(
            f"{_ROLLUPS.name} has statistics of rows that retention removed, and this downgrade "
            "would drop it. Nothing was changed: to lose them, run lynkr-store downgrade "
            "--drop-data, or alembic -x drop-data=yes downgrade …"
        )


def _may_drop_data() -> bool:
    return context.get_x_argument(as_dictionary=True).get("drop-data") == "yes"


def _has_rows(connection: Connection, table: str) -> bool:
    one = select(literal(1)).select_from(sql_table(table)).limit(1)
    return connection.scalar(one) is not None
