"""The statement that answers a question about a window: roll-ups, and the rows that are in none.

An answer is the roll-ups, the ragged ends of its window, and all rows above the watermark. Nothing
is executed here.
"""

from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    Subquery,
    Text,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)

from lynkr_store.db.functions import each_row, unindexed, whole_number, written_out
from lynkr_store.db.models import CHANGES, DIMENSIONS, ROLLUPS, TELEMETRY
from lynkr_store.rollups import measures
from lynkr_store.rollups.buckets import Cover
from lynkr_store.rollups.state import GREATEST_ID, counts_in, folded, folded_in
from lynkr_store.schemas.units import INSTANT_MIN_MS, QUARTER_MS

LONG_BACKLOG: Final = 20_000
"""Rows above the watermark from which on the window is read by its time, not by their ids."""

_t: Final = TELEMETRY.c


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


def parameters(
    asked: Cover,
    since: int,
    until: int,
    folded: int,
    kept_from: int = INSTANT_MIN_MS,
    *,
    changed: bool = False,
) -> dict[str, Any]:
    """What `answer` takes for one window.

    Args:
        asked: What makes up the window.
        since: The window's first millisecond.
        until: The first one after it.
        folded: The watermark.
        kept_from: Before this instant rows were removed: of a quarter that begins earlier the
            roll-ups are what is known, whatever was changed in it.
        changed: Whether the statement's shape is that of changed rows.
    """
    given: dict[str, Any] = {"since": since, "until": until, "folded": folded}
    ranges = [(bucket.since, bucket.until) for bucket in asked.buckets]
    name = "summed" if changed else "quarters"  # in which changes count
    ranges += [] if changed else asked.ends
    given[f"{name}_since"] = max(min((start for start, _ in ranges), default=0), kept_from)
    given[f"{name}_until"] = max((end for _, end in ranges), default=0)
    for number, bucket in enumerate(asked.buckets):
        given |= {f"bucket_{number}_{name}": v for name, v in bucket._asdict().items()}
    for number, some in enumerate(asked.rows):
        given |= {f"rows_{number}_{name}": v for name, v in some._asdict().items()}
    for number, (start, end) in enumerate(asked.ends):
        given |= {f"end_{number}_since": start, f"end_{number}_until": end}
    return given


class Shape(NamedTuple):
    """How many parts of each kind a cover has: what sets the statement of an answer.

    ``changed`` is whether rows of its quarters were changed or deleted since they were folded.

    Nothing is asked for the sake of a part that is not there: PostgreSQL takes longer to plan one
    than to find nothing in it.
    """

    buckets: int
    rows: int
    ends: int
    changed: bool = False


def shape(asked: Cover, *, changed: bool = False) -> Shape:
    """A cover's shape."""
    return Shape(len(asked.buckets), len(asked.rows), len(asked.ends), changed)


@cache
def answer(
    question: Question, shape: Shape, *, long_backlog: bool
) -> CompoundSelect[*tuple[Any, ...]]:
    """The parts of an answer, to be added up, in one statement and so of one snapshot.

    Where rows of a quarter were changed since they were folded, its roll-ups are taken away and its
    rows added: a longer roll-up is the sum of its quarters'.

    Takes `parameters`, and ``provider`` if the question is of one.

    Returns:
        ``part``, ``sign``, the question's dimensions, ``requests`` and the columns of its measures.
        The sign is 1 or -1 in a part of the answer. It is 0 in rows about the answer, which
        ``part`` tells apart: ``folded``, with the watermark as ``requests``; and for each ragged
        end, by its number, ``missing_0`` and ``missing_1``, with how many rows that the roll-ups
        know of the quarter there are gone (below 0: with how many they do not know). A shape that
        is ``changed`` has ``changed_0`` and ``changed_1``, one that is not ``changed``: how many
        changes are noted of the end's quarter, or of all.
    """
    names = list(measures.columns_of(question.names))
    parts = [_from_rows(question, shape, long_backlog=long_backlog)]
    facts: dict[str, ColumnElement[int]] = {"folded": folded().scalar_subquery()}
    if shape.buckets:
        parts.append(_from_rollups(question, shape.buckets))
    if shape.buckets and shape.changed:
        parts.append(_from_changed_rollups(question))
    facts |= {f"missing_{number}": _missing(f"end_{number}") for number in range(shape.ends)}
    if shape.changed:
        facts |= {f"changed_{number}": _changes(f"end_{number}") for number in range(shape.ends)}
    else:
        facts["changed"] = _changes("quarters")
    parts += (_about(question, names, part, n) for part, n in facts.items())
    return written_out(union_all(*parts))


