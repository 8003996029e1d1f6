"""Pure statement builders: a filter goes in, a statement comes out; nothing is executed here."""

from collections.abc import Iterator
from typing import Any, Final, assert_never

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    Insert,
    Select,
    Update,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.types import NullType

from lynkr_store.backend import Backend
from lynkr_store.domains import COUNT, DOLLARS, MILLISECONDS, SCORE
from lynkr_store.filters import RoutingFilter
from lynkr_store.functions import exact_sum, measured
from lynkr_store.models import LEDGER, TELEMETRY
from lynkr_store.schemas import Cursor, RoutingRow, RoutingRowBrief

_t: Final = TELEMETRY.c

_SEVERAL: Final = (
    "provider",
    "tier",
    "model",
    "session_id",
    "request_id",
    "request_type",
    "routing_method",
    "status_code",
)
_BOUNDED: Final = {
    "latency_ms": MILLISECONDS,
    "cost_usd": DOLLARS,
    "quality_score": SCORE,
    "input_tokens": COUNT,
    "output_tokens": COUNT,
}

_HIGH_TIERS: Final = ("REASONING", "COMPLEX")
_HIGH_QUALITY: Final = 80  # the gateway's thresholds
_FEW_TOKENS: Final = 50
_LOW_QUALITY: Final = 45


def insert_rows() -> Insert:
    """Insert rows given as one mapping each, of every column but ``id``."""
    return insert(TELEMETRY)


def enter_batch(
    backend: Backend, batch_id: str, row_count: int, now_ms: int
) -> ReturningInsert[*tuple[Any, ...]]:
    """Enter a batch in the ledger and return its id; no row where it is there already.

    An entry that another transaction has not yet committed is waited for.
    """
    values = {"batch_id": batch_id, "row_count": row_count, "committed_at": now_ms}
    match backend:
        case Backend.SQLITE:
            into_sqlite = sqlite_insert(LEDGER).values(values)
            return into_sqlite.on_conflict_do_nothing().returning(LEDGER.c.batch_id)
        case Backend.POSTGRESQL:
            into_postgresql = postgresql_insert(LEDGER).values(values)
            return into_postgresql.on_conflict_do_nothing().returning(LEDGER.c.batch_id)
        case _:
            assert_never(backend)


def batch_rows(batch_id: str) -> Select[*tuple[Any, ...]]:
    """How many rows of the batch were stored."""
    return select(LEDGER.c.row_count).where(LEDGER.c.batch_id == batch_id)


def correct_batch(batch_id: str, row_count: int) -> Update:
    """Set how many rows of the batch were stored."""
    return update(LEDGER).where(LEDGER.c.batch_id == batch_id).values(row_count=row_count)


def expire_batches(cutoff_ms: int, limit: int) -> Delete:
    """Delete up to ``limit`` of the ledger's entries before the cutoff, the oldest first."""
    oldest = (
        select(LEDGER.c.batch_id)
        .where(LEDGER.c.committed_at < cutoff_ms)
        .order_by(LEDGER.c.committed_at)
        .limit(limit)
    )
    return delete(LEDGER).where(LEDGER.c.batch_id.in_(oldest))


def rows(
    criteria: RoutingFilter,
    since_ms: int | None,
    until_ms: int | None,
    *,
    limit: int,
    before: Cursor | None,
    include_text: bool,
) -> Select[*tuple[Any, ...]]:
    """Rows by ``(timestamp, id)`` descending, those after the cursor in this order."""
    model = RoutingRow if include_text else RoutingRowBrief
    statement = select(*(column for column in _t if column.name in model.model_fields))
    statement = statement.where(*_matching(criteria))
    if since_ms is not None:
        statement = statement.where(_t.timestamp >= since_ms)
    if until_ms is not None:
        statement = statement.where(_t.timestamp < until_ms)
    if before is not None:
        place = literal(before.timestamp, _raw_type(before)), literal(before.id, BigInteger)
        statement = statement.where(tuple_(_t.timestamp, _t.id) < tuple_(*place))
    return statement.order_by(_t.timestamp.desc(), _t.id.desc()).limit(limit)


