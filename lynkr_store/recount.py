"""Begins the roll-ups again after tables were lost that they are made of."""

from collections.abc import Collection
from typing import Final

from sqlalchemy import BigInteger, Connection, cast, delete, func, literal, select

from lynkr_store import folds, rollups
from lynkr_store.clock_check import TRUSTED
from lynkr_store.engine import backend_of
from lynkr_store.inserts import FORGOTTEN
from lynkr_store.models import DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.rollups import GREATEST_ID
from lynkr_store.spans import QUARTER_MS, SPANS_MS, floor_to

_RAW_FROM: Final = "raw_from"
_STILL_TRUE: Final = (_RAW_FROM, TRUSTED, FORGOTTEN)
"""What the table of progress says of times and not of ids."""


def count_again(connection: Connection, made: Collection[str]) -> None:
    """Have the next fold count all rows that are there, after tables were made again, empty.

    Roll-ups are kept as history where no row can be counted twice: of times before the oldest row.
    What was counted cannot be told from what was not, where the watermark is lost; and where the
    rows are, ids begin at 1 again.

    Args:
        connection: In the transaction in which the tables were made.
        made: Their names.
    """
    if not {TELEMETRY.name, DIMENSIONS.name, ROLLUPS.name, PROGRESS.name} & {*made}:
        return
    if DIMENSIONS.name in made:  # the roll-ups name what is not there any more
        connection.execute(delete(ROLLUPS))
    else:
        _keep_history(connection)
    connection.execute(delete(PROGRESS).where(PROGRESS.c.name.not_in(_STILL_TRUE)))


def _keep_history(connection: Connection) -> None:
    """Delete the roll-ups of the quarters of an hour from the oldest row's on."""
    oldest = select(func.min(TELEMETRY.c.timestamp)).where(rollups.in_domain)
    first: int | None = connection.scalar(select(cast(oldest.scalar_subquery(), BigInteger)))
    if first is None:
        return
    start = floor_to(QUARTER_MS, first)
    counts = connection.execute(
        rollups.counts_of_quarter(), rollups.quarter(start, GREATEST_ID)
    ).one()
    if (
        counts.known > counts.there
    ):  # some rows of the oldest quarter were removed, and nothing would tell
        note = {"name": _RAW_FROM, "value": first}
        connection.execute(folds.note_first(backend_of(connection)), note)
    upto = ROLLUPS.c.start + ROLLUPS.c.span_ms
    connection.execute(delete(ROLLUPS).where(upto > literal(start, BigInteger)))
    for span in SPANS_MS[1:]:  # the hour and the day that it lies in, as far as they are history
        connection.execute(folds.sum_of_quarters(span, floor_to(span, start)))
