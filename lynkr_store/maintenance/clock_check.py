"""Whether the clock may be trusted with a deletion by age: the database's own past has its say.

A clock that is a year ahead makes every row a year older, and one run of retention would delete
them all. So retention waits while the present is far ahead of all that the database has seen: its
newest row, the newest batch that a store wrote, and the last retention that went ahead. Clocks that
are behind do no harm: they delete less.
"""

from typing import Any, Final, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Select, select, type_coerce

from lynkr_store.db.models import LEDGER, TELEMETRY
from lynkr_store.schemas.units import DAY_MS, HOUR_MS, INSTANT_MIN_MS

TRUSTED: Final = "trusted_clock_ms"
"""The name, among the values of the progress, of the present that retention trusted last."""

AHEAD_MS: Final = 35 * DAY_MS
"""How far ahead the present may be, in milliseconds: a month and some days, so that a machine that
was off for a month, or is maintained once a month, is not kept waiting. A wrong clock that is no
further ahead deletes that much too early; the next usual mistake is two months."""

_SETTLED_MS: Final = DAY_MS
"""Age in milliseconds from which on rows and batches speak for a present that the last retention
speaks against: younger ones may have been stamped by the clock that is in doubt. A day is enough
for a system to set its clock, or for a person to read the warning."""

_NOTE_EVERY_MS: Final = HOUR_MS  # fine enough for a limit of weeks, and an idle disk stays idle


class Seen(NamedTuple):
    """The newest instants that the database has seen, in epoch milliseconds.

    Attributes:
        row: Of a row, as it was stored; None without rows.
        batch: When a store wrote a batch, by its own clock; None without batches. Rows may name
            other times: imported ones do.
    """

    row: float | None
    batch: float | None


def newest(upto_ms: int) -> Select[*tuple[Any, ...]]:
    """One row with the values of a `Seen`, up to an instant: the ends of two indexes."""
    return select(
        _newest(TELEMETRY.c.timestamp, upto_ms).label("row"),
        _newest(LEDGER.c.committed_at, upto_ms).label("batch"),
    )


def _newest(column: ColumnElement[Any], upto_ms: int) -> ColumnElement[Any]:
    stored = type_coerce(column, BigInteger)
    within = select(stored).where(stored >= INSTANT_MIN_MS, stored <= upto_ms)
    return within.order_by(column.desc()).limit(1).scalar_subquery()


def seen_upto(now_ms: int, trusted_ms: int | None) -> int:
    """Up to which instant what the database has seen may speak for the present.

    What lies in the future never does: its own clock was wrong, or this one is behind.

    Args:
        now_ms: The present.
        trusted_ms: The present that retention trusted last; None where it never did.
    """
    return now_ms - _SETTLED_MS if _is_past(trusted_ms, now_ms) else now_ms


def doubt(now_ms: int, trusted_ms: int | None, seen: Seen) -> str | None:
    """Why retention should wait, and what to do about it; None where it may go ahead.

    Where nothing is known, nothing speaks against the present.

    Args:
        now_ms: The present.
        trusted_ms: The present that retention trusted last. One that lies in the future says
            nothing: the clock was set back since.
        seen: What the database has seen, up to `seen_upto`.
    """
    known = [at for at in (trusted_ms, *seen) if _is_past(at, now_ms)]
    ahead_ms = int(min((now_ms - at for at in known if at is not None), default=0))
    if ahead_ms <= AHEAD_MS:
        return None
    return (
        f"the clock is {ahead_ms // DAY_MS:,} days ahead of the newest row and of the last "
        "retention, and may be wrong, so nothing was deleted by its age; set the clock, or, where "
        "it is right, insist with trust_clock=True (on the command line: --trust-clock)"
    )


def is_news(now_ms: int, trusted_ms: int | None) -> bool:
    """Whether a present that is trusted must be noted: once an hour, and when it was set back."""
    return trusted_ms is None or not 0 <= now_ms - trusted_ms < _NOTE_EVERY_MS


def _is_past(at_ms: float | None, now_ms: int) -> bool:
    return at_ms is not None and at_ms <= now_ms
