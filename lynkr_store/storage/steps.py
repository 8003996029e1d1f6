"""Where a step ends, of work that goes through a table's rows in the order of their ids."""

from typing import Any

from sqlalchemy import Connection, Select, Table, select


def end_of_step(connection: Connection, table: Table, after: int, upto: int, rows: int) -> int:
    """The id of row number ``rows`` after an id; at most ``upto``."""
    found: int | None = connection.scalar(nth_after(table, after, rows))
    return upto if found is None else min(found, upto)


def nth_after(table: Table, after: int, rows: int) -> Select[*tuple[Any, ...]]:
    """The id of row number ``rows`` after an id; no row if there are fewer.

    It has no upper limit: between two ids PostgreSQL expects few rows, as long as it has gathered
    no statistics of the table, and would sort all that there are.
    """
    ids = table.c.id
    return select(ids).where(ids > after).order_by(ids).limit(1).offset(rows - 1)
