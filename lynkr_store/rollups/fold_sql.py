"""The statements by which a fold reads rows and writes roll-ups. Nothing is executed here."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Delete,
    FromClause,
    Insert,
    Select,
    String,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.dml import ReturningDelete

from lynkr_store.backend import Backend
from lynkr_store.db.functions import count_of, each_row, inserting, same, unindexed, whole_number
from lynkr_store.db.models import CHANGES, DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY, measure_columns
from lynkr_store.rollups import measures
from lynkr_store.rollups.buckets import BUCKET_LENGTHS_MS, floor_to
from lynkr_store.rollups.state import WATERMARK, folded_between, in_domain
from lynkr_store.schemas.units import DAY_MS, INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS

ROLLUP: Final = ("span_ms", "start", "dimension_id", *measure_columns())
"""The columns of a roll-up."""

MOST_ADDED: Final = 512
"""Roll-ups that one statement adds on SQLite: half of the 32,766 parameters that it allows."""

_BY: Final = ("provider", "model", "tier", "request_type")
_t: Final = TELEMETRY.c


def unlocked_watermark() -> Select[*tuple[Any, ...]]:
    """The watermark, which PostgreSQL locks; no row if another transaction has locked it."""
    row = select(PROGRESS.c.value).where(PROGRESS.c.name == WATERMARK)
    return row.with_for_update(skip_locked=True)


def first_above(row_id: int) -> Select[*tuple[Any, ...]]:
    """The first id above the given one, or NULL."""
    return select(func.min(_t.id)).where(_t.id > row_id)


class RowStatements(NamedTuple):
    """Statements about one set of rows.

    Attributes:
        new_dimensions: The combinations of the rows' dimensions that are not in the table yet.
        quarters: The measures by quarter and dimension: ``start``, ``dimension_id``, the timestamps
            ``first`` and ``last``, and the measures. Leaves out rows whose dimensions are not in
            the table.
        number: The number of rows.
    """

    new_dimensions: Select[*tuple[Any, ...]]
    quarters: Select[*tuple[Any, ...]]
    number: Select[int]


@cache
def step_statements() -> RowStatements:
    """Statements about the rows with ``after < id <= upto``."""
    return row_statements(_t.id > whole_number("after"), _t.id <= whole_number("upto"))


@cache
def number_between() -> Select[*tuple[Any, ...]]:
    """How many rows of a step have timestamps from ``first`` to ``last``, counted by the index.

    A page of the index holds a hundred times as many rows as a page of the table. ``seen`` is how
    many rows of any step are in that range. If it is ``most``, the count stopped there and
    ``found`` is too low.
    """
    in_range = (
        select(_t.id)
        .where(_t.timestamp >= whole_number("first"), _t.timestamp < whole_number("last") + 1)
        .limit(whole_number("most"))
        .subquery()
    )
    mine = and_(in_range.c.id > whole_number("after"), in_range.c.id <= whole_number("upto"))
    return select(func.count().label("seen"), count_of(case((mine, 1))).label("found")).select_from(
        in_range
    )


@cache
def quarter_statements() -> RowStatements:
    """Statements about the folded rows of one quarter; take `state.quarter_parameters`."""
    return row_statements(*folded_between("quarter"))


def row_statements(*conditions: ColumnElement[bool]) -> RowStatements:
    """Statements about the rows that meet all conditions and have a timestamp in its domain."""
    mine = [_t[name] for name in _BY]
    rows = select(*mine).where(*conditions, in_domain).distinct().subquery()
    new = (
        select(*(rows.c[name] for name in _BY))
        .select_from(rows.outerjoin(DIMENSIONS, _same_dimensions(rows)))
        .where(DIMENSIONS.c.id.is_(None))
    )
    instant = cast(_t.timestamp, BigInteger)
    each = each_row(
        select(
            instant.label("instant"),
            (instant - instant % QUARTER_MS).label("start"),
            DIMENSIONS.c.id.label("dimension_id"),
            *measures.of_a_row(),
        )
        .select_from(TELEMETRY.join(DIMENSIONS, _same_dimensions(TELEMETRY)))
        .where(*conditions, in_domain)
    )
    keys = (each.c.start, each.c.dimension_id)
    ends = func.min(each.c.instant).label("first"), func.max(each.c.instant).label("last")
    return RowStatements(
        new,
        select(*keys, *ends, *measures.of_rows(each.c)).group_by(*keys),
        select(func.count()).select_from(TELEMETRY).where(*conditions, in_domain),
    )


def _same_dimensions(rows: FromClause) -> ColumnElement[bool]:
    # provider is never NULL, and both databases join best by an equality
    others = (same(DIMENSIONS.c[name], unindexed(rows.c[name])) for name in _BY[1:])
    return and_(DIMENSIONS.c.provider == unindexed(rows.c.provider), *others)


@cache
def add_to_rollups() -> Insert:
    """Add measures to roll-ups and create those that do not exist; PostgreSQL.

    Takes the values of each column of `ROLLUP`, see `as_array`.
    """
    arrays = (cast(bindparam(name, type_=String), ARRAY(BigInteger)) for name in ROLLUP)
    rows = func.unnest(*arrays).table_valued(*ROLLUP).render_derived()
    into = inserting(Backend.POSTGRESQL, ROLLUPS)
    return _adding(into.from_select(ROLLUP, select(*(rows.c[name] for name in ROLLUP))))


def as_array(values: Iterable[int]) -> str:
    """The values as PostgreSQL's literal of an array.

    The driver's own conversion of lists took a sixth of a fold's time.
    """
    return f"{{{','.join(map(str, values))}}}"


@cache
def add_text(count: int) -> str:
    """The same for SQLite, in one statement: ``executemany`` takes the GIL for each roll-up.

    Takes the columns of ``count`` roll-ups (at most `MOST_ADDED`), one roll-up after the other.
    """
    text = str(_adding(inserting(Backend.SQLITE, ROLLUPS)).compile(dialect=sqlite.dialect()))
    one = f"({', '.join('?' * len(ROLLUP))})"
    return text.replace(one, ", ".join([one] * count), 1)


def _adding(into: Any) -> Insert:
    sums = {name: ROLLUPS.c[name] + into.excluded[name] for name in measure_columns()}
    statement: Insert = into.on_conflict_do_update(
        index_elements=list(ROLLUPS.primary_key), set_=sums
    )
    return statement


@cache
def requests_of_buckets() -> Select[*tuple[Any, ...]]:
    """How many rows the buckets of one length with the given starts hold.

    Takes ``span_ms`` and ``starts``. Gives NULL if no bucket exists.
    """
    return select(cast(func.sum(ROLLUPS.c.requests), BigInteger)).where(
        ROLLUPS.c.span_ms == whole_number("span_ms"),
        ROLLUPS.c.start.in_(bindparam("starts", type_=BigInteger, expanding=True)),
    )


def drop_buckets(starts: Mapping[int, int]) -> Delete:
    """Delete one bucket of each given length, at its start."""
    return delete(ROLLUPS).where(
        or_(*(_bucket(span, start) for span, start in sorted(starts.items())))
    )


def _bucket(span_ms: int, start: int) -> ColumnElement[bool]:
    return and_(ROLLUPS.c.span_ms == span_ms, ROLLUPS.c.start == start)


def sum_of_quarters(span_ms: int, start: int) -> Insert:
    """Insert the roll-ups of an hour or a day as the sum of its quarters."""
    quarters = (
        select(
            literal(span_ms, BigInteger),
            literal(start, BigInteger),
            ROLLUPS.c.dimension_id,
            *measures.of_rollups(),
        )
        .where(
            ROLLUPS.c.span_ms == QUARTER_MS,
            ROLLUPS.c.start >= start,
            ROLLUPS.c.start < start + span_ms,
        )
        .group_by(ROLLUPS.c.dimension_id)
    )
    return insert(ROLLUPS).from_select(ROLLUP, quarters)


def first_from(instant: int, kept_from: int) -> Select[*tuple[Any, ...]]:
    """The first row's timestamp from an instant on, and the first quarter in the roll-ups; or NULL.

    Args:
        instant: In epoch milliseconds.
        kept_from: Quarters before this instant are history and are found only by their rows.
    """
    rows = select(func.min(_t.timestamp)).where(
        _t.timestamp >= instant, _t.timestamp < INSTANT_MAX_MS
    )
    quarters = select(func.min(ROLLUPS.c.start)).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start >= max(instant, kept_from)
    )
    return select(cast(rows.scalar_subquery(), BigInteger), quarters.scalar_subquery())


def oldest_instant() -> Select[*tuple[Any, ...]]:
    """The first timestamp of any row, folded or not, that is in its domain; or NULL."""
    return select(cast(func.min(_t.timestamp), BigInteger)).where(in_domain)


def drop_from(start: int) -> Delete:
    """Delete the buckets of every length that contain or follow the start of a quarter."""
    return delete(ROLLUPS).where(
        or_(
            *(
                and_(ROLLUPS.c.span_ms == span, ROLLUPS.c.start >= floor_to(span, start))
                for span in BUCKET_LENGTHS_MS
            )
        )
    )


def days_gone(before: int, most: int = 1) -> Select[*tuple[Any, ...]]:
    """The first days before an instant that the roll-ups hold and that have no row left.

    Reads all rows before the instant, so it must be one before which rows were removed.
    """
    instant = cast(_t.timestamp, BigInteger)
    has_rows = select(instant - instant % literal(DAY_MS, BigInteger)).where(
        _t.timestamp >= INSTANT_MIN_MS, _t.timestamp < before
    )
    return (
        select(ROLLUPS.c.start)
        .where(
            ROLLUPS.c.span_ms == DAY_MS,
            ROLLUPS.c.start <= before - DAY_MS,
            ROLLUPS.c.start.not_in(has_rows.distinct()),
        )
        .distinct()
        .order_by(ROLLUPS.c.start)
        .limit(most)
    )


def trim(days: Sequence[int]) -> Delete:
    """Delete all roll-ups of whole days, given by their starts; at least one."""
    start = ROLLUPS.c.start
    return delete(ROLLUPS).where(
        ROLLUPS.c.span_ms.in_(BUCKET_LENGTHS_MS),
        start >= min(days),
        start < max(days) + DAY_MS,
        (start - start % literal(DAY_MS, BigInteger)).in_(days),
    )


@cache
def deleted_upto() -> Select[*tuple[Any, ...]]:
    """The greatest timestamp of a deleted row of the quarter ``start``; NULL without one."""
    return select(func.max(CHANGES.c.newest)).where(CHANGES.c.start == whole_number("start"))


def newest_change() -> Select[*tuple[Any, ...]]:
    """The id of the last change entry, or NULL."""
    return select(func.max(CHANGES.c.id))


@cache
def first_changed() -> Select[*tuple[Any, ...]]:
    """The first quarter with change entries up to the id ``upto``, or NULL."""
    return select(func.min(CHANGES.c.start)).where(unindexed(CHANGES.c.id) <= whole_number("upto"))


@cache
def take_changes() -> ReturningDelete[*tuple[Any, ...]]:
    """Delete the change entries of the quarter ``start``; returns ``newest`` of each entry."""
    return (
        delete(CHANGES).where(CHANGES.c.start == whole_number("start")).returning(CHANGES.c.newest)
    )


def drop_changes(*, before: int | None = None, since: int | None = None) -> Delete:
    """Delete the change entries of quarters that begin before an instant, or from an instant on."""
    start = CHANGES.c.start
    return delete(CHANGES).where(
        *([] if before is None else [start < before]), *([] if since is None else [start >= since])
    )


@cache
def instant_after() -> Select[*tuple[Any, ...]]:
    """The timestamp of the row ``rows`` places after the first row from ``since`` on.

    No row if there are fewer. The end of the domain is no condition of the search, see `nth_after`.
    """
    nth = (
        select(_t.timestamp)
        .where(_t.timestamp >= whole_number("since"))
        .order_by(_t.timestamp)
        .limit(1)
        .offset(whole_number("rows"))
        .subquery()
    )
    instant = nth.c.timestamp
    return select(cast(instant, BigInteger)).where(instant < INSTANT_MAX_MS)


@cache
def counts_there() -> CompoundSelect[int, int]:
    """How many rows up to ``watermark`` each quarter in ``[since, until)`` has, in two parts.

    The first part counts all rows, by the index of timestamps alone: PostgreSQL would have to read
    the table for each row's id. The second, below 0, counts those above the watermark: few, shortly
    after a fold. One statement sees no row in one part alone, whatever is stored meanwhile.
    """
    instant = cast(_t.timestamp, BigInteger)
    start = (instant - instant % QUARTER_MS).label("start")
    since, until = whole_number("since"), whole_number("until")
    everything = (
        select(start, func.count().label("requests"))
        .where(_t.timestamp >= since, _t.timestamp < until)
        .group_by(start)
    )
    above = (
        select(start, -func.count())
        .where(
            _t.id > whole_number("watermark"),
            unindexed(_t.timestamp) >= since,
            unindexed(_t.timestamp) < until,
        )
        .group_by(start)
    )
    return union_all(everything, above)


@cache
def counts_folded() -> Select[*tuple[Any, ...]]:
    """The same for a table that is distributed, of which the two parts would see two moments."""
    instant = cast(_t.timestamp, BigInteger)
    start = (instant - instant % QUARTER_MS).label("start")
    return (
        select(start, func.count().label("requests"))
        .where(
            _t.timestamp >= whole_number("since"),
            _t.timestamp < whole_number("until"),
            unindexed(_t.id) <= whole_number("watermark"),
        )
        .group_by(start)
    )


@cache
def counts_known() -> Select[*tuple[Any, ...]]:
    """How many rows the roll-ups hold of each quarter in ``[since, until)``."""
    return (
        select(ROLLUPS.c.start, cast(func.sum(ROLLUPS.c.requests), BigInteger).label("requests"))
        .where(*_quarters_between())
        .group_by(ROLLUPS.c.start)
    )


@cache
def known_quarters() -> Select[*tuple[Any, ...]]:
    """The roll-ups of the quarters in ``[since, until)``: keys and measures."""
    return select(*(ROLLUPS.c[name] for name in ROLLUP[1:])).where(*_quarters_between())


@cache
def range_statements() -> RowStatements:
    """Statements about the folded rows in ``[between_since, between_until)``."""
    return row_statements(*folded_between("between"))


def _quarters_between() -> tuple[ColumnElement[bool], ...]:
    return (
        ROLLUPS.c.span_ms == QUARTER_MS,
        ROLLUPS.c.start >= whole_number("since"),
        ROLLUPS.c.start < whole_number("until"),
    )
