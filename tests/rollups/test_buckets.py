"""A window, made up of whole spans and what is left at its ends."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lynkr_store.rollups.buckets import BUCKET_LENGTHS_MS, floor_to, split_window
from lynkr_store.schemas.units import DAY_MS, HOUR_MS, INSTANT_MAX_MS, INSTANT_MIN_MS, QUARTER_MS

NOW = 1_750_000_000_000
EDGES = [
    0,
    -(2**62),
    2**62,
    INSTANT_MIN_MS - 1,
    INSTANT_MIN_MS,
    INSTANT_MAX_MS - 1,
    INSTANT_MAX_MS,
    INSTANT_MAX_MS + 10,
    floor_to(DAY_MS, NOW),
    floor_to(HOUR_MS, NOW),
    floor_to(QUARTER_MS, NOW),
    floor_to(QUARTER_MS, NOW) - 1,
    floor_to(QUARTER_MS, NOW) + 1,
    NOW,
]
INSTANTS = st.one_of(
    st.sampled_from(EDGES),
    st.integers(NOW - 3 * DAY_MS, NOW + DAY_MS),
    st.integers(NOW - 2 * QUARTER_MS, NOW + 2 * QUARTER_MS),
)


def times_counted(parts, instant):
    """How often a row at an instant counts."""
    if not INSTANT_MIN_MS <= instant < INSTANT_MAX_MS:
        rolled = 0
    else:
        rolled = sum(
            bucket.since <= floor_to(bucket.span_ms, instant) < bucket.until
            for bucket in parts.buckets
        )
    return rolled + sum(some.sign for some in parts.rows if some.since <= instant < some.until)


@given(since=INSTANTS, until=INSTANTS, instant=INSTANTS)
@example(since=NOW, until=NOW, instant=NOW)
@example(since=0, until=2**62, instant=NOW)
@example(since=floor_to(QUARTER_MS, NOW), until=floor_to(QUARTER_MS, NOW) + 1, instant=NOW)
def test_an_instant_counts_once_inside_the_window_and_never_outside(since, until, instant):
    parts = split_window(since, until, NOW)
    near = (instant, since, since - 1, until - 1, until, floor_to(QUARTER_MS, since))
    for at in near:
        assert times_counted(parts, at) == (since <= at < until), at


@given(since=INSTANTS, until=INSTANTS, raw_from=INSTANTS, instant=INSTANTS)
@example(since=NOW, until=NOW + 1, raw_from=NOW, instant=NOW)
@example(since=NOW, until=NOW + DAY_MS, raw_from=NOW - 1, instant=NOW)
def test_of_rows_that_are_left_each_counts_once(since, until, raw_from, instant):
    parts = split_window(since, until, NOW, raw_from)
    for at in (instant, since, until, raw_from, raw_from + 1, floor_to(QUARTER_MS, since)):
        if at >= raw_from:
            assert times_counted(parts, at) == (since <= at < until), at


@given(since=st.integers(NOW, NOW + QUARTER_MS), length=st.integers(0, DAY_MS))
def test_rows_that_are_gone_are_not_missed_where_the_window_begins_after_them(since, length):
    parts = split_window(
        since, since + length, NOW, max(floor_to(QUARTER_MS, since) + 1, since - 60_000)
    )
    assert all(start >= since for start, _ in parts.edges)


@given(since=INSTANTS, until=INSTANTS)
@example(since=-(2**62), until=2**62)
@example(since=INSTANT_MIN_MS - 1, until=INSTANT_MAX_MS + 10)
def test_a_cover_has_few_parts_and_none_is_empty(since, until):
    parts = split_window(since, until, NOW)
    assert all(bucket.since < bucket.until for bucket in parts.buckets)
    assert all(some.since < some.until for some in parts.rows)
    assert all(start < end for start, end in parts.edges)
    assert all(number <= most for number, most in zip(map(len, parts), (5, 4, 2), strict=True))


@pytest.mark.parametrize(
    ("hours", "spans"),
    [(1, [HOUR_MS]), (24, [HOUR_MS]), (46, [HOUR_MS]), (47, [HOUR_MS, DAY_MS])],
)
def test_hours_are_one_range_unless_a_whole_day_lies_between(hours, spans):
    since = floor_to(DAY_MS, NOW) + HOUR_MS
    parts = split_window(since, since + hours * HOUR_MS, NOW + 3 * DAY_MS)
    assert [bucket.span_ms for bucket in parts.buckets] == spans


@given(since=st.integers(NOW - DAY_MS, NOW), length=st.integers(QUARTER_MS, DAY_MS))
def test_half_a_quarter_of_rows_is_read_at_an_end_at_most(since, length):
    for end in split_window(since, since + length, since + 2 * DAY_MS).rows:
        assert end.until - end.since <= QUARTER_MS // 2


def test_no_row_is_read_up_to_the_present_where_none_is_later():
    parts = split_window(floor_to(QUARTER_MS, NOW), NOW + 1, NOW)
    assert parts.rows == ((-1, NOW + 1, floor_to(QUARTER_MS, NOW) + QUARTER_MS),)


@given(days=st.integers(3, 4000), since=st.integers(NOW, NOW + DAY_MS))
def test_a_long_window_is_as_many_buckets_as_it_has_days_and_a_few(days, since):
    parts = split_window(since, since + days * DAY_MS, NOW)
    number = sum((b.until - b.since) // b.span_ms for b in parts.buckets)
    assert number <= days + 2 * (24 + 4)


def test_the_days_of_every_time_zone_are_whole_quarters():
    assert DAY_MS % HOUR_MS == HOUR_MS % QUARTER_MS == 0
    assert INSTANT_MIN_MS % BUCKET_LENGTHS_MS[-1] == INSTANT_MAX_MS % BUCKET_LENGTHS_MS[-1] == 0