def _from_rollups(question: Question, spans: int) -> Select[*tuple[Any, ...]]:
    columns = [ROLLUPS.c[name] for name in measures.columns_of(question.names)]
    buckets = union_all(
        *(
            select(ROLLUPS.c.dimension_id, *columns).where(
                ROLLUPS.c.span_ms == whole_number(f"bucket_{number}_span_ms"),
                ROLLUPS.c.start >= whole_number(f"bucket_{number}_since"),
                ROLLUPS.c.start < whole_number(f"bucket_{number}_until"),
            )
            for number in range(spans)
        )
    ).subquery()
    return _by_dimension(question, "buckets", 1, buckets)


def _from_changed_rollups(question: Question) -> Select[*tuple[Any, ...]]:
    columns = [ROLLUPS.c[name] for name in measures.columns_of(question.names)]
    buckets = select(ROLLUPS.c.dimension_id, *columns).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start.in_(_changed_starts())
    )
    return _by_dimension(question, "changed", -1, buckets.subquery())


def _by_dimension(
    question: Question, part: str, sign: int, buckets: Subquery
) -> Select[*tuple[Any, ...]]:
    key = buckets.c.dimension_id
    # by number first: SQLite groups by sorting, and by text that takes half as long again
    each = select(key, *measures.of_rollups(question.names, buckets.c)).group_by(key).subquery()
    by = [DIMENSIONS.c[name] for name in question.by]
    sums = measures.of_rollups(question.names, each.c)
    statement = select(_part(part), literal(sign, Integer).label("sign"), *by, *sums).select_from(
        each.join(DIMENSIONS, DIMENSIONS.c.id == each.c.dimension_id)
    )
    if question.one_provider:
        statement = statement.where(DIMENSIONS.c.provider == _provider())
    return statement.group_by(*by)


def _from_rows(question: Question, shape: Shape, *, long_backlog: bool) -> Select[*tuple[Any, ...]]:
    changed = [_changed_rows(question)] if shape.buckets and shape.changed else []
    read = union_all(
        _rows(question, literal(1, Integer), *_above_watermark(long_backlog=long_backlog)),
        *changed,
        *(
            _rows(question, whole_number(f"rows_{number}_sign"), *folded_in(f"rows_{number}"))
            for number in range(shape.rows)
        ),
    ).subquery()
    keys = ("sign", *question.by)
    each = measures.of_a_row(question.names, read.c)
    rows = each_row(select(*(read.c[name] for name in keys), *each))
    by = [rows.c[name] for name in keys]
    return select(_part("rows"), *by, *measures.of_rows(rows.c, question.names)).group_by(*by)


def _rows(
    question: Question, sign: ColumnElement[int], *conditions: ColumnElement[bool]
) -> Select[*tuple[Any, ...]]:
    needed = dict.fromkeys((*question.by, *measures.NEEDED))
    return select(sign.label("sign"), *(_t[name] for name in needed)).where(
        *conditions, *_of_provider(question)
    )


def _changed_rows(question: Question) -> Select[*tuple[Any, ...]]:
    starts = _changed_starts().subquery()
    return _rows(
        question,
        literal(1, Integer),
        _t.timestamp >= starts.c.start,
        _t.timestamp < starts.c.start + literal(QUARTER_MS, BigInteger),
        unindexed(_t.id) <= whole_number("folded"),
    )


def _changed_starts() -> Select[int]:
    """The quarters of the roll-ups that are added up of which rows were changed."""
    return (
        select(CHANGES.c.start)
        .where(
            CHANGES.c.start >= whole_number("summed_since"),
            CHANGES.c.start < whole_number("summed_until"),
        )
        .distinct()
    )


def _above_watermark(*, long_backlog: bool) -> tuple[ColumnElement[bool], ...]:
    # SQLite uses one index, and cannot know which of the two ranges is the shorter
    row_id, instant = (
        (unindexed(_t.id), _t.timestamp) if long_backlog else (_t.id, unindexed(_t.timestamp))
    )
    return (
        row_id > whole_number("folded"),
        # with one end alone, PostgreSQL's plan for any parameters expects a third of the table
        row_id <= literal(GREATEST_ID, BigInteger),
        instant >= whole_number("since"),
        instant < whole_number("until"),
    )


def _of_provider(question: Question) -> list[ColumnElement[bool]]:
    # it is never NULL, and there is no index of this: where there are many providers, PostgreSQL's
    # plan for any of them would walk all rows of a common one
    return [func.coalesce(_t.provider, "") == _provider()] if question.one_provider else []


def _provider() -> BindParameter[str]:
    return bindparam("provider", type_=_t.provider.type)


def _changes(name: str) -> ColumnElement[int]:
    """How many changes are noted of the quarters from ``{name}_since`` to ``{name}_until``."""
    noted = select(func.count()).where(
        CHANGES.c.start >= whole_number(f"{name}_since"),
        CHANGES.c.start < whole_number(f"{name}_until"),
    )
    return noted.scalar_subquery()


def _missing(end: str) -> ColumnElement[int]:
    known, there = counts_in(end)
    return known - there


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
