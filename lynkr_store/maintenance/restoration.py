"""Recreates dropped tables of the store, and restarts what was derived from them.

This works only on a schema at this release's revision, where the models describe every table.
Tables are recreated empty, with their indexes and triggers, and with the rows about revisions.
"""

from collections.abc import Collection
from typing import Final

from sqlalchemy import BigInteger, Connection, Table, cast, delete, func, select

from lynkr_store.db import catalogue, triggers
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import DIMENSIONS, NOTES, PROGRESS, ROLLUPS, TELEMETRY, Base
from lynkr_store.exceptions import SchemaError
from lynkr_store.maintenance.clock_check import TRUSTED
from lynkr_store.migrate import scripts
from lynkr_store.rollups import state
from lynkr_store.rollups.buckets import floor_to
from lynkr_store.rollups.fold import drop_from
from lynkr_store.schemas.units import QUARTER_MS
from lynkr_store.schemas.values import INT64_MAX
from lynkr_store.storage import progress
from lynkr_store.storage.ledger import FORGOTTEN

_STILL_TRUE: Final = (state.RAW_FROM, TRUSTED, FORGOTTEN)
"""The entries of the table of progress that describe times rather than ids."""


def recreate_tables(connection: Connection, lost: Collection[str]) -> None:
    """Create the missing tables in the caller's transaction.

    Args:
        connection: To a database at the head, where the other tables exist.
        lost: The names of the missing tables.

    Raises:
        SchemaError: A missing table was renamed, and its indexes still have the names that are
            needed.
    """
    tables = [Base.metadata.tables[name] for name in lost]
    _require_free_names(connection, tables)
    Base.metadata.create_all(connection, tables=tables, checkfirst=False)
    if TELEMETRY.name in lost:
        for statement in triggers.creating(backend_of(connection)):
            connection.exec_driver_sql(statement)
    if NOTES.name in lost:
        scripts.note_all_applied(connection)
    if {TELEMETRY.name, DIMENSIONS.name, ROLLUPS.name, PROGRESS.name} & {*lost}:
        _restart_rollups(connection, lost)


def _require_free_names(connection: Connection, tables: Collection[Table]) -> None:
    names = [str(index.name) for table in tables for index in table.indexes]
    names += [str(table.primary_key.name) for table in tables]
    if TELEMETRY in tables:
        names += triggers.NAMES[backend_of(connection)]
    for name, holder in catalogue.indexed_tables(connection, names).items():
        raise SchemaError(
            f"{', '.join(table.name for table in tables)}: missing, and cannot be recreated, "
            f"because the table {holder} already has {name}. If {holder} is the store's table "
            "under another name, rename it back; otherwise drop its indexes and triggers that have "
            "the store's names"
        )


def _restart_rollups(connection: Connection, made: Collection[str]) -> None:
    """Make the next fold count all existing rows.

    Roll-ups from before the oldest row stay as history, because no row there can be counted twice.
    If the watermark is lost, folded rows can no longer be told from others; if the rows are lost,
    ids start again at 1.
    """
    if DIMENSIONS.name in made:  # the roll-ups refer to dimensions that are gone
        connection.execute(delete(ROLLUPS))
    else:
        _keep_history(connection)
    connection.execute(delete(PROGRESS).where(PROGRESS.c.name.not_in(_STILL_TRUE)))


def _keep_history(connection: Connection) -> None:
    """Delete the roll-ups from the quarter of the oldest row on."""
    oldest = select(func.min(TELEMETRY.c.timestamp)).where(state.in_domain)
    first: int | None = connection.scalar(select(cast(oldest.scalar_subquery(), BigInteger)))
    if first is None:
        return
    start = floor_to(QUARTER_MS, first)
    counts = connection.execute(
        state.counts_of_quarter(), state.quarter_parameters(start, INT64_MAX)
    ).one()
    if counts.known > counts.there:  # retention removed rows of the oldest quarter: save that
        entry = {"name": state.RAW_FROM, "value": first}
        connection.execute(progress.insert_if_absent(backend_of(connection)), entry)
    drop_from(connection, start)
