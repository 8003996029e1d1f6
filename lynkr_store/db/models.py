"""The declarative tables.

Columns keep the gateway's names and physical order; `lynkr_store.schemas.RoutingEvent` says what
each means. The gateway's indexes keep their names, although these do not follow the convention
below: otherwise the gateway would create them a second time.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    cast,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lynkr_store.db.column_types import (
    Count,
    Dollars,
    Instant,
    JsonText,
    Latency,
    Milliseconds,
    PlainText,
    Score,
    TokenCount,
    WholeNumber,
    Words,
    YesNo,
)
from lynkr_store.schemas.units import COUNT, DOLLARS, MILLISECONDS, SCORE

_RowId = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    """The base of the store's tables; a host's Alembic environment can use its metadata."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class RoutingTelemetry(Base):
    """One row for each routed request."""

    __tablename__ = "routing_telemetry"

    id: Mapped[int] = mapped_column(_RowId, Identity(), primary_key=True)
    request_id: Mapped[Words]
    session_id: Mapped[Words | None]
    timestamp: Mapped[Instant]
    complexity_score: Mapped[Score | None]
    tier: Mapped[Words | None]
    agentic_type: Mapped[Words | None]
    tool_count: Mapped[Count | None]
    input_tokens: Mapped[TokenCount | None]
    message_count: Mapped[Count | None]
    request_type: Mapped[Words | None]
    provider: Mapped[Words]
    model: Mapped[Words | None]
    routing_method: Mapped[Words | None]
    was_fallback: Mapped[YesNo | None] = mapped_column(server_default=text("0"))
    output_tokens: Mapped[TokenCount | None]
    latency_ms: Mapped[Latency | None]
    status_code: Mapped[Count | None]
    error_type: Mapped[Words | None]
    cost_usd: Mapped[Dollars | None]
    tool_calls_made: Mapped[Count | None]
    retry_count: Mapped[Count | None] = mapped_column(server_default=text("0"))
    circuit_breaker_state: Mapped[Words | None]
    quality_score: Mapped[Score | None]
    tokens_per_second: Mapped[Score | None]
    cost_efficiency: Mapped[Score | None]
    request_text: Mapped[Words | None]
    response_text: Mapped[Words | None]
    base_tier: Mapped[Words | None]
    escalation_source: Mapped[Words | None]
    propensity: Mapped[Score | None]
    candidates: Mapped[JsonText | None]
    pinned: Mapped[YesNo | None] = mapped_column(server_default=text("0"))
    switch_reason: Mapped[Words | None]
    cache_decision: Mapped[JsonText | None]
    cache_read_tokens: Mapped[TokenCount | None]
    cache_creation_tokens: Mapped[TokenCount | None]
    trace_id: Mapped[Words | None]
    attempt_index: Mapped[Count | None]
    requested_model: Mapped[Words | None]
    ttft_ms: Mapped[Milliseconds | None]
    stream: Mapped[YesNo | None]
    cache_tokens_included: Mapped[YesNo | None]
    reasoning_tokens: Mapped[TokenCount | None]
    finish_reason: Mapped[Words | None]
    attributes: Mapped[JsonText | None]

    __table_args__ = (
        # the gateway's four; its own pages filter by each
        Index("idx_telemetry_provider", "provider"),
        Index("idx_telemetry_tier", "tier"),
        Index("idx_telemetry_timestamp", "timestamp"),  # every window, and the newest rows first
        Index("idx_telemetry_session_id", "session_id", "timestamp"),  # one session in order
        # the store's own: the newest rows of a tier, of a model; a third is defined below
        Index("ix_routing_telemetry_tier_timestamp", "tier", "timestamp"),
        Index("ix_routing_telemetry_model_timestamp", "model", "timestamp"),
        {"sqlite_autoincrement": True},
    )


class SavingsEvent(Base):
    """Tokens that compression or a cache saved, as the gateway records them."""

    __tablename__ = "savings_events"

    id: Mapped[int] = mapped_column(_RowId, Identity(), primary_key=True)
    timestamp: Mapped[Instant]
    category: Mapped[Words]
    tokens_saved: Mapped[TokenCount]

    __table_args__ = (
        Index("idx_savings_timestamp", "timestamp"),  # sums from an instant on
        {"sqlite_autoincrement": True},
    )


class IngestBatch(Base):
    """The ledger: one row for each stored batch of records, written in the batch's transaction.

    If the answer to a commit was lost, the writer tries the batch again under the same id, finds it
    here, and stores nothing twice.
    """

    __tablename__ = "ingest_batches"

    batch_id: Mapped[Words] = mapped_column(primary_key=True)
    row_count: Mapped[Count]
    """Rows stored, without those that the database refused."""
    committed_at: Mapped[Instant]

    __table_args__ = (
        Index("ix_ingest_batches_committed_at", "committed_at"),  # expiry, the oldest first
        {"sqlite_with_rowid": False},
    )


