"""A window as whole spans of time and what is left over at its ends. Knows no SQL.

Roll-ups are kept by quarter of an hour, so that the days of every time zone are whole ones, and by
hour and day, so that a long window is few of them.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from lynkr_store.domains import INSTANT_MAX_MS, INSTANT_MIN_MS

QUARTER_MS: Final = 900_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
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

    Attributes:
        buckets: Always as many, some of them empty.
        rows: Those at the ragged ends, and those outside the roll-ups' domain: four of them.
        ends: The quarters in which a ragged end lies, and whose rows must all be there: two of
            them, either empty.
    """

    buckets: tuple[Buckets, ...]
    rows: tuple[Rows, ...]
    ends: tuple[tuple[int, int], ...]


_NO_ROWS: Final = Rows(1, 0, 0)
_NO_END: Final = (0, 0)


def floor_to(span_ms: int, ms: int) -> int:
    """The start of the span in which an instant lies."""
    return ms - ms % span_ms


def ceil_to(span_ms: int, ms: int) -> int:
    """The first start of a span from an instant on."""
    return ms + -ms % span_ms


def cover(since: int, until: int, now: int, raw_from: int | None = None) -> Cover:
    """Make up the window ``[since, until)`` of roll-ups and as few rows as can be.

    A ragged end is the rows from its quarter's boundary to the window's, or the whole quarter
    without the others, whichever is shorter or lies in the future, where there are hardly any.

    Args:
        since: The window's first millisecond.
        until: The first one after it.
        now: The present.
        raw_from: Before this instant rows were removed. A window that begins later in the same
            quarter is made up of the rows that are left.
    """
    before = Rows(1, since, max(since, min(until, INSTANT_MIN_MS)))
    after = Rows(1, min(until, max(since, INSTANT_MAX_MS)), until)
    since, until = max(since, INSTANT_MIN_MS), min(until, INSTANT_MAX_MS)
    left = right = _NO_ROWS
    first_end = last_end = _NO_END
    first, last = ceil_to(QUARTER_MS, since), floor_to(QUARTER_MS, until)
    only_rows = raw_from is not None and first - QUARTER_MS < raw_from <= since
    if since >= until:
        first = last = 0
    elif first > last:
        left, first_end = Rows(1, since, until), _NO_END if only_rows else (last, first)
        last = first
    else:
        if since < first:
            before_since = since - (first - QUARTER_MS)
            left, first_end = Rows(1, since, first), (first - QUARTER_MS, first)
            if only_rows:
                first_end = _NO_END
            elif before_since < first - since:
                left, first = Rows(-1, since - before_since, since), since - before_since
        if until > last:
            last_end = (last, last + QUARTER_MS)
            right = Rows(1, last, until)
            if last_end[1] - until < until - last or until > now:
                right, last = Rows(-1, until, last_end[1]), last_end[1]
    return Cover(tuple(_whole(first, last)), (before, left, right, after), (first_end, last_end))


def _whole(since: int, until: int) -> Iterator[Buckets]:
    """Whole quarters as few buckets: the longest in the middle, shorter ones on either side."""
    for span, longer in pairwise(SPANS_MS):
        first = min(ceil_to(longer, since), until)
        last = max(floor_to(longer, until), first)
        yield Buckets(span, since, first)
        yield Buckets(span, last, until)
        since, until = first, last
    yield Buckets(SPANS_MS[-1], since, until)
