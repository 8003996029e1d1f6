"""A window as whole spans of time and what is left over at its ends. Knows no SQL.

Roll-ups are kept by quarter of an hour, so that the days of every time zone are whole ones, and by
hour and day, so that a long window is few of them.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from lynkr_store.schemas.units import DAY_MS, HOUR_MS, INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS

SPANS_MS: Final = (QUARTER_MS, HOUR_MS, DAY_MS)
"""Each a multiple of the one before; instants in their domain begin and end on whole ones."""


class Buckets(NamedTuple):
    """The roll-ups of one length that start in ``[since, until)``."""

    span_ms: int
    since: int
    until: int


class Rows(NamedTuple):
    """Rows with an instant in ``[since, until)``, to be added (``sign`` 1) or taken away (-1)."""

    sign: int
    since: int
    until: int


class Cover(NamedTuple):
    """What together makes up a window, of the rows that are rolled up.

    None of its parts is empty.

    Attributes:
        buckets: Five of them at most.
        rows: Those at the ragged ends, and those outside the roll-ups' domain: four at most.
        ends: The quarters in which a ragged end lies, and whose rows must all be there: two at
            most.
    """

    buckets: tuple[Buckets, ...]
    rows: tuple[Rows, ...]
    ends: tuple[tuple[int, int], ...]


def floor_to(span_ms: int, ms: int) -> int:
    """The start of the span in which an instant lies."""
    return ms - ms % span_ms


def ceil_to(span_ms: int, ms: int) -> int:
    """The first start of a span from an instant on."""
    return ms + -ms % span_ms


def cover(
    since: int, until: int, now: int, raw_from: int | None = None, *, ends_by_rows: bool = False
) -> Cover:
    """Make up the window ``[since, until)`` of roll-ups and as few rows as can be.

    A ragged end is the rows from its quarter's boundary to the window's, or the whole quarter
    without the others, whichever is shorter or lies in the future, where there are hardly any.

    Args:
        since: The window's first millisecond.
        until: The first one after it.
        now: The present.
        raw_from: Before this instant rows were removed. A window that begins later in the same
            quarter is made up of the rows that are left.
        ends_by_rows: Make up the ragged ends of their own rows, however many there are: their
            quarters' roll-ups are not those of the rows.
    """
    rows = [
        Rows(1, since, min(until, INSTANT_MIN_MS)),
        Rows(1, max(since, INSTANT_MAX_MS), until),
    ]
    ends = []
    since, until = max(since, INSTANT_MIN_MS), min(until, INSTANT_MAX_MS)
    first, last = ceil_to(QUARTER_MS, since), floor_to(QUARTER_MS, until)
    only_rows = raw_from is not None and first - QUARTER_MS < raw_from <= since
    if first > last:  # no boundary lies in the window, which may be empty
        rows.append(Rows(1, since, until))
        if since < until and not only_rows:
            ends.append((last, first))
    else:
        if since < first:
            before_since = since - (first - QUARTER_MS)
            left = Rows(1, since, first)
            if not only_rows:
                ends.append((first - QUARTER_MS, first))
                if before_since < first - since and not ends_by_rows:
                    left, first = Rows(-1, since - before_since, since), since - before_since
            rows.append(left)
        if until > last:
            end = last + QUARTER_MS
            ends.append((last, end))
            right = Rows(1, last, until)
            if (end - until < until - last or until > now) and not ends_by_rows:
                right, last = Rows(-1, until, end), end
            rows.append(right)
    there = (some for some in rows if some.since < some.until)
    return Cover(tuple(_whole(first, last)), tuple(there), tuple(ends))


def _whole(since: int, until: int) -> Iterator[Buckets]:
    """Whole quarters as few buckets: the longest in the middle, shorter ones on either side."""
    for span, longer in pairwise(SPANS_MS):
        first, last = ceil_to(longer, since), floor_to(longer, until)
        if first >= last:
            break
        if since < first:
            yield Buckets(span, since, first)
        if last < until:
            yield Buckets(span, last, until)
        since, until = first, last
    else:
        span = SPANS_MS[-1]
    if since < until:
        yield Buckets(span, since, until)
