"""The state of the roll-ups relative to the rows: the watermark, and which rows were removed.

Rows are folded in the order of their ids. The roll-ups hold every row up to a watermark, whichever
process wrote the row and whatever timestamp it carries.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Label,
    ScalarSelect,
    Select,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import Session

from lynkr_store.db.citus import is_distributed
from lynkr_store.db.functions import unindexed, whole_number, written_out
from lynkr_store.db.models import CHANGES, ROLLUPS, TELEMETRY
from lynkr_store.rollups.buckets import floor_to
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.schemas.values import INT64_MIN
from lynkr_store.storage.progress import value_of

WATERMARK: Final = "folded"
"""The watermark's name in the table of progress."""

NOTHING_FOLDED: Final = INT64_MIN
"""The watermark before the first fold."""

RAW_FROM: Final = "raw_from"
"""The name in the table of progress of the instant before which rows were removed."""

_t: Final = TELEMETRY.c

in_domain: Final = and_(_t.timestamp >= INSTANT_MIN_MS, _t.timestamp < INSTANT_MAX_MS)
"""Whether a row's timestamp is in its domain; the roll-ups hold no other rows."""


class RollupState(NamedTuple):
    """The state of the roll-ups relative to the rows.

    Attributes:
        watermark: Rows up to this id are in the roll-ups.
        raw_from: As saved: rows before this instant were removed.
        first_bucket: The first quarter in the roll-ups.
        first_kept: The first quarter in the roll-ups whose rows were not merely changed. If it has
            no rows, they were removed.
        last_bucket: The last quarter in the roll-ups.
        newest: The greatest id, or None.
        oldest_row: The timestamp of the oldest folded row that still exists; None without roll-ups.
    """

    watermark: int
    raw_from: int | None
    first_bucket: int | None
    first_kept: int | None
    last_bucket: int | None
    newest: int | None
    oldest_row: int | None


@cache
def state_query() -> Select[*tuple[Any, ...]]:
    """One row with the values of a `RollupState`."""
    oldest = _oldest_folded(watermark().scalar_subquery())
    first = _quarters().order_by(ROLLUPS.c.start).scalar_subquery()
    return written_out(
        select(
            *_stored(),
            newest_id().scalar_subquery().label("newest"),
            # without roll-ups no row is folded, and the query would examine every row
            case((first.is_not(None), cast(oldest.scalar_subquery(), BigInteger))).label(
                "oldest_row"
            ),
        )
    )


@cache
def stored_state_query() -> Select[*tuple[Any, ...]]:
    """Of a `RollupState` the values that the store's own tables hold."""
    return written_out(select(*_stored()))


def _stored() -> Iterator[Label[Any]]:
    changed = exists().where(CHANGES.c.start == ROLLUPS.c.start).correlate(ROLLUPS)
    kept = _quarters().where(or_(~changed, changed.where(CHANGES.c.newest.is_not(None))))
    ends = {
        "first_bucket": _quarters().order_by(ROLLUPS.c.start),
        "first_kept": kept.order_by(ROLLUPS.c.start),
        "last_bucket": _quarters().order_by(ROLLUPS.c.start.desc()),
    }
    yield watermark().scalar_subquery().label("watermark")
    yield value_of(RAW_FROM).label("raw_from")
    yield from (each.scalar_subquery().label(name) for name, each in ends.items())


def _quarters() -> Select[int]:
    return select(ROLLUPS.c.start).where(ROLLUPS.c.span_ms == QUARTER_MS).limit(1)


def _oldest_folded(upto: ColumnElement[int]) -> Select[*tuple[Any, ...]]:
    folded = select(_t.timestamp).where(in_domain, unindexed(_t.id) <= upto)
    return folded.order_by(_t.timestamp).limit(1)


def newest_id() -> Select[*tuple[Any, ...]]:
    """The greatest id, or NULL."""
    return select(func.max(_t.id))


def read_state(connection: Session | Connection) -> RollupState:
    """The state now.

    Where the rows are distributed, they are read after the store's own tables: a row that is folded
    meanwhile counts as not folded, as if all had been read before.
    """
    own = connection if isinstance(connection, Connection) else connection_of(connection)
    if not is_distributed(own):
        return RollupState(*connection.execute(state_query()).one())
    stored = connection.execute(stored_state_query()).one()
    newest: int | None = connection.scalar(newest_id())
    oldest: int | None = None
    if stored.first_bucket is not None:
        asked = _oldest_folded(whole_number("watermark"))
        oldest = connection.scalar(
            select(cast(asked.scalar_subquery(), BigInteger)), {"watermark": stored.watermark}
        )
    return RollupState._make((*stored, newest, oldest))


