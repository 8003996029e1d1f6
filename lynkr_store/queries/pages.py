"""Builds the statement of a page of rows from a filter. Nothing is executed here."""

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import product
from typing import Any, Final, NamedTuple, assert_never

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    ColumnElement,
    Select,
    any_,
    bindparam,
    column,
    func,
    literal,
    select,
    true,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine

from lynkr_store.backend import Backend
from lynkr_store.db.column_types import Real
from lynkr_store.db.functions import as_real, each_id, measured, one_of, unindexed
from lynkr_store.db.models import FAILED, TELEMETRY
from lynkr_store.schemas import Cursor, RoutingRow, RoutingRowBrief
from lynkr_store.schemas.filters import RoutingFilter
from lynkr_store.schemas.units import COUNT, DOLLARS, MILLISECONDS, SCORE

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


@cache
def _page(model: type[RoutingRowBrief]) -> Select[*tuple[Any, ...]]:
    """The model's columns as stored; the model interprets them."""
    columns = (column for column in _t if column.name in model.model_fields)
    return select(
        *(
            type_coerce(c, c.type.impl_instance).label(c.name)
            if isinstance(c.type, TypeDecorator)
            else c
            for c in columns
        )
    )


_VALUE: Final = column("value", BigInteger)
_NEWEST: Final = (_t.timestamp.desc(), _t.id.desc())
_BY_ERROR: Final = ("provider", "has_error")
_INDEXED: Final = (("session_id",), ("model",), _BY_ERROR, ("tier",))
"""Filters whose columns stand before the timestamp in an index; first those with few rows a
value."""
_LIMIT: Final = bindparam("limit", type_=BigInteger)
_MAX_PREFIXES: Final = 100  # SQLite allows 500 terms in one UNION ALL


@cache
def _providers_with_errors() -> CTE:
    """Every provider, found by one step in its index for each."""
    after = TELEMETRY.alias("after")
    first = select(func.min(after.c.provider).label("provider")).cte("providers", recursive=True)
    following = select(func.min(after.c.provider)).where(after.c.provider > first.c.provider)
    known = first.c.provider.is_not(None)
    providers = first.union_all(select(following.scalar_subquery()).where(known))
    named = providers.c.provider.is_not(None)
    return select(providers.c.provider, literal(1).label("has_error")).where(named).cte("prefixes")


class _StatementKey(NamedTuple):
    """What determines the text of a page's statement; its values are parameters.

    Attributes:
        backend: The backend.
        include_text: Whether the two texts are read.
        prefixes: Conditions on the first columns of an index: the filter's name and its number of
            values, or a flag's value; None for any value.
        rest: Other conditions: the filter's name and whether it has several values, or a flag's
            value; False for a bound.
        since: Whether the window has a beginning.
        until: Whether the window has an end.
        before: None without a cursor; otherwise whether the cursor's timestamp is a whole number.
        distributed: Whether only the ids are selected, by a statement that Citus can plan.
    """

    backend: Backend
    include_text: bool
    prefixes: tuple[tuple[str, int | None], ...]
    rest: tuple[tuple[str, bool], ...]
    since: bool
    until: bool
    before: bool | None
    distributed: bool


def rows(
    backend: Backend,
    criteria: RoutingFilter,
    since_ms: int | None,
    until_ms: int | None,
    *,
    limit: int,
    before: Cursor | None,
    include_text: bool,
    distributed: bool = False,
) -> tuple[Select[*tuple[Any, ...]], dict[str, Any]]:
    """Rows by ``(timestamp, id)`` descending, after the cursor in that order.

    An index holds the rows of one value in this order. The statement reads at most ``limit`` rows
    of each requested value and merges them.

    If the rows are ``distributed``, the statement selects only their ids, for `with_ids`: each
    shard sends ``limit`` of them, and texts would be too much.

    Returns:
        The statement, and its parameters.
    """
    # SQLite's index uses either of two upper bounds, so the redundant one is left out. A cursor
    # with another writer's odd timestamp cannot be compared here, so both bounds stay.
    if until_ms is not None and before is not None and type(before.timestamp) is int:
        if before.timestamp < until_ms:
            until_ms = None
        else:
            before = None
    index = () if distributed else _index_for(criteria)
    prefixes, rest, values = _split_criteria(criteria, index)
    values["limit"] = limit
    if since_ms is not None:
        values["since"] = since_ms
    if until_ms is not None:
        values["until"] = until_ms
    if before is not None:
        values |= {"before_timestamp": before.timestamp, "before_id": before.id}
    key = _StatementKey(
        backend,
        include_text,
        prefixes,
        rest,
        since_ms is not None,
        until_ms is not None,
        None if before is None else type(before.timestamp) is int,
        distributed,
    )
    return _rows(key), values


