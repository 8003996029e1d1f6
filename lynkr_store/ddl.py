"""Steps that the revisions share. Each leaves what is already there as it is.

On a gateway's file a revision meets columns, tables and indexes that the gateway made. In a
script (``--sql``) nothing can be looked up, and everything is written out.
"""

from collections.abc import Sequence

from alembic import context, op
from sqlalchemy import Column, Connection, inspect, literal, select
from sqlalchemy import table as sql_table

from lynkr_store.adopt import refuse_below_adopted, refuse_while_the_gateway_writes
from lynkr_store.exceptions import DowngradeRefused


def add_columns(table: str, columns: Sequence[Column[object]]) -> None:
    """Add the columns that are missing."""
    there: set[str] = set()
    if not context.is_offline_mode():
        there = {column["name"] for column in inspect(op.get_bind()).get_columns(table)}
    for column in columns:
        if column.name not in there:
            op.add_column(table, column)


def create_indexes(table: str, indexes: dict[str, list[str]]) -> None:
    """Create the missing indexes, on a table without rows.

    An index of a table with rows can take long to build, and an upgrade holds the write lock:
    ``maintain()`` builds it afterwards.
    """
    there: set[str | None] = set()
    if not context.is_offline_mode():
        if _has_rows(op.get_bind(), table):
            return
        there = {index["name"] for index in inspect(op.get_bind()).get_indexes(table)}
    for name, columns in indexes.items():
        if name not in there:
            op.create_index(name, table, columns)


def drop_columns(table: str, columns: Sequence[str]) -> None:
    """Drop the columns, with their values."""
    for column in columns:
        op.drop_column(table, column)


def has_table(table: str) -> bool:
    """Whether the table is there already; never in a script."""
    return not context.is_offline_mode() and inspect(op.get_bind()).has_table(table)


def drop_table(table: str) -> None:
    """Drop a table that is empty, or any with ``-x drop-data=yes``.

    Raises:
        DowngradeRefused: It has rows.
    """
    if not (_may_drop_data() or context.is_offline_mode()) and _has_rows(op.get_bind(), table):
        raise DowngradeRefused(
            f"{table} has rows, and this downgrade would drop it; nothing was changed. To lose "
            "them, say so: alembic -x drop-data=yes downgrade …, lynkr-store downgrade --drop-data"
        )
    op.drop_table(table)


def keep_adopted(revision: str) -> None:
    """Refuse to undo what the gateway had made before the database was adopted, or writes now.

    Raises:
        DowngradeRefused: It had made this revision's objects; or it writes them, and the user did
            not say ``-x drop-data=yes``.
    """
    if not context.is_offline_mode():
        refuse_below_adopted(op.get_bind(), revision)
        if not _may_drop_data():
            refuse_while_the_gateway_writes(op.get_bind(), revision)


def _may_drop_data() -> bool:
    return context.get_x_argument(as_dictionary=True).get("drop-data") == "yes"


def _has_rows(connection: Connection, table: str) -> bool:
    one = select(literal(1)).select_from(sql_table(table)).limit(1)
    return connection.scalar(one) is not None
