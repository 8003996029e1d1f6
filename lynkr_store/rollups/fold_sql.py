"""What a fold reads of the rows, and writes to the roll-ups. Nothing is executed here."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    FromClause,
    Insert,
    Select,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.dml import ReturningDelete

from lynkr_store.backend import Backend
from lynkr_store.db.functions import count_of, each_row, inserting, same, unindexed, whole_number
from lynkr_store.db.models import CHANGES, DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.rollups import measures
from lynkr_store.rollups.buckets import SPANS_MS, floor_to
from lynkr_store.rollups.state import folded_in, in_domain
from lynkr_store.schemas.units import DAY_MS, INSTANT_MAX_MS, QUARTER_MS

ROLLUP: Final = ("span_ms", "start", "dimension_id", *measures.columns_of())
"""The columns of a roll-up."""

MOST_ADDED: Final = 512
"""Roll-ups that one statement adds on SQLite: half of the 32,766 values that it may take."""

_BY: Final = ("provider", "model", "tier", "request_type")
_t: Final = TELEMETRY.c


def watermark() -> Select[*tuple[Any, ...]]:
    """The watermark; on PostgreSQL nobody else moves it before the transaction ends."""
    return select(PROGRESS.c.value).where(PROGRESS.c.name == "folded").with_for_update()


def first_above(row_id: int) -> Select[*tuple[Any, ...]]:
    """The first id above another, or NULL."""
    return select(func.min(_t.id)).where(_t.id > row_id)


def last_of_step(after: int, upto: int, rows: int) -> Select[*tuple[Any, ...]]:
    """The id of the last of so many rows after an id; none if there are not as many."""
    return (
        select(_t.id).where(_t.id > after, _t.id <= upto).order_by(_t.id).limit(1).offset(rows - 1)
    )


def newest_id() -> Select[*tuple[Any, ...]]:
    """The greatest id, or NULL."""
    return select(func.max(_t.id))


class Rows(NamedTuple):
    """Statements on some rows.

    Attributes:
        new_dimensions: The combinations of their dimensions that are not known.
        enter_dimensions: Enters these.
        quarters: Their measures by quarter and dimension: ``start``, ``dimension_id``, the instants
            ``first`` and ``last``, measures. Without those whose dimensions are not known.
        number: How many they are.
    """

    new_dimensions: Select[*tuple[Any, ...]]
    enter_dimensions: Insert
    quarters: Select[*tuple[Any, ...]]
    number: Select[int]


@cache
def rows_of_step() -> Rows:
    """The rows with ``after < id <= upto``."""
    return rows_where(_t.id > whole_number("after"), _t.id <= whole_number("upto"))


@cache
def number_between() -> Select[*tuple[Any, ...]]:
    """How many rows of a step have instants from ``first`` to ``last``, by their index.

    Which holds a hundred times as many rows to a page as the table does. ``seen`` is how many rows
    it has there, of any step; where these are ``most``, or more, ``found`` is not the whole number.
    """
    some = (
        select(_t.id)
        .where(_t.timestamp >= whole_number("first"), _t.timestamp < whole_number("last") + 1)
        .limit(whole_number("most"))
        .subquery()
    )
    mine = and_(some.c.id > whole_number("after"), some.c.id <= whole_number("upto"))
    return select(func.count().label("seen"), count_of(case((mine, 1))).label("found")).select_from(
        some
    )


@cache
def rows_of_quarter() -> Rows:
    """The rows of one `quarter`."""
    return rows_where(*folded_in("quarter"))


def folded_rows(folded: int, condition: ColumnElement[bool]) -> Rows:
    """Of some rows those up to the watermark."""
    return rows_where(condition, unindexed(_t.id) <= folded)


def rows_where(*conditions: ColumnElement[bool]) -> Rows:
    """Statements on the rows that meet all conditions and name an instant in its domain."""
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
    return Rows(
        new,
        insert(DIMENSIONS).from_select(list(_BY), new),
        select(*keys, *ends, *measures.of_rows(each.c)).group_by(*keys),
        select(func.count()).select_from(TELEMETRY).where(*conditions, in_domain),
    )


def _same_dimensions(rows: FromClause) -> ColumnElement[bool]:
    # provider is never NULL, and an equality is what both databases join by best
    others = (same(DIMENSIONS.c[name], unindexed(rows.c[name])) for name in _BY[1:])
    return and_(DIMENSIONS.c.provider == unindexed(rows.c.provider), *others)


@cache
def add_to_rollups() -> Insert:
    """Add measures to roll-ups, which are made if they are not there; PostgreSQL.

    Takes a list for each column of `ROLLUP`.
    """
    lists = (bindparam(name, type_=ARRAY(BigInteger)) for name in ROLLUP)
    rows = func.unnest(*lists).table_valued(*ROLLUP).render_derived()
    into = inserting(Backend.POSTGRESQL, ROLLUPS)
    return _adding(into.from_select(ROLLUP, select(*(rows.c[name] for name in ROLLUP))))


@cache
def add_text(count: int) -> str:
    """The same for SQLite, where ``executemany`` would wait for the interpreter at each roll-up.

    Takes the columns of one after the other; ``count`` of them, `MOST_ADDED` at most.
    """
    text = str(_adding(inserting(Backend.SQLITE, ROLLUPS)).compile(dialect=sqlite.dialect()))
    one = f"({', '.join('?' * len(ROLLUP))})"
    return text.replace(one, ", ".join([one] * count), 1)


def _adding(into: Any) -> Insert:
    sums = {name: ROLLUPS.c[name] + into.excluded[name] for name in measures.columns_of()}
    statement: Insert = into.on_conflict_do_update(
        index_elements=list(ROLLUPS.primary_key), set_=sums
    )
    return statement


@cache
def requests_of_buckets() -> Select[*tuple[Any, ...]]:
    """How many rows roll-ups hold, those of some starts of one length.

    Takes ``span_ms`` and ``starts``; where none is there, gives NULL.
    """
    return select(cast(func.sum(ROLLUPS.c.requests), BigInteger)).where(
        ROLLUPS.c.span_ms == whole_number("span_ms"),
        ROLLUPS.c.start.in_(bindparam("starts", type_=BigInteger, expanding=True)),
    )


def drop_empty() -> Delete:
    """Delete roll-ups of no row, which erasure leaves behind."""
    return delete(ROLLUPS).where(ROLLUPS.c.requests == 0)


def drop_buckets(starts: Mapping[int, int]) -> Delete:
    """Delete the roll-ups of some lengths, each with its start."""
    return delete(ROLLUPS).where(
        or_(*(_bucket(span, start) for span, start in sorted(starts.items())))
    )


def _bucket(span_ms: int, start: int) -> ColumnElement[bool]:
    return and_(ROLLUPS.c.span_ms == span_ms, ROLLUPS.c.start == start)


def sum_of_quarters(span_ms: int, start: int) -> Insert:
    """Make the roll-ups of a longer span of those of its quarters."""
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
    """The first row's instant from an instant on, and the first quarter known, or NULL.

    Args:
        instant: In epoch milliseconds.
        kept_from: Quarters before it are history, and only looked for by their rows.
    """
    rows = select(func.min(_t.timestamp)).where(
        _t.timestamp >= instant, _t.timestamp < INSTANT_MAX_MS
    )
    quarters = select(func.min(ROLLUPS.c.start)).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start >= max(instant, kept_from)
    )
    return select(cast(rows.scalar_subquery(), BigInteger), quarters.scalar_subquery())


def oldest_instant() -> Select[*tuple[Any, ...]]:
    """The first instant of any row, folded or not, in its domain; or NULL."""
    return select(cast(func.min(_t.timestamp), BigInteger)).where(in_domain)


def drop_from(start: int) -> Delete:
    """Delete the roll-ups of every length that begin, or whose quarters do, from a quarter on."""
    return delete(ROLLUPS).where(
        or_(
            *(
                and_(ROLLUPS.c.span_ms == span, ROLLUPS.c.start >= floor_to(span, start))
                for span in SPANS_MS
            )
        )
    )


def days_gone(before: int, most: int = 1) -> Select[*tuple[Any, ...]]:
    """The first days that end before an instant, which the roll-ups know and that have no row."""
    day = (
        select(ROLLUPS.c.start)
        .where(ROLLUPS.c.span_ms == DAY_MS, ROLLUPS.c.start <= before - DAY_MS)
        .distinct()
        .subquery()
    )
    has_row = exists().where(
        _t.timestamp >= day.c.start,
        _t.timestamp < day.c.start + literal(DAY_MS, BigInteger),
    )
    return select(day.c.start).where(~has_row).order_by(day.c.start).limit(most)


def trim(days: Sequence[int]) -> Delete:
    """Delete the roll-ups of whole days, one at least, that are given by their starts."""
    start = ROLLUPS.c.start
    return delete(ROLLUPS).where(
        ROLLUPS.c.span_ms.in_(SPANS_MS),
        start >= min(days),
        start < max(days) + DAY_MS,
        (start - start % literal(DAY_MS, BigInteger)).in_(days),
    )


@cache
def deleted_upto() -> Select[*tuple[Any, ...]]:
    """The greatest instant of a row that was deleted of the quarter ``start``; NULL for none."""
    return select(func.max(CHANGES.c.newest)).where(CHANGES.c.start == whole_number("start"))


def newest_change() -> Select[*tuple[Any, ...]]:
    """The id of the last entry among the changes, or NULL."""
    return select(func.max(CHANGES.c.id))


@cache
def first_changed() -> Select[*tuple[Any, ...]]:
    """The first quarter of which changes are noted up to the entry ``upto``, or NULL."""
    return select(func.min(CHANGES.c.start)).where(unindexed(CHANGES.c.id) <= whole_number("upto"))


@cache
def take_changes() -> ReturningDelete[*tuple[Any, ...]]:
    """Take out what is noted of the quarter ``start``; gives ``newest`` of each entry."""
    return (
        delete(CHANGES).where(CHANGES.c.start == whole_number("start")).returning(CHANGES.c.newest)
    )


def drop_changes(*, before: int | None = None, since: int | None = None) -> Delete:
    """Delete what is noted of the quarters that begin before an instant, or from one on."""
    start = CHANGES.c.start
    return delete(CHANGES).where(
        *([] if before is None else [start < before]), *([] if since is None else [start >= since])
    )


@cache
def instant_after() -> Select[*tuple[Any, ...]]:
    """The instant of the row that comes ``rows`` after the first from ``since`` on, or NULL."""
    return (
        select(cast(_t.timestamp, BigInteger))
        .where(_t.timestamp >= whole_number("since"), _t.timestamp < INSTANT_MAX_MS)
        .order_by(_t.timestamp)
        .limit(1)
        .offset(whole_number("rows"))
    )


@cache
def counts_there() -> Select[*tuple[Any, ...]]:
    """How many rows each quarter has from ``since`` to ``until``, by the index of instants alone.

    PostgreSQL would read the table for each row's id: those above the watermark are told apart by
    `counts_above`.
    """
    instant = cast(_t.timestamp, BigInteger)
    start = (instant - instant % QUARTER_MS).label("start")
    return (
        select(start, func.count().label("requests"))
        .where(_t.timestamp >= whole_number("since"), _t.timestamp < whole_number("until"))
        .group_by(start)
    )


@cache
def counts_above() -> Select[*tuple[Any, ...]]:
    """As `counts_there`, of the rows above the watermark ``folded``: they are few after a fold."""
    instant = cast(_t.timestamp, BigInteger)
    start = (instant - instant % QUARTER_MS).label("start")
    return (
        select(start, func.count().label("requests"))
        .where(
            _t.id > whole_number("folded"),
            unindexed(_t.timestamp) >= whole_number("since"),
            unindexed(_t.timestamp) < whole_number("until"),
        )
        .group_by(start)
    )


@cache
def counts_known() -> Select[*tuple[Any, ...]]:
    """How many rows the roll-ups know of each quarter from ``since`` to ``until``."""
    return (
        select(ROLLUPS.c.start, cast(func.sum(ROLLUPS.c.requests), BigInteger).label("requests"))
        .where(*_quarters_between())
        .group_by(ROLLUPS.c.start)
    )


@cache
def known_quarters() -> Select[*tuple[Any, ...]]:
    """The roll-ups of the quarters from ``since`` to ``until``: keys and measures."""
    return select(*(ROLLUPS.c[name] for name in ROLLUP[1:])).where(*_quarters_between())


@cache
def rows_between() -> Rows:
    """The rows up to the watermark from ``between_since`` to ``between_until``."""
    return rows_where(*folded_in("between"))


def _quarters_between() -> tuple[ColumnElement[bool], ...]:
    return (
        ROLLUPS.c.span_ms == QUARTER_MS,
        ROLLUPS.c.start >= whole_number("since"),
        ROLLUPS.c.start < whole_number("until"),
    )