def next_ids(after: int, limit: int) -> tuple[Select[int, int, int], dict[str, Any]]:
    """How far the rows after an id go, whichever they are.

    Returns:
        The statement, and its parameters. Its row is the greatest of the next ``limit`` ids, the
        last one up to which no number is missing between them, and the greatest id of the table;
        each is NULL if there is none.
    """
    return _next_ids(), {"after": after, "limit": limit}


@cache
def _next_ids() -> Select[int, int, int]:
    after = bindparam("after", type_=BigInteger)
    ids = select(_t.id).where(_t.id > after).order_by(_t.id).limit(_LIMIT).subquery()
    numbered = select(ids.c.id, func.row_number().over(order_by=ids.c.id).label("number"))
    following = numbered.subquery()
    joined = following.c.id - following.c.number == after
    return select(
        func.max(following.c.id),
        func.max(following.c.id).filter(joined),
        select(func.max(_t.id)).scalar_subquery(),
    )


def rows_between(
    criteria: RoutingFilter, after: int, upto: int, *, include_text: bool
) -> tuple[Select[*tuple[Any, ...]], dict[str, Any]]:
    """Rows whose ids are greater than ``after`` and at most ``upto``, by id.

    Returns:
        The statement, and its parameters.
    """
    _, rest, values = _split_criteria(criteria, ())
    return _rows_between(rest, include_text=include_text), values | {"after": after, "upto": upto}


@lru_cache
def _rows_between(
    rest: tuple[tuple[str, bool], ...], *, include_text: bool
) -> Select[*tuple[Any, ...]]:
    page = _page(RoutingRow if include_text else RoutingRowBrief)
    ids = (
        _t.id > bindparam("after", type_=BigInteger),
        _t.id <= bindparam("upto", type_=BigInteger),
    )
    return page.where(*ids, *_matching(rest, indexed=False)).order_by(_t.id)


def _split_criteria(
    criteria: RoutingFilter, index: Iterable[str]
) -> tuple[tuple[tuple[str, int | None], ...], tuple[tuple[str, bool], ...], dict[str, Any]]:
    """The conditions for an index's first columns, the other conditions, and the values."""
    prefixes: dict[str, int | None] = dict.fromkeys(index)
    rest: dict[str, bool] = {}
    values: dict[str, Any] = {}
    for name in RoutingFilter.model_fields:  # a subclass may have more
        value = getattr(criteria, name)
        if isinstance(value, bool):
            (prefixes if name in prefixes else rest)[name] = value
        elif name in prefixes and value is not None:
            prefixes[name] = len(value)
            values |= {f"{name}_{number}": each for number, each in enumerate(value)}
        elif isinstance(value, tuple):
            rest[name] = len(value) > 1
            values[name] = list(value) if rest[name] else value[0]
        elif value is not None:
            rest[name] = False
            values[name] = value
    return tuple(prefixes.items()), tuple(rest.items()), values


def _index_for(criteria: RoutingFilter) -> tuple[str, ...]:
    """The filters of an index that begins with columns that are filtered.

    Empty if there is no such index, or if there are too many values.
    """
    if criteria.has_error and criteria.session_id is None and criteria.provider is None:
        return _BY_ERROR
    for index in _INDEXED:
        number = len(getattr(criteria, index[0]) or ())
        if index is _BY_ERROR and criteria.has_error is None:
            number *= 2
        if 0 < number <= _MAX_PREFIXES:
            return index
    return ()


@lru_cache
def _rows(key: _StatementKey) -> Select[*tuple[Any, ...]]:
    """Build the statement; cached, because building it took a quarter of the time of a page."""
    page = _page(RoutingRow if key.include_text else RoutingRowBrief)
    within = tuple(_within(key))
    if not key.prefixes:
        matching = _matching(key.rest)
        read = select(_t.id) if key.distributed else page
        return read.where(*matching, *within).order_by(*_NEWEST).limit(_LIMIT)
    prefixes = _prefixes(key)
    matching = _matching(key.rest, indexed=False)
    ids_under_prefix = _ids_under(prefixes).where(*matching, *within).limit(_LIMIT)
    # ids first, then the rows: so the texts are read only of the rows that are returned
    newest = _newest_ids(key.backend, prefixes, ids_under_prefix).limit(_LIMIT).correlate(None)
    return page.where(_t.id.in_(newest)).order_by(*_NEWEST)


