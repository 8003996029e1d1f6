"""Pure statement builders: a filter goes in, a statement comes out; nothing is executed here."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import Any, Final, NamedTuple, assert_never

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Select,
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


def _page(model: type[RoutingRowBrief]) -> Select[*tuple[Any, ...]]:
    """The model's columns as they were stored: it knows what they mean."""
    columns = (column for column in _t if column.name in model.model_fields)
    return select(
        *(
            type_coerce(c, c.type.impl_instance).label(c.name)
            if isinstance(c.type, TypeDecorator)
            else c
            for c in columns
        )
    )


_PAGE: Final = _page(RoutingRow)
_BRIEF_PAGE: Final = _page(RoutingRowBrief)
_VALUE: Final = column("value", BigInteger)
_NEWEST: Final = (_t.timestamp.desc(), _t.id.desc())
_BY_ERROR: Final = ("provider", "has_error")
_INDEXED: Final = (("session_id",), ("model",), _BY_ERROR, ("tier",))
"""Dimensions that an index has before the timestamp; first those of few rows to a value."""
_LIMIT: Final = bindparam("limit", type_=BigInteger)
_MAX_HEADS: Final = 100  # SQLite takes 500 terms in one UNION ALL


def _heads_of_errors() -> CTE:
    """Every provider, found by a step in its index for each."""
    after = TELEMETRY.alias("after")
    first = select(func.min(after.c.provider).label("provider")).cte("providers", recursive=True)
    following = select(func.min(after.c.provider)).where(after.c.provider > first.c.provider)
    known = first.c.provider.is_not(None)
    providers = first.union_all(select(following.scalar_subquery()).where(known))
    named = providers.c.provider.is_not(None)
    return select(providers.c.provider, literal(1).label("has_error")).where(named).cte("heads")


_HEADS_OF_ERRORS: Final = _heads_of_errors()


class _Shape(NamedTuple):
    """What the statement of a list depends on, beside the values that it takes.

    Attributes:
        backend: Whose SQL it is.
        include_text: With the two texts.
        heads: What the first columns of an index are to equal: to the name of a dimension how many
            values, to a flag's its value; None for any.
        rest: What else is asked: to the name of a dimension whether it is given several values, to
            a flag's its value, to a bound's False.
        since: From an instant on.
        until: Up to an instant.
        before: After a cursor; whether its timestamp is a whole number.
    """

    backend: Backend
    include_text: bool
    heads: tuple[tuple[str, int | None], ...]
    rest: tuple[tuple[str, bool], ...]
    since: bool
    until: bool
    before: bool | None


def rows(
    backend: Backend,
    criteria: RoutingFilter,
    since_ms: int | None,
    until_ms: int | None,
    *,
    limit: int,
    before: Cursor | None,
    include_text: bool,
) -> tuple[Select[*tuple[Any, ...]], dict[str, Any]]:
    """Rows by ``(timestamp, id)`` descending, those after the cursor in this order.

    An index has the rows of one value in this order: at most ``limit`` are read of each value that
    is asked for, and put together.

    Returns:
        A statement, and the values that it takes.
    """
    # Of two bounds from above SQLite's index takes either, so that which follows is left out; from
    # another writer's odd timestamp nothing follows here.
    if until_ms is not None and before is not None and type(before.timestamp) is int:
        if before.timestamp < until_ms:
            until_ms = None
        else:
            before = None
    heads, rest, values = _parted(criteria)
    values["limit"] = limit
    if since_ms is not None:
        values["since"] = since_ms
    if until_ms is not None:
        values["until"] = until_ms
    if before is not None:
        values |= {"before_timestamp": before.timestamp, "before_id": before.id}
    shape = _Shape(
        backend,
        include_text,
        heads,
        rest,
        since_ms is not None,
        until_ms is not None,
        None if before is None else type(before.timestamp) is int,
    )
    return _rows(shape), values


def _parted(
    criteria: RoutingFilter,
) -> tuple[tuple[tuple[str, int | None], ...], tuple[tuple[str, bool], ...], dict[str, Any]]:
    """The heads and the rest of a shape, and the values that are asked for."""
    index = _index_for(criteria)
    heads: dict[str, int | None] = dict.fromkeys(index)
    rest: dict[str, bool] = {}
    values: dict[str, Any] = {}
    for name, value in criteria:
        if isinstance(value, bool):
            (heads if name in heads else rest)[name] = value
        elif name in heads and value is not None:
            heads[name] = len(value)
            values |= {f"{name}_{number}": each for number, each in enumerate(value)}
        elif isinstance(value, tuple):
            rest[name] = len(value) > 1
            values[name] = list(value) if rest[name] else value[0]
        elif value is not None:
            rest[name] = False
            values[name] = value
    return tuple(heads.items()), tuple(rest.items()), values


