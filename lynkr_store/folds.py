"""What a fold reads of the rows, and writes to the roll-ups. Nothing is executed here."""

from collections.abc import Mapping
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
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY

from lynkr_store import measures
from lynkr_store.backend import Backend
from lynkr_store.domains import INSTANT_MAX_MS
from lynkr_store.functions import (
    count_of,
    each_row,
    inserting,
    same,
    unindexed,
    whole_number,
)
from lynkr_store.models import DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.rollups import folded_in, in_domain
from lynkr_store.spans import DAY_MS, QUARTER_MS, floor_to

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
    return _on_conflict(
        into, {name: ROLLUPS.c[name] + into.excluded[name] for name in measures.columns_of()}
    )


@cache
def note(backend: Backend) -> Insert:
    """Set a value of the progress; takes ``name`` and ``value``."""
    into = inserting(backend, PROGRESS)
    return _on_conflict(into, {"value": into.excluded.value})


def note_first(backend: Backend) -> Insert:
    """Enter a value of the progress, unless it is there; takes ``name`` and ``value``."""
    statement: Insert = inserting(backend, PROGRESS).on_conflict_do_nothing()
    return statement


def _on_conflict(into: Any, values: dict[str, Any]) -> Insert:
    statement: Insert = into.on_conflict_do_update(
        index_elements=list(into.table.primary_key), set_=values
    )
    return statement


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


def first_from(instant: int) -> Select[*tuple[Any, ...]]:
    """The first row's instant and the first quarter known from an instant on, or NULL."""
    rows = select(func.min(_t.timestamp)).where(
        _t.timestamp >= instant, _t.timestamp < INSTANT_MAX_MS
    )
    quarters = select(func.min(ROLLUPS.c.start)).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start >= instant
    )
    return select(cast(rows.scalar_subquery(), BigInteger), quarters.scalar_subquery())


def first_start() -> Select[*tuple[Any, ...]]:
    """The start of the first day that the roll-ups know, or NULL."""
    return select(func.min(ROLLUPS.c.start)).where(ROLLUPS.c.span_ms == DAY_MS)


def trim(before: int) -> Delete:
    """Delete the roll-ups of the days that end before an instant."""
    return delete(ROLLUPS).where(ROLLUPS.c.start < floor_to(DAY_MS, before))
