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
    Text,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)

from lynkr_store import measures
from lynkr_store.functions import each_row, unindexed, whole_number, written_out
from lynkr_store.models import DIMENSIONS, ROLLUPS, TELEMETRY
from lynkr_store.rollups import GREATEST_ID, counts_in, folded, folded_in
from lynkr_store.spans import Cover

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


class Shape(NamedTuple):
    """How many parts of each kind a cover has: what sets the statement of an answer.

    Nothing is asked for the sake of a part that is not there: PostgreSQL takes longer to plan one
    than to find nothing in it.
    """

    buckets: int
    rows: int
    ends: int


def shape(asked: Cover) -> Shape:
    """A cover's shape."""
    return Shape(*map(len, asked))


@cache
def answer(
    question: Question, shape: Shape, *, long_backlog: bool
) -> CompoundSelect[*tuple[Any, ...]]:
    """The parts of an answer, to be added up, in one statement and so of one snapshot.

    Takes `parameters`, and ``provider`` if the question is of one.

    Returns:
        ``part``, ``sign``, the question's dimensions, ``requests`` and the columns of its measures.
        The sign is 1 or -1 in a part of the answer. It is 0 in rows about the answer, which
        ``part`` tells apart: ``folded``, with the watermark as ``requests``; and for each ragged
        end, by its number, ``missing_0`` and ``missing_1``, with how many rows that the roll-ups
        know of the quarter there are gone.
    """
    names = list(measures.columns_of(question.names))
    parts = [_from_rows(question, shape.rows, long_backlog=long_backlog)]
    facts: dict[str, ColumnElement[int]] = {"folded": folded().scalar_subquery()}
    if shape.buckets:
        parts.append(_from_rollups(question, shape.buckets))
    facts |= {f"missing_{number}": _missing(f"end_{number}") for number in range(shape.ends)}
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


def _from_rows(question: Question, ranges: int, *, long_backlog: bool) -> Select[*tuple[Any, ...]]:
    read = union_all(
        _rows(question, literal(1, Integer), *_above_watermark(long_backlog=long_backlog)),
        *(
            _rows(question, whole_number(f"rows_{number}_sign"), *folded_in(f"rows_{number}"))
            for number in range(ranges)
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
