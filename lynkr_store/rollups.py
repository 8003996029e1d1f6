"""Statements on the roll-ups: what a question reads, and what a fold writes. None is executed here.

Rows are folded by their id: the roll-ups hold the rows up to a watermark, whoever wrote them and
whatever time they name. So an answer is the roll-ups, the ragged ends of its window, and all rows
above the watermark.
"""

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    CompoundSelect,
    Delete,
    FromClause,
    Insert,
    Integer,
    ScalarSelect,
    Select,
    Subquery,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from lynkr_store import measures
from lynkr_store.backend import Backend
from lynkr_store.domains import INSTANT_MAX_MS, INSTANT_MIN_MS
from lynkr_store.functions import inserting, same, unindexed
from lynkr_store.models import DIMENSIONS, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.spans import DAY_MS, QUARTER_MS, Cover, cover, floor_to

NOTHING: Final = -(2**63)
"""The watermark before the first fold."""

GREATEST_ID: Final = 2**63 - 1

LONG_BACKLOG: Final = 20_000
"""Rows above the watermark from which on the window is read by its time, not by their ids."""

ROLLUP: Final = ("span_ms", "start", "dimension_id", *measures.columns_of())
"""The columns of a roll-up."""

MOST_ADDED: Final = 512
"""Roll-ups that one statement adds on SQLite: half of the 32,766 values that it may take."""

_BY: Final = ("provider", "model", "tier", "request_type")
_t: Final = TELEMETRY.c
_in_domain: Final = and_(_t.timestamp >= INSTANT_MIN_MS, _t.timestamp < INSTANT_MAX_MS)


class Question(NamedTuple):
    """What is asked of a window.

    Attributes:
        by: The dimensions by which the answer is kept apart.
        names: Measures beside the number of requests.
        one_provider: Only rows of the provider that is given with the window.
    """

    by: tuple[str, ...]
    names: tuple[str, ...]
    one_provider: bool = False


class Standing(NamedTuple):
    """How the roll-ups stand to the rows.

    Attributes:
        folded: The watermark: rows up to this id are in the roll-ups.
        newest: The greatest id, or None.
        raw_from: What was noted: before this instant rows were removed.
        first_bucket: The first quarter that the roll-ups know.
        last_bucket: The last one.
        oldest_row: The first instant of a folded row that is there.
    """

    folded: int
    newest: int | None
    raw_from: int | None
    first_bucket: int | None
    last_bucket: int | None
    oldest_row: int | None


@cache
def standing() -> Select[*tuple[Any, ...]]:
    """One row with the values of a `Standing`."""
    quarters = select(ROLLUPS.c.start).where(ROLLUPS.c.span_ms == QUARTER_MS).limit(1)
    oldest = (
        select(_t.timestamp)
        .where(_in_domain, unindexed(_t.id) <= folded().scalar_subquery())
        .order_by(_t.timestamp)
        .limit(1)
    )
    return select(
        folded().scalar_subquery().label("folded"),
        select(func.max(_t.id)).scalar_subquery().label("newest"),
        noted("raw_from").label("raw_from"),
        quarters.order_by(ROLLUPS.c.start).scalar_subquery().label("first_bucket"),
        quarters.order_by(ROLLUPS.c.start.desc()).scalar_subquery().label("last_bucket"),
        cast(oldest.scalar_subquery(), BigInteger).label("oldest_row"),
    )


def lag() -> Select[*tuple[Any, ...]]:
    """How many ids lie above the watermark; NULL where there is no row."""
    newest, oldest = (select(which(_t.id)).scalar_subquery() for which in (func.max, func.min))
    watermark = noted("folded")
    return select(newest - case((watermark >= oldest, watermark), else_=oldest - 1))


@cache
def folded() -> Select[*tuple[Any, ...]]:
    """The watermark, without a hold on it."""
    return select(func.coalesce(noted("folded"), NOTHING))


def noted(name: str) -> ScalarSelect[int]:
    """A value of the progress, or NULL."""
    return select(PROGRESS.c.value).where(PROGRESS.c.name == name).scalar_subquery()


def quarter(start: int, folded: int) -> dict[str, int]:
    """What a statement on one quarter's rows up to the watermark takes."""
    return {"quarter_since": start, "quarter_until": start + QUARTER_MS, "folded": folded}


@cache
def counts_of_quarter() -> Select[*tuple[Any, ...]]:
    """How many rows of one `quarter` the roll-ups know, and how many of these are there.

    Equal, unless rows were removed.
    """
    known = select(func.coalesce(func.sum(ROLLUPS.c.requests), 0)).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start == _whole_number("quarter_since")
    )
    there = select(func.count()).where(*_folded_in("quarter"))
    return select(known.scalar_subquery().label("known"), there.scalar_subquery().label("there"))