def _index_for(criteria: RoutingFilter) -> tuple[str, ...]:
    """The dimensions of an index that begins with what is asked for.

    Empty where none does, or the values are very many.
    """
    if criteria.has_error and criteria.session_id is None and criteria.provider is None:
        return _BY_ERROR
    for index in _INDEXED:
        heads = len(getattr(criteria, index[0]) or ())
        if index is _BY_ERROR and criteria.has_error is None:
            heads *= 2
        if 0 < heads <= _MAX_HEADS:
            return index
    return ()


@lru_cache
def _rows(shape: _Shape) -> Select[*tuple[Any, ...]]:
    """The statement, made once: that took a quarter of the time of a page."""
    page = _PAGE if shape.include_text else _BRIEF_PAGE
    within = tuple(_within(shape))
    if not shape.heads:
        matching = _matching(shape.rest)
        return page.where(*matching, *within).order_by(*_NEWEST).limit(_LIMIT)
    heads = _heads(shape)
    matching = _matching(shape.rest, indexed=False)
    under_head = _under(heads).where(*matching, *within).limit(_LIMIT)
    # two steps, for the texts are then read of these alone
    newest = _newest_under(shape.backend, heads, under_head).limit(_LIMIT).correlate(None)
    return page.where(_t.id.in_(newest)).order_by(*_NEWEST)


def _heads(shape: _Shape) -> CTE:
    """Each combination of what the first columns are to equal, in columns named like them."""
    if dict(shape.heads).get("provider", 0) is None:
        return _HEADS_OF_ERRORS
    heads = product(*(_head(name, asked) for name, asked in shape.heads))
    return union_all(*(select(*head) for head in heads)).cte("heads")


def _head(name: str, asked: int | None) -> list[ColumnElement[Any]]:
    type_ = _indexed(name).type
    if name == "has_error":
        flags = (False, True) if asked is None else (bool(asked),)
        return [literal(flag, type_).label(name) for flag in flags]
    return [bindparam(f"{name}_{n}", type_=type_).label(name) for n in range(asked or 0)]


def _under(heads: CTE) -> Select[int]:
    """The ids of the rows under one head, the newest first."""
    (first, head), *others = ((_indexed(name), head) for name, head in heads.c.items())
    return (
        select(_t.id)
        .where(first == one_of(head), *(other == value for other, value in others))
        .order_by(first.desc(), *_NEWEST)
        .correlate(heads)
    )


def _newest_under(
    backend: Backend, heads: CTE, under_head: Select[*tuple[Any, ...]]
) -> Select[int]:
    """The ids of what is under any of the heads, the newest first."""
    match backend:
        case Backend.SQLITE:
            found = each_id(under_head.scalar_subquery()).table_valued(_VALUE, name="value")
            ids = select(found.c.value).select_from(heads.join(found, true()))
            return select(_t.id).where(_t.id.in_(ids)).order_by(*_NEWEST)
        case Backend.POSTGRESQL:  # where each row's instant comes with it from the index
            rows = under_head.add_columns(_t.timestamp).lateral()
            newest = rows.c.timestamp.desc(), rows.c.id.desc()
            return select(rows.c.id).select_from(heads.join(rows, true())).order_by(*newest)
        case _:
            assert_never(backend)


def _indexed(name: str) -> ColumnElement[Any]:
    return FAILED if name == "has_error" else _t[name]


def _within(shape: _Shape) -> Iterator[ColumnElement[bool]]:
    if shape.since:
        yield _t.timestamp >= bindparam("since", type_=BigInteger)
    if shape.until:
        yield _t.timestamp < bindparam("until", type_=BigInteger)
    if shape.before is not None:
        timestamp, type_ = _comparable_instant(shape.backend, whole=shape.before)
        place = (
            bindparam("before_timestamp", type_=type_),
            bindparam("before_id", type_=BigInteger),
        )
        yield tuple_(timestamp, _t.id) < tuple_(*place)


def _comparable_instant(
    backend: Backend, *, whole: bool
) -> tuple[ColumnElement[Any], TypeEngine[Any]]:
    """The timestamp, and the type of a value that it is compared with: a whole number, or not."""
    if whole:
        return _t.timestamp, BigInteger()
    match backend:
        case Backend.SQLITE:  # which orders values of every kind, and binds each as it is
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
