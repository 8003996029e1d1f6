"""Splits a window into whole buckets of time and the partial edges at its ends. Knows no SQL.

Roll-ups exist for each quarter of an hour, so that a day in any time zone consists of whole
buckets, and for each hour and day, so that a long window needs few buckets.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from lynkr_store.schemas.units import DAY_MS, HOUR_MS, INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS

BUCKET_LENGTHS_MS: Final = (QUARTER_MS, HOUR_MS, DAY_MS)
"""Each is a multiple of the one before. The domain of timestamps begins and ends on whole
buckets."""


class BucketRange(NamedTuple):
    """The buckets of one length that start in ``[since, until)``."""

    span_ms: int
    since: int
    until: int


class RowRange(NamedTuple):
    """Rows with a timestamp in ``[since, until)``, to be added (``sign`` 1) or subtracted (-1)."""

    sign: int
    since: int
    until: int


class WindowParts(NamedTuple):
    """The parts that make up a window, for rows that are folded. No part is empty.

    Attributes:
        buckets: Whole buckets, five ranges at most.
        rows: Raw rows at the partial edges, and rows outside the roll-ups' domain; four ranges at
            most.
        edges: The quarters that contain a partial edge, two at most. All their rows must exist.
    """

    buckets: tuple[BucketRange, ...]
    rows: tuple[RowRange, ...]
    edges: tuple[tuple[int, int], ...]


def floor_to(span_ms: int, ms: int) -> int:
    """The start of the bucket that contains an instant."""
    return ms - ms % span_ms


def ceil_to(span_ms: int, ms: int) -> int:
    """The first start of a bucket at or after an instant."""
    return ms + -ms % span_ms


def split_window(
    since: int, until: int, now: int, raw_from: int | None = None, *, edges_from_rows: bool = False
) -> WindowParts:
    """Split the window ``[since, until)`` into buckets and as few raw rows as possible.

    A partial edge is either the rows between the quarter's boundary and the window's end, or the
    whole quarter minus the other rows. The shorter range is chosen; a range in the future counts as
    short, because hardly any rows are there.

    Args:
        since: The window's first millisecond.
        until: The first millisecond after the window.
        now: The present.
        raw_from: Rows before this instant were removed. If the window begins later in the same
            quarter, its edge consists of the remaining rows.
        edges_from_rows: Build the edges from their own rows, however many there are, because the
            roll-ups of their quarters differ from the rows.
    """
    rows = [
        RowRange(1, since, min(until, INSTANT_MIN_MS)),
        RowRange(1, max(since, INSTANT_MAX_MS), until),
    ]
    edges = []
    since, until = max(since, INSTANT_MIN_MS), min(until, INSTANT_MAX_MS)
    first, last = ceil_to(QUARTER_MS, since), floor_to(QUARTER_MS, until)
    only_rows = raw_from is not None and first - QUARTER_MS < raw_from <= since
    if first > last:  # the window contains no boundary; it may be empty
        rows.append(RowRange(1, since, until))
        if since < until and not only_rows:
            edges.append((last, first))
    else:
        if since < first:
            before_since = since - (first - QUARTER_MS)
            left = RowRange(1, since, first)
            if not only_rows:
                edges.append((first - QUARTER_MS, first))
                if before_since < first - since and not edges_from_rows:
                    left, first = RowRange(-1, since - before_since, since), since - before_since
            rows.append(left)
        if until > last:
            end = last + QUARTER_MS
            edges.append((last, end))
            right = RowRange(1, last, until)
            if (end - until < until - last or until > now) and not edges_from_rows:
                right, last = RowRange(-1, until, end), end
            rows.append(right)
    not_empty = (each for each in rows if each.since < each.until)
    return WindowParts(tuple(_fewest_buckets(first, last)), tuple(not_empty), tuple(edges))


def _fewest_buckets(since: int, until: int) -> Iterator[BucketRange]:
    """Cover whole quarters with few buckets: the longest in the middle, shorter ones around it."""
    for span, longer in pairwise(BUCKET_LENGTHS_MS):
        first, last = ceil_to(longer, since), floor_to(longer, until)
        if first >= last:
            break
        if since < first:
            yield BucketRange(span, since, first)
        if last < until:
            yield BucketRange(span, last, until)
        since, until = first, last
    else:
        span = BUCKET_LENGTHS_MS[-1]
    if since < until:
        yield BucketRange(span, since, until)
