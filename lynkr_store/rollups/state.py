"""Statements on how the roll-ups stand to the rows: the watermark, and what was removed since.

Rows are folded by their id: the roll-ups hold the rows up to a watermark, whoever wrote them and
whatever time they name.
"""

from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
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

from lynkr_store.db.functions import unindexed, whole_number, written_out
from lynkr_store.db.models import CHANGES, ROLLUPS, TELEMETRY
from lynkr_store.schemas.units import INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS
from lynkr_store.storage.progress import value_of

NOTHING: Final = -(2**63)
"""The watermark before the first fold."""

GREATEST_ID: Final = 2**63 - 1

_t: Final = TELEMETRY.c

in_domain: Final = and_(_t.timestamp >= INSTANT_MIN_MS, _t.timestamp < INSTANT_MAX_MS)
"""Whether a row names an instant in its domain: only such are in the roll-ups."""


class Standing(NamedTuple):
    """How the roll-ups stand to the rows.

    Attributes:
        folded: The watermark: rows up to this id are in the roll-ups.
        newest: The greatest id, or None.
        raw_from: What was noted: before this instant rows were removed.
        first_bucket: The first quarter that the roll-ups know.
        first_kept: The first one whose rows were not merely changed since: where it has no row,
            they were removed.
        last_bucket: The last one.
        oldest_row: The first instant of a folded row that is there, if there are roll-ups.
    """

    folded: int
    newest: int | None
    raw_from: int | None
    first_bucket: int | None
    first_kept: int | None
    last_bucket: int | None
    oldest_row: int | None


@cache
def standing() -> Select[*tuple[Any, ...]]:
    """One row with the values of a `Standing`."""
    quarters = select(ROLLUPS.c.start).where(ROLLUPS.c.span_ms == QUARTER_MS).limit(1)
    first = quarters.order_by(ROLLUPS.c.start).scalar_subquery()
    changed = exists().where(CHANGES.c.start == ROLLUPS.c.start).correlate(ROLLUPS)
    kept = quarters.where(or_(~changed, changed.where(CHANGES.c.newest.is_not(None))))
    oldest = (
        select(_t.timestamp)
        .where(in_domain, unindexed(_t.id) <= folded().scalar_subquery())
        .order_by(_t.timestamp)
        .limit(1)
    )
    return written_out(
        select(
            folded().scalar_subquery().label("folded"),
            select(func.max(_t.id)).scalar_subquery().label("newest"),
            value_of("raw_from").label("raw_from"),
            first.label("first_bucket"),
            kept.order_by(ROLLUPS.c.start).scalar_subquery().label("first_kept"),
            quarters.order_by(ROLLUPS.c.start.desc()).scalar_subquery().label("last_bucket"),
            # without roll-ups no row is folded, and each would be looked at
            case((first.is_not(None), cast(oldest.scalar_subquery(), BigInteger))).label(
                "oldest_row"
            ),
        )
    )


def lag() -> Select[*tuple[Any, ...]]:
    """How many ids lie above the watermark; NULL where there is no row.

    Never below 0: retention may have taken the row of the greatest id.
    """
    newest, oldest = (select(which(_t.id)).scalar_subquery() for which in (func.max, func.min))
    watermark = value_of("folded")
    above = newest - case((watermark >= oldest, watermark), else_=oldest - 1)
    return select(case((watermark > newest, literal(0, BigInteger)), else_=above))


@cache
def folded() -> Select[*tuple[Any, ...]]:
    """The watermark, without a hold on it."""
    return select(func.coalesce(value_of("folded"), literal(NOTHING, BigInteger)))


def quarter(start: int, folded: int) -> dict[str, int]:
    """What a statement on one quarter's rows up to the watermark takes."""
    return {"quarter_since": start, "quarter_until": start + QUARTER_MS, "folded": folded}


@cache
def counts_of_quarter() -> Select[*tuple[Any, ...]]:
    """How many rows of one `quarter` the roll-ups know, and how many of these are there.

    Equal, unless rows were changed or removed. ``changed`` is how many entries say so, and
    ``deleted`` the greatest instant of a row that was deleted.
    """
    known, there = counts_in("quarter")
    entries = CHANGES.c.start == whole_number("quarter_since")
    changed = select(func.count()).select_from(CHANGES).where(entries).scalar_subquery()
    deleted = select(func.max(CHANGES.c.newest)).where(entries).scalar_subquery()
    return select(
        known.label("known"),
        there.label("there"),
        changed.label("changed"),
        deleted.label("deleted"),
    )


def counts_in(name: str) -> tuple[ScalarSelect[int], ScalarSelect[int]]:
    """As `counts_of_quarter`, of the one from ``{name}_since`` to ``{name}_until``."""
    requests = cast(func.coalesce(func.sum(ROLLUPS.c.requests), 0), BigInteger)
    known = select(requests).where(
        ROLLUPS.c.span_ms == QUARTER_MS, ROLLUPS.c.start == whole_number(f"{name}_since")
    )
    there = select(func.count()).select_from(TELEMETRY).where(*folded_in(name))
    return known.scalar_subquery(), there.scalar_subquery()


def folded_in(name: str) -> tuple[ColumnElement[bool], ...]:
    """Whether a row was folded and its instant lies from ``{name}_since`` to ``{name}_until``."""
    return (
        _t.timestamp >= whole_number(f"{name}_since"),
        _t.timestamp < whole_number(f"{name}_until"),
        unindexed(_t.id) <= whole_number("folded"),
    )
