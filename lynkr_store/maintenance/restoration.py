"""Makes tables of the store's again that somebody dropped, and begins again what was made of them.

Of a schema at this release's revision alone: what is there is what the models say. Tables come back
empty, with their indexes, triggers and, of the revisions, notes.
"""

from collections.abc import Collection
from typing import Final

from sqlalchemy import BigInteger, Connection, Table, cast, delete, func, select

from lynkr_store.db import catalogue, triggers
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import DIMENSIONS, NOTES, PROGRESS, ROLLUPS, TELEMETRY, Base
from lynkr_store.exceptions import SchemaError
from lynkr_store.maintenance.clock_check import TRUSTED
from lynkr_store.migrate import revisions
from lynkr_store.rollups import state
from lynkr_store.rollups.buckets import floor_to
from lynkr_store.rollups.fold import drop_from
from lynkr_store.rollups.state import GREATEST_ID
from lynkr_store.schemas.units import QUARTER_MS
from lynkr_store.storage import progress
from lynkr_store.storage.ledger import FORGOTTEN

_RAW_FROM: Final = "raw_from"
_STILL_TRUE: Final = (_RAW_FROM, TRUSTED, FORGOTTEN)
"""What the table of progress says of times and not of ids."""


def recreate_tables(connection: Connection, lost: Collection[str]) -> None:
    """Make the lost tables, in the transaction that the caller commits.

    Args:
        connection: To a database at the head, whose other tables are there.
        lost: The tables' names.

    Raises:
        SchemaError: A lost table was renamed, and its indexes have the names that are needed.
    """
    tables = [Base.metadata.tables[name] for name in lost]
    _require_free_names(connection, tables)
    Base.metadata.create_all(connection, tables=tables, checkfirst=False)
    if TELEMETRY.name in lost:
        for statement in triggers.creating(backend_of(connection)):
            connection.exec_driver_sql(statement)
    if NOTES.name in lost:
        revisions.note_all_applied(connection)
    if {TELEMETRY.name, DIMENSIONS.name, ROLLUPS.name, PROGRESS.name} & {*lost}:
        _count_again(connection, lost)


def _require_free_names(connection: Connection, tables: Collection[Table]) -> None:
    names = [str(index.name) for table in tables for index in table.indexes]
    names += [str(table.primary_key.name) for table in tables]
    if TELEMETRY in tables:
        names += triggers.NAMES[backend_of(connection)]
    for name, holder in catalogue.indexed_tables(connection, names).items():
        raise SchemaError(
            f"{', '.join(table.name for table in tables)}: not there, and cannot be made again, "
            f"for {name} is there, of the table {holder}. If that is the store's under another "
            "name, name it back; else drop its indexes and triggers that have the store's names"
        )


def _count_again(connection: Connection, made: Collection[str]) -> None:
    """Have the next fold count all rows that are there.

    Roll-ups are kept as history where no row can be counted twice: of times before the oldest row.
    What was counted cannot be told from what was not, where the watermark is lost; and where the
    rows are, ids begin at 1 again.
    """
    if DIMENSIONS.name in made:  # the roll-ups name what is not there any more
        connection.execute(delete(ROLLUPS))
    else:
        _keep_history(connection)
    connection.execute(delete(PROGRESS).where(PROGRESS.c.name.not_in(_STILL_TRUE)))


def _keep_history(connection: Connection) -> None:
    """Delete the roll-ups of the quarters of an hour from the oldest row's on."""
    oldest = select(func.min(TELEMETRY.c.timestamp)).where(state.in_domain)
    first: int | None = connection.scalar(select(cast(oldest.scalar_subquery(), BigInteger)))
    if first is None:
        return
    start = floor_to(QUARTER_MS, first)
    counts = connection.execute(state.counts_of_quarter(), state.quarter(start, GREATEST_ID)).one()
    if (
        counts.known > counts.there
    ):  # some rows of the oldest quarter were removed, and nothing would tell
        note = {"name": _RAW_FROM, "value": first}
        connection.execute(progress.insert_if_absent(backend_of(connection)), note)
    drop_from(connection, start)
