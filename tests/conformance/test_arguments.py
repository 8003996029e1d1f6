"""Arguments at the ends of what there is, and beyond: the same on every backend."""

from datetime import UTC, datetime, timedelta, timezone

import pendulum
import pytest

from lynkr_store import BadArgument, Cursor, RoutingFilter, Window
from tests.support.values import AT, OwnDuration

M = 2**63 - 1
EAST, WEST = (timezone(timedelta(hours=hours)) for hours in (14, -14))
ENDS = [
    *(None, -M, datetime.min.replace(tzinfo=EAST), datetime.min.replace(tzinfo=UTC)),
    *("0001-01-01T00:00+14:00", AT, AT + 0.0, datetime.max.replace(tzinfo=UTC)),
    *(datetime.max.replace(tzinfo=WEST), "9999-12-31T23:59:59.999999-14:00", M),
]


def test_windows_may_end_anywhere(open_store):
    store = open_store(clock=lambda: AT)
    store.record(provider="p", timestamp=AT)
    assert store.flush(30)
    store.maintain()
    for low, since in enumerate(ENDS):
        for high, until in enumerate(ENDS):
            window = Window(since=since, until=until)
            there = low <= ENDS.index(AT) + 1 and (high > ENDS.index(AT) + 1 or until is None)
            assert len(store.query(window=window)) == there, window
            for stats in (store.get_stats(window), store.get_provider_stats("p", window)):
                assert (stats is not None) == there, window
            assert (store.get_routing_accuracy(window) is not None) == there, window


def test_ages_and_limits_may_be_the_greatest(open_store):
    store = open_store()
    store.record(provider="p")
    assert store.flush(30)
    assert store.cleanup(timedelta.max) == 0
    assert store.cleanup(pendulum.duration(days=1)) == 0
    assert store.cleanup(OwnDuration(days=1)) == 0
    assert len(store.query(limit=M)) == 1
    assert len(list(store.iter_records(page_rows=M))) == 1
    assert store.flush(1e300) is store.flush(float("inf")) is True
    assert store.maintain(budget_s=float("inf")).rollup_lag == 0
    for timestamp in (M, float(AT) * 2, 4.5e18 + 0.5):
        assert len(store.query(before=Cursor(timestamp=timestamp, id=M))) == 1
    assert store.query(before=Cursor(timestamp=-M, id=-M)) == []


BAD_ARGUMENTS = [
    (lambda s: s.query(limit=2**63), "limit"),
    (lambda s: list(s.iter_records(page_rows=10**30)), "page_rows"),
    (lambda s: s.query(RoutingFilter(min_latency_ms=10**400)), "min_latency_ms"),
    (lambda s: s.query(RoutingFilter(status_code=2**63)), "status_code"),
    (lambda s: s.query(window=Window(since=2**63)), "since"),
    (lambda s: s.query(before=Cursor(timestamp=2**63, id=1)), "timestamp"),
    (lambda s: s.query(before=Cursor(timestamp=1, id=2**63)), "id"),
    (lambda s: s.query(before=Cursor(timestamp="abc", id=1)), "timestamp"),
    (lambda s: s.query(before=Cursor.parse(f"1:{2**63}")), "cursor"),
    (lambda s: s.cleanup("30d"), "older_than"),
    (lambda s: s.flush("5"), "timeout_s"),
    (lambda s: s.flush(timedelta(seconds=5)), "timeout_s"),
    (lambda s: s.flush(None), "timeout_s"),
    (lambda s: s.close("5"), "timeout_s"),
    (lambda s: s.close(-1), "timeout_s"),
    (lambda s: s.maintain(budget_s="5"), "budget_s"),
    (lambda s: s.maintain(budget_s=10**400), "budget_s"),
    (lambda s: s.maintain(budget_s=None), "budget_s"),
]


def test_arguments_at_and_beyond_the_ends_are_named(open_store):
    store = open_store()
    for call, name in BAD_ARGUMENTS:
        with pytest.raises(ValueError, match=name):
            call(store)
    assert store.query() == [], "nor is it closed"


def test_the_cursor_of_an_odd_row_pages_in_its_own_file_and_is_refused_by_postgresql(open_store):
    store = open_store()
    store.query()
    odd = Cursor.model_construct(timestamp="odd", id=1)  # as a row of an SQLite file has it
    if open_store.backend.startswith("sqlite"):
        store.record(provider="p", timestamp=AT)
        assert store.flush(30)
        assert len(store.query(before=odd)) == 1
    else:
        with pytest.raises(BadArgument, match=r"before: .*SQLite"):
            store.query(before=odd)
