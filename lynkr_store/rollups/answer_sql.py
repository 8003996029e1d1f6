"""The statement that answers a question about a window. Nothing is executed here.

An answer consists of roll-ups, the raw rows at the window's partial edges, and all rows above the
watermark.
"""

from collections.abc import Iterator, Mapping
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
from lynkr_store.db.models import CHANGES, DIMENSIONS, ROLLUPS, TELEMETRY, measure_columns
from lynkr_store.rollups import measures
from lynkr_store.rollups.buckets import WindowParts
from lynkr_store.rollups.state import counts_between, folded_between, watermark
from lynkr_store.schemas.units import INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.schemas.values import INT64_MAX

LONG_BACKLOG: Final = 20_000
"""From this number of rows above the watermark on, the backlog is read by the index of timestamps
instead of by id."""

_t: Final = TELEMETRY.c


class Question(NamedTuple):
    """What is asked about a window.

    Attributes:
        by: The dimensions by which the answer is grouped.
        names: The measures, in addition to the number of requests.
        one_provider: Only rows of the provider that is passed with the window.
    """

    by: tuple[str, ...]
    names: tuple[str, ...]
    one_provider: bool = False


def parameters(
    parts: WindowParts,
    since: int,
    until: int,
    watermark: int,
    kept_from: int = INSTANT_MIN_MS,
    *,
    changed: bool = False,
) -> dict[str, Any]:
    """The parameters of `answer` for one window.

    Args:
        parts: The parts of the window.
        since: The window's first millisecond.
        until: The first millisecond after the window.
        watermark: The watermark.
        kept_from: Rows before this instant were removed. For a quarter that begins earlier the
            roll-ups are authoritative, whatever was changed in it.
        changed: Whether the statement's key has ``changed`` set.
    """
    values: dict[str, Any] = {"since": since, "until": until, "watermark": watermark}
    ranges = [(bucket.since, bucket.until) for bucket in parts.buckets]
    name = "summed" if changed else "quarters"  # where change entries are looked up
    ranges += [] if changed else parts.edges
    values[f"{name}_since"] = max(min((start for start, _ in ranges), default=0), kept_from)
    values[f"{name}_until"] = max((end for _, end in ranges), default=0)
    for number, bucket in enumerate(parts.buckets):
        values |= {f"bucket_{number}_{name}": v for name, v in bucket._asdict().items()}
    for number, each in enumerate(parts.rows):
        values |= {f"rows_{number}_{name}": v for name, v in each._asdict().items()}
    for number, (start, end) in enumerate(parts.edges):
        values |= {f"edge_{number}_since": start, f"edge_{number}_until": end}
    return values


class StatementKey(NamedTuple):
    """What determines the text of an answer's statement: the number of parts of each kind.

    ``changed``: rows of the window's quarters were changed or deleted after they were folded.

    A part that does not exist is left out, because PostgreSQL takes longer to plan it than to find
    nothing in it.
    """

    buckets: int
    rows: int
    edges: int
    changed: bool = False


def statement_key(parts: WindowParts, *, changed: bool = False) -> StatementKey:
    """The key for a window's parts."""
    return StatementKey(len(parts.buckets), len(parts.rows), len(parts.edges), changed)


@cache
def answer(
    question: Question, key: StatementKey, *, long_backlog: bool
) -> CompoundSelect[*tuple[Any, ...]]:
    """All parts of an answer in one statement, and so from one snapshot. The caller adds them up.

    Where rows of a quarter were changed after they were folded, the statement subtracts the
    quarter's roll-ups and adds its rows; a longer bucket is the sum of its quarters.

    Takes `parameters`, and ``provider`` if the question is about one provider.

    Returns:
        ``part``, ``sign``, the question's dimensions, ``requests`` and the columns of its measures.
        A part of the answer has sign 1 or -1. Rows with sign 0 are facts about the answer, named by
        ``part``, with the value in ``requests``. ``watermark`` is the watermark. ``missing_0`` and
        ``missing_1`` are, for each partial edge, how many rows of its quarter are in the roll-ups
        but gone (negative: exist but are not in the roll-ups). ``changed_0`` and ``changed_1`` are
        the change entries for each edge's quarter, if the key has ``changed`` set; otherwise
        ``changed`` is the number of change entries for all quarters.
    """
    missing = {}
    for number in range(key.edges):
        known, there = counts_between(f"edge_{number}")
        missing[f"missing_{number}"] = known - there
    return written_out(
        union_all(
            _from_rows(question, key, long_backlog=long_backlog),
            *_from_buckets(question, key),
            *_facts(question, _stored_facts(key) | missing),
        )
    )


@cache
def answer_in_turn(
    question: Question, key: StatementKey, *, long_backlog: bool
) -> tuple[CompoundSelect[*tuple[Any, ...]], ...]:
    """`answer` for a table that is distributed: several statements, in the order of execution.

    The first reads the roll-ups, and one server executes it, so it sees one moment. The others read
    rows, which have no common moment, and take the first one's watermark as a parameter: a row that
    is folded meanwhile counts as not folded. The last counts the rows at the edges, so it notices
    rows that were removed before the second read them. Facts of the same name add up.

    Citus can only compute on all servers what has neither an OFFSET nor a union without ids.
    """
    known, gone = {}, {}
    for number in range(key.edges):
        in_rollups, there = counts_between(f"edge_{number}")
        known[f"missing_{number}"], gone[f"missing_{number}"] = in_rollups, -there
    statements = (
        [*_from_buckets(question, key), *_facts(question, _stored_facts(key) | known)],
        [_from_rows(question, key, long_backlog=long_backlog, distributed=True)],
        [*_facts(question, gone)],
    )
    return tuple(written_out(union_all(*parts)) for parts in statements if parts)


