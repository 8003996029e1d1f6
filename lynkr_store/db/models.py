"""The declarative tables.

Columns keep the gateway's names and physical order; what each means is said at
`lynkr_store.schemas.RoutingEvent`. Indexes keep the gateway's names, which do not begin with the
table's: the gateway would make them again under these.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Identity,
    Index,
    Integer,
    MetaData,
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
    Score,
    TokenCount,
    WholeNumber,
    Words,
    YesNo,
)
from lynkr_store.schemas.units import COUNT, DOLLARS, MILLISECONDS, SCORE

_RowId = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    """The base of the store's tables; its metadata can stand in a host's Alembic environment."""

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
        # the store's own: the newest rows of a tier, of a model; a third stands below
        Index("ix_routing_telemetry_tier_timestamp", "tier", "timestamp"),
        Index("ix_routing_telemetry_model_timestamp", "model", "timestamp"),
        {"sqlite_autoincrement": True},
    )


class SavingsEvent(Base):
    """Tokens that compression or a cache saved, as the gateway notes them."""

    __tablename__ = "savings_events"

    id: Mapped[int] = mapped_column(_RowId, Identity(), primary_key=True)
    timestamp: Mapped[Instant]
    category: Mapped[Words]
    tokens_saved: Mapped[TokenCount]

    __table_args__ = (
        Index("idx_savings_timestamp", "timestamp"),  # a summary since an instant
        {"sqlite_autoincrement": True},
    )


class IngestBatch(Base):
    """The ledger: one row for each batch of records that was stored, written with its rows.

    A batch whose commit went unanswered is tried again under the same id, and finds itself here.
    """

    __tablename__ = "ingest_batches"

    batch_id: Mapped[Words] = mapped_column(primary_key=True)
    row_count: Mapped[Count]
    """Rows stored; the batch may have had more, which the database refused."""
    committed_at: Mapped[Instant]

    __table_args__ = (
        Index("ix_ingest_batches_committed_at", "committed_at"),  # expiry, the oldest first
        {"sqlite_with_rowid": False},
    )


class Dimension(Base):
    """One combination of values by which roll-ups are kept apart; NULL and ``''`` are two."""

    __tablename__ = "routing_dimensions"

    id: Mapped[int] = mapped_column(_RowId, Identity(), primary_key=True)
    provider: Mapped[Words]
    model: Mapped[Words | None]
    tier: Mapped[Words | None]
    request_type: Mapped[Words | None]


COUNTED: Final = ("errors", "fallbacks", "over_provisioned", "under_provisioned")
"""What roll-ups count, in addition to the requests."""

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
    """The names of the columns of roll-ups that hold these measures, in their order."""
    yield "requests"
    for name in names:
        if name in SUMMED:
            yield from (f"{name}_count", f"{name}_high", f"{name}_low")
        else:
            yield name


class Rollup(Base):
    """Counts and sums of the rows of one bucket of time and one combination of dimensions.

    It covers the folded rows, up to the watermark in `Progress`. `measure_columns` names its other
    columns. A sum is two integers, ``high * 2**31 + low``, in the units of its domain; see
    `lynkr_store.rollups.measures`.
    """

    __tablename__ = "routing_rollups"

    span_ms: Mapped[Count] = mapped_column(primary_key=True)
    """Its length: a quarter of an hour, an hour or a day, each from a whole one on in UTC."""
    start: Mapped[Count] = mapped_column(primary_key=True)
    """Its first millisecond."""
    dimension_id: Mapped[Count] = mapped_column(primary_key=True)

    __table_args__ = ({"sqlite_with_rowid": False},)


for _name in measure_columns():
    setattr(Rollup, _name, mapped_column(WholeNumber, nullable=False))


class Progress(Base):
    """How far the work behind the rows has come, by its name."""

    __tablename__ = "lynkr_store_progress"

    name: Mapped[Words] = mapped_column(primary_key=True)
    value: Mapped[Count]

    __table_args__ = ({"sqlite_with_rowid": False},)


class Change(Base):
    """A quarter of an hour in which rows were changed or deleted; triggers enter it.

    Until maintenance has made the quarter's roll-ups again, answers read its rows.
    """

    __tablename__ = "routing_changes"

    id: Mapped[int] = mapped_column(_RowId, Identity(), primary_key=True)
    start: Mapped[Count]
    """The quarter's first millisecond."""
    newest: Mapped[Count | None]
    """The greatest instant of a row that was deleted; None where rows were only changed."""

    __table_args__ = (
        Index("ix_routing_changes_start", "start"),  # what was changed in a window
        {"sqlite_autoincrement": True},
    )


class RevisionNote(Base):
    """What a release that applied a revision has to say to older ones."""

    __tablename__ = "lynkr_store_revisions"

    revision: Mapped[Words] = mapped_column(primary_key=True)
    rolling: Mapped[Count]
    """1: a release that does not know the revision can go on reading and writing."""
    after: Mapped[Words]
    """The revision before it."""
    release: Mapped[Words]
    """The release that applied it, and knows it."""

    __table_args__ = ({"sqlite_with_rowid": False},)


TELEMETRY: Final = Base.metadata.tables[RoutingTelemetry.__tablename__]

FAILED: Final[ColumnElement[int]] = cast(TELEMETRY.c.error_type.is_not(None), Integer)
"""1 where a row has an error type, else 0."""

# The newest rows of a provider, of its errors, and of all errors: those of each provider, merged.
Index(
    "ix_routing_telemetry_provider_failed_timestamp",
    TELEMETRY.c.provider,
    FAILED,
    TELEMETRY.c.timestamp,
)

SAVINGS: Final = Base.metadata.tables[SavingsEvent.__tablename__]

LEDGER: Final = Base.metadata.tables[IngestBatch.__tablename__]

DIMENSIONS: Final = Base.metadata.tables[Dimension.__tablename__]

ROLLUPS: Final = Base.metadata.tables[Rollup.__tablename__]

PROGRESS: Final = Base.metadata.tables[Progress.__tablename__]

CHANGES: Final = Base.metadata.tables[Change.__tablename__]

NOTES: Final = Base.metadata.tables[RevisionNote.__tablename__]

INDEXES: Final = tuple(index for table in Base.metadata.sorted_tables for index in table.indexes)
"""Every index the store uses: revisions build them on empty tables, ``maintain()`` on tables with
rows. One that is missing slows answers and changes none."""