def parameters(asked: Cover, since: int, until: int, folded: int) -> dict[str, Any]:
    """What `answer` takes for one window."""
    given: dict[str, Any] = {"since": since, "until": until, "folded": folded}
    for number, bucket in enumerate(asked.buckets):
        given |= {f"bucket_{number}_{name}": v for name, v in bucket._asdict().items()}
    for number, some in enumerate(asked.rows):
        given |= {f"rows_{number}_{name}": v for name, v in some._asdict().items()}
    for number, (start, end) in enumerate(asked.ends):
        given |= {f"end_{number}_since": start, f"end_{number}_until": end}
    return given


_SHAPE: Final = cover(0, 0, 0)  # of every cover: it sets the number of parameters


@cache
def answer(question: Question, *, long_backlog: bool) -> CompoundSelect[*tuple[Any, ...]]:
    """The parts of an answer, to be added up, in one statement and so of one snapshot.

    Takes `parameters`, and ``provider`` if the question is of one.

    Returns:
        ``sign``, the question's dimensions, ``requests`` and the columns of its measures. The sign
        is 1 or -1 in a part of the answer. It is 0 in three rows about the answer, told apart by
        ``part``: ``folded``, with the watermark as ``requests``; and ``known`` and ``there``, with
        how many rows the roll-ups know of the quarters at the window's ends, and how many of these
        are there.
    """
    names = list(measures.columns_of(question.names))
    return union_all(
        _from_rollups(question),
        _up_to_watermark(question),
        _above_watermark(question, long_backlog=long_backlog),
        *(_about(question, names, part, n) for part, n in _facts().items()),
    )


def _from_rollups(question: Question) -> Select[*tuple[Any, ...]]:
    columns = [ROLLUPS.c[name] for name in measures.columns_of(question.names)]
    spans = (
        select(ROLLUPS.c.dimension_id, *columns).where(
            ROLLUPS.c.span_ms == _whole_number(f"bucket_{number}_span_ms"),
            ROLLUPS.c.start >= _whole_number(f"bucket_{number}_since"),
            ROLLUPS.c.start < _whole_number(f"bucket_{number}_until"),
        )
        for number in range(len(_SHAPE.buckets))
    )
    buckets = union_all(*spans).subquery()
    key = buckets.c.dimension_id
    # by number first: SQLite groups by sorting, and by text that takes half as long again
    each = select(key, *measures.of_rollups(question.names, buckets.c)).group_by(key).subquery()
    by = [DIMENSIONS.c[name] for name in question.by]
    sums = measures.of_rollups(question.names, each.c)
    statement = select(_part("buckets"), literal(1, Integer).label("sign"), *by, *sums).select_from(
        each.join(DIMENSIONS, DIMENSIONS.c.id == each.c.dimension_id)
    )
    if question.one_provider:
        statement = statement.where(DIMENSIONS.c.provider == _provider())
    return statement.group_by(*by)


def _up_to_watermark(question: Question) -> Select[*tuple[Any, ...]]:
    names = dict.fromkeys((*question.by, *measures.NEEDED))
    ends = union_all(
        *(
            select(
                _whole_number(f"rows_{number}_sign").label("sign"), *(_t[name] for name in names)
            ).where(*_folded_in(f"rows_{number}"), *_of_provider(question))
            for number in range(len(_SHAPE.rows))
        )
    ).subquery()
    return _from_rows(question, select(ends.c.sign), ends.c)


def _above_watermark(question: Question, *, long_backlog: bool) -> Select[*tuple[Any, ...]]:
    # SQLite uses one index, and cannot know which of the two ranges is the shorter
    row_id, instant = (
        (unindexed(_t.id), _t.timestamp) if long_backlog else (_t.id, unindexed(_t.timestamp))
    )
    rows = select(literal(1, Integer).label("sign")).where(
        row_id > _whole_number("folded"),
        # with one end alone, PostgreSQL's plan for any parameters expects a third of the table
        row_id <= literal(GREATEST_ID, BigInteger),
        instant >= _whole_number("since"),
        instant < _whole_number("until"),
        *_of_provider(question),
    )
    return _from_rows(question, rows, _t)


def _folded_in(name: str) -> tuple[ColumnElement[bool], ...]:
    return (
        _t.timestamp >= _whole_number(f"{name}_since"),
        _t.timestamp < _whole_number(f"{name}_until"),
        unindexed(_t.id) <= _whole_number("folded"),
    )


def _of_provider(question: Question) -> list[ColumnElement[bool]]:
    return [unindexed(_t.provider) == _provider()] if question.one_provider else []


def _provider() -> BindParameter[str]:
    return bindparam("provider", type_=Text())