@cache
def with_ids(*, include_text: bool) -> Select[*tuple[Any, ...]]:
    """The rows with these ids, newest first; PostgreSQL. Takes a list, ``ids``."""
    page = _page(RoutingRow if include_text else RoutingRowBrief)
    ids = bindparam("ids", type_=ARRAY(BigInteger))
    return page.where(_t.id == any_(ids)).order_by(*_NEWEST)


def _prefixes(key: _StatementKey) -> CTE:
    """Each combination of values for an index's first columns, in columns of the same names."""
    if dict(key.prefixes).get("provider", 0) is None:
        return _providers_with_errors()
    prefixes = product(*(_prefix_values(name, asked) for name, asked in key.prefixes))
    return union_all(*(select(*prefix) for prefix in prefixes)).cte("prefixes")


def _prefix_values(name: str, asked: int | None) -> list[ColumnElement[Any]]:
    type_ = _indexed(name).type
    if name == "has_error":
        flags = (False, True) if asked is None else (bool(asked),)
        return [literal(flag, type_).label(name) for flag in flags]
    return [bindparam(f"{name}_{n}", type_=type_).label(name) for n in range(asked or 0)]


def _ids_under(prefixes: CTE) -> Select[int]:
    """The ids of the rows with one prefix, newest first."""
    (first, first_value), *others = ((_indexed(name), value) for name, value in prefixes.c.items())
    return (
        select(_t.id)
        .where(first == one_of(first_value), *(column == value for column, value in others))
        .order_by(first.desc(), *_NEWEST)
        .correlate(prefixes)
    )


def _newest_ids(
    backend: Backend, prefixes: CTE, ids_under_prefix: Select[*tuple[Any, ...]]
) -> Select[int]:
    """The ids of the rows with any of the prefixes, newest first."""
    match backend:
        case Backend.SQLITE:
            found = each_id(ids_under_prefix.scalar_subquery()).table_valued(_VALUE, name="value")
            ids = select(found.c.value).select_from(prefixes.join(found, true()))
            return select(_t.id).where(_t.id.in_(ids)).order_by(*_NEWEST)
        case Backend.POSTGRESQL:  # the index supplies each row's timestamp
            rows = ids_under_prefix.add_columns(_t.timestamp).lateral()
            newest = rows.c.timestamp.desc(), rows.c.id.desc()
            return select(rows.c.id).select_from(prefixes.join(rows, true())).order_by(*newest)
        case _:
            assert_never(backend)


def _indexed(name: str) -> ColumnElement[Any]:
    return FAILED if name == "has_error" else _t[name]


def _within(key: _StatementKey) -> Iterator[ColumnElement[bool]]:
    if key.since:
        yield _t.timestamp >= bindparam("since", type_=BigInteger)
    if key.until:
        yield _t.timestamp < bindparam("until", type_=BigInteger)
    if key.before is not None:
        timestamp, type_ = _comparable_instant(key.backend, whole=key.before)
        place = (
            bindparam("before_timestamp", type_=type_),
            bindparam("before_id", type_=BigInteger),
        )
        yield tuple_(timestamp, _t.id) < tuple_(*place)


def _comparable_instant(
    backend: Backend, *, whole: bool
) -> tuple[ColumnElement[Any], TypeEngine[Any]]:
    """The timestamp, and the type of the value it is compared with: a whole number or not."""
    if whole:
        return _t.timestamp, BigInteger()
    match backend:
        case Backend.SQLITE:  # orders values of every type, and binds each as it is
            return _t.timestamp, NullType()
        case Backend.POSTGRESQL:
            return as_real(_t.timestamp), Real
        case _:
            assert_never(backend)


def _matching(
    rest: Iterable[tuple[str, bool]], *, indexed: bool = True
) -> Iterator[ColumnElement[bool]]:
    for name, asked in rest:
        if name in _SEVERAL:
            column = _t[name] if indexed else unindexed(_t[name])
            value = bindparam(name, type_=_t[name].type, expanding=asked)
            yield column.in_(value) if asked else column == value
        elif name == "has_error":
            yield _t.error_type.is_not(None) if asked else _t.error_type.is_(None)
        elif name == "was_fallback":
            yield _t.was_fallback == literal(int(asked), BigInteger)
        else:
            side, _, measure = name.partition("_")
            number = as_real(measured(_t[measure], _BOUNDED[measure]))
            bound = bindparam(name, type_=Real)
            yield number >= bound if side == "min" else number <= bound