def connection_of(session: Session) -> Connection:
    """The connection of a Session's transaction."""
    return session.connection(bind_arguments={"clause": TELEMETRY})


def removed_before(connection: Connection, current: RollupState) -> int | None:
    """The instant before which rows that the roll-ups hold were removed; None if none were.

    Retention, the store's or another program's, removes the oldest rows first, so the oldest
    remaining row tells. Rows that were changed, or deleted from among rows that stay, do not count
    as removed: their quarters are recomputed.
    """
    found = None
    if current.first_bucket is not None and current.last_bucket is not None:
        if current.oldest_row is None:
            found = current.last_bucket + QUARTER_MS
        else:
            start = floor_to(QUARTER_MS, current.oldest_row)
            earlier = current.first_kept is not None and current.first_kept < start
            if earlier or _lost_oldest_rows(connection, start, current):
                found = current.oldest_row
    return max((i for i in (found, current.raw_from) if i is not None), default=None)


def _lost_oldest_rows(connection: Connection, start: int, current: RollupState) -> bool:
    """Whether the oldest row's quarter lost rows, and only rows older than the remaining ones."""
    assert current.oldest_row is not None  # noqa: S101 - the quarter was found by it
    known, there, changed, deleted = connection.execute(
        counts_of_quarter(), quarter_parameters(start, current.watermark)
    ).one()
    if known <= there:
        return False
    return not changed or (deleted is not None and deleted < current.oldest_row)


def lag() -> Select[*tuple[Any, ...]]:
    """How many ids are above the watermark; NULL without rows.

    Never negative: retention may have deleted the row with the greatest id.
    """
    newest, oldest = (select(which(_t.id)).scalar_subquery() for which in (func.max, func.min))
    folded = value_of(WATERMARK)
    above = newest - case((folded >= oldest, folded), else_=oldest - 1)
    return select(case((folded > newest, literal(0, BigInteger)), else_=above))


@cache
def watermark() -> Select[*tuple[Any, ...]]:
    """The watermark, without locking it."""
    return select(func.coalesce(value_of(WATERMARK), literal(NOTHING_FOLDED, BigInteger)))


def quarter_parameters(start: int, watermark: int) -> dict[str, int]:
    """The parameters of a statement about one quarter's rows up to the watermark."""
    return {
        "quarter_since": start,
        "quarter_until": start + QUARTER_MS,
        "watermark": watermark,
    }


@cache
def counts_of_quarter() -> Select[*tuple[Any, ...]]:
    """How many rows of one quarter the roll-ups hold, and how many of them exist.

    Takes `quarter_parameters`. The two are equal unless rows were changed or removed. ``changed``
    is the number of change entries for the quarter, and ``deleted`` the greatest timestamp of a
    deleted row.
    """
    known, there = counts_between("quarter")
    entries = CHANGES.c.start == whole_number("quarter_since")
    changed = select(func.count()).select_from(CHANGES).where(entries).scalar_subquery()
    deleted = select(func.max(CHANGES.c.newest)).where(entries).scalar_subquery()
    return select(
        known.label("known"),
        there.label("there"),
        changed.label("changed"),
        deleted.label("deleted"),
    )


def counts_between(name: str) -> tuple[ScalarSelect[int], ScalarSelect[int]]:
    """Rows that the roll-ups hold, and rows that exist, of one quarter.

    The quarter is ``[{name}_since, {name}_until)``.
    """
    requests = cast(func.coalesce(func.sum(ROLLUPS.c.requests), 0), BigInteger)
    known = select(requests).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start == whole_number(f"{name}_since")
    )
    there = select(func.count()).select_from(TELEMETRY).where(*folded_between(name))
    return known.scalar_subquery(), there.scalar_subquery()


def folded_between(name: str) -> tuple[ColumnElement[bool], ...]:
    """Whether a row is folded and its timestamp is in ``[{name}_since, {name}_until)``."""
    return (
        _t.timestamp >= whole_number(f"{name}_since"),
        _t.timestamp < whole_number(f"{name}_until"),
        unindexed(_t.id) <= whole_number("watermark"),
    )
