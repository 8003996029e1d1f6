"""The steps that revisions are made of. Each leaves what is already there as it is.

This is all that a revision imports of the library, so its names and what they do are frozen: a step
that must do something else gets a name of its own. On a gateway's file a revision meets columns,
tables and indexes that the gateway made. In a script (``--sql``) nothing can be looked up, and
everything is written out.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from alembic import context, op
from sqlalchemy import Column, Connection, TextClause, literal, select
from sqlalchemy import table as sql_table

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue, triggers
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

_TABLES: Final = {"0001": "routing_telemetry", "0004": "savings_events"}
"""Tables that are not dropped with rows in them, and the revisions that made them."""


def adopt() -> None:
    """Note which of its objects the gateway had made, where the database is one of its own.

    Raises:
        AdoptionRefused: Tables of these names are there and are not the gateway's.
    """
    if not context.is_offline_mode() and (found := examine(op.get_bind())):
        note_adoption(op.get_bind(), found, now_ms=time.time_ns() // 1_000_000)


def refuse_foreign(table: str) -> None:
    """Refuse a table of the name of one that the revision makes and the gateway never had.

    Raises:
        AdoptionRefused: There is one.
    """
    if has_table(table):
        raise AdoptionRefused(f"the table {table} is there, and it is not the store's")


def add_columns(table: str, columns: Sequence[Column[object]]) -> None:
    """Add the columns that are missing."""
    there: frozenset[str] = frozenset()
    if not context.is_offline_mode():
        there = catalogue.column_names(op.get_bind(), table)
    for column in columns:
        if column.name not in there:
            op.add_column(table, column)


def create_indexes(table: str, indexes: Mapping[str, Sequence[str | TextClause]]) -> None:
    """Create the missing indexes, of columns and expressions, on a table without rows.

    An index of a table with rows can take long to build, and an upgrade holds the write lock:
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
    """Drop the columns, with their values; leave them in an adopted file that may be in use.

    SQLite writes the whole table anew for each: at 1,000,000 rows the lock is held for 15 s, and a
    gateway waits 3. They are nullable, neither it nor an older release minds them, and an upgrade
    finds them again. With ``-x drop-data=yes`` they go.
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
    """Whether the table is there already; never in a script."""
    return not context.is_offline_mode() and bool(catalogue.tables(op.get_bind(), [table]))


def drop_table(table: str) -> None:
    """Drop a table that is empty, or any with ``-x drop-data=yes``.

    Raises:
        DowngradeRefused: It has rows.
    """
    if not (_may_drop_data() or context.is_offline_mode()):
        _keep_rows(op.get_bind(), table)
    with _overwriting():
        op.drop_table(table)


def create_triggers() -> None:
    """Create the triggers that note the changes of rows; on Citus none."""
    for statement in triggers.creating(Backend(op.get_context().dialect.name)):
        op.execute(statement)


def drop_triggers() -> None:
    """Drop them, and PostgreSQL's function."""
    for statement in triggers.dropping(Backend(op.get_context().dialect.name)):
        op.execute(statement)


def _overwriting() -> AbstractContextManager[None]:
    """Have SQLite overwrite what is dropped, which may be texts; a host's connection too."""
    return nullcontext() if context.is_offline_mode() else overwriting(op.get_bind())


def _keep_rows(connection: Connection, table: str) -> None:
    if _has_rows(connection, table):
        raise DowngradeRefused(
            f"{table} has rows, and this downgrade would drop it; nothing was changed. To lose "
            "them, say so: alembic -x drop-data=yes downgrade …, lynkr-store downgrade --drop-data"
        )


def refuse_early(connection: Connection, undone: Collection[str]) -> None:
    """Refuse a downgrade before its first step, which may hold SQLite's lock for long.

    Args:
        connection: Of the database.
        undone: The revisions that would be undone.

    Raises:
        DowngradeRefused: One of them would refuse.
    """
    for revision in sorted(undone, reverse=True):
        _keep_adopted(connection, revision)
    for revision, table in _TABLES.items():
        if revision in undone and not _may_drop_data():
            _keep_rows(connection, table)


def keep_adopted(revision: str) -> None:
    """Refuse to undo what the gateway had made before the database was adopted, or writes now.

    Raises:
        DowngradeRefused: It had made this revision's objects; or it writes them, and the user did
            not say ``-x drop-data=yes``.
    """
    if not context.is_offline_mode():
        _keep_adopted(op.get_bind(), revision)


def _keep_adopted(connection: Connection, revision: str) -> None:
    refuse_below_adopted(connection, revision)
    if not _may_drop_data():
        refuse_while_the_gateway_writes(connection, revision)


def _may_drop_data() -> bool:
    return context.get_x_argument(as_dictionary=True).get("drop-data") == "yes"


def _has_rows(connection: Connection, table: str) -> bool:
    one = select(literal(1)).select_from(sql_table(table)).limit(1)
    return connection.scalar(one) is not None