TELEMETRY: Final = Base.metadata.tables[RoutingTelemetry.__tablename__]

FAILED: Final[ColumnElement[int]] = cast(TELEMETRY.c.error_type.is_not(None), Integer)
"""1 where a row has an error type, else 0."""

# The newest rows of a provider, the newest errors of a provider, and the newest errors of all
# providers, by merging those of each.
Index(
    "ix_routing_telemetry_provider_failed_timestamp",
    TELEMETRY.c.provider,
    FAILED,
    TELEMETRY.c.timestamp,
)

SAVINGS: Final = Base.metadata.tables[SavingsEvent.__tablename__]

LEDGER: Final = Base.metadata.tables[IngestBatch.__tablename__]

# -- the store's own tables, without a mapped class: mapping takes most of the time of importing ---


def _id() -> Column[int]:
    return Column("id", _RowId, Identity(), primary_key=True)


def _whole(name: str, *, key: bool = False, nullable: bool = False) -> Column[int]:
    return Column(name, WholeNumber, primary_key=key, nullable=nullable)


def _text(name: str, *, key: bool = False, nullable: bool = False) -> Column[str]:
    return Column(name, PlainText, primary_key=key, nullable=nullable)


DIMENSIONS: Final = Table(
    "routing_dimensions",
    Base.metadata,
    _id(),
    _text("provider"),
    _text("model", nullable=True),
    _text("tier", nullable=True),
    _text("request_type", nullable=True),
)
"""One combination of values for which roll-ups are kept; NULL and ``''`` are different values."""

COUNTED: Final = ("errors", "fallbacks", "over_provisioned", "under_provisioned")
"""What roll-ups count besides the requests."""

SUMMED: Final = {
    "latency_ms": MILLISECONDS,
    "quality_score": SCORE,
    "input_tokens": COUNT,
    "output_tokens": COUNT,
    "cache_read_tokens": COUNT,
    "cache_creation_tokens": COUNT,
    "tokens_per_second": SCORE,
    "cost_usd": DOLLARS,
}
"""The columns that roll-ups sum, with the units of the sums."""


def measure_columns(names: Iterable[str] = (*COUNTED, *SUMMED)) -> Iterator[str]:
    """The names of the roll-up columns that hold these measures, in their order."""
    yield "requests"
    for name in names:
        if name in SUMMED:
            yield from (f"{name}_count", f"{name}_high", f"{name}_low")
        else:
            yield name


ROLLUPS: Final = Table(
    "routing_rollups",
    Base.metadata,
    _whole("span_ms", key=True),  # the bucket's length: a quarter of an hour, an hour, a UTC day
    _whole("start", key=True),  # the bucket's first millisecond
    _whole("dimension_id", key=True),
    *map(_whole, measure_columns()),
    sqlite_with_rowid=False,
)
"""Counts and sums of the rows of one time bucket and one combination of dimensions.

They include the rows that were folded, up to the watermark in `PROGRESS`. A sum is two integers,
``high * 2**31 + low``, in the units of its domain; see `lynkr_store.rollups.measures`.
"""

PROGRESS: Final = Table(
    "lynkr_store_progress",
    Base.metadata,
    _text("name", key=True),
    _whole("value"),
    sqlite_with_rowid=False,
)
"""Named numbers, such as the watermark, that say how far maintenance has come."""

CHANGES: Final = Table(
    "routing_changes",
    Base.metadata,
    _id(),
    _whole("start"),  # the quarter's first millisecond
    _whole("newest", nullable=True),  # a deleted row's instant; NULL if rows were only changed
    Index("ix_routing_changes_start", "start"),  # what was changed in a window
    sqlite_autoincrement=True,
)
"""Quarters of an hour in which rows were changed or deleted; triggers insert them.

Until maintenance has recomputed the quarter's roll-ups, answers read its rows.
"""

NOTES: Final = Table(
    "lynkr_store_revisions",
    Base.metadata,
    _text("revision", key=True),
    _whole("rolling"),  # 1: a release that does not know the revision can still read and write
    _text("after"),  # the revision before it
    _text("release"),  # the release that applied it
    sqlite_with_rowid=False,
)
"""Tells older releases whether they can work with a newer revision, and names the release
that applied it."""

INDEXES: Final = tuple(index for table in Base.metadata.sorted_tables for index in table.indexes)
"""Every index the store uses. Revisions build them on empty tables, ``maintain()`` on tables with
rows. A missing index makes answers slower, and never wrong."""
