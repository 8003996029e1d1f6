"""What operators read: the store's health, and what maintenance did."""

from datetime import datetime
from typing import Annotated

from pydantic import Field

from lynkr_store.backend import Backend
from lynkr_store.schemas.base import FrozenMap, FrozenOutput


class Health(FrozenOutput):
    """One moment of a store.

    The seven counters are one atomic snapshot, in which
    ``submitted + recovered == written + rejected + dropped + spooled + pending``.
    """

    submitted: int
    """Records handed to ``record()``."""
    recovered: int
    """Records found in a spool that an earlier process left."""
    written: int
    """Records whose commit is known."""
    rejected: int
    """Records refused for their own fault."""
    dropped: int
    """Records given up unwritten."""
    spooled: int
    """Records put aside on disk until the database is back."""
    pending: int
    """Records queued or in the batch under way."""
    rejected_by: FrozenMap[int]
    dropped_by: FrozenMap[int]
    mended_by: FrozenMap[int]
    """Cause to number of values changed on the way in, or unreadable on the way out."""
    faults_by: FrozenMap[int]
    """Kind of fault to number of tries to write a batch, to use the spool or to keep roll-ups, that
    it ended."""
    backend: Backend
    revision: str | None
    """The schema's revision at the last probe; None before one, or when there is none."""
    head: str
    """The revision this release works with."""
    reachable: bool
    """Whether the last probe reached the database."""
    probe_age_s: float | None
    """Seconds since that probe; None before the first."""
    last_error: str | None
    """The last fault of the writer or probe, without any row's values."""
    last_error_age_s: float | None
    database_bytes: int | None
    """Size of the SQLite file, or of the store's PostgreSQL tables with their indexes."""
    reclaimable_bytes: int | None
    """Of these, bytes that SQLite will reuse; None on PostgreSQL."""
    oldest_timestamp: datetime | None
    """The oldest row's instant."""
    rollup_lag: int | None
    """Rows, at most, that are not yet in the roll-ups: each statistic reads them one by one."""


class MaintenanceReport(FrozenOutput):
    """What one call of ``maintain()`` did."""

    indexes_built: tuple[str, ...]
    """Names of the indexes that were missing and are there now."""
    indexes_left: tuple[str, ...] = ()
    """Names of those that are missing still; the next call tries again."""
    waited_for: str | None = None
    """What was in their way for the whole of ``budget_s``, in words."""
    sequences_set: tuple[str, ...]
    """PostgreSQL: names of the sequences that were behind their tables' ids, as after a restore,
    and were set forward to the greatest."""
    rows_folded: int
    """Rows that were added to the roll-ups, or counted anew by a rebuild."""
    quarters_recounted: Annotated[int, Field(exclude_if=lambda number: not number)] = 0
    """Quarters of an hour whose roll-ups were made again, for rows in them had been changed or
    deleted. 0 is left out of the JSON."""
    quarters_mended: Annotated[int, Field(exclude_if=lambda number: not number)] = 0
    """Quarters whose roll-ups differed from their rows though no change had been noted, and were
    made again. 0 is left out of the JSON."""
    rollup_lag: int
    """Rows, at most, that are not in the roll-ups: they came meanwhile, or, on PostgreSQL,
    transactions that may have written rows before them were still open."""
    rows_deleted: int
    """Rows and savings events older than ``retention_days`` that were deleted."""
    rows_remaining: int
    """Such that are still there: the time was not enough, or another transaction holds them.
    Counted up to 100,000."""
    texts_removed: int
    """Rows older than ``text_retention_days`` whose texts were removed."""
    texts_remaining: int
    """Such that are still to be looked at. Counted up to 100,000."""
    bytes_freed: int
    """By how much the SQLite file gets smaller."""
    retention_waits: Annotated[str | None, Field(exclude_if=lambda why: why is None)] = None
    """Why nothing was deleted by its age though something is old enough, and what to do: the clock
    may be wrong. None where retention went ahead; then it is left out of the JSON too."""
