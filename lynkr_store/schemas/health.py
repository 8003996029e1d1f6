"""What operators read: the state of the store, and what maintenance did."""

from datetime import datetime
from typing import Annotated

from pydantic import Field

from lynkr_store.backend import Backend
from lynkr_store.schemas.base import FrozenMap, FrozenOutput
from lynkr_store.schemas.events import RoutingEvent, similar_field


class Rejection(FrozenOutput):
    """Why a record was rejected: names and types, never a value."""

    cause: str
    """As in `Health.rejected_by`."""
    field: str | None
    """The field's name; an unknown name only if it is an identifier of up to 64 characters. None if
    no one field is the cause."""
    value_type: str | None
    """The name of the value's Python type; None if there is no value."""

    def __str__(self) -> str:
        """In words; for an unknown name with the field whose name is similar."""
        where = f": {self.field}" if self.field else ""
        given = f" ({self.value_type})" if self.value_type else ""
        unknown = self.field and self.field not in RoutingEvent.model_fields
        return f"{self.cause}{where}{given}{similar_field(self.field or '') if unknown else ''}"


class BatchAttempt(FrozenOutput):
    """One attempt of the store's to write a batch, as `Store.on_batch` reports it."""

    rows: int
    """Records in the batch."""
    duration_s: float
    """Seconds that the attempt took."""
    error: str | None = None
    """The exception's class; None if the batch is written."""


class Health(FrozenOutput):
    """The state of a store at one moment.

    The seven counters are one atomic snapshot, in which ``submitted + recovered == written +
    rejected + dropped + spooled + pending``.
    """

    enabled: bool = True
    """False: the store is switched off, and the other figures are those of an empty database."""
    submitted: int
    """Records passed to ``record()``."""
    recovered: int
    """Records found in a spool that an earlier process left."""
    written: int
    """Records whose commit is confirmed."""
    rejected: int
    """Records refused because they are invalid."""
    dropped: int
    """Records that were given up without being written."""
    spooled: int
    """Records on disk in the spool, waiting for the database."""
    pending: int
    """Records in the queue or in the current batch."""
    queue_bytes: int = 0
    """Memory of these records, in bytes; the setting `queue_max_bytes` limits it."""
    rejected_by: FrozenMap[int]
    """Cause to the number of records; `rejections` says more."""
    rejections: tuple[Rejection, ...] = ()
    """The last five different ones of each cause, without those that the database refused."""
    dropped_by: FrozenMap[int]
    """Cause to the number of records."""
    mended_by: FrozenMap[int]
    """Cause to the number of values that were sanitized on the way in, or unreadable on the way
    out."""
    faults_by: FrozenMap[int]
    """Kind of fault to the number of attempts that it ended: attempts to write a batch, to use the
    spool or to keep roll-ups."""
    backend: Backend
    """The kind of database."""
    revision: str | None
    """The schema's revision at the last probe; None before the first probe, or without a
    revision."""
    head: str
    """The revision that this release works with."""
    reachable: bool
    """Whether the last probe reached the database; False before the first has ended, for which
    ``check()`` waits."""
    server: str | None = None
    """PostgreSQL: the server that answered the last probe, as ``host:port``, or a pooler in front
    of it; None before the first. The writer may be connected to another one of the URL's hosts."""
    writable: bool | None = None
    """PostgreSQL: whether that server takes writes; False on a standby, or if its
    ``default_transaction_read_only`` is on. None before the first probe."""
    probe_age_s: float | None
    """Seconds since the last probe; None before the first."""
    last_error: str | None
    """The last fault of the writer or the probe; it never contains row values."""
    last_error_age_s: float | None
    """Seconds since that fault; None if there was none."""
    database_bytes: int | None
    """Size of the SQLite file, or of the store's PostgreSQL tables with their indexes."""
    reclaimable_bytes: int | None
    """The part of these bytes that SQLite will reuse; None on PostgreSQL."""
    oldest_timestamp: datetime | None
    """The oldest row's timestamp."""
    rollup_lag: int | None
    """Upper bound of the rows that are not yet in the roll-ups; each statistic reads them one by
    one."""


class MaintenanceReport(FrozenOutput):
    """What one call of ``maintain()`` did."""

    indexes_built: tuple[str, ...]
    """Names of the indexes that were missing and were built."""
    indexes_left: tuple[str, ...] = ()
    """Names of the indexes that are still missing; the next call tries again."""
    waited_for: str | None = None
    """What blocked them for the whole of ``budget_s``, in words."""
    sequences_set: tuple[str, ...]
    """PostgreSQL: names of the sequences that were behind their tables' ids, as after a restore,
    and were set to the greatest id."""
    rows_folded: int
    """Rows that were added to the roll-ups, or counted again by a rebuild."""
    quarters_recounted: Annotated[int, Field(exclude_if=lambda number: not number)] = 0
    """Quarters of an hour whose roll-ups were recomputed because rows in them had been changed or
    deleted. 0 is left out of the JSON."""
    quarters_mended: Annotated[int, Field(exclude_if=lambda number: not number)] = 0
    """Quarters whose roll-ups differed from their rows without a change entry, and were recomputed.
    0 is left out of the JSON."""
    rollup_lag: int
    """Upper bound of the rows that are not in the roll-ups: they arrived during the call, or, on
    PostgreSQL, transactions that may have written rows before them were still open."""
    rows_deleted: int
    """Rows and savings events that were older than ``retention_days`` and were deleted."""
    rows_remaining: int
    """Rows and savings events that are old enough but remain, because the time was too short or
    another transaction holds them. Counted up to 100,000."""
    texts_removed: int
    """Rows older than ``text_retention_days`` whose texts were removed."""
    texts_remaining: int
    """Rows whose texts are still to be removed, at most. Counted up to 100,000."""
    bytes_freed: int
    """The number of bytes by which the SQLite file shrinks."""
    retention_waits: Annotated[str | None, Field(exclude_if=lambda why: why is None)] = None
    """Why nothing was deleted although something is old enough, and what to do: the clock may be
    wrong. None if retention ran; then it is left out of the JSON too."""