def _from_rows(
    question: Question,
    statement: Select[*tuple[Any, ...]],
    columns: ReadOnlyColumnCollection[str, Any],
) -> Select[*tuple[Any, ...]]:
    by = [columns[name] for name in question.by]
    rows = _each_row(statement.add_columns(*by, *measures.of_a_row(question.names, columns)))
    keys = [rows.c.sign, *(rows.c[name] for name in question.by)]
    sums = measures.of_rows(rows.c, question.names)
    return select(_part("rows"), *keys, *sums).group_by(*keys)


def _each_row(statement: Select[*tuple[Any, ...]]) -> Subquery:
    """A subquery that is computed as written: each expression once a row.

    Both databases would else put the expressions in the place of their names, and compute what
    is used in three sums three times: with OFFSET they do not.
    """
    return statement.offset(0).subquery()


def _facts() -> dict[str, ColumnElement[int]]:
    ends = range(len(_SHAPE.ends))
    starts = (ROLLUPS.c.start == _whole_number(f"end_{number}_since") for number in ends)
    known = select(func.coalesce(func.sum(ROLLUPS.c.requests), 0)).where(
        ROLLUPS.c.span_ms == QUARTER_MS, or_(*starts)
    )
    rows = union_all(*(select(_t.id).where(*_folded_in(f"end_{number}")) for number in ends))
    return {
        "folded": folded().scalar_subquery(),
        "known": known.scalar_subquery(),
        "there": select(func.count()).select_from(rows.subquery()).scalar_subquery(),
    }


def _about(
    question: Question, names: list[str], part: str, value: ColumnElement[int]
) -> Select[*tuple[Any, ...]]:
    empty = [cast(null(), Text).label(name) for name in question.by]
    none = [literal(0, Integer).label(name) for name in names[1:]]
    return select(
        _part(part), literal(0, Integer).label("sign"), *empty, value.label("requests"), *none
    )


def _part(name: str) -> Any:
    return literal(name, Text).label("part")


def _whole_number(name: str) -> BindParameter[int]:
    return bindparam(name, type_=BigInteger())


# -- what a fold writes ------------------------------------------------------------------------


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
    return rows_where(_t.id > _whole_number("after"), _t.id <= _whole_number("upto"))


@cache
def number_between() -> Select[*tuple[Any, ...]]:
    """How many rows of a step have instants from ``first`` to ``last``, by their index.

    Which holds a hundred times as many rows to a page as the table does. ``seen`` is how many rows
    it has there, of any step; where these are ``most``, or more, ``found`` is not the whole number.
    """
    some = (
        select(_t.id)
        .where(_t.timestamp >= _whole_number("first"), _t.timestamp < _whole_number("last") + 1)
        .limit(_whole_number("most"))
        .subquery()
    )
    mine = and_(some.c.id > _whole_number("after"), some.c.id <= _whole_number("upto"))
    return select(
        func.count().label("seen"), func.count(case((mine, 1))).label("found")
    ).select_from(some)


@cache
def rows_of_quarter() -> Rows:
    """The rows of one `quarter`."""
    return rows_where(*_folded_in("quarter"))


def folded_rows(folded: int, condition: ColumnElement[bool]) -> Rows:
    """Of some rows those up to the watermark."""
    return rows_where(condition, unindexed(_t.id) <= folded)


def rows_where(*conditions: ColumnElement[bool]) -> Rows:
    """Statements on the rows that meet all conditions and name an instant in its domain."""
    mine = [_t[name] for name in _BY]
    rows = select(*mine).where(*conditions, _in_domain).distinct().subquery()
    new = (
        select(*(rows.c[name] for name in _BY))
        .select_from(rows.outerjoin(DIMENSIONS, _same_dimensions(rows)))
        .where(DIMENSIONS.c.id.is_(None))
    )
    instant = cast(_t.timestamp, BigInteger)
    each = _each_row(
        select(
            instant.label("instant"),
            (instant - instant % QUARTER_MS).label("start"),
            DIMENSIONS.c.id.label("dimension_id"),
            *measures.of_a_row(),
        )
        .select_from(TELEMETRY.join(DIMENSIONS, _same_dimensions(TELEMETRY)))
        .where(*conditions, _in_domain)
    )
    keys = (each.c.start, each.c.dimension_id)
    ends = func.min(each.c.instant).label("first"), func.max(each.c.instant).label("last")
    return Rows(
        new,
        insert(DIMENSIONS).from_select(list(_BY), new),
        select(*keys, *ends, *measures.of_rows(each.c)).group_by(*keys),
        select(func.count()).select_from(TELEMETRY).where(*conditions, _in_domain),
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


@lru_cache
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
