"""Decides whether retention may trust the clock, by what the database has seen so far.

If the clock is a year ahead, every row seems a year older, and one run of retention would delete
them all. So retention waits while the present is far ahead of everything in the database: its
newest row, the newest batch that a store wrote, and the last retention that ran. A clock that is
behind does no harm, because it deletes less.
"""

from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Select, select, type_coerce

from lynkr_store.db.models import LEDGER, TELEMETRY
from lynkr_store.schemas.units import DAY_MS, HOUR_MS, INSTANT_MIN_MS

TRUSTED: Final = "trusted_clock_ms"
"""The name, in the table of progress, of the present that retention trusted last."""

AHEAD_MS: Final = 35 * DAY_MS
"""How far ahead the present may be, in milliseconds: a month and some days, so that retention does
not wait on a machine that was off for a month or is maintained once a month. A wrong clock within
this limit deletes rows that much too early; the next usual error is two months."""

_SETTLED_MS: Final = DAY_MS
"""Minimum age, in milliseconds, of rows and batches that count as evidence for a present that the
last retention contradicts: the doubtful clock may have stamped younger ones. A day is enough for a
system to correct its clock, or for a person to read the warning."""

_SAVE_EVERY_MS: Final = HOUR_MS  # fine enough for a limit of weeks, without busying an idle disk


class Seen(NamedTuple):
    """The newest instants in the database, in epoch milliseconds.

    Attributes:
        row: The newest row's stored timestamp; None without rows.
        batch: When a store wrote the newest batch, by that store's clock; None without batches. Its
            rows may have other timestamps, such as imported ones.
    """

    row: float | None
    batch: float | None


def newest(upto_ms: int) -> Select[*tuple[Any, ...]]:
    """One row with the values of a `Seen`, up to an instant; reads the ends of two indexes."""
    return select(
        _newest(TELEMETRY.c.timestamp, upto_ms).label("row"),
        _newest(LEDGER.c.committed_at, upto_ms).label("batch"),
    )


def _newest(column: ColumnElement[Any], upto_ms: int) -> ColumnElement[Any]:
    stored = type_coerce(column, BigInteger)
    within = select(stored).where(stored >= INSTANT_MIN_MS, stored <= upto_ms)
    return within.order_by(column.desc()).limit(1).scalar_subquery()


def seen_upto(now_ms: int, trusted_ms: int | None) -> int:
    """The instant up to which rows and batches count as evidence for the present.

    Later ones never count: either the clock that stamped them was wrong, or this clock is behind.

    Args:
        now_ms: The present.
        trusted_ms: The present that retention trusted last; None if it never did.
    """
    return now_ms - _SETTLED_MS if _is_past(trusted_ms, now_ms) else now_ms


def doubt(now_ms: int, trusted_ms: int | None, seen: Seen) -> str | None:
    """The reason why retention should wait, with the remedy; None if it may proceed.

    Without any evidence the present is trusted.

    Args:
        now_ms: The present.
        trusted_ms: The present that retention trusted last. A value in the future is ignored,
            because the clock was set back since.
        seen: The newest instants in the database, up to `seen_upto`.
    """
    known = [at for at in (trusted_ms, *seen) if _is_past(at, now_ms)]
    ahead_ms = int(min((now_ms - at for at in known if at is not None), default=0))
    if ahead_ms <= AHEAD_MS:
        return None
    return (
        f"the clock is {ahead_ms // DAY_MS:,} days ahead of the newest row and of the last "
        "retention, and may be wrong, so nothing was deleted by its age; set the clock, or, if it "
        "is right, insist with trust_clock=True (on the command line: --trust-clock)"
    )


def must_save(now_ms: int, trusted_ms: int | None) -> bool:
    """Whether a trusted present must be saved: once an hour, and after the clock was set back."""
    return trusted_ms is None or not 0 <= now_ms - trusted_ms < _SAVE_EVERY_MS


def _is_past(at_ms: float | None, now_ms: int) -> bool:
    return at_ms is not None and at_ms <= now_ms