def routing_stats(since_ms: int, until_ms: int) -> Select[*tuple[Any, ...]]:
    """One row for each provider and tier: requests, errors, sums of latency, quality and cost."""
    return _over(
        since_ms,
        until_ms,
        _t.provider,
        _t.tier,
        *_judged(),
        func.count(_t.error_type).label("errors"),
        *exact_sum("latency", _t.latency_ms, MILLISECONDS),
        *exact_sum("quality", _t.quality_score, SCORE),
        *exact_sum("cost", _t.cost_usd, DOLLARS),
    ).group_by(_t.provider, _t.tier)


def provider_stats(provider: str, since_ms: int, until_ms: int) -> Select[*tuple[Any, ...]]:
    """One row with the provider's requests, errors, fallbacks and sums; of 0 requests if none."""
    return _over(
        since_ms,
        until_ms,
        func.count().label("requests"),
        func.count(_t.error_type).label("errors"),
        func.count(case((_flag("was_fallback", value=True), 1))).label("fallbacks"),
        *exact_sum("latency", _t.latency_ms, MILLISECONDS),
        *exact_sum("quality", _t.quality_score, SCORE),
        *exact_sum("output_tokens", _t.output_tokens, COUNT),
        *exact_sum("speed", _t.tokens_per_second, SCORE),
        *exact_sum("cost", _t.cost_usd, DOLLARS),
    ).where(*_matching(RoutingFilter(provider=provider)))


def routing_accuracy(since_ms: int, until_ms: int) -> Select[*tuple[Any, ...]]:
    """One row: requests, and how many were over- and under-provisioned."""
    return _over(since_ms, until_ms, *_judged())


def delete_older(cutoff_ms: int, limit: int) -> Delete:
    """Delete up to ``limit`` of the rows before the cutoff, the oldest first."""
    oldest = (
        select(_t.id).where(_t.timestamp < cutoff_ms).order_by(_t.timestamp, _t.id).limit(limit)
    )
    return delete(TELEMETRY).where(_t.id.in_(oldest))


def oldest_timestamp() -> Select[*tuple[Any, ...]]:
    """The least stored timestamp."""
    return select(func.min(_t.timestamp))


def _over(since_ms: int, until_ms: int, *columns: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    """The columns over a window.

    A timestamp that is no number lies in none: SQLite orders every text after every number.
    """
    return select(*columns).where(_t.timestamp >= since_ms, _t.timestamp < until_ms)


def _judged() -> tuple[ColumnElement[Any], ...]:
    quality = measured(_t.quality_score, SCORE)
    over = and_(
        quality > literal(_HIGH_QUALITY),
        measured(_t.output_tokens, COUNT) < literal(_FEW_TOKENS),
        _t.tier.in_(_HIGH_TIERS),
    )
    under = and_(quality < literal(_LOW_QUALITY), _t.tier == "SIMPLE")
    return (
        func.count().label("requests"),
        func.count(case((over, 1))).label("over"),
        func.count(case((under, 1))).label("under"),
    )


def _matching(criteria: RoutingFilter) -> Iterator[ColumnElement[bool]]:
    for name in _SEVERAL:
        values = getattr(criteria, name)
        if values is not None:
            yield _t[name] == values[0] if len(values) == 1 else _t[name].in_(values)
    if criteria.has_error is not None:
        yield _t.error_type.is_not(None) if criteria.has_error else _t.error_type.is_(None)
    if criteria.was_fallback is not None:
        yield _flag("was_fallback", value=criteria.was_fallback)
    for name, domain in _BOUNDED.items():
        value = measured(_t[name], domain)
        low, high = getattr(criteria, f"min_{name}"), getattr(criteria, f"max_{name}")
        if low is not None:
            yield value >= literal(low)
        if high is not None:
            yield value <= literal(high)


def _flag(name: str, *, value: bool) -> ColumnElement[bool]:
    return _t[name] == literal(int(value), BigInteger)


def _raw_type(cursor: Cursor) -> Any:
    """A type that binds another writer's odd timestamp as it is."""
    return BigInteger() if type(cursor.timestamp) is int else NullType()
