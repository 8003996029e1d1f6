"""The statements of retention: find old rows and texts, and remove them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    Label,
    Select,
    Table,
    Update,
    delete,
    func,
    literal,
    or_,
    select,
    tuple_,
    type_coerce,
    update,
)

from lynkr_store.db.functions import unindexed
from lynkr_store.db.models import TELEMETRY
from lynkr_store.schemas import TEXT_FIELDS

Place = tuple[Any, int]
"""A row's stored timestamp and its id, the order of the rows."""


def older(
    table: Table,
    cutoff_ms: int,
    *,
    after: Place | None = None,
    upto_id: int | None = None,
    limit: int,
) -> Select[*tuple[Any, ...]]:
    """``id`` and stored ``timestamp`` of rows before the cutoff, ordered by both, oldest first.

    Args:
        table: A table with these two columns.
        cutoff_ms: The first instant that is kept.
        after: Rows up to this place are left out.
        upto_id: Rows with greater ids are left out.
        limit: The maximum number of rows.
    """
    timestamp = _stored(table)
    statement = select(table.c.id, timestamp).where(timestamp < cutoff_ms)
    if after is not None:
        place = (literal(value, BigInteger) for value in after)
        statement = statement.where(tuple_(timestamp, table.c.id) > tuple_(*place))
    if upto_id is not None:
        statement = statement.where(table.c.id <= upto_id)
    return statement.order_by(timestamp, table.c.id).limit(limit)


def count_older(
    table: Table,
    cutoff_ms: int,
    *,
    after: Place | None = None,
    upto_id: int | None = None,
    most: int,
) -> Select[int]:
    """How many rows `older` would return, counted up to ``most``."""
    counted = older(table, cutoff_ms, after=after, upto_id=upto_id, limit=most)
    return select(func.count()).select_from(counted.subquery())


def remove_texts(rows: ColumnElement[bool], cutoff_ms: int) -> Update:
    """Remove the texts of people and models from those of the rows that are before the cutoff.

    Args:
        rows: A condition on ``id`` that selects the rows.
        cutoff_ms: The first instant that is kept.
    """
    has_text = or_(*(TELEMETRY.c[name].is_not(None) for name in TEXT_FIELDS))
    return (
        update(TELEMETRY)
        .where(rows, unindexed(TELEMETRY.c.timestamp) < cutoff_ms, has_text)
        .values(dict.fromkeys(TEXT_FIELDS))
    )


def count_late(after_id: int, until_ms: int, *, most: int) -> Select[int]:
    """How many of the first ``most`` rows above an id have timestamps up to an instant."""
    above = (
        select(_stored(TELEMETRY))
        .where(TELEMETRY.c.id > after_id)
        .order_by(TELEMETRY.c.id)
        .limit(most)
    )
    return select(func.count()).where(above.subquery().c.timestamp <= until_ms)


def delete_rows(table: Table, ids: Sequence[int]) -> Delete:
    """Delete the rows with these ids."""
    return delete(table).where(table.c.id.in_(ids))


def oldest_timestamp() -> Select[*tuple[Any, ...]]:
    """The lowest stored timestamp."""
    return select(func.min(TELEMETRY.c.timestamp))


def _stored(table: Table) -> Label[Any]:
    """The stored timestamp, not converted to an instant."""
    return type_coerce(table.c.timestamp, BigInteger).label("timestamp")