def _stored_facts(key: StatementKey) -> dict[str, ColumnElement[int]]:
    """The facts that the store's own tables hold."""
    names = [f"edge_{number}" for number in range(key.edges)] if key.changed else []
    changed = {name.replace("edge", "changed"): _change_count(name) for name in names}
    return {
        "watermark": watermark().scalar_subquery(),
        **(changed if key.changed else {"changed": _change_count("quarters")}),
    }


def _from_buckets(question: Question, key: StatementKey) -> Iterator[Select[*tuple[Any, ...]]]:
    if key.buckets:
        yield _from_rollups(question, key.buckets)
    if key.buckets and key.changed:
        yield _from_changed_rollups(question)


def _from_rollups(question: Question, spans: int) -> Select[*tuple[Any, ...]]:
    columns = [ROLLUPS.c[name] for name in measure_columns(question.names)]
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
    columns = [ROLLUPS.c[name] for name in measure_columns(question.names)]
    buckets = select(ROLLUPS.c.dimension_id, *columns).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start.in_(_changed_starts())
    )
    return _by_dimension(question, "changed", -1, buckets.subquery())


def _by_dimension(
    question: Question, part: str, sign: int, buckets: Subquery
) -> Select[*tuple[Any, ...]]:
    key = buckets.c.dimension_id
    # group by number first: SQLite groups by sorting, and sorting text takes 1.5 times as long
    each = select(key, *measures.of_rollups(question.names, buckets.c)).group_by(key).subquery()
    by = [DIMENSIONS.c[name] for name in question.by]
    sums = measures.of_rollups(question.names, each.c)
    statement = select(_part(part), literal(sign, Integer).label("sign"), *by, *sums).select_from(
        each.join(DIMENSIONS, DIMENSIONS.c.id == each.c.dimension_id)
    )
    if question.one_provider:
        statement = statement.where(DIMENSIONS.c.provider == _provider())
    return statement.group_by(*by)


def _from_rows(
    question: Question, key: StatementKey, *, long_backlog: bool, distributed: bool = False
) -> Select[*tuple[Any, ...]]:
    changed = [_changed_rows(question)] if key.buckets and key.changed else []
    read = union_all(
        _rows(question, literal(1, Integer), *_above_watermark(long_backlog=long_backlog)),
        *changed,
        *(
            _rows(question, whole_number(f"rows_{number}_sign"), *folded_between(f"rows_{number}"))
            for number in range(key.rows)
        ),
    ).subquery()
    keys = ("sign", *question.by)
    each = select(*(read.c[name] for name in keys), *measures.of_a_row(question.names, read.c))
    rows = each.subquery() if distributed else each_row(each)
    by = [rows.c[name] for name in keys]
    return select(_part("rows"), *by, *measures.of_rows(rows.c, question.names)).group_by(*by)


def _rows(
    question: Question, sign: ColumnElement[int], *conditions: ColumnElement[bool]
) -> Select[*tuple[Any, ...]]:
    # the id, because Citus computes no union without it on all servers
    needed = dict.fromkeys(("id", *question.by, *measures.NEEDED))
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
        unindexed(_t.id) <= whole_number("watermark"),
    )


def _changed_starts() -> Select[int]:
    """The quarters with changed rows, among the roll-ups that the answer adds up."""
    return (
        select(CHANGES.c.start)
        .where(
            CHANGES.c.start >= whole_number("summed_since"),
            CHANGES.c.start < whole_number("summed_until"),
        )
        .distinct()
    )


def _above_watermark(*, long_backlog: bool) -> tuple[ColumnElement[bool], ...]:
    # SQLite uses one index and cannot know which of the two ranges is shorter
    row_id, instant = (
        (unindexed(_t.id), _t.timestamp) if long_backlog else (_t.id, unindexed(_t.timestamp))
    )
    return (
        row_id > whole_number("watermark"),
        # with only one bound, PostgreSQL's generic plan expects a third of the table
        row_id <= literal(INT64_MAX, BigInteger),
        instant >= whole_number("since"),
        instant < whole_number("until"),
    )


def _of_provider(question: Question) -> list[ColumnElement[bool]]:
    # provider is never NULL, and no index has this expression: with many providers, PostgreSQL's
    # generic plan would otherwise read all rows of a common provider through the index
    return [func.coalesce(_t.provider, "") == _provider()] if question.one_provider else []


def _provider() -> BindParameter[str]:
    return bindparam("provider", type_=_t.provider.type)


def _change_count(name: str) -> ColumnElement[int]:
    """The number of change entries for quarters that start in ``[{name}_since, {name}_until)``."""
    entries = select(func.count()).where(
        CHANGES.c.start >= whole_number(f"{name}_since"),
        CHANGES.c.start < whole_number(f"{name}_until"),
    )
    return entries.scalar_subquery()


def _facts(
    question: Question, facts: Mapping[str, ColumnElement[int]]
) -> Iterator[Select[*tuple[Any, ...]]]:
    empty = [cast(null(), Text).label(name) for name in question.by]
    none = [literal(0, Integer).label(name) for name in [*measure_columns(question.names)][1:]]
    for part, value in facts.items():
        sign = literal(0, Integer).label("sign")
        yield select(_part(part), sign, *empty, value.label("requests"), *none)


def _part(name: str) -> Any:
    return literal(name, Text).label("part")
